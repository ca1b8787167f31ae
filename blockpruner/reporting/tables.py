"""The tables of the report of targets, and the CSV files that `dvc plots show` draws.

Decides which numbers are shown, and in which order.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from statistics import mean

from pandas import DataFrame

from blockpruner.core.blocks import format_mask
from blockpruner.core.budgets import speedup
from blockpruner.evaluation.kinds import Loss
from blockpruner.reporting.findings import paired, paired_confidence, recommended
from blockpruner.reporting.formats import parameters, percent, size, times
from blockpruner.reporting.inputs import PrunedOption, ReportedRun
from blockpruner.reporting.results import PHASES, Option
from blockpruner.reporting.statistics import Effect, Mean
from blockpruner.reporting.table import Cell, Column, Number, Table, points, score, to_csv

BETTER, WORSE = "↑", "↓"
GLOSS = (
    "p of the right answer: of all choices' likelihoods (per character where the accuracy is by"
    " character) the share that the right one has; finer than right and wrong."
)
LEGEND = (
    f"Scores in % ± 1 standard error. {WORSE} {BETTER}: differs from the dense model by more than 2"
    " standard errors of the paired items; unmarked: within noise. Brackets: 95 % intervals. A"
    " pruned model is timed in turns with the dense one, whose speed in these turns stands beside"
    f" its own. {GLOSS}"
)
COMPARISON_LEGEND = (
    "By parameters removed. × dense and − dense (points): against the dense model, with 95 %"
    " intervals of the paired repeats of a generation, rows of text or items. Stressed: the"
    " recommended one. ●: no other betters it in both speed (parameters, where nothing is timed)"
    f" and held-out perplexity (the Pareto front). {GLOSS}"
)
NOT_TIMED = "not timed"
P_TITLE = "p of the right answer, %"
STRESSED_MEASURES = ("Held-out perplexity", "Average, %")

Show = Callable[[Option], Cell]
"""Makes the cell of a model."""


@dataclass(frozen=True)
class Measure:
    """A row of the headline; `chance` is what guessing scores."""

    title: str
    show: Show
    chance: float | None = None


def _timed(show: Show) -> Show:
    """Show a cell only where the model was timed."""
    return lambda option: show(option) if option.timed else NOT_TIMED


def _multiple(option: Option, effect: Effect) -> Number:
    """Show a multiple of what the dense model has."""
    if option.plan is None:
        return Number(1)
    interval = effect.interval
    return Number(effect.value, low=interval.low, high=interval.high)


def _ratio(option: Option) -> Cell:
    return Number(option.ratio, write=percent)


def _heldout(option: Option) -> Cell:
    return _multiple(option, option.heldout)


def _rate(phase: str, option: Option) -> Cell:
    """Show tokens per second, beside those of the dense model in the same turns."""
    race = option.race
    pruned = Number(race.pruned.rate(phase))
    if option.plan is None:
        return pruned
    dense = Number(race.dense.rate(phase))
    return f"{pruned} (dense {dense})"


def _speedup(phase: str, option: Option) -> Cell:
    return _multiple(option, option.race.speedups[phase])


def _accuracy(option: Option, task: str | None = None) -> Cell:
    """Show a task or the average, marked where it differs from the dense model's."""
    accuracy = option.model.tasks[task] if task else option.model.average
    if option.plan is None:
        return score(accuracy)
    change = paired(option.dense, option.model, task)
    return score(accuracy, _mark(change))


def _confidence(option: Option) -> Cell:
    """Show p of the right answer, marked where it differs from the dense model's."""
    confidence = option.model.confidence
    if confidence is None:
        return None
    change = paired_confidence(option.dense, option.model)
    return score(confidence, _mark(change))


def _mark(change: Mean) -> str:
    if not change.differs:
        return ""
    return BETTER if change.value > 0 else WORSE


def headline(reported: ReportedRun) -> Table:
    """Compare dense with every target: one row a measure, one column a model, and what guessing
    scores."""
    options = reported.options
    rows: list[tuple[Cell, ...]] = []
    strong = set()
    for measure in _measures(reported):
        if measure.title in STRESSED_MEASURES:
            strong.add(len(rows))
        guess = None
        if measure.chance is not None:
            guess = Number(100 * measure.chance, 1)
        cells = map(measure.show, options)
        rows.append((measure.title, guess, *cells))
    models = [Column(option.name, option.name) for option in options]
    columns = (Column("measure", ""), Column("chance", "chance"), *models)
    return Table(
        f"{reported.run}-headline",
        "Dense against pruned",
        columns,
        tuple(rows),
        (LEGEND,),
        frozenset(strong),
    )


