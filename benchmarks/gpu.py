"""Table 7 of the paper on a CUDA device: the time of BlockPruner's whole search on Llama2-7B and 13B shapes.

    python -m benchmarks.gpu [llama2-7b | llama2-13b | tiny] [device] [removals] [rows] [row length]

Weights are random, in bfloat16: the cost of the exact search does not depend on their values. By default there are 15
rows of 2,048 tokens (about the paper's 256 Alpaca samples) and 17 or 24 removals (the paper's 952 and 1,644
evaluations). Prints the card, its row of the table with the paper's, and the share of a matrix product's rate.
"""

from __future__ import annotations

import csv
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from benchmarks.shapes import MODELS, random_model, random_rows
from blockpruner.core.blocks import DENSE, Mask, all_blocks
from blockpruner.core.budgets import resources_of
from blockpruner.core.families import Config
from blockpruner.core.progress import ConsoleObserver
from blockpruner.core.settings import Score
from blockpruner.inputs.calibration import CalibrationSet
from blockpruner.model import accelerator
from blockpruner.model.models import resolve_device
from blockpruner.paper.flops import Flops
from blockpruner.scoring.engine import Engine
from blockpruner.search.registry import request
from blockpruner.search.run import search
from blockpruner.store.provenance import machine, versions
from blockpruner.store.trials import TrialStore

PAPER = Path(__file__).parents[1] / "data" / "paper" / "table7_pruning_time.csv"
REMOVALS = {"llama2-7b": 17, "llama2-13b": 24, "tiny": 3}


def paper_minutes(shape: str) -> str:
    name = shape.replace("llama2-", "Llama2-").replace("b", "B")
    with open(PAPER) as handle:
        rows = [row for row in csv.DictReader(handle) if row["model"] == name and row["method"] == "blockpruner"]
    return rows[0]["minutes"] if rows else "–"


@torch.inference_mode()
def matrix_rate(device: torch.device, tokens: int, width: int) -> float:
    """FLOP/s of one bfloat16 product [tokens, width] x [width, width]; best of 20."""
    left, right = (torch.randn(n, width, device=device, dtype=torch.bfloat16) for n in (tokens, width))
    best = 0.0
    for _ in range(20):
        started = time.perf_counter()
        left @ right
        accelerator.synchronize(device)
        best = max(best, 2 * tokens * width * width / (time.perf_counter() - started))
    return best


def main(shape: str, place: str, removals: int, rows: int, length: int) -> int:
    device = resolve_device(place)
    model = random_model(shape, torch.bfloat16, str(device))
    config = model.config
    data = CalibrationSet(tuple(map(tuple, random_rows(config.vocab_size, rows, length))))
    asked, budget = request(Score()), f"{removals}blocks"
    stores = {name: TrialStore({}, data.row_keys) for name in asked.losses}
    resources = resources_of(config.to_dict())
    rate = matrix_rate(device, min(rows * length, 16384), config.hidden_size)
    started = time.perf_counter()
    trace = search(asked, data, stores, Engine(model), resources, [budget], ConsoleObserver()).of(budget)
    seconds = time.perf_counter() - started
    flops, naive, evaluations = spent(config.to_dict(), [step.removed for step in trace], rows, length)
    card = machine() if device.type == "cpu" else accelerator.name(device)
    print("\n| model | evaluations | minutes | the paper's, two RTX 4090 | PFLOP | TFLOP/s | of one product's rate |")
    print("|---|---:|---:|---:|---:|---:|---:|")
    print(
        f"| {shape}, random weights, bfloat16 | {evaluations} | {seconds / 60:.1f} | {paper_minutes(shape)} | "
        f"{flops / 1e15:.2f} | {flops / seconds / 1e12:.1f} | {flops / seconds / rate:.0%} |"
    )
    peak = "" if device.type == "cpu" else f"; peak {accelerator.peak(device) / 2**30:.1f} GiB"
    print(
        f"\n{card}, torch {versions(('torch',))['torch']}; {rows} rows of {length} tokens; full forward passes would "
        f"take {naive / flops:.2f}x the FLOPs{peak}"
    )
    return 0


def spent(config: Config, prefixes: Sequence[Mask], rows: int, length: int) -> tuple[int, int, int]:
    """FLOPs of the sweep, of a full forward pass for each candidate, and how many candidates there were."""
    flops, layers = Flops.of(config, rows, length), int(config["num_hidden_layers"])
    exact = naive = evaluations = 0
    for base in (DENSE, *prefixes[:-1]):
        masks = [base | {block} for block in all_blocks(layers) if block not in base]
        exact, naive, evaluations = exact + flops.exact(masks), naive + flops.naive(masks), evaluations + len(masks)
    return exact, naive, evaluations


if __name__ == "__main__":
    given = sys.argv[1:]
    if given and given[0] not in MODELS:
        sys.exit(f"shape {given[0]!r} is unknown; valid: {', '.join(MODELS)}")
    shape = given[0] if given else "llama2-7b"
    if len(given) < 2 and not accelerator.count():
        sys.exit("no CUDA device was seen; name another device to run there: python -m benchmarks.gpu tiny cpu")
    numbers = [int(n) for n in given[2:]] + [REMOVALS[shape], 15, 2048][len(given[2:]) :]
    sys.exit(main(shape, given[1] if len(given) > 1 else "cuda", *numbers))
