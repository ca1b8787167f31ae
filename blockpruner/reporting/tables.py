"""The tables of a report as values of text, and the CSV files that `dvc plots show` draws.

Decides which numbers are shown, and in which order. How a table is marked up is decided in `html` and `markdown`.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from statistics import mean

from blockpruner.core.blocks import BlockKind, Mask, format_mask
from blockpruner.reporting.comparison import BAND, GAINS, SPEED, Comparison, Option
from blockpruner.reporting.findings import first_jump
from blockpruner.reporting.formats import number, parameters, percent, points, signed_points, size, times
from blockpruner.reporting.inputs import Estimate, Result, Speedups, Study, Target, paired
from blockpruner.reporting.methods import cost_words, method_words, taken_out
from blockpruner.scoring.metrics import METRICS

BLANK = "–"
AT_CHANCE = "†"
IN_NOISE = "≈"
BETTER, WORSE = "↑", "↓"
LEGEND = (
    f"Scores in % ± 1 standard error. {WORSE} {BETTER}: differs from the dense model by more than 2 standard errors of "
    f"the paired items; unmarked: within noise. {AT_CHANCE}: within 2 standard errors of chance. Speed-ups (×) are "
    "measured with dense and pruned in turns, so they need not equal the quotient of two columns; "
    f"{IN_NOISE}: the timings of both overlap."
)
COMPARISON_LEGEND = (
    "Upper table: the models that no other betters in speed of generation and held-out perplexity together (the Pareto "
    "front), the slowest first: take the first that is fast enough. Lower table: all targets, by parameters removed; "
    "those of the front are stressed. Against ref: difference of the averages to the first target of the same size "
    f"(within {100 * BAND:.1f} % of the parameters), ± 1 standard error of the paired items; {WORSE} {BETTER}: beyond "
    f"2. {IN_NOISE}: the timings of pruned and dense overlap."
)


@dataclass(frozen=True)
class Table:
    """head: column titles; rows: cells of text, the first being the row's name; strong: indices of rows to stress."""

    head: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    strong: frozenset[int] = field(default_factory=frozenset)


def headline(study: Study) -> Table:
    """Dense against every target: one row a measure, one column a model, and what guessing scores."""
    dense, targets = study.dense, study.targets
    models = [dense, *(t.result for t in targets)]

    def rate(name: str, speed: Sequence[float], speedups: Sequence[float]) -> tuple[str, ...]:
        return (
            name,
            BLANK,
            number(speed[0]),
            *(f"{number(s)} ({times(u)})" for s, u in zip(speed[1:], speedups, strict=True)),
        )

    rows = [
        ("Parameters", BLANK, *(parameters(m.parameters) for m in models)),
        ("Parameters removed", BLANK, percent(0), *(percent(t.plan.ratio) for t in targets)),
        ("Taken out", BLANK, "nothing", *(taken_out(t) for t in targets)),
        *(
            [("Trained since", BLANK, "no", *("LoRA" if t.plan.recover else "no" for t in targets))]
            if any(t.plan.recover for t in targets)
            else []
        ),
        ("Held-out perplexity", BLANK, *(number(m.perplexity) for m in models)),
        *((name, BLANK, *(number(m.perplexities[name]) for m in models)) for name in dense.perplexities),
        *(
            (
                f"{task}, %",
                f"{100 * dense.chance[task]:.1f}",
                *(_score(m.tasks[task], dense.chance[task], dense, m, task) for m in models),
            )
            for task in dense.tasks
        ),
        (
            "Average, %",
            f"{100 * mean(dense.chance[task] for task in dense.tasks):.1f}",
            *(_score(m.average, mean(m.chance[task] for task in m.tasks), dense, m, None) for m in models),
        ),
        rate("Prefill, tokens/s", [m.speed.prefill for m in models], [t.speedups.prefill for t in targets]),
        rate("Decode, tokens/s", [m.speed.decode for m in models], [t.speedups.decode for t in targets]),
        ("Generation speed-up", BLANK, times(1), *(_speedup(t.speedups) for t in targets)),
        ("Peak memory", BLANK, *(size(m.speed.peak_memory_bytes) for m in models)),
        ("KV cache", BLANK, *(size(m.speed.kv_cache_bytes) for m in models)),
        ("Weights", BLANK, *(size(m.weight_bytes) for m in models)),
    ]
    strong = frozenset(i for i, row in enumerate(rows) if row[0] in ("Held-out perplexity", "Average, %"))
    return Table(("", "chance", "dense", *(t.name for t in targets)), tuple(rows), strong)


