"""What scoring costs: full forward passes, as the paper's public code does, against the exact sweep and acceleration.

    python -m benchmarks.scoring iteration [smollm2 | llama2-7b] [layers]   one iteration, 8 rows of 128 tokens, float32
    python -m benchmarks.scoring search [removals] [seed ...]               greedy on SmolLM2, exact and lazy+race
    python -m benchmarks.scoring growth                                     cost against layers, rows, vocabulary
    python -m benchmarks.scoring workers [n ...]                            Ray workers of one thread each
    python -m benchmarks.scoring small [layers]                             few short rows: several masks at once or one
    python -m benchmarks.scoring losses                                     a loss of many logits, in pieces or whole
    python -m benchmarks.scoring streaming [layers] [shape]                 layers from disk: read ahead, or not

Each prints Markdown and keeps its figures in data/benchmarks/ for `python -m benchmarks.plots`. `search` goes on where
it was stopped. SmolLM2 must be in data/models/smollm2 (`dvc repro fetch@smollm2`).
"""

from __future__ import annotations

import inspect
import json
import multiprocessing
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional
from transformers import PreTrainedModel

from benchmarks.flops import Flops
from benchmarks.shapes import random_model, random_rows
from blockpruner.core.blocks import DENSE, Mask, all_blocks, format_mask, removable_units
from blockpruner.core.families import Config
from blockpruner.core.settings import Runtime, Score
from blockpruner.inputs.calibration import CalibrationSet, draw, pack_rows
from blockpruner.inputs.checkpoints import checkpoint_identity
from blockpruner.inputs.texts import read_texts
from blockpruner.inputs.tokenizers import load_tokenizer
from blockpruner.model import accelerator
from blockpruner.model.allocator import keep_freed_memory
from blockpruner.model.models import load_model, masked
from blockpruner.scoring.accelerate import accelerate, settings_of
from blockpruner.scoring.engine import Engine
from blockpruner.scoring.large.streaming import StreamingEngine
from blockpruner.scoring.losses import token_nll
from blockpruner.scoring.objectives import Objective
from blockpruner.scoring.scorers import make_scorer
from blockpruner.scoring.work import LOGITS_BYTES, Rows, ScoredRows, Span, Task
from blockpruner.search.greedy import GreedyOptions, greedy
from blockpruner.search.problem import Problem
from blockpruner.store.files import write_json
from blockpruner.store.provenance import machine, versions
from blockpruner.store.trials import TrialStore, store_fields

ROWS, LENGTH = 8, 128
SMOLLM2, TEXT = Path("data/models/smollm2"), Path("data/sources/smollm2/calibration.parquet")
RESULTS = Path("data/benchmarks")
SMALL = {"hidden_size": 576, "intermediate_size": 1536, "num_attention_heads": 9, "num_key_value_heads": 3}


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


