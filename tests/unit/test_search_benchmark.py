"""The benchmark of searches without a model: the table against the model, and scores against brute force."""

import json
from functools import partial
from itertools import combinations
from math import comb
from pathlib import Path
from typing import Any

import pytest

from benchmarks import searches as bench
from blockpruner.core.blocks import DENSE, parse_mask
from blockpruner.core.families import count_parameters
from blockpruner.core.progress import SilentObserver
from blockpruner.inputs.calibration import CalibrationSet
from blockpruner.model.models import masked
from blockpruner.scoring.engine import Engine
from blockpruner.scoring.objectives import Objective
from blockpruner.store.trials import TrialStore, store_fields
from tests.tiny import full_nll, tiny_model

COUNT = 6


@pytest.fixture(scope="module")
def model():
    return tiny_model("llama", layers=4)


@pytest.fixture(scope="module")
def rows():
    return CalibrationSet(tuple((n + 1, 2 * n, 7, n, 30 - n) for n in range(6)))


def objective(model, rows):
    store = TrialStore(store_fields(rows.digest, "tiny", "float32", "perplexity"), rows.row_keys)
    return Objective(rows, store, Engine(model))


@pytest.fixture(scope="module")
def table(model, rows, tmp_path_factory):
    costs = count_parameters(model.config.to_dict())
    found, sizes = bench.known(objective(model, rows), costs, COUNT, SilentObserver())
    path = tmp_path_factory.mktemp("table") / "tiny.parquet"
    bench.write(path, found, sizes)
    return bench.Table.read(path)


def test_the_table_holds_all_singles_pairs_and_subsets(table, model, rows):
    assert len(table.subsets) == 2**COUNT
    units = [parse_mask(f"{kind}.{layer}") for kind in ("mha", "mlp") for layer in range(4)]
    assert all(a | b in table.losses for a, b in combinations(units, 2))
    for mask in (DENSE, table.blocks[0] | table.blocks[3], DENSE.union(*table.blocks)):
        with masked(model, mask):
            assert table.losses[mask] == pytest.approx([full_nll(model, row) for row in rows.rows], abs=1e-5)


@pytest.mark.parametrize("name", ["beam", "genetic", "floating"])
def test_a_search_asks_the_table_and_the_model_for_the_same_masks(name, table, model, rows):
    size = sum(sorted(table.sizes.values())[:3])
    options = {"generations": 4, "initial": 4, "children": 4, "share": 1} if name == "genetic" else {}
    task = bench.Task(table, size, range(len(rows.rows)), 10_000, 0)
    ask, seen = objective(model, rows), []

    def noted(masks, *given, **more):
        seen.extend(masks)
        return ask(masks, *given, **more)

    answer = bench.of_product(name, options, task, noted)
    assert bench.of_product(name, options, task) == answer
    assert list(task.asked) == list(dict.fromkeys(seen))


def test_excess_is_over_the_best_mask_of_the_size(table):
    for task in bench.tasks(table, 40):
        task.size = table.size(table.blocks[0] | table.blocks[1])
        fitting = [mask for mask in table.subsets if table.size(mask) == task.size]
        best = min(fitting, key=task.true)
        assert [task.fits(blocks) for blocks in ([], task.blocks[:1], task.blocks)] == [True, True, False]
        assert task.excess(lambda task, best=best: best) == (0.0, 0.0)
        worst = max(fitting, key=task.true)
        assert task.excess(lambda task, worst=worst: worst)[0] == task.true(worst) - task.true(best)
        with pytest.raises(ValueError, match="is asked"):
            task.excess(lambda task: table.blocks[0])


def test_no_search_has_more_trials_than_a_task_gives(table):
    for search in (bench.greedy, bench.chance, partial(bench.of_product, "beam", {})):
        for task in bench.tasks(table, 9):
            task.size = table.size(table.blocks[0] | table.blocks[1])
            task.excess(search)
            assert len(task.asked) <= 9


def test_a_search_of_ones_own_file_is_scored(table, tmp_path, monkeypatch, capsys):
    share = table.size(table.blocks[0] | table.blocks[1]) / sum(table.sizes.values())
    monkeypatch.setattr(bench, "SHARES", (share,))
    (tmp_path / "mine.py").write_text("def mine(task):\n    return list(task.blocks[:2])\n")
    monkeypatch.setattr(bench, "OURS", {})
    monkeypatch.setattr(bench.Table, "read", lambda path: table)
    monkeypatch.setattr(bench.sys, "argv", ["", "table", f"{tmp_path / 'mine.py'}:mine"])
    bench.main()
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line["trials"] for line in lines] == list(bench.TRIALS)
    assert all(line["over_best"] >= 1 and line["used"] == 0 for line in lines)


def test_the_search_of_the_docs_answers_every_task_of_the_published_table():
    root = Path(bench.__file__).parent.parent
    table = bench.Table.read(root / "data/evidence/searches.parquet")
    assert len(table.subsets) == 2**bench.BLOCKS
    assert len(table.losses) == 1 + 60 + 1770 + sum(comb(bench.BLOCKS, count) for count in range(3, bench.BLOCKS + 1))
    code = (root / "docs/searches.md").read_text().split("```python")[1].split("```")[0]
    exec(code, own := dict[str, Any]())
    for task in bench.tasks(table, 200):
        assert task.excess(own["search"])[0] >= 0
