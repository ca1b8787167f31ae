"""What scoring costs: full forward passes, as the paper's public code does, against the exact sweep and acceleration.

    python -m benchmarks.scoring iteration                      one iteration
    python -m benchmarks.scoring search [removals] [seed ...]   greedy, exact and lazy+race

Each prints Markdown, for SmolLM2 in float32 and 8 rows of 128 tokens. The model must be in data/models/smollm2 (`dvc
repro fetch@smollm2`).
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional
from transformers import PreTrainedModel

from benchmarks.flops import Flops
from blockpruner.core.blocks import DENSE, Mask, all_blocks, format_mask, removable_units
from blockpruner.core.families import Config
from blockpruner.inputs.calibration import CalibrationSet, draw, pack_rows
from blockpruner.inputs.texts import read_texts
from blockpruner.inputs.tokenizers import load_tokenizer
from blockpruner.model import accelerator
from blockpruner.model.models import load_model, masked
from blockpruner.scoring.accelerate import accelerate
from blockpruner.scoring.engine import Engine
from blockpruner.scoring.objectives import Objective
from blockpruner.scoring.settings import Score
from blockpruner.scoring.work import LOGITS_BYTES, Rows, ScoredRows, Span, Task
from blockpruner.search.greedy import PricedOptions, greedy
from blockpruner.search.problem import Problem
from blockpruner.store.provenance import machine, versions
from blockpruner.store.trials import Origin, TrialStore

ROWS, LENGTH = 8, 128
SMOLLM2, TEXT = Path("data/models/smollm2"), Path("data/sources/smollm2/calibration.parquet")


def calibration_rows(seed: int) -> CalibrationSet:
    """The first 8 rows of 128 tokens of 20 samples drawn with `seed`."""
    samples = draw(read_texts(TEXT), 20, "all", seed)
    return CalibrationSet(pack_rows(samples, load_tokenizer(SMOLLM2), LENGTH, "joined").rows[:ROWS])


@torch.inference_mode()
def full_forward(model: PreTrainedModel, mask: Mask, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Row losses by one forward pass with the logits of all tokens, [B], and those logits, [B, T, V]."""
    with masked(model, mask):
        logits = model(input_ids=ids, use_cache=False).logits
    targets = ids[:, 1:]
    losses = functional.cross_entropy(logits[:, :-1].flatten(0, 1), targets.flatten(), reduction="none")
    return losses.view(targets.shape).mean(dim=1), logits


