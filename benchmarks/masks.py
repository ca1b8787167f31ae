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
    watcher = observer()
    source = {"source": "path", "path": str(texts)}
    settings = Calibration(data=source, split="all", num_rows=ROWS, seq_len=LENGTH)
    rows = draw_rows(read_texts(texts), load_tokenizer(model), settings, (), watcher.note)
    local_model = LocalModel(source="path", path=str(model), dtype="bfloat16")
    trials = table.with_suffix(".trials")
    with open_material(model, local_model, Runtime(), trials, watcher) as material:
        fields = store_fields(rows.digest, material.identity, "bfloat16", "perplexity")
        store = TrialStore(fields, rows.row_keys, trials)
        objective = Objective(rows, store, material.scorer, watcher)
        costs = count_parameters(material.config)
        losses, sizes = row_losses(objective, costs, BLOCKS, watcher)
        metadata = {
            "model": material.identity,
            "rows": rows.digest,
            "origin": json.dumps(dict(objective.origin)),
        }
        write(table, losses, sizes, **metadata)
        store.close()


def row_losses(
    objective: Callable[..., list[MaskScore]], costs: Costs, count: int, watcher: Observer
) -> tuple[dict[Mask, tuple[float, ...]], dict[str, int]]:
    """The row losses of all single blocks, all pairs, and all subsets of the `count` blocks whose
    removal alone costs least for their size; and the sizes of these blocks, in units of the
    smallest one."""
    singles = [Mask({block}) for block in costs.blocks]
    dense, *single_scores = objective([DENSE, *singles])
    losses = {dense.mask: dense.row_loss}
    rise_by_size = {}
    for score in single_scores:
        losses[score.mask] = score.row_loss
        rise_by_size[score.mask] = score.rise_over(dense) / costs.ratio(score.mask)
    cheapest = sorted(singles, key=rise_by_size.__getitem__)[:count]
    masks = [DENSE.union(*pair) for pair in combinations(singles, 2)]
    for size in range(3, count + 1):
        masks += [DENSE.union(*subset) for subset in combinations(cheapest, size)]
    # Neighbours in this order share the beginning of their forward passes.
    masks.sort(key=lambda mask: sorted((block.layer, block.kind) for block in mask))
    for start in range(0, len(masks), CHUNK):
        watcher.begin(f"masks from {start} of {len(masks)}", start / len(masks))
        for score in objective(masks[start : start + CHUNK]):
            losses[score.mask] = score.row_loss
        watcher.end(f"{len(losses)} masks")
    smallest = min(costs.blocks.values())
    sizes = {}
    for mask in cheapest:
        (block,) = mask
        sizes[format_mask(mask)] = round(costs.blocks[block] / smallest)
    return losses, sizes


def write(
    path: Path, losses: Mapping[Mask, Sequence[float]], sizes: Mapping[str, int], **metadata: str
) -> None:
    columns = {"mask": [format_mask(mask) for mask in losses], "nll": list(losses.values())}
    write_table(path, pa.table(columns, SCHEMA), {**metadata, "sizes": json.dumps(sizes)})


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.masks", description=(__doc__ or "").splitlines()[0]
    )
    for name in ("model", "texts", "table"):
        parser.add_argument(name, type=Path)
    make(**vars(parser.parse_args()))
