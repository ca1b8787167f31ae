"""Draws the masks of question 8, all of one size: `python -m benchmarks.masks MODEL TEXTS SIZE COUNT SEARCHES...`.

SEARCHES are folders of traces of greedy searches (data/experiments/*/<search>): each is continued past what is too
large until the size is met. COUNT more are random, with a preference for blocks that cost little alone which is
drawn anew for each; of ten times as many, those stay whose loss is spread most evenly over the range. The lines that
are printed belong under an experiment's `methods`.
"""

import argparse
import json
import math
import random
import tempfile
from collections.abc import Sequence
from pathlib import Path

from blockpruner.core.blocks import DENSE, BlockKind, Mask, format_mask
from blockpruner.core.families import Costs, count_parameters
from blockpruner.core.progress import observer
from blockpruner.core.settings import LocalModel, Runtime
from blockpruner.inputs.calibration import draw_rows
from blockpruner.inputs.settings import Calibration
from blockpruner.inputs.texts import read_texts
from blockpruner.inputs.tokenizers import load_tokenizer
from blockpruner.methods.score import open_material
from blockpruner.scoring.objectives import Objective
from blockpruner.search.iteration import removals
from blockpruner.search.trace import Current, read_trace, trace_directory
from blockpruner.store.trials import TrialStore, store_fields

NEAR = 0.003
"""How far from the size masks may be."""

STRENGTHS = (0.0, 8.0)
"""Preference for cheap blocks: a weight of exp(-strength * rise in nats)."""


def line(name: str, mask: Mask) -> str:
    """As a method of an experiment that removes all at once."""
    return f'      {name}: {{method: given, options: {{order: ["{format_mask(mask)}"]}}}}'


def filled(order: Sequence[Mask], size: float, costs: Costs) -> Mask | None:
    """The removals of a sequence that fit, until a size is met; None if it is not."""
    mask = DENSE
    for step in order:
        if costs.ratio(mask | step) <= size + NEAR:
            mask |= step
        if costs.ratio(mask) >= size - NEAR:
            return mask
    return None


def drawn(rises: dict[Mask, float], size: float, costs: Costs, chance: random.Random) -> Mask:
    """A random mask of a size."""
    while True:
        strength = chance.uniform(*STRENGTHS)
        order = sorted(rises, key=lambda unit: chance.expovariate(math.exp(-strength * max(0.0, rises[unit]))))
        mask = filled(order, size, costs)
        if mask is not None and any(block.kind is BlockKind.MLP for block in mask):
            return mask


def spread(scored: Sequence[tuple[float, Mask]], count: int) -> list[Mask]:
    """Masks whose losses are as even as can be over the range of all."""
    low, high = min(scored)[0], max(scored)[0]
    left, found = list(scored), list[Mask]()
    for step in range(count):
        wanted = low + (high - low) * (step + 0.5) / count
        found.append(min(left, key=lambda each: abs(each[0] - wanted))[1])
        left = [each for each in left if each[1] not in found]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.masks", description=(__doc__ or "").splitlines()[0])
    for name in ("model", "texts"):
        parser.add_argument(name, type=Path)
    parser.add_argument("size", type=float, help="share of all parameters")
    parser.add_argument("count", type=int)
    parser.add_argument("searches", type=Path, nargs="*")
    given = parser.parse_args()
    costs = count_parameters(json.loads((given.model / "config.json").read_text()))
    found = dict[Mask, None]()
    for folder in given.searches:
        current = Current.load(folder)
        order, _ = removals(read_trace(trace_directory(folder, current, ""), current.search), True)
        if mask := filled(order, given.size, costs):
            found.setdefault(mask)
    print(*(line(f"searched {number}", mask) for number, mask in enumerate(found, 1)), sep="\n")
    source = {"source": "path", "path": str(given.texts)}
    wanted = Calibration(data=source, split="all", num_samples=12, packing="per_sample", seq_len=256)
    rows = draw_rows(read_texts(given.texts), load_tokenizer(given.model), wanted, (), print)
    model = LocalModel(source="path", path=str(given.model), dtype="bfloat16")
    with (
        tempfile.TemporaryDirectory() as folder,
        open_material(given.model, model, Runtime(), Path(folder), observer()) as material,
    ):
        fields = store_fields(rows.digest, material.identity, "bfloat16", "perplexity")
        ask, chance = Objective(rows, TrialStore(fields, rows.row_keys), material.scorer, observer()), random.Random(0)
        dense, *alone = ask([DENSE, *(Mask({block}) for block in costs.blocks)])
        rises = {score.mask: score.rise_over(dense) for score in alone}
        masks = dict.fromkeys(drawn(rises, given.size, costs, chance) for _ in range(10 * given.count))
        scored = [(score.loss, score.mask) for score in ask([mask for mask in masks if mask not in found])]
    for number, mask in enumerate(spread(scored, given.count), 1):
        loss = next(loss for loss, each in scored if each == mask)
        print(f"{line(f'random {number}', mask)}  # {math.exp(loss - dense.loss):.1f} × dense")


if __name__ == "__main__":
    main()
