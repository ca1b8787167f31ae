"""The losses of a model without single blocks, pairs of blocks, and all subsets of some blocks, in
one Parquet file.

    python -m benchmarks.masks MODEL TEXTS TABLE    computes the file (hours; a kill loses nothing)

The file has a line for each mask, with the loss of each row of tokens.
data/evidence/searches.parquet is such a file.
"""

import argparse
import json
from collections.abc import Callable, Mapping, Sequence
from itertools import combinations
from pathlib import Path

import pyarrow as pa

from blockpruner.core.blocks import DENSE, Mask, format_mask
from blockpruner.core.families import Costs, count_parameters
from blockpruner.core.progress import Observer, observer
from blockpruner.core.settings import LocalModel, Runtime
from blockpruner.inputs.calibration import draw_rows
from blockpruner.inputs.settings import Calibration
from blockpruner.inputs.texts import read_texts
from blockpruner.inputs.tokenizers import load_tokenizer
from blockpruner.methods.score import open_material
from blockpruner.scoring.objectives import MaskScore, Objective
from blockpruner.store.files import write_table
from blockpruner.store.trials import TrialStore, store_fields

SCHEMA = pa.schema(
    [pa.field("mask", pa.string(), nullable=False), pa.field("nll", pa.list_(pa.float32()))]
)
"""The blocks that are gone, and the mean NLL of each row, nats per token."""

BLOCKS = 12
"""How many blocks are combined in all ways: those whose single removal costs least for what they
take."""

ROWS, LENGTH = 15, 80
CHUNK = 512


def make(model: Path, texts: Path, table: Path) -> None:
    """Compute the table, which is written when it is whole; the trials beside it are kept."""
    seen, source = observer(), {"source": "path", "path": str(model)}
    wanted = Calibration(
        data={**source, "path": str(texts)}, split="all", num_rows=ROWS, seq_len=LENGTH
    )
    rows = draw_rows(read_texts(texts), load_tokenizer(model), wanted, (), seen.note)
    own, trials = (
        LocalModel(source="path", path=str(model), dtype="bfloat16"),
        table.with_suffix(".trials"),
    )
    with open_material(model, own, Runtime(), trials, seen) as material:
        fields = store_fields(rows.digest, material.identity, "bfloat16", "perplexity")
        store = TrialStore(fields, rows.row_keys, trials)
        ask = Objective(rows, store, material.scorer, seen)
        costs = count_parameters(material.config)
        found, sizes = known(ask, costs, BLOCKS, seen)
        about = {
            "model": material.identity,
            "rows": rows.digest,
            "origin": json.dumps(dict(ask.origin)),
        }
        write(table, found, sizes, **about)
        store.close()


def known(
    ask: Callable[..., list[MaskScore]], costs: Costs, count: int, seen: Observer
) -> tuple[dict[Mask, tuple[float, ...]], dict[str, int]]:
    """The row losses of all single blocks, all pairs, and all subsets of those `count` blocks whose
    removal alone costs least for what they take; and what each of these takes, in units of the
    smallest one."""
    singles = [Mask({block}) for block in costs.blocks]
    dense, *alone = ask([DENSE, *singles])
    found = {score.mask: score.row_loss for score in (dense, *alone)}
    rises = {score.mask: score.rise_over(dense) / costs.ratio(score.mask) for score in alone}
    blocks = sorted(singles, key=rises.__getitem__)[:count]
    masks = [one | other for one, other in combinations(singles, 2)]
    masks += [
        DENSE.union(*chosen)
        for size in range(3, count + 1)
        for chosen in combinations(blocks, size)
    ]
    masks.sort(key=lambda mask: sorted((block.layer, block.kind) for block in mask))
    for start in range(0, len(masks), CHUNK):
        seen.begin(f"masks from {start} of {len(masks)}", start / len(masks))
        found |= {score.mask: score.row_loss for score in ask(masks[start : start + CHUNK])}
        seen.end(f"{len(found)} masks")
    smallest = min(costs.blocks.values())
    return found, {
        format_mask(mask): round(sum(costs.blocks[block] for block in mask) / smallest)
        for mask in blocks
    }


def write(
    path: Path, found: Mapping[Mask, Sequence[float]], sizes: Mapping[str, int], **about: str
) -> None:
    table = pa.table(
        {"mask": [format_mask(mask) for mask in found], "nll": list(found.values())}, SCHEMA
    )
    write_table(path, table, {**about, "sizes": json.dumps(sizes)})


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.masks", description=(__doc__ or "").splitlines()[0]
    )
    for name in ("model", "texts", "table"):
        parser.add_argument(name, type=Path)
    make(**vars(parser.parse_args()))