def choices(comparison: Comparison) -> Table:
    """The models on the front of speed, the slowest first: what to take for a wanted speed."""
    head = ("#", "generation", "take", "method", "held-out PPL", "average, %", "KV cache", "removed")
    rows = [
        (
            str(i),
            _speed(option),
            option.name,
            option.method,
            number(option.result.perplexity),
            points(option.result.average.value, option.result.average.stderr),
            _cache(option),
            percent(option.ratio),
        )
        for i, option in enumerate(comparison.front(SPEED), 1)
    ]
    return Table(head, tuple(rows))


def compared(comparison: Comparison) -> Table:
    """All targets of one dense model by size; strong are those on the front of speed."""
    head = (
        "target", "method", "removed", "taken out", "calibration PPL", "held-out PPL", "generation", "KV cache",
        "average, %", "against ref",
    )  # fmt: skip
    best = comparison.front(SPEED)
    options = [(option, band[0]) for band in comparison.bands() for option in band]
    rows = [_compared(option, reference) for option, reference in options]
    return Table(head, tuple(rows), frozenset(i for i, (option, _) in enumerate(options) if option in best))


def _compared(option: Option, reference: Option) -> tuple[str, ...]:
    target = option.target
    assert target is not None
    calibration, average = target.calibration_perplexity, option.result.average
    return (
        option.name,
        option.method,
        percent(option.ratio),
        taken_out(target),
        BLANK if calibration is None else number(calibration),
        number(option.result.perplexity),
        _speed(option),
        _saved(option),
        points(average.value, average.stderr),
        "ref" if option == reference else _difference(reference, option),
    )


def _difference(reference: Option, option: Option) -> str:
    found = paired(reference.result, option.result)
    mark = (BETTER if found.value > 0 else WORSE) if found.differs_from(0) else ""
    return f"{signed_points(found.value, found.stderr)} {mark}".rstrip()


def _speed(option: Option) -> str:
    return _speedup(option.target.speedups) if option.target else times(1)


def _cache(option: Option) -> str:
    saved = f" ({_saved(option)})" if option.cache_saved else ""
    return size(option.result.speed.kv_cache_bytes) + saved


def _saved(option: Option) -> str:
    return f"−{percent(option.cache_saved, 0)}" if option.cache_saved else percent(0, 0)


def sequence(target: Target) -> Table:
    """The order of removal, with the cost of each, and what it was chosen by where that is something else."""
    jump = first_jump(target.removals)
    is_nll = METRICS[target.plan.metric].is_nll
    by = [] if is_nll else [", ".join(cost_words(target))]
    rows = [("0", "(dense)", percent(0, 2), number(target.removals[0].before), "", *("" for _ in by))]
    scored: Mapping[Mask, float] = {}
    for i, r in enumerate(target.removals, 1):
        scored = r.costs or scored  # one-shot: all are ranked by the scores of the first iteration
        rise = f"{r.rise:+.4f}".replace("-", "−")
        cost = [f"{scored[r.added]:.4g}".replace("-", "−") for _ in by]
        rows.append((str(i), format_mask(r.added), percent(r.ratio, 2), number(r.perplexity), rise, *cost))
    strong = frozenset(() if jump is None else (jump + 1,))
    return Table(("#", "removed", "ratio", "calibration PPL", "NLL rise, nats/token", *by), tuple(rows), strong)


