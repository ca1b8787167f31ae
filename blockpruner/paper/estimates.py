"""What a study takes before anything is computed: trials, FLOPs, hours on a GPU, memory and disk, from its run file.

Decides what is counted and what is assumed. A greedy search asks for a fixed number of masks, so its trials and FLOPs
are exact once the number of removals is known; that depends on which kind of block goes, and MHA_SHARE is assumed. What
depends on the texts (tokens), on the search (races, merges) or on the machine is an estimate, and said to be one. No
model, no text and no torch is read.

Not counted: fetching, loading weights, reading tokens, tasks of unknown size (which are named).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from blockpruner.core.blocks import DENSE, BlockId, BlockKind, Mask, removable_units
from blockpruner.core.budgets import Budget, choose_prefix, is_settled, parse_budget, require_reachable, resources_of
from blockpruner.core.errors import InputError
from blockpruner.core.families import Config, count_kv_cache, count_parameters
from blockpruner.core.options import read_options
from blockpruner.core.settings import Calibration, Run, Speed
from blockpruner.methods.registry import check_score
from blockpruner.paper.experiments import Variant, study_of, variants
from blockpruner.paper.flops import Flops
from blockpruner.paper.shapes import find_config
from blockpruner.scoring.metrics import PERPLEXITY, metric_of
from blockpruner.scoring.work import LOGITS_BYTES, live_numbers

MHA_SHARE = 0.7
"""Of the blocks that BlockPruner removes, how many are MHA: 12 of 17 for Llama2-7B at 22 %, 17 of 24 for its 13B at
25 %, 14 of 22 at 30 % (arXiv 2406.10594, Tables 1 and 5)."""

SAMPLE_TOKENS = 113.4
"""Of an Alpaca sample with the blank line behind it: the mean over 13,354 of the original 52,002, by the tokenizer of
SmolLM2 (49,152 entries). One of fewer entries, as Llama 2's, makes more tokens of a text; other texts differ."""

WIKITEXT_TOKENS = 304_986
"""Of WikiText-2's test split, its 4,358 lines joined, by the same tokenizer."""


@dataclass(frozen=True)
class Items:
    """A task's evaluated split: items; requests and tokens of one item, tokens over all its requests."""

    items: int
    requests: float
    tokens: float


TASKS: dict[str, Items] = {
    "piqa": Items(1838, 2, 72.6),
    "winogrande": Items(1267, 2, 45.0),
    "hellaswag": Items(10042, 4, 317.3),
    "arc_easy": Items(2376, 4, 126.7),
    "arc_challenge": Items(1172, 4, 148.3),
    "openbookqa": Items(500, 4, 59.8),
    "lambada_openai": Items(5153, 1, 78.1),
    "mmlu_high_school_biology": Items(310, 4, 381.7),
    "mmlu_high_school_geography": Items(198, 4, 270.1),
    "mmlu_marketing": Items(234, 4, 304.8),
    "mmlu_miscellaneous": Items(783, 4, 264.1),
    "mmlu_world_religions": Items(171, 4, 236.7),
}
"""Counted over all items of the stock tasks as lm-eval asks them, by the same tokenizer. A few items of ARC have three
or five choices."""

EXPECTED = {"none": 1.0, "lazy": 1.0, "race": 0.44, "lazy+race": 0.23}
"""By `score.acceleration`: which part of the exact search's work is expected to be done. Measured on SmolLM2, 8 rows
(docs/performance.md): lazy+race 1/6.99, 1/6.31 and 1/7.31 of full forward passes, against 1/1.59 exact; race 4.61 of
10.47 TFLOP in a first iteration. `lazy` alone was not measured, so nothing is taken off."""

ITEM_BYTES = {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2}

LOSS_BYTES, UNIT_BYTES, BLOCK_BYTES = 19, 45, 7
"""Of a line of a trial log: a loss, what stands around the losses of a unit, the name of a removed block."""

BATCH_TOKENS = 1024
"""Of a unit at least, a row or more: what an engine takes on a CPU; a GPU takes more, and its log has fewer lines."""

RESULT_BYTES = 128
"""Of one item in the results: 63 in a Parquet table, which the store and the study hold each."""