class Meter:
    """Measures seconds and peak resident memory of pieces of work that take turns in one process; a piece ends when the
    device is done with it."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self.seconds: dict[str, float] = {}
        self.peak: dict[str, int] = {}

    def __call__(self, name: str, work: Callable[[], Any]) -> Any:
        Path("/proc/self/clear_refs").write_text("5")  # resets the peak
        started = time.perf_counter()
        result = work()
        accelerator.synchronize(self._device)
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - started
        status = Path("/proc/self/status").read_text()
        peak = int(status.partition("VmHWM:")[2].split()[0]) * 1024
        self.peak[name] = max(self.peak.get(name, 0), peak)
        return result


def iteration(shape: str, layers: int | None) -> dict[str, Any]:
    """The first iteration of a greedy search: dense and every block removed; naive and exact take turns."""
    if shape == "smollm2":
        model, rows = load_model(SMOLLM2, "float32"), calibration_rows(42)
    else:
        changes = {} if layers is None else {"num_hidden_layers": layers}
        model = random_model(shape, torch.float32, **changes)
        rows = CalibrationSet(tuple(map(tuple, random_rows(model.config.vocab_size, ROWS, LENGTH))))
    ids, depth = torch.tensor(rows.rows, device=model.device), model.config.num_hidden_layers
    masks = [DENSE, *(frozenset({block}) for block in all_blocks(depth))]
    engine, flops = Engine(model, ROWS * LENGTH), Flops.of(model.config.to_dict(), ROWS, LENGTH)
    meter = Meter(model.device)
    rate = matrix_rate(model, ROWS * LENGTH)
    full_forward(model, DENSE, ids)
    walk = engine.run([Task(range(ROWS), tuple(masks))], rows.rows)
    worst = 0.0
    for done in range(len(masks)):
        unit: ScoredRows = meter("exact", lambda: next(walk))
        _, logits = meter("naive", lambda unit=unit: full_forward(model, unit.mask, ids))
        reference = logits[:, :-1].double().log_softmax(-1).gather(-1, ids[:, 1:, None])[..., 0].mean(dim=1).neg()
        del logits
        worst = max(worst, (reference.cpu() - torch.tensor(unit.loss, dtype=torch.float64)).abs().max().item())
        if done % 10 == 0:
            print(f"  {done + 1}/{len(masks)} masks", file=sys.stderr, flush=True)
    rate = (rate + matrix_rate(model, ROWS * LENGTH)) / 2
    race = Counted(engine, model.config.to_dict())
    objective = Objective(rows, TrialStore({}, rows.row_keys), race)
    select = accelerate(objective, Score(acceleration="race"))
    meter("race", lambda: select(0, DENSE, masks))
    counted = {"naive": flops.naive(masks), "exact": flops.exact(masks), "race": race.flops}
    return {
        "shape": shape if layers is None else f"{shape}, {layers} layers", "rows": ROWS, "length": LENGTH,
        "masks": len(masks), "flops": counted, "seconds": meter.seconds, "peak": meter.peak, "matrix_rate": rate,
        "worst": worst, "trials": {"naive": len(masks), "exact": len(masks), "race": objective.counts.trials_computed},
        "rows_scored": {"naive": len(masks) * ROWS, "exact": len(masks) * ROWS, "race": objective.counts.rows_computed},
        **setting(),
    }  # fmt: skip


class Counted:
    """A scorer that counts the FLOPs of its tasks."""

    def __init__(self, scorer: Engine, config: Config) -> None:
        self._scorer = scorer
        self._config = config
        self.flops = 0

    def limit_batches(self, rows: Rows, most: int | None) -> None:
        self._scorer.limit_batches(rows, most)

    def row_batches(self, rows: Rows, span: Span) -> list[Span]:
        return self._scorer.row_batches(rows, span)

    def run(self, tasks: Sequence[Task], rows: Rows) -> Iterator[ScoredRows]:
        for task in tasks:
            self.flops += Flops.of(self._config, len(task.span), len(rows[task.span[0]])).exact(task.masks)
        yield from self._scorer.run(tasks, rows)

    def placement(self) -> dict[str, str]:
        return self._scorer.placement()

    def close(self) -> None:
        self._scorer.close()


def setting() -> dict[str, Any]:
    return {"machine": machine(), "threads": torch.get_num_threads(), "versions": versions(("torch", "transformers"))}


def show_iteration(found: dict[str, Any]) -> None:
    flops, seconds = found["flops"], found["seconds"]
    bound = flops["naive"] / flops["exact"]
    ratio = seconds["naive"] / seconds["exact"]
    print(f"\n{found['shape']}: {found['masks']} masks, {found['rows']} rows of {found['length']} tokens, float32")
    print("\n| | TFLOP | seconds | GFLOP/s | of the matrix rate | trials on all rows | rows | peak memory, GiB |")
    print("|---|---:|---:|---:|---:|---:|---:|---:|")
    for name in ("naive", "exact", "race"):
        rate = flops[name] / seconds[name]
        print(
            f"| {name} | {flops[name] / 1e12:.2f} | {seconds[name]:.1f} | {rate / 1e9:.0f} | "
            f"{rate / found['matrix_rate']:.0%} | {found['trials'][name]} | {found['rows_scored'][name]} | "
            f"{found['peak'][name] / 2**30:.2f} |"
        )
    print(
        f"\nnaive / exact: {ratio:.3f}x in time, {bound:.3f}x in FLOPs: {ratio / bound:.1%} of the bound; the matrices "
        f"alone: {found['matrix_rate'] / 1e9:.0f} GFLOP/s; largest difference of a row's NLL {found['worst']:.1e}"
    )


def search(removals: int, seeds: Sequence[int]) -> dict[str, Any]:
    """Greedy removals on SmolLM2, exact and lazy+race, each over trials of its own; resumed from their stores."""
    path = RESULTS / "search.json"
    found: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    model, identity = load_model(SMOLLM2, "float32"), checkpoint_identity(SMOLLM2).before
    units = removable_units(model.config.num_hidden_layers, "block", "all")
    fast = Score(acceleration="lazy+race")
    settings = settings_of(fast)
    if found.get("settings") != settings or found["removals"] != removals:
        found = {}  # the trials stay; the record of how they were made begins anew
    found |= {"settings": settings, "removals": removals} | setting()
    for seed in seeds:
        rows = calibration_rows(seed)
        for mode in ("exact", "lazy+race"):
            flops = Flops.of(model.config.to_dict(), ROWS, LENGTH)
            engine = Engine(model, ROWS * LENGTH)
            fields = store_fields(rows.digest, identity, "float32", "perplexity")
            store = TrialStore(fields, rows.row_keys, RESULTS / "trials" / mode)
            objective = Objective(rows, store, engine)
            asked = Asked(objective, model.config.to_dict())
            chosen = Score() if mode == "exact" else fast
            records = found.setdefault(mode, {}).setdefault(str(seed), [])
            problem = Problem(units, asked, accelerate(asked, chosen), ROWS)  # type: ignore[arg-type]  # Asked stands in for an Objective
            for step in greedy(problem, GreedyOptions()):
                added = step.added[step.chosen]
                assert added is not None
                removed = step.removed - added
                entered = [removed | unit for unit in units if not unit <= removed] + ([] if removed else [DENSE])
                record = {
                    "added": format_mask(added), "nll": step.scores[step.chosen].loss, "flops": asked.flops,
                    "naive_flops": flops.naive(entered), "seconds": objective.counts.seconds,
                    "candidates": len(entered), "considered": len(step.scores),
                    "complete": sum(s.rows_used == ROWS for s in step.scores),
                    "rows": sum(s.rows_used for s in step.scores),
                    "audit": None if step.lazy_choice is None else format_mask(step.lazy_choice - removed),
                }  # fmt: skip
                if len(records) <= step.index:
                    records.append(record | {"whole": objective.counts.units_reused == 0})
                write_json(path, found)
                print(
                    f"  seed {seed}, {mode}, {step.index + 1}/{removals}: {record['added']}",
                    file=sys.stderr,
                    flush=True,
                )
                asked.flops, objective.counts.seconds, objective.counts.units_reused = 0, 0.0, 0
                if step.index + 1 == removals:
                    break
            store.close()
    return found


class Asked:
    """An objective that counts the FLOPs of what a search asks for the first time, even if the store knows it."""

    def __init__(self, objective: Objective, config: Any) -> None:
        self._objective, self._config = objective, config
        self._known: dict[Mask, int] = {}
        self.flops = 0

    @property
    def rows(self) -> int:
        return self._objective.rows

    def __call__(self, masks: Sequence[Mask], rows: int | None = None, base: Mask = DENSE) -> Any:
        stop = self.rows if rows is None else rows
        for start in range(stop):
            new = [mask for mask in dict.fromkeys(masks) if self._known.get(mask, 0) == start]
            if new:
                self.flops += Flops.of(self._config, 1, LENGTH).exact(new)
            self._known |= dict.fromkeys(new, start + 1)
        return self._objective(masks, rows)


def show_search(found: dict[str, Any]) -> None:
    print(f"\nSmolLM2-135M, {found['removals']} removals, {ROWS} rows of {LENGTH} tokens, {found['settings']}")
    print("\n| seed | | removed, in order | NLL | against exact | FLOPs, of naive | s | scored on all rows | audits |")
    print("|---:|---|---|---:|---:|---:|---:|---:|---|")
    for seed in found["exact"]:
        exact = found["exact"][seed]
        for mode in ("exact", "lazy+race"):
            records = found[mode][seed]
            picks = [
                r["added"] if r["added"] == e["added"] else f"**{r['added']}**"
                for r, e in zip(records, exact, strict=False)
            ]
            share = sum(r["flops"] for r in records) / sum(r["naive_flops"] for r in records)
            seconds = f"{sum(r['seconds'] for r in records):.0f}" if all(r["whole"] for r in records) else "–"
            audits = [r for r in records if r["audit"]]
            other = [f"{r['added']}, not {r['audit']}" for r in audits if r["audit"] != r["added"]]
            said = f"{len(audits)}, " + ("; ".join(other) if other else "all agree") if audits else "–"
            print(
                f"| {seed} | {mode} | {' '.join(picks)} | {records[-1]['nll']:.5f} | "
                f"{records[-1]['nll'] / exact[-1]['nll'] - 1:+.3%} | 1/{1 / share:.2f} | {seconds} | "
                f"{sum(r['complete'] for r in records)} of {sum(r['candidates'] for r in records)} | {said} |"
            )


def growth() -> dict[str, Any]:
    """Seconds and FLOPs of one exact iteration of small random models, one size changed at a time."""
    points = []
    base = {"num_hidden_layers": 8, "vocab_size": 16000}
    for size, values in (
        ("num_hidden_layers", (4, 8, 12, 16)),
        ("rows", (2, 4, 8, 16)),
        ("vocab_size", (4000, 16000, 64000)),
    ):
        for value in values:
            changes = base | ({size: value} if size != "rows" else {})
            rows = value if size == "rows" else 4
            model = random_model("tiny", torch.float32, **SMALL | changes)
            data = random_rows(changes["vocab_size"], rows, LENGTH)
            masks = [DENSE, *(frozenset({block}) for block in all_blocks(changes["num_hidden_layers"]))]
            engine = Engine(model)
            tasks = [Task(span, tuple(masks)) for span in engine.row_batches(data, range(rows))]
            seconds = []
            for _ in range(3):
                started = time.perf_counter()
                list(engine.run(tasks, data))
                seconds.append(time.perf_counter() - started)
            point = {"size": size, "value": value, "seconds": min(seconds),
                     "flops": Flops.of(model.config.to_dict(), rows, LENGTH).exact(masks)}  # fmt: skip
            points.append(point)
            print(f"  {point}", file=sys.stderr, flush=True)
    return {"points": points, **setting()}


def show_growth(found: dict[str, Any]) -> None:
    print("\n| size | value | GFLOP | seconds | GFLOP/s |\n|---|---:|---:|---:|---:|")
    for p in found["points"]:
        rate = p["flops"] / p["seconds"] / 1e9
        print(f"| {p['size']} | {p['value']} | {p['flops'] / 1e9:.0f} | {p['seconds']:.2f} | {rate:.0f} |")


def alone(folder: str, layers: int) -> float:
    """Seconds of an iteration of `workers` in a process of its own, without Ray; median of 3."""
    scorer = make_scorer(Path(folder), "float32", Runtime(threads=1, device="cpu"))
    masks = (DENSE, *(frozenset({block}) for block in all_blocks(layers)))
    data, seconds = random_rows(16000, ROWS, LENGTH), []
    for _ in range(4):
        started = time.perf_counter()
        list(scorer.run([Task(span, masks) for span in scorer.row_batches(data, range(ROWS))], data))
        seconds.append(time.perf_counter() - started)
    return statistics.median(seconds[1:])  # one to warm up


def workers(counts: Sequence[int], layers: int = 12, turns: int = 5) -> dict[str, Any]:
    """Seconds of one exact iteration of a small random model, on so many Ray workers of one thread each and in this
    process (0). All take turns, each turn with workers started anew, and no batch is larger than lets all share.

    What the machine allows is measured by as many processes that do the whole iteration at the same time, on their own:
    cores share memory, caches and power.
    """
    model = random_model("tiny", torch.float32, **SMALL | {"num_hidden_layers": layers, "vocab_size": 16000})
    data = random_rows(16000, ROWS, LENGTH)
    masks = (DENSE, *(frozenset({block}) for block in all_blocks(layers)))
    seconds: dict[int, list[float]] = {count: [] for count in (0, *counts)}
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        for turn in range(turns):
            for count in list(seconds)[:: -1 if turn % 2 else 1]:
                ray = {"executor": "ray", "workers": count} if count else {}
                scorer = make_scorer(Path(folder), "float32", Runtime(threads=1, device="cpu", **ray))
                scorer.limit_batches(data, None)
                tasks = [Task(span, masks) for span in scorer.row_batches(data, range(ROWS))]
                list(scorer.run([Task(task.span, masks[:3]) for task in tasks], data))  # to warm up
                started = time.perf_counter()
                list(scorer.run(tasks, data))
                seconds[count].append(time.perf_counter() - started)
                scorer.close()
                print(
                    f"  {count} workers, {len(tasks)} batches: {seconds[count][-1]:.2f} s", file=sys.stderr, flush=True
                )
        at_once = {}
        for count in sorted({1, *counts}):
            with ProcessPoolExecutor(count, multiprocessing.get_context("spawn")) as pool:
                at_once[count] = max(pool.map(alone, [folder] * count, [layers] * count))
    bounds = {count: count * at_once[1] / taken for count, taken in at_once.items()}
    return {"layers": layers, "points": [{"workers": count, "seconds": taken, "bound": bounds.get(count)}
                                         for count, taken in seconds.items()], **setting()}  # fmt: skip


def show_workers(found: dict[str, Any]) -> None:
    """Medians; a ratio is the median of those of each turn."""
    base, bounds = ({p["workers"]: p[key] for p in found["points"]} for key in ("seconds", "bound"))
    names = {0: "this process", 1: "one worker"}
    print(f"\n| workers of one thread | seconds |{''.join(f' against {names[b]} |' for b in names if b in base)}"
          " processes without Ray |")  # fmt: skip
    print("|---|---:|" + "---:|" * (1 + sum(b in base for b in names)))
    for count, seconds in base.items():
        ratios = [
            statistics.median(a / b for a, b in zip(base[one], seconds, strict=True)) for one in names if one in base
        ]
        print(
            f"| {count or 'none: this process'} | {statistics.median(seconds):.2f} |"
            + "".join(f" {ratio:.2f}x |" for ratio in ratios)
            + (f" {bounds[count]:.2f}x |" if bounds[count] else " |")
        )


def small(layers: int) -> dict[str, Any]:
    """An iteration of a random model of SmolLM2's widths, several masks at once and one by one in turns."""
    model = random_model("tiny", torch.float32, **SMALL | {"num_hidden_layers": layers, "vocab_size": 49152})
    masks = (DENSE, *(frozenset({block}) for block in all_blocks(layers)))
    together, alone, points = Engine(model), Engine(model), []
    alone._width = lambda *batch: 1  # type: ignore[method-assign]
    for rows, length in ((1, 32), (1, 64), (2, 64), (2, 128)):
        data, seconds = random_rows(49152, rows, length), []
        tasks, found = [Task(range(rows), masks)], {}
        for turn in range(7):
            for engine in (together, alone)[:: 1 if turn % 2 else -1]:
                started = time.perf_counter()
                found[engine] = list(engine.run(tasks, data))
                seconds.append((engine, time.perf_counter() - started))
        taken = {engine: [s for e, s in seconds if e is engine][1:] for engine in (together, alone)}  # one to warm up
        pairs = zip(taken[alone], taken[together], strict=True)
        points.append({
            "rows": rows, "length": length,
            "masks_at_once": together._exact[torch.Size((rows, length, SMALL["hidden_size"]))],
            "alone": statistics.median(taken[alone]), "together": statistics.median(taken[together]),
            "gain": statistics.median(a / t for a, t in pairs), "same_bits": found[together] == found[alone],
        })  # fmt: skip
        print(f"  {points[-1]}", file=sys.stderr, flush=True)
    return {"layers": layers, "points": points, **setting()}


