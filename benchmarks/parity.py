"""The engine against full forward passes of the masked model, on SmolLM2: per-row NLL and the removal sequence.

    python -m benchmarks.parity [data/models/smollm2 data/sources/smollm2] [removals] [rows] [row length]

The oracle runs transformers' own forward pass, once for each mask, with full logits, as the public code of
arXiv 2406.10594 does. Writes nothing; prints a Markdown table, which docs/quality.md sums up. Needs
`dvc repro fetch@smollm2`.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import PreTrainedModel

from blockpruner.core.blocks import DENSE, Mask, all_blocks
from blockpruner.inputs.calibration import CalibrationSet, draw, pack_rows
from blockpruner.inputs.texts import read_texts
from blockpruner.inputs.tokenizers import load_tokenizer
from blockpruner.model.models import load_model, masked
from blockpruner.scoring.engine import Engine
from blockpruner.scoring.work import Task
from blockpruner.store.provenance import machine, versions


@torch.inference_mode()
def oracle(model: PreTrainedModel, mask: Mask, rows: Sequence[Sequence[int]]) -> list[float]:
    """Mean NLL of each row from one full forward pass with whole logits.

    The softmax is in float64: the comparison is about the engine, not about the rounding of a sum over the vocabulary.
    """
    ids = torch.tensor([list(row) for row in rows], device=model.device)
    with masked(model, mask):
        logits = model(input_ids=ids, use_cache=False).logits[:, :-1].double()
    return logits.log_softmax(-1).gather(-1, ids[:, 1:, None])[..., 0].mean(dim=1).neg().tolist()


def main(checkpoint: Path, sources: Path, removals: int, rows: int, length: int) -> int:
    model, tokenizer = load_model(checkpoint, "float32"), load_tokenizer(checkpoint)
    samples = draw(read_texts(sources / "calibration.parquet"), 20, "all", 42)
    data = CalibrationSet(pack_rows(samples, tokenizer, length, "joined").rows[:rows])
    engine = Engine(model)
    chosen: dict[str, list[str]] = {"engine": [], "oracle": []}
    seconds = {"engine": 0.0, "oracle": 0.0}
    removed = {"engine": DENSE, "oracle": DENSE}
    worst = 0.0
    print(f"{versions()['torch']=} {machine()}; {rows} rows of {length} tokens, float32", flush=True)
    print("| removal | engine | oracle | largest difference of a row's NLL |\n|---:|---|---|---:|", flush=True)
    for step in range(1, removals + 1):
        found: dict[str, dict[object, list[float]]] = {"engine": {}, "oracle": {}}
        for name in ("engine", "oracle"):
            masks = [removed[name] | {b} for b in all_blocks(engine.layers) if b not in removed[name]]
            started = time.perf_counter()
            if name == "engine":
                tasks = [Task(span, tuple(masks)) for span in engine.row_batches(data.rows, range(len(data.rows)))]
                for unit in engine.run(tasks, data.rows):
                    found[name].setdefault(unit.mask, []).extend(unit.loss)
            else:
                for mask in masks:
                    found[name][mask] = oracle(model, mask, data.rows)
            seconds[name] += time.perf_counter() - started
            best = min(masks, key=lambda mask: sum(found[name][mask]))
            chosen[name].append(str(next(iter(best - removed[name]))))
            removed[name] = best
        step_worst = max(
            abs(a - b) for mask in found["oracle"] for a, b in zip(found["engine"].get(mask, [float("inf")]),
                                                                   found["oracle"][mask], strict=True)
        )  # fmt: skip
        worst = max(worst, step_worst)
        print(f"| {step} | {chosen['engine'][-1]} | {chosen['oracle'][-1]} | {step_worst:.1e} |", flush=True)
    same = chosen["engine"] == chosen["oracle"]
    print(
        f"\nsame sequence: {same}; largest difference {worst:.1e}; engine {seconds['engine']:.0f} s, full forward "
        f"passes {seconds['oracle']:.0f} s, ratio {seconds['oracle'] / seconds['engine']:.2f}"
    )
    return 0 if same and worst <= 1e-5 else 1


if __name__ == "__main__":
    given = sys.argv[1:]
    paths = [Path(p) for p in given[:2]] or [Path("data/models/smollm2"), Path("data/sources/smollm2")]
    numbers = [int(n) for n in given[2:]] + [8, 2, 64][len(given[2:]) :]
    sys.exit(main(*paths, *numbers))
