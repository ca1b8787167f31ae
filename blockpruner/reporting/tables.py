"""The tables of the report of targets, and the CSV files that `dvc plots show` draws.

Decides which numbers are shown, and in which order.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from statistics import mean

from pandas import DataFrame

from blockpruner.core.blocks import format_mask
from blockpruner.core.budgets import speedup
from blockpruner.evaluation.kinds import Loss
from blockpruner.reporting.findings import paired, paired_confidence, recommended
from blockpruner.reporting.formats import parameters, percent, size, times
from blockpruner.reporting.inputs import ReportedRun
from blockpruner.reporting.results import PARTS, Option
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


def _timed(of: Callable[[Option], Cell]) -> Callable[[Option], Cell]:
    return lambda option: of(option) if option.timed else NOT_TIMED


def _multiple(option: Option, found: Effect) -> Number:
    """Show a multiple of what the dense model has."""
    return (
        Number(found.value, low=found.interval.low, high=found.interval.high)
        if option.plan
        else Number(1)
    )


def _rate(part: str, option: Option) -> Cell:
    """Show tokens per second, beside those of the dense model in the same turns."""
    pruned, dense = (Number(model.rate(part)) for model in (option.race.pruned, option.race.dense))
    return f"{pruned} (dense {dense})" if option.plan else pruned


def _speedup(option: Option, part: str = "generation") -> Number:
    return _multiple(option, option.race.speedups[part])


P_TITLE = "p of the right answer, %"


def _confidence(option: Option) -> Cell:
    """Show p of the right answer, marked where it differs from the dense model's."""
    found = option.model.confidence
    return (
        score(found, mark=_change(paired_confidence(option.dense, option.model))) if found else None
    )


def _change(found: Mean) -> str:
    return (BETTER if found.value > 0 else WORSE) if found.differs else ""


def headline(reported: ReportedRun) -> Table:
    """Compare dense with every target: one row a measure, one column a model, and what guessing
    scores."""
    rows: list[tuple[Cell, ...]] = []

    def add(title: str, of: Callable[[Option], Cell], chance: float | None = None) -> None:
        rows.append(
            (title, None if chance is None else Number(100 * chance, 1), *map(of, reported.options))
        )

    def accuracy(option: Option, task: str | None = None) -> Cell:
        found = option.model.tasks[task] if task else option.model.average
        return score(
            found, mark=_change(paired(option.dense, option.model, task)) if option.plan else ""
        )

    def of_kind(kind: str, option: Option) -> Cell:
        return Number(option.by_kind[kind][0])

    def of_kind_x(kind: str, option: Option) -> Cell:
        return _multiple(option, option.by_kind[kind][1])

    add("Parameters", lambda o: Number(o.model.parameters, write=parameters))
    add("Parameters removed", lambda o: Number(o.ratio, write=percent))
    add("Taken out", lambda o: o.taken_out)
    if any(target.healing for target in reported.targets):
        add("Weights healed by", lambda o: " + ".join(o.healing) or "nothing")
    add("Held-out perplexity", lambda o: Number(o.model.perplexity))
    add("Held-out perplexity, × dense", lambda o: _multiple(o, o.heldout))
    for kind in reported.dense.by_kind:
        add(f"Perplexity of {kind}", partial(of_kind, kind))
        add(f"Perplexity of {kind}, × dense", partial(of_kind_x, kind))
    if any(target.plan.kinds for target in reported.targets):
        add(
            "Texts set aside: mean of kinds",
            lambda o: times(loss.mean) if (loss := _loss(o)) else None,
        )
        add("Texts set aside: worst kind", lambda o: _worst(loss) if (loss := _loss(o)) else None)
    for task, chance in reported.chance.items():
        add(f"{task}, %", partial(accuracy, task=task), chance)
    add("Average, %", accuracy, mean(reported.chance.values()))
    if known := reported.dense.model.p_gold:
        chance = mean(reported.chance[task] for task in known)
        add(P_TITLE, _confidence, chance)
    for part in PARTS:
        add(f"{part.capitalize()}, tokens/s", _timed(partial(_rate, part)))
        add(f"{part.capitalize()}, × dense", _timed(partial(_speedup, part=part)))
    if any("latency" in target.plan.removes for target in reported.targets):
        add("Generation by the times of its blocks", _estimate)
    add("Peak memory", _timed(lambda o: Number(o.race.pruned.memory_bytes, write=size)))
    add("KV cache", _timed(lambda o: Number(o.race.pruned.cache_bytes, write=size)))
    add("Weights", lambda o: Number(o.model.weight_bytes, write=size))
    strong = frozenset(
        i for i, row in enumerate(rows) if row[0] in ("Held-out perplexity", "Average, %")
    )
    columns = (
        Column("measure", ""),
        Column("chance", "chance"),
        *(Column(o.name, o.name) for o in reported.options),
    )
    return Table(
        f"{reported.run}-headline", "Dense against pruned", columns, tuple(rows), (LEGEND,), strong
    )


def _loss(option: Option) -> Loss | None:
    """What the model lost by the texts that judged it."""
    return Loss.of(option.plan.kinds) if option.plan and option.plan.kinds else None


def _worst(loss: Loss) -> str:
    return f"{times(loss.worst)}, {loss.worst_kind}"


def _estimate(option: Option) -> Cell:
    known = option.plan.removes if option.plan else {}
    return times(speedup(known["latency"])) if "latency" in known else None


def _saved(option: Option) -> str:
    share = 1 - option.race.pruned.cache_bytes / option.race.dense.cache_bytes
    return f"−{percent(share, 0)}" if share else percent(0, 0)


