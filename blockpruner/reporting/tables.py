"""The tables of a report as values of text, and the CSV files that `dvc plots show` draws.

Decides which numbers are shown, and in which order. How a table is marked up is decided in `html` and `markdown`.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import mean

from blockpruner.blocks import format_mask
from blockpruner.reporting.findings import blocks_of, first_jump
from blockpruner.reporting.formats import number, parameters, percent, points, size, times
from blockpruner.reporting.inputs import Estimate, Result, Speedups, Study, Target, paired

AT_CHANCE = "†"
IN_NOISE = "≈"
BETTER, WORSE = "↑", "↓"
LEGEND = (
    f"Scores in % ± 1 standard error. {WORSE} {BETTER}: differs from the dense model by more than 2 standard errors of "
    f"the paired items; unmarked: within noise. {AT_CHANCE}: within 2 standard errors of chance. Speed-ups (×) are "
    "measured with dense and pruned in turns, so they need not equal the quotient of two columns; "
    f"{IN_NOISE}: the timings of both overlap."
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
    blank = "–"

    def rate(name: str, speed: Sequence[float], speedups: Sequence[float]) -> tuple[str, ...]:
        return (
            name,
            blank,
            number(speed[0]),
            *(f"{number(s)} ({times(u)})" for s, u in zip(speed[1:], speedups, strict=True)),
        )

    rows = [
        ("Parameters", blank, *(parameters(m.parameters) for m in models)),
        ("Parameters removed", blank, percent(0), *(percent(t.plan.ratio) for t in targets)),
        ("Blocks removed", blank, "0", *(blocks_of(t) for t in targets)),
        *(
            [("Trained since", blank, "no", *("LoRA" if t.plan.recover else "no" for t in targets))]
            if any(t.plan.recover for t in targets)
            else []
        ),
        ("Held-out perplexity", blank, *(number(m.perplexity) for m in models)),
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
        ("Generation speed-up", blank, times(1), *(_speedup(t.speedups) for t in targets)),
        ("Peak memory", blank, *(size(m.speed.peak_memory_bytes) for m in models)),
        ("KV cache", blank, *(size(m.speed.kv_cache_bytes) for m in models)),
        ("Weights", blank, *(size(m.weight_bytes) for m in models)),
    ]
    strong = frozenset(i for i, row in enumerate(rows) if row[0] in ("Held-out perplexity", "Average, %"))
    return Table(("", "chance", "dense", *(t.name for t in targets)), tuple(rows), strong)


def sequence(target: Target) -> Table:
    """The order of removal, with the cost of each."""
    jump = first_jump(target.removals)
    rows = [("0", "(dense)", percent(0, 2), number(target.dense_perplexity), "")]
    rows += [
        (
            str(i + 1),
            format_mask(r.added),
            percent(r.ratio, 2),
            number(r.perplexity),
            f"{r.rise:+.4f}".replace("-", "−"),
        )
        for i, r in enumerate(target.removals)
    ]
    strong = frozenset(() if jump is None else (jump + 1,))
    return Table(("#", "removed", "ratio", "calibration PPL", "NLL rise, nats/token"), tuple(rows), strong)


def curve_csv(studies: Sequence[Study]) -> str:
    """One row a model, at full precision; a dense model has ratio 0 and speed-ups of 1."""
    head = ["run", "target", "ratio", "removals", "parameters", "perplexity_calibration", "perplexity_heldout"]
    head += ["accuracy", "accuracy_stderr", "speedup_prefill", "speedup_decode", "speedup_generation"]
    head += ["kv_cache_bytes", "weight_bytes"]
    rows: list[tuple[object, ...]] = []
    for study in studies:
        dense = study.targets[0].dense_perplexity
        rows.append((study.run, f"{study.run}-dense", 0.0, 0, *_measures(study.dense, dense, (1.0, 1.0, 1.0))))
        for t in study.targets:
            speedups = (t.speedups.prefill, t.speedups.decode, t.speedups.generation)
            measures = _measures(t.result, t.plan.calibration["perplexity"], speedups)
            rows.append((study.run, t.name, t.plan.ratio, len(t.removals), *measures))
    return _csv(head, rows)


def iterations_csv(studies: Sequence[Study]) -> str:
    """One row a removal of every search, from the dense model (iteration 0, nothing removed) on."""
    head = ["run", "target", "iteration", "removed", "ratio", "perplexity", "nll_rise", "units_scored"]
    rows: list[tuple[object, ...]] = []
    for study in studies:
        for t in study.traces:
            rows.append((study.run, t.name, 0, "", 0.0, t.dense_perplexity, 0.0, 0))
            rows += [
                (study.run, t.name, i, format_mask(r.added), r.ratio, r.perplexity, r.rise, len(r.rises))
                for i, r in enumerate(t.removals, 1)
            ]
    return _csv(head, rows)


def _measures(result: Result, calibration: float, speedups: tuple[float, float, float]) -> tuple[object, ...]:
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
