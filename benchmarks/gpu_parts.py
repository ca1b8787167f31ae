"""The nine parts of `benchmarks.gpu`, and the worker that computes them in a process of its own.

Decides what is measured and what must hold. Deadlines, records and the page are decided by `benchmarks.gpu`, which
starts the worker, writes the name of a part to its standard input and reads what it finds, one JSON object a line.

A part is a function of a setting and of `Say`, which it gives its facts as soon as they are known. Keys are words with
units, since the page prints them as they are.
"""

from __future__ import annotations

import gc
import json
import math
import os
import re
import statistics
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any, TextIO

import torch
from torch import Tensor
from torch.autograd import DeviceType
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.profiler import ProfilerActivity, profile
from transformers import PreTrainedModel

from benchmarks.gpu import lines_in
from benchmarks.scoring import Counted, full_forward, matrix_rate
from benchmarks.shapes import MODELS, random_model, random_rows
from blockpruner.checkpoints.hf import export_hf
from blockpruner.core.blocks import DENSE, BlockId, BlockKind, Mask, all_blocks, sorted_blocks
from blockpruner.core.budgets import resources_of
from blockpruner.core.errors import InputError
from blockpruner.core.progress import SilentObserver, stderr_observer
from blockpruner.core.settings import HubTexts, Latency, Score, Speed, Train
from blockpruner.evaluation.latency import measure_latency
from blockpruner.evaluation.speed import measure_speed, weight_bytes
from blockpruner.healing.trainer import train_
from blockpruner.inputs.calibration import CalibrationSet
from blockpruner.model import accelerator
from blockpruner.model.models import decoder_layers, load_model, model_family, prune_, resolve_device, shared_copy
from blockpruner.paper.flops import Flops
from blockpruner.scoring.engine import Engine
from blockpruner.scoring.large.streaming import StreamingEngine
from blockpruner.scoring.metrics import METRICS
from blockpruner.scoring.scorers import _compile_
from blockpruner.scoring.work import Rows, Scorer, Task, live_numbers
from blockpruner.search.iteration import Iteration
from blockpruner.search.registry import request
from blockpruner.search.run import search
from blockpruner.store.files import read_json
from blockpruner.store.provenance import environment
from blockpruner.store.trials import TrialStore
from tests.plans import fetch, plan_of, pruning
from tests.tiny import VARIANTS, tiny_model

NO_DEVICE = "no accelerator: rehearsal at tiny shapes"
GIB = 2**30


@dataclass(frozen=True)
class Setting:
    """What the parts compute with."""

    shape: str
    """Of `shapes.MODELS`."""
    device: torch.device
    rows: int
    length: int
    removals: int
    """Of the search."""
    layers: int
    """Of the smaller model, where depth decides nothing."""
    batches: tuple[int, ...]
    """Padded tokens to a batch, descending; the first is all rows."""
    sample: int
    """Masks that are scored by full forward passes, too."""
    families: Sequence[str]
    dtypes: tuple[str, ...]
    """Of the checkpoints that are exported."""
    generated: int
    """Tokens of a prompt, and new ones."""

    @property
    def is_real(self) -> bool:
        return self.device.type != "cpu"

    def goal(self, text: str) -> str:
        """Goals are those of one H100."""
        return f" (goal on an H100: {text})" if self.shape == "llama2-7b" else ""

    @property
    def tokens(self) -> int:
        return self.rows * self.length

    @property
    def data(self) -> CalibrationSet:
        return CalibrationSet(tuple(map(tuple, random_rows(self.vocabulary, self.rows, self.length))))

    @property
    def vocabulary(self) -> int:
        return int(MODELS[self.shape]["vocab_size"])

    def model(self, layers: int | None = None, dtype: str = "bfloat16", device: str | None = None) -> PreTrainedModel:
        """Weights are random and seeded: what is timed does not depend on their values."""
        changes = {} if layers is None else {"num_hidden_layers": layers}
        return random_model(self.shape, getattr(torch, dtype), device or str(self.device), **changes)


def setting_of(shape: str, device: torch.device) -> Setting:
    """The shape's own, or without an accelerator the tiny one."""
    if device.type == "cpu" or shape == "tiny":
        return Setting("tiny", device, 2, 32, 3, 3, (64, 32), 3, ("gemma2",), ("bfloat16",), 4)
    removals = {"llama2-7b": 17, "llama2-13b": 24}[shape]  # 952 and 1,644 evaluations: Table 7 of the paper
    batches = (30720, 16384, 8192, 4096)
    return Setting(shape, device, 15, 2048, removals, 8, batches, 16, VARIANTS, ("float16", "bfloat16"), 64)


