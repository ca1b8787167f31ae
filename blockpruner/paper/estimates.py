"""What a study's searches and trainings take, before anything is computed, from its run file: trials, FLOPs, GPU hours.

Decides what is counted and what is assumed. A greedy search asks for a fixed number of masks. Its trials and FLOPs are
exact for a given number of removals, which depends on the kinds of the removed blocks; MHA_SHARE is assumed. Tokens of
texts, accelerated searches and hours are estimates. No model, no text and no torch is read.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from blockpruner.core.blocks import DENSE, BlockKind, Mask, removable_units
from blockpruner.core.budgets import Budget, is_settled, parse_budget, read_budget, require_reachable, resources_of
from blockpruner.core.errors import InputError, UnreachableError
from blockpruner.core.families import Config, count_parameters
from blockpruner.core.options import read_options
from blockpruner.healing.settings import Train
from blockpruner.inputs.settings import Calibration
from blockpruner.methods.registry import check_score, require_budgets
from blockpruner.paper.experiments import Cure, Variant, cures, variants
from blockpruner.paper.flops import Flops
from blockpruner.paper.shapes import find_config
from blockpruner.scoring.metrics import METRICS, NLL
from blockpruner.search.registry import SEARCHES
from blockpruner.settings import Run

MHA_SHARE = 0.7
"""Share of MHA among the blocks that BlockPruner removes: 12 of 17 for Llama2-7B at 22 %, 17 of 24 for its 13B at 25 %,
14 of 22 at 30 % (arXiv 2406.10594, Tables 1 and 5)."""

SAMPLE_TOKENS = 113.4
"""Tokens of an Alpaca sample with the blank line behind it: the mean over 13,354 of the original 52,002, by the
tokenizer of SmolLM2 (49,152 entries). A smaller tokenizer, as Llama 2's, makes more tokens; other texts differ."""

EXPECTED = {"none": 1.0, "lazy": 1.0, "race": 0.44, "lazy+race": 0.23}
"""By `score.acceleration`: the share of the exact search's work that remains. Measured on SmolLM2, 8 rows
(docs/performance.md): lazy+race 1/6.99, 1/6.31 and 1/7.31 of full forward passes, against 1/1.59 exact; race 4.61 of
10.47 TFLOP in a first iteration, of another draw 5.68. `lazy` alone was not measured; nothing is taken off."""

UTILISATION = 0.4
"""Share of a GPU's peak that scoring reaches: an assumption."""


GPUS: dict[str, tuple[str, float, float]] = {
    "h100": ("H100 SXM", 989e12, 67e12),
    "h200": ("H200", 989e12, 67e12),
    "a100": ("A100 SXM 80 GB", 312e12, 19.5e12),
    "rtx4090": ("RTX 4090", 165e12, 82.6e12),
}
"""Title and the maker's peak FLOP/s of dense matrix products: in 16 bits, and in float32 without TF32."""


@dataclass(frozen=True)
class SearchCost:
    """What one search of a study computes."""

    variant: Variant
    removals: int
    """To its farthest budget."""
    rows: int
    length: int
    """Tokens of a row of its calibration set."""
    trials: int
    """Masks scored on all rows that no search before it has scored, with those that its report needs in perplexity;
    an upper bound if the search is accelerated."""
    flops: int
    """Of these trials, with shared prefixes."""
    expected: float = 1.0
    """The share of both that the acceleration is expected to leave."""
    remark: str = ""
    """Why nothing is counted: the method cannot be had, or what it asks for is not known before."""


@dataclass(frozen=True)
class TrainingCost:
    """What the training of one pruned model computes, validation apart."""

    name: str
    budget: str
    rows: int
    """Over all epochs."""
    length: int
    flops: int
    expected: float = 1.0


@dataclass(frozen=True)
class Estimate:
    """All searches of a run's study, and what is trained after them."""

    run: str
    dtype: str
    parameters: int
    searches: tuple[SearchCost, ...]
    trainings: tuple[TrainingCost, ...] = ()

    @property
    def trials(self) -> int:
        return sum(cost.trials for cost in self.searches)

    def hours(self, gpu: str) -> float:
        """Expected on one GPU, a key of GPUS."""
        costs: tuple[SearchCost | TrainingCost, ...] = (*self.searches, *self.trainings)
        return sum(gpu_hours(cost, gpu, self.dtype) for cost in costs)