def _measures(reported: ReportedRun) -> Iterator[Measure]:
    """List the rows of the headline."""
    yield Measure("Parameters", lambda o: Number(o.model.parameters, write=parameters))
    yield Measure("Parameters removed", _ratio)
    yield Measure("Taken out", lambda o: o.taken_out)
    if any(target.healing for target in reported.targets):
        yield Measure("Weights healed by", lambda o: " + ".join(o.healing) or "nothing")
    yield Measure("Held-out perplexity", lambda o: Number(o.model.perplexity))
    yield Measure("Held-out perplexity, × dense", _heldout)
    for kind in reported.dense.by_kind:
        title = f"Perplexity of {kind}"
        yield Measure(title, partial(_perplexity_of_kind, kind))
        yield Measure(f"{title}, × dense", partial(_loss_of_kind, kind))
    # Only rows of a mix that neither search nor fit has seen judge a model by kind.
    if any(target.plan.kinds for target in reported.targets):
        yield Measure("Texts set aside: mean of kinds", _mean_loss)
        yield Measure("Texts set aside: worst kind", _worst_loss)
    chance = reported.chance
    for task in chance:
        yield Measure(f"{task}, %", partial(_accuracy, task=task), chance[task])
    yield Measure("Average, %", _accuracy, mean(chance.values()))
    confident_tasks = reported.dense.model.p_gold
    # Only some tasks have a p of the right answer.
    if confident_tasks:
        guess = mean(chance[task] for task in confident_tasks)
        yield Measure(P_TITLE, _confidence, guess)
    for phase in PHASES:
        title = phase.capitalize()
        yield Measure(f"{title}, tokens/s", _timed(partial(_rate, phase)))
        yield Measure(f"{title}, × dense", _timed(partial(_speedup, phase)))
    # The times of the blocks are known only where they were measured.
    if any("latency" in target.plan.removes for target in reported.targets):
        yield Measure("Generation by the times of its blocks", _estimate)
    yield Measure("Peak memory", _timed(lambda o: Number(o.race.pruned.memory_bytes, write=size)))
    yield Measure("KV cache", _timed(lambda o: Number(o.race.pruned.cache_bytes, write=size)))
    yield Measure("Weights", lambda o: Number(o.model.weight_bytes, write=size))


def _perplexity_of_kind(kind: str, option: Option) -> Cell:
    perplexity, _ = option.by_kind[kind]
    return Number(perplexity)


def _loss_of_kind(kind: str, option: Option) -> Cell:
    _, effect = option.by_kind[kind]
    return _multiple(option, effect)


def _loss(option: Option) -> Loss | None:
    """What the model lost by the texts that judged it."""
    plan = option.plan
    if plan is None or not plan.kinds:
        return None
    return Loss.of(plan.kinds)


def _mean_loss(option: Option) -> Cell:
    loss = _loss(option)
    return None if loss is None else times(loss.mean)


def _worst_loss(option: Option) -> Cell:
    loss = _loss(option)
    return None if loss is None else f"{times(loss.worst)}, {loss.worst_kind}"


def _estimate(option: Option) -> Cell:
    plan = option.plan
    if plan is None or "latency" not in plan.removes:
        return None
    return times(speedup(plan.removes["latency"]))


def _saved_cache(option: Option) -> Cell:
    """Show the share of the dense model's KV cache that the model does without."""
    race = option.race
    share = 1 - race.pruned.cache_bytes / race.dense.cache_bytes
    text = percent(share, 0)
    return f"−{text}" if share else text


def _confidence_change(option: Option) -> Cell:
    if not option.model.p_gold:
        return None
    return points(paired_confidence(option.dense, option.model))


def front(points: Sequence[tuple[float, float]]) -> list[int]:
    """Find the points that no other dominates (Pareto front), by index: in both coordinates less is
    better."""
    indices = []
    for index, (x, y) in enumerate(points):
        # Equal points do not dominate one another.
        rivals = [rival for rival in points if rival != (x, y)]
        if not any(rival[0] <= x and rival[1] <= y for rival in rivals):
            indices.append(index)
    return indices


def best_options(reported: ReportedRun) -> list[Option]:
    """Find the options that no other betters in held-out perplexity and speed; in size, where
    nothing is timed."""
    points = []
    for option in reported.options:
        # `front` minimises, so what is to be large is negated.
        gain = option.speedup if reported.dense.timed else option.ratio
        points.append((-gain, option.model.perplexity))
    return [reported.options[index] for index in front(points)]