@dataclass(frozen=True)
class Gpu:
    """half, single: peak FLOP/s of dense matrix products in bfloat16 (float16), and in float32 without TF32;
    bandwidth: of its memory, bytes/s; memory: bytes; utilisation: of the peak that is expected."""

    name: str
    half: float
    single: float
    bandwidth: float
    memory: int
    utilisation: float = 0.4

    def rate(self, dtype: str) -> float:
        """FLOP/s expected of scoring and evaluation."""
        return self.utilisation * (self.half if ITEM_BYTES[dtype] == 2 else self.single)


GPUS: dict[str, Gpu] = {
    "h100": Gpu("H100 SXM", 989e12, 67e12, 3.35e12, 80 * 2**30),
    "h200": Gpu("H200", 989e12, 67e12, 4.8e12, 141 * 10**9),
    "a100": Gpu("A100 SXM 80 GB", 312e12, 19.5e12, 2.039e12, 80 * 2**30),
    "rtx4090": Gpu("RTX 4090", 165e12, 82.6e12, 1.008e12, 24 * 2**30),
}
"""The makers' figures. The utilisation is an assumption: no GPU has been measured with this code."""


@dataclass(frozen=True)
class SearchCost:
    """One search of a study.

    removals: to its farthest budget; rows, length: of its calibration set; trials: masks scored on all rows that no
    search before it has scored, those in perplexity for its report included, an upper bound where it is accelerated;
    flops: of these, with the shared prefix; expected: which part of both the acceleration is expected to leave.
    """

    variant: Variant
    removals: int
    rows: int
    length: int
    trials: int
    flops: int
    expected: float = 1.0


@dataclass(frozen=True)
class Estimate:
    """A run's whole study.

    parameters: of the dense model; models: evaluated, the dense one included, if no two searches end in the same;
    evaluation_tokens, evaluation_flops: of texts and items of all models; unknown: tasks that are not counted;
    generated_tokens, generation_bytes: of all timed generations, weights and KV cache read once for a token; weights:
    bytes of the dense model; search_memory, evaluation_memory: bytes on the device; layer_memory, states: of a search
    with `runtime.streaming`, on the device and beside it (in RAM or on disk); disk: bytes, by what is kept.
    """

    run: str
    dtype: str
    parameters: int
    searches: tuple[SearchCost, ...]
    models: int
    evaluation_tokens: int
    evaluation_flops: int
    unknown: tuple[str, ...]
    generated_tokens: int
    generation_bytes: int
    weights: int
    search_memory: int
    evaluation_memory: int
    layer_memory: int
    states: int
    disk: Mapping[str, int]

    @property
    def trials(self) -> int:
        return sum(cost.trials for cost in self.searches)

    @property
    def search_flops(self) -> int:
        return sum(cost.flops for cost in self.searches)

    @property
    def expected_flops(self) -> float:
        return sum(cost.flops * cost.expected for cost in self.searches) + self.evaluation_flops

    @property
    def flops(self) -> int:
        """At most."""
        return self.search_flops + self.evaluation_flops

    def devices(self, gpu: Gpu) -> int:
        """How many hold the model."""
        return math.ceil(max(self.search_memory, self.evaluation_memory) / gpu.memory)

    def hours(self, gpu: Gpu) -> float:
        """Of the whole study, expected: one device after the other, since a model that several hold uses one at a
        time."""
        return (self.expected_flops / gpu.rate(self.dtype) + self.generation_bytes / gpu.bandwidth) / 3600