def show_small(found: dict[str, Any]) -> None:
    print(f"\n{found['layers']} layers of SmolLM2's widths, first iteration, float32")
    print("\n| rows | tokens | masks at once | s, one by one | s, at once | gain | bits |")
    print("|---:|---:|---:|---:|---:|---:|---|")
    for p in found["points"]:
        print(
            f"| {p['rows']} | {p['length']} | {p['masks_at_once']} | {p['alone']:.2f} | {p['together']:.2f} | "
            f"{p['gain']:.2f}x | {'the same' if p['same_bits'] else 'others'} |"
        )


@torch.inference_mode()
def losses() -> dict[str, Any]:
    """The NLL of tokens from their logits in float32, in pieces that stay in a CPU's cache and whole, in turns."""
    keep_freed_memory(True)  # as in a search
    points = []
    for tokens, vocabulary in ((126, 49152), (340, 49152), (110, 151936)):
        logits, targets = torch.randn(tokens, vocabulary), torch.randint(vocabulary, (tokens,))
        seconds: dict[str, list[float]] = {"pieces": [], "whole": []}
        ways = {"pieces": token_nll, "whole": inspect.unwrap(token_nll)}
        found = {}
        for turn in range(30):
            for name in list(ways)[:: 1 if turn % 2 else -1]:
                started = time.perf_counter()
                found[name] = ways[name](logits, targets)
                seconds[name].append(time.perf_counter() - started)
        seconds = {name: taken[2:] for name, taken in seconds.items()}  # two to warm up
        points.append({
            "tokens": tokens, "vocabulary": vocabulary, "same_bits": torch.equal(found["pieces"], found["whole"]),
            **{name: statistics.median(taken) for name, taken in seconds.items()},
            "gain": statistics.median(w / p for p, w in zip(seconds["pieces"], seconds["whole"], strict=True)),
        })  # fmt: skip
    return {"points": points, **setting()}