def curve_csv(studies: Sequence[Study]) -> str:
    """One row a model, at full precision; a dense model has ratio 0 and speed-ups of 1."""
    head = ["run", "target", "method", "ratio", "removals", "parameters", "perplexity_calibration"]
    head += ["perplexity_heldout", "accuracy", "accuracy_stderr", "speedup_prefill", "speedup_decode"]
    head += ["speedup_generation", "kv_cache_bytes", "weight_bytes"]
    rows: list[tuple[object, ...]] = []
    for study in studies:
        measures = _measures(study.dense, study.dense_calibration, (1.0, 1.0, 1.0))
        rows.append((study.run, f"{study.run}-dense", "", 0.0, 0, *measures))
        for t in study.targets:
            speedups = (t.speedups.prefill, t.speedups.decode, t.speedups.generation)
            measures = _measures(t.result, t.calibration_perplexity, speedups)
            rows.append((study.run, t.name, method_words(t), t.plan.ratio, len(t.removals), *measures))
    return _csv(head, rows)


def pareto_csv(found: Sequence[Comparison]) -> str:
    """One row an option of each dense model, the slowest first; front_<gain> is 1 where no other is better in held-out
    perplexity and in that gain together."""
    head = ["model", "run", "target", "method", "recovered", "ratio", "mha_removed", "mlp_removed"]
    head += ["perplexity_heldout", "accuracy", "accuracy_stderr", "speedup_generation", "kv_cache_bytes"]
    rows: list[tuple[object, ...]] = []
    for comparison in found:
        fronts = [comparison.front(gain) for gain in GAINS]
        for option in sorted(comparison.options, key=SPEED.of):
            plan, average = option.target and option.target.plan, option.result.average
            rows.append(
                (
                    option.study.labels.model,
                    option.study.run,
                    option.name,
                    method_words(option.target) if option.target else "",
                    int(bool(plan and plan.recover)),
                    option.ratio,
                    *(plan.blocks[kind] if plan else 0 for kind in BlockKind),
                    option.result.perplexity,
                    average.value,
                    average.stderr,
                    option.speedup,
                    option.result.speed.kv_cache_bytes,
                    *(int(option in front) for front in fronts),
                )
            )
    return _csv([*head, *(f"front_{gain.name}" for gain in GAINS)], rows)


def iterations_csv(studies: Sequence[Study]) -> str:
    """One row a removal of every search, from the dense model (iteration 0, nothing removed) on."""
    head = ["run", "target", "iteration", "removed", "ratio", "perplexity", "nll_rise", "units_scored"]
    rows: list[tuple[object, ...]] = []
    for study in studies:
        for t in study.traces:
            rows.append((study.run, t.name, 0, "", 0.0, t.removals[0].before, 0.0, 0))
            rows += [
                (study.run, t.name, i, format_mask(r.added), r.ratio, r.perplexity, r.rise, len(r.costs))
                for i, r in enumerate(t.removals, 1)
            ]
    return _csv(head, rows)


def _measures(result: Result, calibration: float | None, speedups: tuple[float, float, float]) -> tuple[object, ...]:
    return (
        result.parameters,
        calibration,
        result.perplexity,
        result.average.value,
        result.average.stderr,
        *speedups,
        result.speed.kv_cache_bytes,
        result.weight_bytes,
    )


def _score(score: Estimate, chance: float, dense: Result, model: Result, task: str | None) -> str:
    marks = "" if score.differs_from(chance) else AT_CHANCE
    if model is not dense:
        difference = paired(dense, model, task)
        if difference.differs_from(0):
            marks += BETTER if difference.value > 0 else WORSE
    return points(score.value, score.stderr) + (f" {marks}" if marks else "")


def _speedup(speedups: Speedups) -> str:
    return times(speedups.generation) + (f" {IN_NOISE}" if speedups.is_noise else "")


def _csv(head: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(head)
    writer.writerows(rows)
    return out.getvalue()