def gpu_hours(cost: SearchCost | TrainingCost, gpu: str, dtype: str) -> float:
    _, half, single = GPUS[gpu]
    return cost.flops * cost.expected / (UTILISATION * (half if dtype in ("bfloat16", "float16") else single)) / 3600


def estimate(run: str, settings: Run, studies: Path = Path("data/studies")) -> Estimate:
    """Count the searches of a run's study.

    Args:
        studies: folder of fetched checkpoints; the config of one that is there is read.

    Raises:
        InputError: no study section, a shape that is not known, a budget that cannot be counted, or a calibration set
            without a row.
    """
    config, known = find_config(settings.model, studies / run / "model"), set[tuple[str, Mask]]()
    searches = []
    for variant in variants(settings):
        try:
            searches.append(search_cost(variant, config, known))
        except UnreachableError as error:  # `studies.search_all` leaves it out, too
            searches.append(_uncounted(variant, f"cannot be had: {error}"))
        except InputError as error:
            raise InputError(f"runs/{run}.yaml, {variant.name}: {error}") from error
    trained = [cure for cure in cures(settings) if cure.train]  # none without its settings
    trainings = [training_cost(cure, recipe, config) for recipe in (settings.train,) if recipe for cure in trained]
    return Estimate(run, settings.model.dtype, count_parameters(config).total, tuple(searches), tuple(trainings))


def forecast(run: Run, config: Config, budgets: tuple[str, ...]) -> dict[str, Any]:
    """What the search of a run takes, and training if the run has one, by name, from its model's config alone.

    Raises:
        InputError: a budget that cannot be reached, or a calibration set without a row.
    """
    require_budgets(run.score, config, budgets)
    variant = Variant("", "", "block", run.score, run.calibration, budgets)
    timed = [budget for budget in budgets if read_budget(budget)[1] == "x"]
    cost = (
        _uncounted(variant, f"not counted: {timed[0]!r} is a speed-up, so how far it goes is known when it is measured")
        if timed
        else search_cost(variant, config, set())
    )
    layers, dtype = config["num_hidden_layers"], run.model.dtype
    costs: list[SearchCost | TrainingCost] = [cost]
    if run.train is not None and not timed:
        costs.append(training_cost(Cure(variant, budgets[-1], "none", True), run.train, config))
    hours = {gpu: sum(gpu_hours(each, gpu, dtype) for each in costs) for gpu in GPUS}
    return {
        "model": f"{run.model.title}, {config['model_type']}, {dtype}",
        "parameters": count_parameters(config).total,
        "blocks": f"{layers} MHA + {layers} MLP",
        "removals": cost.removals,
        "calibration": f"about {cost.rows} rows of {cost.length} tokens",
        "trials": cost.trials,
        "teraflop": float(f"{sum(each.flops * each.expected for each in costs) / 1e12:.3g}"),
        **{f"hours_{gpu}": float(f"{value:.2g}") for gpu, value in hours.items()},
        "remark": cost.remark
        or f"nothing was computed; assumed: {MHA_SHARE:.0%} of what goes is MHA, {UTILISATION:.0%} of a GPU's peak",
    }


def training_cost(cure: Cure, recipe: Train, config: Config) -> TrainingCost:
    """What the training of a model takes, of which the blocks that `removals` assumes are gone."""
    units = removable_units(int(config["num_hidden_layers"]), cure.variant.score.unit, cure.variant.score.candidates)
    rows, length = recipe.num_rows, recipe.seq_len
    if rows is None:
        rows, length = recipe.num_samples, round(min(SAMPLE_TOKENS, recipe.seq_len))
    flops = Flops.of(config, rows, length).training(removals(units, (cure.budget,), config)[-1], recipe)
    return TrainingCost(cure.variant.name, cure.budget, rows * recipe.epochs, length, flops * recipe.epochs)