def show_losses(found: dict[str, Any]) -> None:
    print("\n| tokens | vocabulary | ms, in pieces | ms, whole | gain | bits |\n|---:|---:|---:|---:|---:|---|")
    for p in found["points"]:
        print(
            f"| {p['tokens']} | {p['vocabulary']:,} | {1e3 * p['pieces']:.1f} | {1e3 * p['whole']:.1f} | "
            f"{p['gain']:.2f}x | {'the same' if p['same_bits'] else 'others'} |"
        )


def streaming(layers: int, shape: str) -> dict[str, Any]:
    """Passes over a checkpoint that the system does not cache, with weights read ahead and without, in turns.

    A pass scores the dense model and every layer's MLP removed over 2 rows of 128 tokens. A pass over one row of two
    tokens shows what reading alone takes.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        random_model(shape, torch.float32, num_hidden_layers=layers).save_pretrained(folder)
        config = json.loads((folder / "config.json").read_text())
        rows = random_rows(config["vocab_size"], 2, LENGTH)
        masks = (DENSE, *(mask for mask in removable_units(layers, "block", "mlp")))
        work = {"a pass": ([Task(range(2), masks)], rows), "reading alone": ([Task(range(1), (DENSE,))], [rows[0][:2]])}
        engines = {slabs: StreamingEngine(folder, "float32", slabs=slabs) for slabs in (2, 1)}
        seconds: dict[tuple[str, int], list[float]] = {(of, slabs): [] for of in work for slabs in engines}
        found: dict[tuple[str, int], list[ScoredRows]] = {}
        for turn in range(4):
            for of, slabs in list(seconds)[:: 1 if turn % 2 else -1]:
                for path in folder.glob("*.safetensors"):
                    with path.open("rb") as file:
                        os.fsync(file.fileno())
                        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
                started = time.perf_counter()
                found[of, slabs] = list(engines[slabs].run(*work[of]))
                seconds[of, slabs].append(time.perf_counter() - started)
        plans = {slabs: engine.plan for slabs, engine in engines.items()}
        points = [
            {"of": of, "ahead": statistics.median(seconds[of, 2][1:]), "not": statistics.median(seconds[of, 1][1:]),
             "gain": statistics.median(b / a for a, b in zip(seconds[of, 2][1:], seconds[of, 1][1:], strict=True)),
             "same_bits": found[of, 2] == found[of, 1]}
            for of in work
        ]  # fmt: skip
        read = {slabs: plan.slabs for slabs, plan in plans.items() if plan}
        size = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    return {"shape": shape, "layers": layers, "masks": len(masks), "bytes": size, "slabs": read, "points": points,
            **setting()}  # fmt: skip


def show_streaming(found: dict[str, Any]) -> None:
    print(f"\n{found['layers']} layers of {found['shape']}, {found['bytes'] / 2**30:.2f} GiB in float32, "
          f"{found['masks']} masks")  # fmt: skip
    print("\n| | s, read ahead | s, not | gain | bits |\n|---|---:|---:|---:|---|")
    for p in found["points"]:
        same = "the same" if p["same_bits"] else "others"
        print(f"| {p['of']} | {p['ahead']:.2f} | {p['not']:.2f} | {p['gain']:.3f}x | {same} |")
    if found["slabs"] != {2: 2, 1: 1}:
        print("\nThere was no memory to read ahead.")


def main(arguments: Sequence[str]) -> int:
    command, *rest = arguments or ["help"]
    if command == "iteration":
        shape, layers = rest[0] if rest else "smollm2", int(rest[1]) if len(rest) > 1 else None
        found = iteration(shape, layers)
        write_json(RESULTS / f"iteration-{shape}.json", found)
        show_iteration(found)
    elif command == "search":
        found = search(int(rest[0]) if rest else 16, [int(seed) for seed in rest[1:]] or [42, 43, 44])
        show_search(found)
    elif command == "growth":
        found = growth()
        write_json(RESULTS / "growth.json", found)
        show_growth(found)
    elif command == "workers":
        found = workers([int(count) for count in rest] or [1, 2])
        write_json(RESULTS / "workers.json", found)
        show_workers(found)
    elif command == "small":
        found = small(int(rest[0]) if rest else 8)
        write_json(RESULTS / "small.json", found)
        show_small(found)
    elif command == "losses":
        found = losses()
        write_json(RESULTS / "losses.json", found)
        show_losses(found)
    elif command == "streaming":
        found = streaming(int(rest[0]) if rest else 6, rest[1] if len(rest) > 1 else "llama2-7b")
        write_json(RESULTS / "streaming.json", found)
        show_streaming(found)
    else:
        print(__doc__)
        return 2
    print(f"\n{found['machine']}, {found['threads']} threads, torch {found['versions']['torch']}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