def compared(reported: ReportedRun) -> Table:
    """List all targets by size; the recommended one is stressed."""
    targets = reported.targets
    on_front = best_options(reported)
    cells: Mapping[Column, Show] = {
        Column("target", "target"): lambda o: o.name,
        Column("removed", "removed"): _ratio,
        Column("taken_out", "taken out"): lambda o: o.taken_out,
        Column("heldout_ppl", "held-out PPL, × dense"): _heldout,
        Column("p_gold", "p of the right answer − dense"): _confidence_change,
        Column("avg", "average − dense"): lambda o: points(paired(o.dense, o.model)),
        Column("generation", "speed, × dense"): _timed(partial(_speedup, "generation")),
        Column("kv_cache", "KV cache"): _timed(_saved_cache),
        Column("front", "front"): lambda o: "●" if o in on_front else "",
        Column("method", "method"): lambda o: " + ".join((o.method, *o.healing)),
    }
    rows = [tuple(show(target) for show in cells.values()) for target in targets]
    best = recommended(targets)
    strong = frozenset() if best is None else frozenset([targets.index(best)])
    notes = (COMPARISON_LEGEND,)
    return Table("targets", "All targets", tuple(cells), tuple(rows), notes, strong)


def samples(options: Sequence[Option]) -> list[Table]:
    """Show what models answer, a column each prompt; nothing where no answers were kept."""
    prompts = [prompt for prompt, _ in options[0].model.samples]
    if not prompts:
        return []
    rows: list[tuple[str, ...]] = []
    for option in options:
        answers = option.model.samples
        # Evidence of an earlier version may have other prompts.
        if [prompt for prompt, _ in answers] == prompts:
            rows.append((option.name, *(text or "(nothing)" for _, text in answers)))
    columns = [Column(f"prompt_{index}", prompt) for index, prompt in enumerate(prompts, 1)]
    title = "What the models answer (greedy, cut off after 48 tokens)"
    model = Column("model", "")
    is_long = len(rows) > 4
    return [Table("samples", title, (model, *columns), tuple(rows), folded=is_long)]


def _curve_row(run: str, option: Option, is_best: bool) -> dict[str, object]:
    """The row of a model in curve.csv."""
    plan = option.plan
    model = option.model
    race = option.timed
    confidence = model.confidence
    row: dict[str, object] = {
        "run": run,
        "target": option.name if plan else f"{run}-dense",
        "method": option.method,
        "compensated": plan.compensate if plan else "none",
        "trained": int(bool(plan and plan.train)),
        "ratio": option.ratio,
        "removals": len(option.curve[1:]),
        "mha_removed": plan.blocks["mha"] if plan else 0,
        "mlp_removed": plan.blocks["mlp"] if plan else 0,
        "parameters": model.parameters,
        "weight_bytes": model.weight_bytes,
        "perplexity_calibration": option.calibration_perplexity,
        "perplexity_heldout": model.perplexity,
        "accuracy": model.average.value,
        "accuracy_stderr": model.average.stderr,
        "p_gold": confidence and confidence.value,
        "p_gold_stderr": confidence and confidence.stderr,
    }
    for phase in PHASES:
        row[f"speedup_{phase}"] = race and race.speedups[phase].value
    row["kv_cache_bytes"] = race and race.pruned.cache_bytes
    row["front"] = int(is_best)
    return row


def curve_csv(runs: Sequence[ReportedRun]) -> str:
    """Write one row a model at full precision; a dense model has ratio 0 and speed-ups of 1.
    `front` is 1 for the `best_options` of a run."""
    rows = []
    for reported in runs:
        best = best_options(reported)
        for option in reported.options:
            rows.append(_curve_row(reported.run, option, option in best))
    return to_csv(DataFrame(rows, dtype=object))


ITERATION_COLUMNS = (
    "run",
    "target",
    "iteration",
    "removed",
    "put_back",
    "blocks",
    "ratio",
    "perplexity",
    "nll_rise",
)


def iterations_csv(runs: Sequence[ReportedRun]) -> str:
    """Write one row a step of every search, from the dense model (iteration 0, nothing removed) on.

    The ratio of a search that is not nested is known at its end only; `blocks` counts what is gone
    at every step.
    """
    rows: list[tuple[object, ...]] = []
    for reported in runs:
        for target in reported.searches:
            rows += [(reported.run, target.name, *row) for row in _iterations(target)]
    return to_csv(DataFrame(rows, columns=ITERATION_COLUMNS, dtype=object))


def _iterations(target: PrunedOption) -> Iterator[tuple[object, ...]]:
    """The values of ITERATION_COLUMNS from `iteration` on."""
    steps = target.steps
    ratios: list[float | None] = [0.0, *target.plan.ratios]
    # A search that exchanges blocks has no ratio for each step in its plan.
    if not target.plan.nested:
        unknown = [None] * (len(steps) - 2)
        ratios = [0.0, *unknown, target.ratio]
    previous = steps[0]
    for index, (step, ratio) in enumerate(zip(steps, ratios, strict=True)):
        removed = format_mask(step.mask - previous.mask)
        put_back = format_mask(previous.mask - step.mask)
        nll_rise = math.log(step.perplexity / previous.perplexity)
        yield index, removed, put_back, len(step.mask), ratio, step.perplexity, nll_rise
        previous = step