class Say:
    """Hands on what a part finds. A later value of a key replaces the earlier one."""

    def __init__(self, tell: Callable[[dict[str, Any]], object]) -> None:
        self._tell = tell
        self._checks: list[dict[str, Any]] = []
        self._headlines: dict[str, str] = {}

    def __call__(self, facts: Mapping[str, Any]) -> None:
        self._tell({"found": dict(facts)})

    def headline(self, key: str, text: str) -> None:
        """A line for the beginning of the page."""
        self._headlines[key] = text
        self({"headlines": self._headlines})

    def check(self, what: str, value: float, limit: float) -> None:
        """What must hold: value <= limit."""
        found = None if math.isnan(value) else value
        self._checks.append({"what": what, "found": found, "at most": limit, "holds": value <= limit})
        self({"checks": self._checks})

    def attempt(self, name: str, work: Callable[[], Mapping[str, Any]]) -> None:
        """Say what a piece of a part finds. If it fails, the others still run; the part then fails a check."""
        try:
            self({name: dict(work())})
        except Exception as error:
            traceback.print_exc()
            self({name: {"failed": reason_of(error)}})
            self.check(f"{name}: failures", 1, 0)
        clean()


def reason_of(error: BaseException) -> str:
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0][:300]}"


def clean() -> None:
    gc.collect()
    accelerator.empty_cache()


def clocked(device: torch.device, work: Callable[[], Any]) -> tuple[float, Any]:
    """Seconds until the device is done with some work, and its result."""
    accelerator.synchronize(device)
    started = time.perf_counter()
    result = work()
    accelerator.synchronize(device)
    return time.perf_counter() - started, result


def tasks_of(scorer: Scorer, rows: Rows, masks: Iterable[Mask]) -> list[Task]:
    return [Task(span, tuple(masks)) for span in scorer.row_batches(rows, range(len(rows)))]


def losses_of(scorer: Scorer, rows: Rows, masks: Sequence[Mask]) -> dict[Mask, dict[int, float]]:
    """The NLL of every row under every mask."""
    found: dict[Mask, dict[int, float]] = {mask: {} for mask in masks}
    for unit in scorer.run(tasks_of(scorer, rows, masks), rows):
        found[unit.mask] |= dict(zip(unit.span, unit.loss, strict=True))
    return found


def furthest(found: Mapping[Mask, Mapping[int, float]], other: Mapping[Mask, Mapping[int, float]]) -> float:
    """The largest difference of a row's loss; NaN, which no check lets pass, if one has rows or masks less."""
    if {m: sorted(rows) for m, rows in found.items()} != {m: sorted(rows) for m, rows in other.items()}:
        return math.nan
    return max(abs(loss - other[mask][row]) for mask, rows in found.items() for row, loss in rows.items())


def apart(found: Mapping[Mask, Mapping[int, float]], other: Mapping[Mask, Mapping[int, float]]) -> float:
    """How far losses are apart, of how far those of masks are from the dense model's: means over rows and masks.

    Rounding of random models is near 0, other masks or rows are near 1 or beyond: see `APART`.
    """
    if math.isnan(furthest(found, other)):
        return math.nan
    pairs = [(loss, other[mask][row], other[DENSE][row]) for mask in found for row, loss in found[mask].items() if mask]
    removed = sum(abs(there - dense) for _, there, dense in pairs)
    return sum(abs(here - there) for here, there, _ in pairs) / removed if removed else math.nan


APART = 0.25


def singles(layers: int) -> list[Mask]:
    return [frozenset({block}) for block in all_blocks(layers)]