@torch.inference_mode()
def matrix_rate(model: PreTrainedModel, tokens: int) -> float:
    """FLOP/s of the matrix products of one forward pass alone, each layer's own weights in turn; median of 5."""
    head = model.get_output_embeddings()
    chunk = max(1, LOGITS_BYTES // (4 * head.weight.shape[0]))
    linears = [(m, tokens) for m in model.modules() if isinstance(m, torch.nn.Linear) and m is not head]
    linears += [(head, min(chunk, tokens - start)) for start in range(0, tokens, chunk)]
    sizes = {(m.in_features, n) for m, n in linears}
    inputs = {(width, n): torch.randn(n, width, dtype=head.weight.dtype, device=model.device) for width, n in sizes}
    seconds = []
    accelerator.synchronize(model.device)
    for _ in range(5):
        started = time.perf_counter()
        for linear, n in linears:
            linear(inputs[linear.in_features, n])
        accelerator.synchronize(model.device)
        seconds.append(time.perf_counter() - started)
    return sum(2 * n * m.weight.numel() for m, n in linears) / statistics.median(seconds)


def iteration() -> dict[str, Any]:
    """The first iteration of a greedy search: dense and every block removed; naive and exact take turns."""
    model, rows = load_model(SMOLLM2, "float32"), calibration_rows(42)
    ids, depth = torch.tensor(rows.rows, device=model.device), model.config.num_hidden_layers
    masks = [DENSE, *(frozenset({block}) for block in all_blocks(depth))]
    engine, flops = Engine(model, ROWS * LENGTH), Flops.of(model.config.to_dict(), ROWS, LENGTH)
    seconds = dict.fromkeys(("naive", "exact", "race"), 0.0)

    def timed(name: str, work: Callable[[], Any]) -> Any:
        started = time.perf_counter()
        result = work()
        accelerator.synchronize(model.device)
        seconds[name] += time.perf_counter() - started
        return result

    full_forward(model, DENSE, ids)
    walk = engine.run([Task(range(ROWS), tuple(masks))], rows.rows)
    worst = 0.0
    for done in range(len(masks)):
        unit: ScoredRows = timed("exact", lambda: next(walk))
        _, logits = timed("naive", lambda unit=unit: full_forward(model, unit.mask, ids))
        reference = logits[:, :-1].double().log_softmax(-1).gather(-1, ids[:, 1:, None])[..., 0].mean(dim=1).neg()
        del logits
        worst = max(worst, (reference.cpu() - torch.tensor(unit.loss, dtype=torch.float64)).abs().max().item())
        if done % 10 == 0:
            print(f"  {done + 1}/{len(masks)} masks", file=sys.stderr, flush=True)
    race = Counted(engine, model.config.to_dict())
    select = accelerate(Objective(rows, TrialStore({}, rows.row_keys), race), Score(acceleration="race"))
    timed("race", lambda: select(0, DENSE, masks))
    counted = {"naive": flops.naive(masks), "exact": flops.exact(masks), "race": race.flops}
    return {"masks": len(masks), "flops": counted, "seconds": seconds, "worst": worst, **setting()}


class Counted:
    """A scorer that counts the FLOPs of its tasks."""

    def __init__(self, scorer: Engine, config: Config) -> None:
        self._scorer = scorer
        self._config = config
        self.flops = 0

    def of(self, rows: int) -> Flops:
        return Flops.of(self._config, rows, LENGTH)

    def row_batches(self, rows: Rows, span: Span) -> list[Span]:
        return self._scorer.row_batches(rows, span)

    def run(self, tasks: Sequence[Task], rows: Rows) -> Iterator[ScoredRows]:
        self.flops += sum(self.of(len(task.span)).exact(task.masks) for task in tasks)
        yield from self._scorer.run(tasks, rows)

    def origin(self) -> Origin:
        return self._scorer.origin()

    def close(self) -> None:
        self._scorer.close()


def setting() -> dict[str, Any]:
    return {"machine": machine(), "threads": torch.get_num_threads(), "versions": versions(("torch", "transformers"))}


def show_iteration(found: dict[str, Any]) -> None:
    print(f"\nSmolLM2-135M: {found['masks']} masks, {ROWS} rows of {LENGTH} tokens, float32")
    print("\n| | TFLOP | seconds |\n|---|---:|---:|")
    for name, seconds in found["seconds"].items():
        print(f"| {name} | {found['flops'][name] / 1e12:.2f} | {seconds:.1f} |")
    print(f"\nlargest difference of a row's NLL {found['worst']:.1e}")


def search(removals: int, seeds: Sequence[int]) -> dict[str, Any]:
    """Greedy removals on SmolLM2, exact and lazy+race, each over trials of its own."""
    model, fast = load_model(SMOLLM2, "float32"), Score(acceleration="lazy+race")
    units = removable_units(model.config.num_hidden_layers, "block", "all")
    found: dict[str, Any] = {"removals": removals, "exact": {}, "lazy+race": {}}
    for seed in seeds:
        rows = calibration_rows(seed)
        for mode in ("exact", "lazy+race"):
            scorer = Counted(Engine(model, ROWS * LENGTH), model.config.to_dict())
            objective = Objective(rows, TrialStore({}, rows.row_keys), scorer)
            records = found[mode][str(seed)] = []
            chosen = Score() if mode == "exact" else fast
            for step in greedy(Problem(units, objective, accelerate(objective, chosen), ROWS), PricedOptions()):
                added = step.added[step.chosen]
                assert added is not None
                removed = step.removed - added
                entered = [removed | unit for unit in units if not unit <= removed] + ([] if removed else [DENSE])
                records.append({
                    "added": format_mask(added), "nll": step.scores[step.chosen].loss, "flops": scorer.flops,
                    "naive_flops": scorer.of(ROWS).naive(entered), "seconds": objective.counts.seconds,
                })  # fmt: skip
                print(
                    f"  seed {seed}, {mode}, {step.index + 1}/{removals}: {format_mask(added)}",
                    file=sys.stderr,
                    flush=True,
                )
                scorer.flops, objective.counts.seconds = 0, 0.0
                if step.index + 1 == removals:
                    break
    return found | setting()


def show_search(found: dict[str, Any]) -> None:
    print(f"\nSmolLM2-135M, {found['removals']} removals, {ROWS} rows of {LENGTH} tokens")
    print("\n| seed | | removed, in order | NLL | against exact | FLOPs, of naive | s |")
    print("|---:|---|---|---:|---:|---:|---:|")
    for seed in found["exact"]:
        exact = found["exact"][seed]
        for mode in ("exact", "lazy+race"):
            records = found[mode][seed]
            picks = [
                r["added"] if r["added"] == e["added"] else f"**{r['added']}**"
                for r, e in zip(records, exact, strict=False)
            ]
            share = sum(r["flops"] for r in records) / sum(r["naive_flops"] for r in records)
            seconds = sum(r["seconds"] for r in records)
            print(
                f"| {seed} | {mode} | {' '.join(picks)} | {records[-1]['nll']:.5f} | "
                f"{records[-1]['nll'] / exact[-1]['nll'] - 1:+.3%} | 1/{1 / share:.2f} | {seconds:.0f} |"
            )


def main(arguments: Sequence[str]) -> int:
    command, *rest = arguments or ["help"]
    if command == "iteration":
        found = iteration()
        show_iteration(found)
    elif command == "search":
        found = search(int(rest[0]) if rest else 16, [int(seed) for seed in rest[1:]] or [42, 43, 44])
        show_search(found)
    else:
        print(__doc__)
        return 2
    print(f"\n{found['machine']}, {found['threads']} threads, torch {found['versions']['torch']}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