def calibration_rows(calibration: Calibration) -> tuple[int, int]:
    """Rows, and tokens of one: samples joined and cut into whole rows, or a row for each sample.

    Raises:
        InputError: no whole row; names how many samples would do.
    """
    if calibration.packing == "per_sample":
        return calibration.samples, round(min(SAMPLE_TOKENS, calibration.seq_len))
    if calibration.num_rows is not None:
        return calibration.num_rows, calibration.seq_len
    rows = int(calibration.samples * SAMPLE_TOKENS // calibration.seq_len)
    if not rows:
        raise InputError(
            f"{calibration.samples} samples, joined, are about {calibration.samples * SAMPLE_TOKENS:.0f} "
            f"tokens, fewer than one row of calibration.seq_len {calibration.seq_len}; raise num_samples to about "
            f"{math.ceil(1.2 * calibration.seq_len / SAMPLE_TOKENS)}, or lower seq_len"
        )
    return rows, calibration.seq_len


def removal_order(units: Sequence[Mask]) -> list[Mask]:
    """The assumed order of removal: from the last layer down; of single blocks MHA_SHARE are MHA."""
    mha = [unit for unit in reversed(units) if len(unit) == 1 and next(iter(unit)).kind is BlockKind.MHA]
    other = [unit for unit in reversed(units) if unit not in mha]
    order: list[Mask] = []
    taken = 0
    while mha or other:
        is_mha = bool(mha) and (not other or taken < MHA_SHARE * (len(order) + 1))
        taken += is_mha
        order.append((mha if is_mha else other).pop(0))
    return order


def removals(units: Sequence[Mask], budgets: Sequence[str], config: Config) -> list[Mask]:
    """What is removed after each step, until every budget is settled.

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
        remaining = {sizes[unit]: unit for unit in order[len(prefixes) :]}  # only sizes matter: one unit of each
        return is_settled(budget, prefixes, resources[budget.resource], list(remaining.values()))

    while not all(map(settled, wanted)):
        prefixes.append(DENSE.union(*order[: len(prefixes) + 1]))
    return prefixes


def search_cost(variant: Variant, config: Config, known: set[tuple[str, Mask]]) -> SearchCost:
    """What one search asks for that is not `known`, by metric and calibration set; enters what it surely scores.

    Later searches share the dense model and the single units of an exact first iteration. Masks that two searches come
    to by chance are counted twice.

    Raises:
        InputError: see `calibration_rows`, `removals` and `require_budgets`.
    """
    kind, score = check_score(variant.score), variant.score
    rows, length = calibration_rows(variant.calibration)
    name, metric, section = score.method, METRICS[score.metric], variant.calibration.model_dump_json()
    flops, depth = Flops.of(config, rows, length), int(config["num_hidden_layers"])

    def unknown(key: str, masks: Sequence[Mask], *, kept: bool) -> list[Mask]:
        found = {mask: (f"{key} {section}", mask) for mask in masks}
        new = [mask for mask, trial in found.items() if trial not in known]
        known.update(trial for mask, trial in found.items() if kept or mask == DENSE)
        return new

    if not kind.removes_blocks:
        require_budgets(score, config, variant.budgets)
        dense = unknown(NLL.key, [DENSE], kept=True)
        measured = kind.passes(read_options(name, kind.options, score.options), depth, len(variant.budgets))
        return SearchCost(variant, 0, rows, length, len(dense), (len(dense) + measured) * flops.full(DENSE))
    steps_scored = SEARCHES[name].scored_steps
    if steps_scored is None:
        return _uncounted(variant, f"not counted: what method: {name} asks for depends on what it finds")
    units = removable_units(depth, score.unit, score.candidates)
    steps = removals(units, variant.budgets, config)
    before = [DENSE, *steps]
    bases = [before[step] for step in steps_scored(len(steps))]
    trials = work = 0
    scored: set[Mask] = set()
    for number, base in enumerate(bases):
        left = {base | unit: unit for unit in units if not unit <= base}
        if metric.influence:  # all units of a base in one pass, or in two passes forward and backward (twice forward)
            once = 6 * flops.full(base) if metric.gradient else flops.blocks_of(base)
            trials, work = trials + len(left), work + once
            continue
        is_first = number == 0
        new = unknown(
            metric.key, [*([DENSE] if is_first else []), *left], kept=is_first and score.acceleration == "none"
        )
        trials += len(new)
        work += flops.sweep(base, [left[mask] for mask in new if mask != DENSE], DENSE in new)
        if metric.reference:  # the dense model's logits for each; its states are kept
            work += len(new) * flops.head + is_first * flops.blocks_of(DENSE)
        if metric.is_nll:
            scored |= left.keys()
    reported = unknown(NLL.key, [mask for mask in [DENSE, *steps] if mask not in scored], kept=False)
    return SearchCost(
        variant, len(steps), rows, length, trials + len(reported), work + sum(map(flops.full, reported)),
        EXPECTED[score.acceleration] * SEARCHES[name].work,
    )  # fmt: skip


def _uncounted(variant: Variant, remark: str) -> SearchCost:
    rows, length = calibration_rows(variant.calibration)
    return SearchCost(variant, 0, rows, length, 0, 0, remark=remark)


def describe(name: str, estimates: Sequence[Estimate], gpu: str | None = None) -> str:
    """The plan of a set as Markdown: every search of every study, with totals.

    Args:
        gpu: a key of GPUS; None is the first.
    """
    gpu = next(iter(GPUS)) if gpu is None else gpu
    if gpu not in GPUS:
        raise InputError(f"GPU {gpu!r} is unknown; valid: {', '.join(GPUS)}")
    title, peak, _ = GPUS[gpu]
    lines = [f"# Plan of {name}: {len(estimates)} {'study' if len(estimates) == 1 else 'studies'}, nothing is computed"]
    totals, everything = [], []
    for found in estimates:
        lines += ["", f"## {found.run}: {found.parameters / 1e9:.2f} B parameters, {found.dtype}", ""]
        lines += ["| search | to | removals | rows x tokens | trials | PFLOP | GPU hours |", "|---|---|" + "---:|" * 5]
        own = [(cost.trials, cost.flops, gpu_hours(cost, gpu, found.dtype)) for cost in found.searches]
        trained = [(0, cost.flops, gpu_hours(cost, gpu, found.dtype)) for cost in found.trainings]
        for cost, amounts in zip(found.searches, own, strict=True):
            budgets, rows = ", ".join(cost.variant.budgets), f"{cost.rows} x {cost.length}"
            numbers = (cost.remark, "", "") if cost.remark else _sums([amounts])
            lines.append(_row(cost.variant.name, budgets, cost.removals or "–", rows, *numbers))
        for training, amounts in zip(found.trainings, trained, strict=True):
            rows = f"{training.rows:,} x {training.length}"
            lines.append(_row(f"training of {training.name}", training.budget, "–", rows, *_sums([amounts])))
        own += trained
        lines.append(_row("together", "", "", "", *_sums(own)))
        totals.append(_row(found.run, *_sums(own)))
        everything += own
    lines += ["", "## Together", "", "| run | trials | PFLOP | GPU hours |", "|---|---:|---:|---:|", *totals]
    lines += [
        _row("all", *_sums(everything)),
        "",
        "Trials and PFLOP of searches are exact for a given number of removals and rows, and an upper bound for an "
        f"accelerated search. Assumed: {MHA_SHARE:.0%} of removed blocks are MHA, and a sample has {SAMPLE_TOKENS:.0f} "
        "tokens. A trial that several searches ask for is counted once where that is sure. Floating search is counted "
        f"as greedy steps; {SEARCHES['floating'].work:g} times their hours are expected.",
        "",
        f"GPU hours are one calculation, nothing measured: PFLOP on one {title} at {UTILISATION:.0%} of its peak "
        f"({peak / 1e12:.0f} TFLOP/s in 16 bits), an assumption, and the share of an accelerated search that SmolLM2's "
        "needed (docs/performance.md). Fetching, loading, compensation, validation, evaluation and timing are not "
        "counted.",
    ]
    if any(cost.remark for found in estimates for cost in found.searches):
        lines += ["", "Searches that are not counted, or cannot be had, are in no total."]
    return "\n".join(lines)


def _sums(amounts: Sequence[tuple[int, int, float]]) -> tuple[str, str, str]:
    """Trials, PFLOP and hours as text."""
    trials, flops, hours = map(sum, zip(*amounts, strict=True))
    peta = f"{flops / 1e15:,.3g}" if flops < 1e18 else f"{flops / 1e15:,.0f}"
    return f"{trials:,}", peta, f"{hours:.2g}" if hours < 10 else f"{hours:,.0f}"


def _row(*cells: object) -> str:
    return "| " + " | ".join(map(str, cells)) + " |"