def estimate(run: str, settings: Run, studies: Path = Path("data/studies")) -> Estimate:
    """What the study of a run takes.

    Args:
        studies: where fetched checkpoints lie, whose config is then read.

    Raises:
        InputError: no study section, a shape that is not known, a budget that cannot be reached or counted, or a
            calibration set without a row.
    """
    study, found = study_of(settings), variants(settings)
    config, dtype = find_config(settings.model.model_dump(), studies / run / "model"), settings.model.dtype
    item, parameters = ITEM_BYTES[dtype], count_parameters(config).total
    known: set[tuple[str, Mask]] = set()
    searches = []
    for variant in found:
        try:
            searches.append(search_cost(variant, config, known))
        except InputError as error:
            raise InputError(f"runs/{run}.yaml, {variant.name}: {error}") from error

    models = [model for variant in found for model in pruned_models(variant, config)]
    flops = Flops.of(config, 1, settings.evaluate.perplexity.seq_len)
    part = {removed: flops.full(removed) / flops.full(DENSE) for removed in {model.removed for model in models}}
    kept = [1.0, *(part[model.removed] for model in models)]
    main_kept = [1.0, *(part[model.removed] for model in models if model.main)]
    perplexity, zero_shot, wikitext = settings.evaluate.perplexity, settings.evaluate.zero_shot, study.wikitext
    work = [(kept, *_text_work(config, perplexity.seq_len, perplexity.max_rows))]
    if wikitext is not None:
        work.append((main_kept, *_text_work(config, wikitext.seq_len, wikitext.max_rows)))
    tasks = [(kept, name, zero_shot.limit) for name in zero_shot.tasks]
    tasks += [(main_kept, name, study.tasks_limit) for name in study.tasks if name not in zero_shot.tasks]
    work += [(shares, *_task_work(config, name, limit)) for shares, name, limit in tasks if name in TASKS]
    items = sum(len(shares) * _items(name, limit) for shares, name, limit in tasks if name in TASKS)

    generated = [
        *_generations(settings.evaluate.speed, [model.removed for model in models if model.raced], config, item),
        *_generations(study.speed, [model.removed for model in models if model.timed], config, item),
    ]
    live = live_numbers(int(config["hidden_size"]), int(config["intermediate_size"])) * item
    beside = 4 * LOGITS_BYTES + live * max(cost.length for cost in searches)
    counts = count_parameters(config).blocks
    layer = max(counts[BlockId(BlockKind.MHA, n)] + counts[BlockId(BlockKind.MLP, n)] for n in range(len(counts) // 2))
    table = int(config["vocab_size"]) * int(config["hidden_size"])
    copies = 2 if any(variant.kind == "width" for variant in found) else 1  # SliceGPT rewrites a copy of the weights
    return Estimate(
        run=run,
        dtype=dtype,
        parameters=parameters,
        searches=tuple(searches),
        models=len(kept),
        evaluation_tokens=sum(len(shares) * tokens for shares, tokens, _ in work),
        evaluation_flops=round(sum(sum(shares) * flops for shares, _, flops in work)),
        unknown=tuple(name for _, name, _ in tasks if name not in TASKS),
        generated_tokens=sum(tokens for tokens, _ in generated),
        generation_bytes=round(sum(moved for _, moved in generated)),
        weights=parameters * item,
        search_memory=parameters * item + beside,
        evaluation_memory=copies * parameters * item + beside,
        layer_memory=max(layer, table) * item + beside,
        states=max(_states(cost, config) for cost in searches) * item,
        disk={
            "checkpoint": parameters * item,
            "trials": sum(map(_trial_bytes, searches)),
            "results": items * RESULT_BYTES,
        },
    )


# --- searches ---------------------------------------------------------------------------------------------------


def calibration_rows(calibration: Calibration) -> tuple[int, int]:
    """Rows, and tokens of one: whole rows of joined samples, or a row for each.

    Raises:
        InputError: no whole row; says how many samples would do.
    """
    if calibration.packing == "per_sample":
        return calibration.num_samples, round(min(SAMPLE_TOKENS, calibration.seq_len))
    rows = int(calibration.num_samples * SAMPLE_TOKENS // calibration.seq_len)
    if not rows:
        raise InputError(
            f"{calibration.num_samples} samples, joined, are about {calibration.num_samples * SAMPLE_TOKENS:.0f} "
            f"tokens, fewer than one row of calibration.seq_len {calibration.seq_len}; raise num_samples to about "
            f"{math.ceil(1.2 * calibration.seq_len / SAMPLE_TOKENS)}, or lower seq_len"
        )
    return rows, calibration.seq_len


def removal_order(units: Sequence[Mask]) -> list[Mask]:
    """The order in which units are taken to be removed: from the last layer down, MHA_SHARE of single blocks MHA."""
    mha = [unit for unit in reversed(units) if len(unit) == 1 and next(iter(unit)).kind is BlockKind.MHA]
    other = [unit for unit in reversed(units) if unit not in mha]
    order: list[Mask] = []
    taken = 0
    while mha or other:
        is_mha = bool(mha) and (not other or taken < MHA_SHARE * (len(order) + 1))
        taken += is_mha
        order.append((mha if is_mha else other).pop(0))
    return order


def removals(units: Sequence[Mask], budgets: Sequence[str], config: Config) -> tuple[list[Mask], list[int]]:
    """What is removed step by step until every budget is settled, as `search.run` goes; and which step meets each.

    Raises:
        InputError: a budget that no removal reaches, or a speed-up, which is measured first.
    """
    resources, order = resources_of(config), removal_order(units)
    wanted: list[Budget] = [parse_budget(text, resources["parameters"]) for text in budgets]
    for budget in wanted:
        if budget.resource not in resources:
            raise InputError(f"budget {budget.text!r} is a speed-up, so how far it goes is known when it is measured")
        require_reachable(budget, units, resources[budget.resource])
    sizes = {unit: tuple(costs.ratio(unit) for costs in resources.values()) for unit in units}
    prefixes: list[Mask] = []

    def settled(budget: Budget) -> bool:
        remaining = {sizes[unit]: unit for unit in order[len(prefixes) :]}  # one of each size: only sizes matter
        return is_settled(budget, prefixes, resources[budget.resource], list(remaining.values()))

    while not all(map(settled, wanted)):
        prefixes.append(DENSE.union(*order[: len(prefixes) + 1]))
    return prefixes, [choose_prefix(budget, prefixes, resources[budget.resource]) for budget in wanted]


def search_cost(variant: Variant, config: Config, known: set[tuple[str, Mask]]) -> SearchCost:
    """What one search asks for that is not `known`, by loss and calibration set; adds what it is sure to have scored.

    Later searches share the dense model and the single units of an exact first iteration. Masks that two searches come
    to by chance are counted twice.

    Raises:
        InputError: a method whose work is not counted; see also `calibration_rows` and `removals`.
    """
    kind, score = check_score(variant.score), variant.score
    rows, length = calibration_rows(variant.calibration)
    name, metric, section = score.method, metric_of(score.metric), variant.calibration.model_dump_json()
    flops, depth = Flops.of(config, rows, length), int(config["num_hidden_layers"])

    def unknown(loss: str, masks: Sequence[Mask], *, kept: bool) -> list[Mask]:
        keys = {mask: (f"{loss} {section}", mask) for mask in masks}
        new = [mask for mask, key in keys.items() if key not in known]
        known.update(key for mask, key in keys.items() if kept or mask == DENSE)
        return new

    if not kind.removes_blocks:
        dense = unknown(PERPLEXITY.loss, [DENSE], kept=True)
        measured = (
            _similarities(read_options(name, kind.options, score.options).model_dump(), depth) + len(variant.budgets)
            if name == "laco"
            else 0
        )
        return SearchCost(variant, 0, rows, length, len(dense), (len(dense) + measured) * flops.full(DENSE))
    if name not in ("greedy", "one_shot", "random"):
        raise InputError(f"method: {name} asks for what depends on what it finds, which cannot be counted before")
    units = removable_units(depth, score.unit, score.candidates)
    steps, _ = removals(units, variant.budgets, config)
    bases = {"greedy": [DENSE, *steps[:-1]], "one_shot": [DENSE], "random": []}[name]
    trials = work = 0
    scored: set[Mask] = set()
    for number, base in enumerate(bases):
        left = {base | unit: unit for unit in units if not unit <= base}
        if metric.influence:  # all units of a base in one pass
            trials, work = trials + len(left), work + flops.blocks_of(base)
            continue
        is_first = number == 0
        new = unknown(
            metric.loss, [*([DENSE] if is_first else []), *left], kept=is_first and score.acceleration == "none"
        )
        trials += len(new)
        work += flops.sweep(base, [left[mask] for mask in new if mask != DENSE], DENSE in new)
        if metric.reference:  # beside each, what the dense model says, whose states are kept
            work += len(new) * flops.head + is_first * flops.blocks_of(DENSE)
        if metric.loss == PERPLEXITY.loss:
            scored |= left.keys()
    told = unknown(PERPLEXITY.loss, [mask for mask in [DENSE, *steps] if mask not in scored], kept=False)
    return SearchCost(
        variant, len(steps), rows, length, trials + len(told), work + sum(map(flops.full, told)),
        EXPECTED[score.acceleration],
    )  # fmt: skip


def _similarities(options: Mapping[str, Any], depth: int) -> int:
    """How many LaCo measures at most: walks over v layers, about v of them, none measured twice."""
    top = depth - 1 if options["highest"] is None else int(options["highest"])
    visited = top - int(options["count"]) - int(options["lowest"]) + 1
    return visited * (visited + 1) // 2


def _states(cost: SearchCost, config: Config) -> int:
    """Numbers that wait between two layers of a streamed pass: a hidden state for each mask of a first iteration."""
    masks = 1 + 2 * int(config["num_hidden_layers"])
    return masks * cost.rows * cost.length * int(config["hidden_size"])


def _trial_bytes(cost: SearchCost) -> int:
    """Of the log, a line for each mask and batch, and of the tables, where a loss takes 8 bytes."""
    lines = min(cost.rows, math.ceil(cost.rows * cost.length / BATCH_TOKENS))
    line = UNIT_BYTES + BLOCK_BYTES * cost.removals / 2
    return round(cost.trials * (cost.rows * (LOSS_BYTES + 8) + lines * line))


# --- evaluation and speed ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Pruned:
    """A model of a study. removed: the blocks taken to be gone; of methods that remove none, the whole layers that
    count as much."""

    removed: Mask
    main: bool
    raced: bool
    timed: bool


def pruned_models(variant: Variant, config: Config) -> list[Pruned]:
    """Those that a search leads to; budgets that the same removals meet lead to one."""
    unit = "block" if variant.kind == "block" else "layer"
    units = removable_units(int(config["num_hidden_layers"]), unit, variant.score.candidates)
    prefixes, steps = removals(units, variant.budgets, config)
    met: dict[int, list[str]] = {}
    for budget, step in zip(variant.budgets, steps, strict=True):
        met.setdefault(step, []).append(budget)
    return [
        Pruned(
            prefixes[step - 1], variant.main in budgets, variant.raced in budgets, bool({*variant.timed} & {*budgets})
        )
        for step, budgets in met.items()
    ]


def _text_work(config: Config, seq_len: int, max_rows: int | None) -> tuple[int, int]:
    """Tokens and FLOPs of the dense model on rows of a text; without a limit the text is WikiText-2's test split."""
    rows = WIKITEXT_TOKENS // seq_len if max_rows is None else max_rows
    return rows * seq_len, Flops.of(config, rows, seq_len).full(DENSE)


def _items(name: str, limit: int | None) -> int:
    return min(TASKS[name].items, limit or TASKS[name].items)


def _task_work(config: Config, name: str, limit: int | None) -> tuple[int, int]:
    """Tokens and FLOPs of the dense model on a task: logits of all tokens, as lm-eval takes them; pads come on top."""
    task = TASKS[name]
    requests, length = round(_items(name, limit) * task.requests), round(task.tokens / task.requests)
    return requests * length, Flops.of(config, requests, length).naive([DENSE])


def _generations(speed: Speed, masks: Sequence[Mask], config: Config, item: int) -> Iterator[tuple[int, float]]:
    """Tokens, and bytes read, of each timing after a warm-up: of the dense model, and of pruned ones beside it."""
    counts, cached = count_parameters(config), count_kv_cache(config)
    steps = (speed.repeats + 1) * speed.new_tokens
    for mask in (DENSE, *(mask for pruned in masks for mask in (DENSE, pruned))):
        states = speed.batch * (speed.prompt_tokens + speed.new_tokens / 2) * cached.total * (1 - cached.ratio(mask))
        yield steps * speed.batch, steps * item * (counts.total * (1 - counts.ratio(mask)) + states)


# --- what is printed --------------------------------------------------------------------------------------------


def describe(name: str, estimates: Sequence[Estimate], gpu: str | None = None) -> str:
    """The plan of a set as Markdown: every search, what evaluation and timing add, hours, memory and disk.

    Args:
        gpu: a key of GPUS; None is the first.
    """
    if gpu is not None and gpu not in GPUS:
        raise InputError(f"GPU {gpu!r} is unknown; valid: {', '.join(GPUS)}")
    device = GPUS[gpu or next(iter(GPUS))]
    lines = [f"# Plan of {name}: {len(estimates)} {'study' if len(estimates) == 1 else 'studies'}, nothing is computed"]
    for found in estimates:
        lines += ["", *_run_lines(found, device)]
    lines += ["", "## Together", "", *_total_lines(estimates, device), "", *_assumptions(device)]
    return "\n".join(lines)


def _run_lines(found: Estimate, gpu: Gpu) -> Iterator[str]:
    rate = gpu.rate(found.dtype)
    yield f"## {found.run}: {found.parameters / 1e9:.2f} B parameters, {found.dtype}"
    yield ""
    yield "| search | to | removals | rows x tokens | trials | PFLOP | expected hours |"
    yield "|---|---|---:|---:|---:|---:|---:|"
    for cost in found.searches:
        yield _row(
            cost.variant.name, ", ".join(cost.variant.budgets), cost.removals or "–", f"{cost.rows} x {cost.length}",
            f"{cost.trials:,}", _peta(cost.flops), _hours(cost.flops * cost.expected / rate / 3600),
        )  # fmt: skip
    yield _row(
        f"evaluation of {found.models} models", "", "", f"{found.evaluation_tokens:,} tokens", "–",
        _peta(found.evaluation_flops), _hours(found.evaluation_flops / rate / 3600),
    )  # fmt: skip
    yield _row(
        "generation, timed", "", "", f"{found.generated_tokens:,} tokens", "–", "–",
        _hours(found.generation_bytes / gpu.bandwidth / 3600),
    )  # fmt: skip
    yield _row("together", "", "", "", f"{found.trials:,}", _peta(found.flops), _hours(found.hours(gpu)))
    devices = found.devices(gpu)
    yield ""
    yield (
        f"Memory: {_size(found.weights)} of weights, {_size(found.search_memory)} while searching, "
        f"{_size(found.evaluation_memory)} while evaluating: {devices} x {gpu.name}"
        f"{', device: split' if devices > 1 else ''}. Streamed, a search takes {_size(found.layer_memory)} of the "
        f"device and up to {_size(found.states)} of RAM or disk."
    )
    yield ""
    yield "Disk: " + ", ".join(f"{_size(size)} of {what}" for what, size in found.disk.items()) + "."
    if found.unknown:
        yield ""
        yield f"Not counted, since their items were never measured here: {', '.join(found.unknown)}."


def _total_lines(estimates: Sequence[Estimate], gpu: Gpu) -> Iterator[str]:
    yield f"| run | trials | PFLOP | hours | {gpu.name} | GPU hours | memory | disk |"
    yield "|---|---:|---:|---:|---:|---:|---:|---:|"
    hours = {found.run: found.hours(gpu) for found in estimates}
    for found in estimates:
        yield _row(
            found.run, f"{found.trials:,}", _peta(found.flops), _hours(hours[found.run]), found.devices(gpu),
            _hours(hours[found.run] * found.devices(gpu)), _size(max(found.search_memory, found.evaluation_memory)),
            _size(sum(found.disk.values())),
        )  # fmt: skip
    yield _row(
        "all", f"{sum(f.trials for f in estimates):,}", _peta(sum(f.flops for f in estimates)),
        _hours(sum(hours.values())), max(f.devices(gpu) for f in estimates),
        _hours(sum(hours[f.run] * f.devices(gpu) for f in estimates)),
        _size(max(max(f.search_memory, f.evaluation_memory) for f in estimates)),
        _size(sum(sum(f.disk.values()) for f in estimates)),
    )  # fmt: skip


def _assumptions(gpu: Gpu) -> Iterator[str]:
    yield (
        f"Trials and PFLOP are exact for a given number of removals and rows where nothing accelerates the search, and "
        f"an upper bound where something does; {MHA_SHARE:.0%} of removed blocks are taken to be MHA, and a sample to "
        f"be {SAMPLE_TOKENS:.0f} tokens. A trial that several searches ask for is counted once where that is sure."
    )
    yield ""
    yield (
        f"Hours on one {gpu.name}: {gpu.half / 1e12:.0f} TFLOP/s (16 bits) x {gpu.utilisation:.0%}, which is assumed, "
        f"and {gpu.bandwidth / 1e12:.2f} TB/s for generation, which Python's launches keep a small model from; of "
        "accelerated searches the part of the work that SmolLM2's needed (docs/performance.md). Where a model needs "
        "several devices, one works at a time. Fetching and loading are not counted."
    )


def _row(*cells: object) -> str:
    return "| " + " | ".join(map(str, cells)) + " |"


def _peta(flops: float) -> str:
    return f"{flops / 1e15:,.3g}" if flops < 1e18 else f"{flops / 1e15:,.0f}"


def _hours(hours: float) -> str:
    return f"{hours:.2g}" if hours < 10 else f"{hours:,.0f}"


def _size(size: float) -> str:
    power = min(3, int(math.log10(max(size, 1000)) // 3))
    return f"{size / 1000**power:,.1f} {' kMG'[power]}B"