def spread(masks: Sequence[Mask], count: int) -> list[Mask]:
    """So many of them, evenly spread."""
    return [masks[i * len(masks) // count] for i in range(min(count, len(masks)))]


def reset_peak(s: Setting) -> None:
    if s.is_real:
        accelerator.reset_peak(s.device)


def peak(s: Setting) -> float | None:
    """GiB on the device; a CPU's are not counted."""
    return accelerator.peak(s.device) / GIB if s.is_real else None


# -- 1 --


def card(s: Setting, say: Say) -> None:
    if s.is_real:
        total, free = accelerator.total_memory(s.device), accelerator.free_memory(s.device)
        say({"memory, GiB": total / GIB, "free of it": free / GIB})
    size = 2**13 * s.tokens
    here = torch.ones(size, dtype=torch.float32, device=s.device)
    there, host = torch.empty_like(here), torch.ones(size, dtype=torch.float32)
    sources = {"within the device, read and written": (here, 2), "from the host": (host, 1)}
    if s.device.type == "cuda":
        sources["from the host's pinned memory"] = (host.pin_memory(), 1)
    copies = []
    for name, (source, times) in sources.items():
        seconds = statistics.median(clocked(s.device, partial(there.copy_, source, True))[0] for _ in range(7))
        copies.append({"copy": name, "GB/s": times * there.nbytes / seconds / 1e9})
    say({"copies": copies})
    del here, there, sources, source
    model = s.model()
    rates = {n: matrix_rate(model, n) for n in s.batches}
    say({"the model's matrix products alone": [{"tokens": n, "TFLOP/s": rate / 1e12} for n, rate in rates.items()]})
    words = f"The matrix products of {s.shape} alone, {s.tokens:,} tokens"
    say.headline("rate", f"{words}: {rates[s.tokens] / 1e12:.4g} TFLOP/s.")


# -- 2 --

SHORT = [tuple(range(1, 10)), tuple(range(3, 12)), (5, 6, 7), (9, 8, 7, 100, 4)]


def numbers(s: Setting, say: Say) -> None:
    """Every metric of tiny models on the device against the engine in float64 on the CPU, which the tests hold against
    other oracles; NLL against transformers' own forward passes on the device, too.

    Weights are such that bfloat16 holds them exactly, so all dtypes compute the same function.
    """
    table = []
    for family in s.families:
        model = tiny_model(family, 2)
        for parameter in model.parameters():
            parameter.data = parameter.data.bfloat16().to(parameter.dtype)
        with tempfile.TemporaryDirectory() as folder:
            model.save_pretrained(folder)
            load = partial(load_model, Path(folder))
            expected, plain = all_values(load("float64", "cpu")), forward_nll(load("float64", "cpu"))
            say.check(f"{family}: float64 engine to forward passes", distance(expected["perplexity"], plain), 1e-4)
            for dtype in ("float32", "bfloat16"):
                there = load(dtype, str(s.device))
                found, own = all_values(there), distance(forward_nll(there), plain)
                distances = {name: distance(values, expected[name]) for name, values in found.items()}
                table.append({"family": family, "dtype": dtype, "forward passes, NLL": own} | distances)
                say({"mean distance from float64": table})
                if dtype == "float32":
                    say.check(f"{family}: float32 from float64", max(distances.values()), 1e-2)
                # in 16 bits a router may choose otherwise; but the engine must be no worse than a forward pass
                say.check(f"{family}: {dtype} NLL from float64", distances["perplexity"], 2 * own + 2e-2)
    say.headline("numbers", f"{len(s.families)} model families in float32 and bfloat16, held against float64 on a CPU.")


def all_values(model: PreTrainedModel) -> dict[str, list[float]]:
    """Of each metric, the values of all masks and rows."""
    found, masks = {}, singles(len(decoder_layers(model)))
    for name, metric in METRICS.items():
        asked = tuple(masks) if metric.influence else (DENSE, *masks)
        values: dict[Mask, dict[int, float]] = {mask: {} for mask in asked}
        for unit in Engine(model, 20).run([Task(range(len(SHORT)), asked, metric)], SHORT):
            values[unit.mask] |= dict(zip(unit.span, unit.loss, strict=True))
        found[name] = [values[mask][row] for mask in asked for row in range(len(SHORT))]
    return found


def forward_nll(model: PreTrainedModel) -> list[float]:
    rows = [torch.tensor([row], device=model.device) for row in SHORT]
    masks = (DENSE, *singles(len(decoder_layers(model))))
    return [nll_of(full_forward(model, mask, ids)[1], ids)[0] for mask in masks for ids in rows]


def nll_of(logits: Tensor, ids: Tensor) -> list[float]:
    """Of each row, from logits [B, T, V] in whatever dtype; row by row, in float32 at least."""
    found = []
    for row, targets in zip(logits, ids[:, 1:], strict=True):
        wide = row[:-1].to(torch.promote_types(row.dtype, torch.float32))
        found.append((wide.logsumexp(-1) - wide.gather(-1, targets[:, None])[:, 0]).double().mean().item())
    return found


def distance(found: Sequence[float], expected: Sequence[float]) -> float:
    """The mean difference, of large values the relative one."""
    return statistics.fmean(abs(a - b) / max(1.0, abs(b)) for a, b in zip(found, expected, strict=True))


# -- 3 --


def iteration(s: Setting, say: Say) -> None:
    """The first iteration of the exact search, then some of its masks by full forward passes."""
    model, rows = s.model(), s.data.rows
    flops, masks = Flops.of(model.config.to_dict(), s.rows, s.length), [DENSE, *singles(len(decoder_layers(model)))]
    engine = Engine(model)
    say({"rows": s.rows, "tokens of each": s.length, "masks": len(masks), "tokens to a batch": engine._batch_tokens})
    rate = matrix_rate(model, s.tokens)
    losses_of(engine, rows, [DENSE])
    times, found = [time.perf_counter()], {mask: dict[int, float]() for mask in masks}
    reset_peak(s)
    for unit in engine.run(tasks_of(engine, rows, masks), rows):
        times.append(time.perf_counter())
        found[unit.mask] |= dict(zip(unit.span, unit.loss, strict=True))
    accelerator.synchronize(s.device)
    seconds, exact = time.perf_counter() - times[0], flops.exact(masks)
    rate = (rate + matrix_rate(model, s.tokens)) / 2
    share = exact / seconds / rate
    say({
        "one iteration, s": seconds, "PFLOP": exact / 1e15, "TFLOP/s": exact / seconds / 1e12,
        "matrix products alone, TFLOP/s": rate / 1e12, "share of the matrix rate": share,
        "peak memory, GiB": peak(s),
        "seconds from one candidate to the next": [b - a for a, b in pairwise(times)],
    })  # fmt: skip
    words = f"{s.shape}, {len(masks)} masks, {s.rows} rows of {s.length} tokens: one exact iteration takes "
    words += f"{seconds:.4g} s, {exact / seconds / 1e12:.4g} TFLOP/s, {share:.0%} of the matrix products' own rate"
    say.headline("iteration", f"{words}{s.goal('60 %')}.")

    some, spent, plain = spread(masks, s.sample), 0.0, {}
    size = s.rows
    while s.is_real and size > 1 and 5 * size * s.length * 2 * s.vocabulary > accelerator.free_memory(s.device):
        size = -(-size // 2)
    parts = [torch.tensor(rows[i : i + size], device=s.device) for i in range(0, s.rows, size)]
    full_forward(model, DENSE, parts[0])
    for mask in some:
        values: list[float] = []
        for ids in parts:
            taken, (_, logits) = clocked(s.device, partial(full_forward, model, mask, ids))
            spent += taken
            values += nll_of(logits, ids)
            del logits
        plain[mask] = dict(enumerate(values))
    naive, bound = flops.naive(some) / spent, flops.naive(masks) / exact
    gain, sampled = flops.naive(masks) / naive / seconds, {mask: found[mask] for mask in some}
    say({
        "full forward passes, rows at once": size, "full forward passes, TFLOP/s": naive / 1e12,
        "full forward passes, s for all masks": flops.naive(masks) / naive, "gain in time": gain,
        "bound by FLOPs": bound, "largest difference of a row's NLL": furthest(sampled, plain),
    })  # fmt: skip
    what = "row NLL to transformers' full forward passes, of what a mask moves"
    say.check(what, apart(sampled, plain), APART)
    words = f"Against full forward passes in the same run, the exact sweep gains {gain:.3f} times in time"
    say.headline("gain", f"{words}, of {bound:.3f} in FLOPs.")


# -- 4 --


def whole_search(s: Setting, say: Say) -> None:
    """All removals of Table 7, exact, then lazy+race.

    Random rows tell random blocks apart by nothing but chance, and no race could drop one. So for lazy+race the blocks
    are of different weight, and the metric is the KL divergence from the dense model, which sees that.
    """
    model, data, budget = s.model(), s.data, f"{s.removals}blocks"
    generator = torch.Generator().manual_seed(0)
    for block in all_blocks(len(decoder_layers(model))):
        branch = model_family(model).branch(block.kind)
        output = getattr(getattr(decoder_layers(model)[block.layer], branch.module), branch.output)
        output.weight.mul_(10 ** (1.5 * torch.rand(1, generator=generator).item() - 1))
    config, engine = model.config.to_dict(), Engine(model)
    rate = matrix_rate(model, s.tokens)
    losses_of(engine, data.rows, [DENSE])
    fast = Score(metric="kl", acceleration="lazy+race")
    for name, score, goal in (("exact", Score(), "7 minutes"), ("lazy+race", fast, "2 minutes")):
        asked, scorer = request(score), Counted(engine, config)
        stores = {key: TrialStore({}, data.row_keys) for key in asked.losses}
        reset_peak(s)
        watch = SearchWatch(s, say, name, goal, scorer, config, rate)
        search(asked, data, stores, scorer, resources_of(config), [budget], stderr_observer(), watch)


class SearchWatch:
    """Says every iteration of a search as it ends.

    Args:
        goal: for all removals.
        rate: FLOP/s of the matrix products alone.
    """

    def __init__(
        self, s: Setting, say: Say, name: str, goal: str, scorer: Counted, config: Mapping[str, Any], rate: float
    ) -> None:
        self._s, self._say, self._name, self._goal = s, say, name, goal
        self._scorer, self._config, self._rate = scorer, config, rate
        self._before: list[Mask] = [DENSE]
        """What was removed before each iteration."""
        self._table: list[dict[str, Any]] = []
        self._started = self._last = time.perf_counter()

    def __call__(self, _: str, done: Iteration) -> None:
        now, s = time.perf_counter(), self._s
        rate = self._scorer.flops / (now - self._last)
        scored = [score for score, added in zip(done.scores, done.added, strict=True) if added is not None]
        self._table.append({
            "iteration": done.index, "candidates": len(scored), "on all rows": sum(x.is_complete for x in scored),
            "s": now - self._last, "TFLOP": self._scorer.flops / 1e12, "TFLOP/s": rate / 1e12,
            "share of the matrix rate": rate / self._rate,
            "peak memory, GiB": peak(s),
        })  # fmt: skip
        self._last, self._scorer.flops = now, 0
        self._say({f"{self._name}, every iteration": self._table})
        words = f"{s.shape}, {self._name}: {len(self._table)} of {s.removals} removals in "
        words += f"{(now - self._started) / 60:.3g} minutes"
        words += self._exact_words(now - self._started) if self._name == "exact" else ""
        self._say.headline(self._name, f"{words}{s.goal(self._goal)}.")
        self._before.append(done.removed)

    def _exact_words(self, seconds: float) -> str:
        s, layers = self._s, int(self._config["num_hidden_layers"])
        there, naive, evaluations = spent_on(self._config, self._before, s)
        words = (
            f", {evaluations} evaluations, {there / seconds / 1e12:.4g} TFLOP/s, {there / seconds / self._rate:.0%} "
        )
        words += f"of the matrix rate; full forward passes would take {naive / there:.2f} times the FLOPs"
        if len(self._before) < s.removals:
            whole, _, _ = spent_on(self._config, completed(self._before, s.removals, layers), s)
            words += f"; by FLOPs, all {s.removals} would take about {whole / there * seconds / 60:.3g} minutes"
        return words


def completed(before: Sequence[Mask], removals: int, layers: int) -> list[Mask]:
    """What is removed before each iteration of a whole search; any block stands for a removal that is not known."""
    found = list(before)
    for block in all_blocks(layers):
        if len(found) < removals and block not in found[-1]:
            found.append(found[-1] | {block})
    return found[:removals]


def spent_on(config: Mapping[str, Any], before: Sequence[Mask], s: Setting) -> tuple[int, int, int]:
    """FLOPs of exact iterations, of a full forward pass for each candidate, and how many candidates there were."""
    flops, exact, naive, evaluations = Flops.of(config, s.rows, s.length), 0, 0, 0
    for number, base in enumerate(before):
        masks = [base | {block} for block in flops.blocks if block not in base]
        exact += flops.exact(masks if number else [DENSE, *masks])
        naive, evaluations = naive + flops.naive(masks), evaluations + len(masks)
    return exact, naive, evaluations


# -- 5 --


def ways(s: Setting, say: Say) -> None:
    """The same masks in other batches, by other kernels: what each gains, and how far it moves a loss."""
    model, rows = s.model(s.layers), s.data.rows
    config, masks = model.config.to_dict(), spread([DENSE, *singles(s.layers)], 8)
    flops, first, table = Flops.of(config, s.rows, s.length), dict[Mask, dict[int, float]](), []

    def measure(
        name: str,
        tokens: int = s.tokens,
        chunk: int | None = None,
        kernel: SDPBackend | None = None,
        may_lack: bool = False,
    ) -> None:
        row: dict[str, Any] = {"way": name}
        try:
            with nullcontext() if kernel is None else sdpa_kernel(kernel):
                engine = engine_of(model, tokens, chunk)
                found = losses_of(engine, rows, masks)
                again = [clocked(s.device, partial(losses_of, engine, rows, masks))[0] for _ in range(2)]
            seconds = statistics.median(again)
            first.update({} if first else found)
            row |= {"s": seconds, "TFLOP/s": flops.exact(masks) / seconds / 1e12}
            row |= {"largest difference of a row's NLL": furthest(found, first)}
            row |= {"mean, of what a mask moves": apart(found, first)}
        except RuntimeError as error:
            if not may_lack:
                raise
            row["not here"] = reason_of(error)
        table.append(row)
        say({"ways": table})

    for tokens in s.batches:
        measure(f"{tokens:,} tokens to a batch", tokens)
    measure("64 MiB of logits at once", chunk=2**26)
    measure("1 GiB of logits at once", chunk=2**30)
    for kernel in (SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION, SDPBackend.EFFICIENT_ATTENTION):
        measure(f"attention by {kernel.name}", kernel=kernel, may_lack=True)
    measure("the first way again")
    if s.is_real:  # last: it takes long to begin
        try:
            _compile_(model)
        except InputError as error:
            table.append({"way": "compiled", "not here": reason_of(error)})
            say({"ways": table})
        else:
            measure("compiled", may_lack=True)
    timed = [row for row in table if "s" in row]
    for row in timed:
        say.check(f"row NLL, {row['way']}, of what a mask moves", row["mean, of what a mask moves"], APART)
    best = min(timed, key=lambda row: row["s"])
    words = (
        f"Of {len(timed)} ways, {best['way']} is the fastest: {table[0]['s'] / best['s']:.2f} times the first's rate"
    )
    moved = max(row["largest difference of a row's NLL"] for row in timed)
    say.headline("ways", f"{words}. A row's NLL moves by {moved:.1e} at most.")


def engine_of(model: PreTrainedModel, tokens: int, chunk: int | None) -> Engine:
    """An engine with so many bytes of logits at once, where that is given."""
    if chunk is None:
        return Engine(model, tokens)
    return type("Chunked", (Engine,), {"_logits_bytes": chunk})(model, tokens)  # type: ignore[no-any-return]


# -- 6 --

KINDS = {
    "attention": re.compile("flash|fmha|attention|sdpa|cudnn.*mha", re.I),
    "matrix products": re.compile(r"gemm|cutlass|nvjet|xmma|wgmma|cublas|\bmm\b|addmm|bmm|matmul", re.I),
    "copies": re.compile("memcpy|memset|copy", re.I),
}
"""Of kernels by their names; the others are elementwise, norms and sums. Attention is asked first: its kernels are
made with cutlass."""


def profiled(s: Setting, say: Say) -> None:
    """One candidate that runs every block but one, and the head and losses on their own."""
    model, rows = s.model(s.layers), s.data.rows
    engine, mask = Engine(model, s.tokens), frozenset({BlockId(BlockKind.MHA, 0)})
    states = torch.randn(s.tokens, model.config.hidden_size).to(s.device, model.dtype)
    batch = engine._batch(rows)
    states, work = states[: len(batch.targets)], {
        "a candidate": lambda: losses_of(engine, rows, [mask]),
        "its head and losses alone": lambda: engine._losses(states, None, batch, METRICS["perplexity"]),
    }  # fmt: skip
    table = []
    for name, run in work.items():
        with torch.inference_mode():
            run()
            seconds, _ = clocked(s.device, run)
            activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if s.device.type == "cuda" else [])]
            with profile(activities=activities) as trace:
                under, _ = clocked(s.device, run)
        by_kind: Counter[str] = Counter()
        for event in trace.key_averages():
            on_device = event.device_type != DeviceType.CPU
            if on_device == (s.device.type == "cuda"):
                kind = next((kind for kind, names in KINDS.items() if names.search(event.key)), "elementwise and norms")
                by_kind[kind] += event.self_device_time_total if on_device else event.self_cpu_time_total
        busy = sum(by_kind.values()) / 1e6
        row = {"of": name, "s": seconds, "s while traced": under}
        row |= {f"{kind}, s": by_kind[kind] / 1e6 for kind in (*KINDS, "elementwise and norms")}
        table.append(row | {"idle, s": max(0.0, under - busy) if busy else "no kernel was traced"})
    say({f"{s.layers} layers, {s.tokens:,} tokens": table})
    taken = table[0]["matrix products, s"] / table[0]["s while traced"]
    say.headline("profile", f"Of a candidate's time, matrix products take {taken:.0%}.")


# -- 7 --


def memory(s: Setting, say: Say) -> None:
    """Whether the memory model holds, and whether work goes on in halves where memory ends."""
    model, rows = s.model(s.layers), s.data.rows
    masks, item = spread([DENSE, *singles(s.layers)], 4), model.dtype.itemsize
    table, need = [], 0
    for tokens in s.batches if s.is_real else ():
        part = rows[: max(1, tokens // s.length)]
        engine, size = Engine(model, tokens), len(part) * s.length
        clean()
        reset_peak(s)
        before = accelerator.peak(s.device)
        losses_of(engine, part, masks)
        found = accelerator.peak(s.device) - before
        planned = live_numbers(model.config.hidden_size, model.config.intermediate_size) * item * size
        planned += 4 * min(engine._logits_bytes, 4 * size * s.vocabulary)
        need = need or found
        table.append({"tokens": size, "peak, GiB": found / GIB, "as planned, GiB": planned / GIB})
        say({"memory beside the weights": table})
        say.check(f"peak of {size:,} tokens, of what was planned", found / planned, 1)
    engine = Engine(model, s.tokens)
    whole, again = losses_of(engine, rows, masks), Engine(model, s.tokens)
    if s.is_real:
        clean()
        ballast = torch.empty(max(0, accelerator.free_memory(s.device) - need // 2), dtype=torch.uint8, device=s.device)
    else:
        say({"stand-in": f"{NO_DEVICE}; a block refuses more than half of the tokens"})
        ballast = None
        refuse_beyond(again, s.tokens // 2)
    halved = losses_of(again, rows, masks)
    say({"tokens to a batch": engine._batch_tokens, "after memory ran out": again._batch_tokens})
    del ballast
    clean()
    say.check("tokens to a batch after memory ran out, of before", again._batch_tokens / engine._batch_tokens, 0.5)
    say.check("row NLL in halves, of what a mask moves", apart(halved, whole), APART)
    back = losses_of(engine, rows, masks)
    say({"same bits when memory is back": back == whole})
    say.check("row NLL when memory is back, of what a mask moves", apart(back, whole), APART)
    sizes = f"{engine._batch_tokens:,} to {again._batch_tokens:,} tokens"
    say.headline("memory", f"Where memory runs out, batches go from {sizes}, and scoring goes on.")


def refuse_beyond(engine: Engine, tokens: int) -> None:
    """As if memory ended at so many tokens to a call."""
    block = engine._block

    def refusing(which: BlockId, hidden: Tensor, *arguments: Any) -> Tensor:
        if hidden.shape[0] * hidden.shape[1] > tokens:
            raise torch.OutOfMemoryError("a stand-in for a device is full")
        return block(which, hidden, *arguments)

    engine._block = refusing  # type: ignore[method-assign]


# -- 8 --


def streaming(s: Setting, say: Say) -> None:
    """A checkpoint on disk, scored layer by layer, against the same model in memory; with the next layer read ahead and
    without, in turns."""
    rows, masks = s.data.rows, spread([DENSE, *singles(s.layers)], 8)
    with tempfile.TemporaryDirectory() as folder:
        model = s.model(s.layers)
        model.save_pretrained(folder)
        engine = Engine(model, s.tokens)
        expected = losses_of(engine, rows, masks)
        here, _ = clocked(s.device, partial(losses_of, engine, rows, masks))  # that before warmed up
        del model, engine
        clean()
        open_file = partial(StreamingEngine, Path(folder), "bfloat16", device=str(s.device), batch_tokens=s.tokens)
        alone, streamed = (open_file(slabs=slabs) for slabs in (1, 2))
        one, _ = clocked(s.device, partial(losses_of, streamed, rows, [DENSE]))
        read, gains = streamed.weight_bytes_read, []
        for turn in range(3):
            taken = {}
            for way in (alone, streamed)[:: 1 if turn % 2 else -1]:
                taken[way], found = clocked(s.device, partial(losses_of, way, rows, masks))
                say.check("row NLL streamed, of what a mask moves", apart(found, expected), APART)
            gains.append(taken[alone] / taken[streamed])
            seconds = taken[streamed]
        for way in (alone, streamed):
            way.close()
        assert streamed.plan is not None
    say({
        "checkpoint, GiB": read / GIB, "one mask, s": one, "weights in it, GB/s": read / one / 1e9,
        f"{len(masks)} masks, s": seconds, "in memory, s": here, "same bits": found == expected,
        "s without reading ahead, of those with it": gains, "plan": list(streamed.plan.lines()),
    })  # fmt: skip
    words = f"Streamed, {len(masks)} masks of {s.layers} layers take {seconds / here:.2f} times as long as in memory"
    same = "the same bits" if found == expected else f"a row's NLL differs by {furthest(found, expected):.1e} at most"
    say.headline("streaming", f"{words}, with {same}; one mask reads {read / one / 1e9:.3g} GB/s.")


# -- 9 --


def around(s: Setting, say: Say) -> None:
    """What comes after a search: generation, training, a checkpoint."""
    say.attempt("generation, dense and pruned over the same tensors", partial(generation, s, say))
    say.attempt("what a block takes of generation", partial(latency, s))
    say.attempt("training", partial(training, s, say))
    for dtype in s.dtypes:
        say.attempt(f"a checkpoint in {dtype}, verified on the CPU", partial(exported, s, dtype))


def some_blocks(layers: int) -> Mask:
    """The attention of every other layer of the second half, and the MLP of one."""
    mha = {BlockId(BlockKind.MHA, layer) for layer in range(layers // 2, layers, 2)}
    return frozenset(mha | {BlockId(BlockKind.MLP, layers - 1)})


def generation(s: Setting, say: Say) -> dict[str, Any]:
    dense = s.model()
    mask = some_blocks(len(decoder_layers(dense)))
    models = {"dense": dense, "pruned": prune_(shared_copy(dense), mask)}
    found = measure_speed(models, Speed(prompt_tokens=s.generated, new_tokens=s.generated, repeats=3))
    sizes = {name: weight_bytes(model) for name, model in models.items()}
    for name, speed in found.items():
        say.check(f"{name}: weights, of the peak of generation", sizes[name] / speed.peak_memory_bytes, 1)
    fewer = found["pruned"].peak_memory_bytes / found["dense"].peak_memory_bytes
    say.check("peak of generation, pruned of dense", fewer, 1)
    gain = found["dense"].decode_seconds.median / found["pruned"].decode_seconds.median
    say.headline("generation", f"Generation without {len(mask)} blocks is {gain:.2f} times as fast as dense.")
    facts = {}
    for name, speed in found.items():
        facts |= {
            f"{name}: prefill, tokens/s": speed.prefill_tokens_per_second,
            f"{name}: decode, tokens/s": speed.decode_tokens_per_second,
            f"{name}: weights, GiB": sizes[name] / GIB,
            f"{name}: peak ({speed.peak_memory}), GiB": speed.peak_memory_bytes / GIB,
        }
    return facts


def latency(s: Setting) -> dict[str, Any]:
    found = measure_latency(s.model(), Latency(prompt_tokens=s.generated, new_tokens=s.generated, repeats=3))
    milliseconds = {f"an {kind.name} block, ms": found[kind.value] / 1e6 for kind in BlockKind}
    return {"dense, s": found["total"] / 1e9} | milliseconds


def training(s: Setting, say: Say) -> dict[str, Any]:
    """Ten LoRA steps on the same rows: the first loss is that of full forward passes, the last one is lower."""
    model = s.model()
    student = prune_(model, some_blocks(len(decoder_layers(model))))
    rows = CalibrationSet(tuple(row[:512] for row in s.data.rows[:4]))
    all_ids = [torch.tensor([row], device=s.device) for row in rows.rows]
    expected = statistics.fmean(nll_of(student(ids, use_cache=False).logits, ids)[0] for ids in all_ids)
    recipe = Train(
        data=HubTexts(source="hub", repo="random/rows"),
        rank=8,
        learning_rate=1e-3,
        accumulation=len(rows.rows),
        epochs=10,
    )
    with tempfile.TemporaryDirectory() as folder:
        train = partial(train_, student, rows, recipe, teacher=None, validation=None, states=Path(folder))
        taken, found = clocked(s.device, partial(train, observer=SilentObserver()))
    first, last = found.losses[0], found.losses[-1]
    say.check("training: first loss to that of forward passes", abs(first - expected), 2e-2)
    say.check("training: last loss less the first", last - first, 0)
    tokens = len(found.losses) * sum(map(len, rows.rows))
    return {"steps": len(found.losses), "s": taken, "tokens/s": tokens / taken, "first loss": first, "last loss": last}


def exported(s: Setting, dtype: str) -> dict[str, Any]:
    """Written and verified in a fresh process; what does not reproduce the masked model raises."""
    layers = min(4, s.layers)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        s.model(layers, dtype, "cpu").save_pretrained(folder / "mine")
        dense = fetch(folder / "mine", folder / "model", dtype=dtype)
        plan = plan_of(dense, [str(block) for block in sorted_blocks(some_blocks(layers))])
        started = time.perf_counter()
        export_hf(pruning(dense, plan, dtype), folder / "pruned")
        report = read_json(folder / "pruned" / "verification.json")
        facts = {key: value for key, value in report.items() if isinstance(value, bool | float)}
        return {"s": time.perf_counter() - started} | facts


# -- the worker --

PARTS: Mapping[str, Callable[[Setting, Say], None]] = {
    "card": card, "numbers": numbers, "iteration": iteration, "search": whole_search, "ways": ways,
    "profile": profiled, "memory": memory, "streaming": streaming, "around": around,
}  # fmt: skip


def where(s: Setting) -> dict[str, str]:
    facts = {"shape": s.shape, "device": accelerator.name(s.device) if s.is_real else NO_DEVICE}
    return facts | environment() | ({"cuda": str(torch.version.cuda)} if torch.version.cuda else {})


def serve(shape: str, asked: Iterable[str], answers: TextIO) -> int:
    """Compute the parts asked for. After one that fails the process ends, since a device may be unusable then."""

    def tell(message: Mapping[str, Any]) -> None:
        answers.write(json.dumps(message) + "\n")
        answers.flush()

    s = setting_of(shape, resolve_device("auto"))
    tell({"where": where(s), "ended": "whole"})
    for name in asked:
        try:
            PARTS[name](s, Say(tell))
        except Exception as error:
            traceback.print_exc()
            tell({"ended": f"failed: {reason_of(error)}"})
            return 1
        tell({"ended": "whole"})
        clean()
    return 0


if __name__ == "__main__":
    told = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print is no answer
    os._exit(serve(sys.argv[1], lines_in(sys.stdin), told))  # a thread still waits for lines
