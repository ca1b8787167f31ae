"""The tables of the report of targets, and the CSV files that `dvc plots show` draws.

Decides which numbers are shown, and in which order.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from statistics import mean

from blockpruner.core.blocks import Mask, format_mask
from blockpruner.reporting.comparison import BAND, GAINS, Comparison
from blockpruner.reporting.findings import jump_at, paired, paired_confidence
from blockpruner.reporting.formats import parameters, percent, size, times
from blockpruner.reporting.grids import (
    Cell,
    Column,
    Field,
    Grid,
    Number,
    csv_text,
    difference,
    grid_of,
    percentage,
    score,
)
from blockpruner.reporting.inputs import PrunedOption, ReportedRun
from blockpruner.reporting.results import Model, Option
from blockpruner.reporting.statistics import Mean
from blockpruner.scoring.metrics import METRICS
from blockpruner.scoring.stability import RESAMPLES, Stability

AT_CHANCE, IN_NOISE, BETTER, WORSE = "†", "≈", "↑", "↓"
LEGEND = (
    f"Scores in % ± 1 standard error. {WORSE} {BETTER}: differs from the dense model by more than 2 standard errors of "
    f"the paired items; unmarked: within noise. {AT_CHANCE}: within 2 standard errors of chance. Speed-ups (×) are "
    "measured with dense and pruned in turns, so they need not equal the quotient of two columns; "
    f"{IN_NOISE}: the 95 % interval of a speed-up holds 1. p of the right answer: of all choices' likelihoods (per "
    "character where the accuracy is by character) the share that the right one has; finer than right and wrong."
)
COMPARISON_LEGEND = (
    "Upper table: the models that no other betters in speed of generation (in parameters, where nothing is timed) and "
    "held-out perplexity together (the Pareto front), the slowest first: take the first that is fast enough. Lower "
    "table: all targets, by parameters removed; those of the front are stressed. Against ref: difference of the "
    f"averages to the first target of the same size (within {100 * BAND:.1f} % of the parameters), ± 1 standard error "
    f"of the paired items; {WORSE} {BETTER}: beyond 2, as at p of the right answer. {IN_NOISE}: the 95 % interval of "
    "the speed-up holds 1."
)


NOT_TIMED = "not timed"


def _timed(of: Callable[[Option], Cell]) -> Callable[[Option], Cell]:
    return lambda option: of(option) if option.is_timed else NOT_TIMED


def _calibration(option: Option) -> Cell:
    value = option.calibration_perplexity
    return None if value is None else Number(value)


def _speedup(option: Option) -> Cell:
    return Number(option.speedup, write=times, mark=IN_NOISE if option.plan and option.race.is_noise else "")


def _perplexity(task: str) -> Callable[[Option], Cell]:
    return lambda option: Number(option.model.tasks[task].value)


def _rate(part: str) -> Callable[[Option], Cell]:
    def cell(option: Option) -> Cell:
        speedup = f"({times(option.race.speedup(part))})" if option.plan else ""
        return Number(option.race.pruned.rate(part), mark=speedup)

    return cell


METHOD = Field[Option]("method", "method", lambda option: option.recipe)
REMOVED = Field[Option]("removed", "removed", lambda option: percentage(option.ratio))
CALIBRATION = Field[Option]("calibration_ppl", "calibration PPL", _calibration)
HELDOUT = Field[Option]("heldout_ppl", "held-out PPL", lambda option: Number(option.model.perplexity))
GENERATION = Field[Option]("generation", "generation", _timed(_speedup))
AVERAGE = Field[Option]("avg", "average, %", lambda option: score(option.model.average))


P_TITLE = "p of the right answer, %"
P_GOLD = Field[Option]("p_gold", P_TITLE, lambda o: score(o.model.confidence) if o.model.confidence else None)


def _confidence(option: Option, base: Model | None) -> Cell:
    """Show p of the right answer, marked where it differs from that of the base."""
    found = option.model.confidence
    if found is None:
        return None
    return score(found, mark="" if base is None else _change(paired_confidence(base, option.model)))


def _change(found: Mean) -> str:
    return (BETTER if found.value > 0 else WORSE) if found.differs_from(0) else ""


def headline(study: ReportedRun) -> Grid:
    """Compare dense with every target: one row a measure, one column a model, and what guessing scores."""
    rows: list[tuple[Cell, ...]] = []

    def add(title: str, of: Callable[[Option], Cell], chance: float | None = None) -> None:
        rows.append((title, None if chance is None else Number(100 * chance, 1), *map(of, study.options)))

    def accuracy(task: str | None, chance: float) -> Callable[[Option], Cell]:
        def cell(option: Option) -> Cell:
            found = option.model.tasks[task] if task else option.model.average
            marks = "" if found.differs_from(chance) else AT_CHANCE
            return score(found, mark=marks + (_change(paired(option.dense, option.model, task)) if option.plan else ""))

        return cell

    add("Parameters", lambda o: Number(o.model.parameters, write=parameters))
    add("Parameters removed", REMOVED.of)
    add("Taken out", lambda o: o.taken_out)
    if any(target.healing for target in study.targets):
        add("Weights healed by", lambda o: " + ".join(o.healing) or "nothing")
    add("Held-out perplexity", HELDOUT.of)
    for task, found in study.dense.model.tasks.items():
        if not found.is_accuracy:
            add(f"{task}, {found.metric.replace('_', ' ')}", _perplexity(task))
    for task, chance in study.chance.items():
        add(f"{task}, %", accuracy(task, chance), chance)
    add("Average, %", accuracy(None, study.average_chance), study.average_chance)
    if known := study.dense.model.p_gold:
        chance = mean(study.chance[task] for task in known)
        add(P_TITLE, lambda o: _confidence(o, o.dense if o.plan else None), chance)
    add("Prefill, tokens/s", _timed(_rate("prefill")))
    add("Decode, tokens/s", _timed(_rate("decode")))
    add("Generation speed-up", GENERATION.of)
    add("Peak memory", _timed(lambda o: Number(o.race.pruned.memory_bytes, write=size)))
    add("KV cache", _timed(lambda o: Number(o.race.pruned.cache_bytes, write=size)))
    add("Weights", lambda o: Number(o.model.weight_bytes, write=size))
    strong = frozenset(i for i, row in enumerate(rows) if row[0] in ("Held-out perplexity", "Average, %"))
    columns = (Column("measure", ""), Column("chance", "chance"), *(Column(o.name, o.name) for o in study.options))
    return Grid(f"{study.run}-headline", "Dense against pruned", columns, tuple(rows), (LEGEND,), strong)


def _saved(option: Option) -> str:
    return f"−{percent(option.cache_saved, 0)}" if option.cache_saved else percent(0, 0)


def choices(comparison: Comparison, title: str) -> Grid:
    """List the models on the front of speed (of size, where nothing is timed), the slowest first: what to take for a
    wanted speed."""
    front = comparison.front(comparison.gains[0])

    def cache(option: Option) -> Cell:
        mark = f"({_saved(option)})" if option.cache_saved else ""
        return Number(option.race.pruned.cache_bytes, write=size, mark=mark)

    fields: tuple[Field[Option], ...] = (
        Field("place", "#", lambda o: Number(front.index(o) + 1, 0)),
        GENERATION,
        Field("take", "take", lambda o: o.name),
        METHOD,
        HELDOUT,
        AVERAGE,
        P_GOLD,
        Field("kv_cache", "KV cache", _timed(cache)),
        REMOVED,
    )
    return grid_of("choices", title, fields, front)


def compared(comparison: Comparison) -> Grid:
    """List all targets of one dense model by size; those of `choices` are stressed."""
    best = comparison.front(comparison.gains[0])
    leaders = {id(option): band[0] for band in comparison.bands() for option in band}

    def against(option: Option) -> Cell:
        if option is leaders[id(option)]:
            return "ref"
        found = paired(leaders[id(option)].model, option.model)
        return difference(found, _change(found))

    def confidence(option: Option) -> Cell:
        leader = leaders[id(option)]
        return _confidence(option, None if option is leader else leader.model)

    fields: tuple[Field[Option], ...] = (
        Field("target", "target", lambda o: o.name),
        METHOD,
        REMOVED,
        Field("taken_out", "taken out", lambda o: o.taken_out),
        CALIBRATION,
        HELDOUT,
        GENERATION,
        Field("kv_cache", "KV cache", _timed(_saved)),
        AVERAGE,
        Field("against_ref", "against ref", against),
        Field("p_gold", P_TITLE, confidence),
    )
    rows = [option for band in comparison.bands() for option in band]
    return grid_of("targets", "All targets", fields, rows, (COMPARISON_LEGEND,), lambda option: option in best)


STABILITY_LEGEND = (
    "Rivals: candidates that the calibration rows cannot tell from the one removed (paired t test, 95 %), of those "
    "compared, on the same rows. What a race dropped earlier or a lazy step left out is not compared. Same choice: the "
    f"share of {RESAMPLES:,} resampled row sets in which the same candidate is the best. Blank: the rows do not tell."
)


def sequence(target: PrunedOption) -> Grid:
    """List the removals in order, with the cost of each, what it was chosen by where that is something else, and how
    firmly."""
    jump = jump_at(target)
    columns = [
        Column("place", "#"), Column("removed", "removed"), Column("ratio", "ratio"),
        Column("calibration_ppl", "calibration PPL"), Column("nll_rise", "NLL rise, nats/token"),
    ]  # fmt: skip
    metric = METRICS[target.plan.metric]
    by = not metric.is_nll
    if by:
        columns.append(Column("cost", f"{metric.cost_title}, {metric.units_text}"))
    firm = any(r.stability for r in target.removals)
    if firm:
        columns += [Column("rivals", "rivals"), Column("kept", "same choice")]
    dense: tuple[Cell, ...] = (Number(0, 0), "(dense)", percentage(0, 2), Number(target.curve[0]), "")
    rows = [dense + ("",) * (by + 2 * firm)]
    scored: Mapping[Mask, float] = {}
    for i, r in enumerate(target.removals, 1):
        scored = r.costs or scored  # one-shot: the scores of the first iteration rank all removals
        row: tuple[Cell, ...] = (
            Number(i, 0), format_mask(r.added), percentage(r.ratio, 2), Number(r.perplexity),
            Number(r.rise, write=lambda value: f"{value:+.4f}".replace("-", "−")),
        )  # fmt: skip
        cost = (Number(scored[r.added], write=lambda value: f"{value:.4g}".replace("-", "−")),) if by else ()
        rows.append(row + cost + (_firm(r.stability) if firm else ()))
    title = f"{target.name}: {len(target.removals)} removals in order"
    strong = frozenset(() if jump is None else (jump + 1,))
    notes = (STABILITY_LEGEND,) if firm else ()
    return Grid(f"{target.name}-sequence", title, tuple(columns), tuple(rows), notes, strong, folded=True)


def _firm(found: Stability | None) -> tuple[Cell, ...]:
    if found is None:
        return "", ""
    return Number(len(found.rivals), 0, mark=f"of {found.compared}"), percentage(found.kept, 0)


MEASURES: Mapping[str, Callable[[Option], object]] = {
    "perplexity_heldout": lambda o: o.model.perplexity,
    "accuracy": lambda o: o.model.average.value,
    "accuracy_stderr": lambda o: o.model.average.stderr,
    "p_gold": lambda o: o.model.confidence and o.model.confidence.value,
    "p_gold_stderr": lambda o: o.model.confidence and o.model.confidence.stderr,
}

SPEED_MEASURES: Mapping[str, Callable[[Option], object]] = {
    "speedup_generation": lambda o: o.speedup if o.is_timed else None,
    "kv_cache_bytes": lambda o: o.race.pruned.cache_bytes if o.is_timed else None,
}

CURVE: Mapping[str, Callable[[Option], object]] = {
    "method": lambda o: o.method,
    "ratio": lambda o: o.ratio,
    "removals": lambda o: len(o.curve[1:]),
    "parameters": lambda o: o.model.parameters,
    "perplexity_calibration": lambda o: o.calibration_perplexity,
    **MEASURES,
    "speedup_prefill": lambda o: o.race.speedup("prefill") if o.is_timed else None,
    "speedup_decode": lambda o: o.race.speedup("decode") if o.is_timed else None,
    **SPEED_MEASURES,
    "weight_bytes": lambda o: o.model.weight_bytes,
}
"""Columns of curve.csv behind the run and the target: one row a model, the dense one included."""

PARETO: Mapping[str, Callable[[Option], object]] = {
    "target": lambda o: o.name,
    "method": lambda o: o.method,
    "compensated": lambda o: o.plan.compensate if o.plan else "none",
    "recovered": lambda o: int(bool(o.plan and o.plan.recover)),
    "ratio": lambda o: o.ratio,
    "mha_removed": lambda o: o.blocks["mha"],
    "mlp_removed": lambda o: o.blocks["mlp"],
    **MEASURES,
    **SPEED_MEASURES,
}
"""Columns of pareto.csv behind the model and the run."""


def curve_csv(studies: Sequence[ReportedRun]) -> str:
    """Write one row a model at full precision; a dense model has ratio 0 and speed-ups of 1."""
    rows = [
        (study.run, option.name if option.plan else f"{study.run}-dense", *(of(option) for of in CURVE.values()))
        for study in studies
        for option in study.options
    ]
    return csv_text([("run", "target", *CURVE), *rows])


def pareto_csv(found: Sequence[Comparison]) -> str:
    """Write one row an option of each dense model, the slowest first. front_<gain> is 1 where no other is better in
    held-out perplexity and in that gain together, and blank where the gain is not known."""
    rows: list[Sequence[object]] = [("model", "run", *PARETO, *(f"front_{gain.name}" for gain in GAINS))]
    for comparison in found:
        fronts = [comparison.front(gain) if gain in comparison.gains else None for gain in GAINS]
        runs = {id(option): study.run for study in reversed(comparison.studies) for option in study.options}
        for option in sorted(comparison.options, key=comparison.gains[0].of):
            on_front = (None if front is None else int(option in front) for front in fronts)
            rows.append((option.subject, runs[id(option)], *(of(option) for of in PARETO.values()), *on_front))
    return csv_text(rows)


def iterations_csv(studies: Sequence[ReportedRun]) -> str:
    """Write one row a removal of every search, from the dense model (iteration 0, nothing removed) on."""
    rows: list[Sequence[object]] = [
        ("run", "target", "iteration", "removed", "ratio", "perplexity", "nll_rise", "units_scored", "rows_compared",
         "units_compared", "rivals", "kept")
    ]  # fmt: skip
    for study, t in ((one, target) for one in studies for target in one.traces):
        rows.append((study.run, t.name, 0, "", 0.0, t.curve[0], 0.0, 0, *[None] * 4))
        rows += [
            (study.run, t.name, i, format_mask(r.added), r.ratio, r.perplexity, r.rise, len(r.costs), *firm)
            for i, r in enumerate(t.removals, 1)
            for s in [r.stability]
            for firm in [(s.rows, s.compared, len(s.rivals), s.kept) if s else (None,) * 4]
        ]
    return csv_text(rows)
