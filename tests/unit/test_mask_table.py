"""The table of masks: its losses are the model's, and the published one holds every mask that it
names."""

from itertools import combinations
from math import comb
from pathlib import Path

import pytest

from benchmarks import masks as bench
from blockpruner.core.blocks import DENSE, parse_mask
from blockpruner.core.families import count_parameters
from blockpruner.core.progress import SilentObserver
from blockpruner.inputs.calibration import CalibrationSet
from blockpruner.model.models import masked
from blockpruner.scoring.engine import Engine
from blockpruner.scoring.objectives import Objective
from blockpruner.store.files import read_table
from blockpruner.store.trials import TrialStore, store_fields
from tests.tiny import full_nll, tiny_model

COUNT = 6


def losses_of(path):
    table, _ = read_table(path, bench.SCHEMA)
    return dict(
        zip(map(parse_mask, table["mask"].to_pylist()), table["nll"].to_pylist(), strict=True)
    )


def test_the_table_holds_all_singles_pairs_and_subsets(tmp_path):
    model = tiny_model("llama", layers=4)
    rows = CalibrationSet(tuple((n + 1, 2 * n, 7, n, 30 - n) for n in range(6)))
    store = TrialStore(store_fields(rows.digest, "tiny", "float32", "perplexity"), rows.row_keys)
    objective = Objective(rows, store, Engine(model))
    result, sizes = bench.row_losses(
        objective, count_parameters(model.config.to_dict()), COUNT, SilentObserver()
    )
    bench.write(tmp_path / "tiny.parquet", result, sizes)
    losses = losses_of(tmp_path / "tiny.parquet")
    blocks = [parse_mask(block) for block in sizes]
    assert len([mask for mask in losses if mask <= DENSE.union(*blocks)]) == 2**COUNT
    units = [parse_mask(f"{kind}.{layer}") for kind in ("mha", "mlp") for layer in range(4)]
    assert all(a | b in losses for a, b in combinations(units, 2))
    for mask in (DENSE, blocks[0] | blocks[3], DENSE.union(*blocks)):
        with masked(model, mask):
            assert losses[mask] == pytest.approx(
                [full_nll(model, row) for row in rows.rows], abs=1e-5
            )


def test_the_published_table_is_whole():
    losses = losses_of(Path(bench.__file__).parent.parent / "data/evidence/searches.parquet")
    subsets = sum(comb(bench.BLOCKS, count) for count in range(3, bench.BLOCKS + 1))
    assert len(losses) == 1 + 60 + comb(60, 2) + subsets