def front(found: Sequence[tuple[float, float]]) -> list[int]:
    """Find the points that no other dominates (Pareto front), by index: in both coordinates less is
    better."""
    return [
        i
        for i, p in enumerate(found)
        if not any(q != p and q[0] <= p[0] and q[1] <= p[1] for q in found)
    ]


def best_options(reported: ReportedRun) -> list[Option]:
    """Find the options that no other betters in held-out perplexity and speed; in size, where
    nothing is timed."""
    gains = [
        option.speedup if reported.dense.timed else option.ratio for option in reported.options
    ]
    perplexities = [option.model.perplexity for option in reported.options]
    return [
        reported.options[i]
        for i in front([(-x, y) for x, y in zip(gains, perplexities, strict=True)])
    ]


def compared(reported: ReportedRun) -> Table:
    """List all targets by size; the recommended one is stressed."""
    on_front, best = best_options(reported), recommended(reported.targets)

    def confidence(option: Option) -> Cell:
        return (
            points(paired_confidence(option.dense, option.model)) if option.model.p_gold else None
        )

    fields: Mapping[Column, Callable[[Option], Cell]] = {
        Column("target", "target"): lambda o: o.name,
        Column("removed", "removed"): lambda o: Number(o.ratio, write=percent),
        Column("taken_out", "taken out"): lambda o: o.taken_out,
        Column("heldout_ppl", "held-out PPL, × dense"): lambda o: _multiple(o, o.heldout),
        Column("p_gold", "p of the right answer − dense"): confidence,
        Column("avg", "average − dense"): lambda o: points(paired(o.dense, o.model)),
        Column("generation", "speed, × dense"): _timed(_speedup),
        Column("kv_cache", "KV cache"): _timed(_saved),
        Column("front", "front"): lambda o: "●" if o in on_front else "",
        Column("method", "method"): lambda o: " + ".join((o.method, *o.healing)),
    }
    cells = tuple(tuple(of(target) for of in fields.values()) for target in reported.targets)
    strong = frozenset(i for i, target in enumerate(reported.targets) if target is best)
    return Table("targets", "All targets", tuple(fields), cells, (COMPARISON_LEGEND,), strong)


def samples(options: Sequence[Option]) -> list[Table]:
    """Show what models answer, a column each prompt; nothing where no answers were kept."""
    prompts = tuple(prompt for prompt, _ in options[0].model.samples)
    kept = [
        option
        for option in options
        if tuple(prompt for prompt, _ in option.model.samples) == prompts
    ]
    columns = (
        Column("model", ""),
        *(Column(f"prompt_{i}", prompt) for i, prompt in enumerate(prompts, 1)),
    )
    rows = tuple(
        (option.name, *(text or "(nothing)" for _, text in option.model.samples)) for option in kept
    )
    title = "What the models answer (greedy, cut off after 48 tokens)"
    return [Table("samples", title, columns, rows, folded=len(kept) > 4)] if prompts else []


CURVE: Mapping[str, Callable[[Option], object]] = {
    "method": lambda o: o.method,
    "compensated": lambda o: o.plan.compensate if o.plan else "none",
    "trained": lambda o: int(bool(o.plan and o.plan.train)),
    "ratio": lambda o: o.ratio,
    "removals": lambda o: len(o.curve[1:]),
    "mha_removed": lambda o: o.plan.blocks["mha"] if o.plan else 0,
    "mlp_removed": lambda o: o.plan.blocks["mlp"] if o.plan else 0,
    "parameters": lambda o: o.model.parameters,
    "weight_bytes": lambda o: o.model.weight_bytes,
    "perplexity_calibration": lambda o: o.calibration_perplexity,
    "perplexity_heldout": lambda o: o.model.perplexity,
    "accuracy": lambda o: o.model.average.value,
    "accuracy_stderr": lambda o: o.model.average.stderr,
    "p_gold": lambda o: o.model.confidence and o.model.confidence.value,
    "p_gold_stderr": lambda o: o.model.confidence and o.model.confidence.stderr,
    **{
        f"speedup_{part}": partial(
            lambda o, part: o.timed and o.timed.speedups[part].value, part=part
        )
        for part in PARTS
    },
    "kv_cache_bytes": lambda o: o.timed and o.timed.pruned.cache_bytes,
}
"""Columns of curve.csv behind the run and the target."""


def curve_csv(runs: Sequence[ReportedRun]) -> str:
    """Write one row a model at full precision; a dense model has ratio 0 and speed-ups of 1.
    `front` is 1 for the `best_options` of a run."""
    rows = [
        {
            "run": reported.run,
            "target": option.name if option.plan else f"{reported.run}-dense",
            **{key: of(option) for key, of in CURVE.items()},
            "front": int(option in best_options(reported)),
        }
        for reported in runs
        for option in reported.options
    ]
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
    rows: list[dict[str, object]] = []
    for reported, t in ((one, target) for one in runs for target in one.searches):
        ratios = t.plan.ratios if t.plan.nested else (*[None] * (len(t.steps) - 2), t.ratio)
        before = t.steps[0]
        for i, (step, ratio) in enumerate(zip(t.steps, (0.0, *ratios), strict=True)):
            rise = math.log(step.perplexity / before.perplexity)
            changed = format_mask(step.mask - before.mask), format_mask(before.mask - step.mask)
            row = (reported.run, t.name, i, *changed, len(step.mask), ratio, step.perplexity, rise)
            rows.append(dict(zip(ITERATION_COLUMNS, row, strict=True)))
            before = step
    return to_csv(DataFrame(rows, columns=ITERATION_COLUMNS, dtype=object))
