"""The report of targets: what it says, in which order, and its files.

For each dense model: the verdict and its numbers, what the search saw, how to use the result. Then the evidence of each
run.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from blockpruner.checkpoints.registry import EXPORTS
from blockpruner.core.blocks import DENSE, format_mask
from blockpruner.evaluation.samples import PROMPTS
from blockpruner.methods.registry import KINDS
from blockpruner.reporting.comparison import Comparison, comparisons
from blockpruner.reporting.figures import figures, of_search, trade_off
from blockpruner.reporting.findings import noise, recommended, stop, warnings
from blockpruner.reporting.formats import listed, number, percent
from blockpruner.reporting.inputs import PrunedOption, ReportedRun, read_studies
from blockpruner.reporting.pages import Facts, Findings, Page, Section, made_line, write_page
from blockpruner.reporting.results import Option, RunLabels
from blockpruner.reporting.tables import (
    NOT_TIMED,
    compared,
    curve_csv,
    headline,
    iterations_csv,
    pareto_csv,
    samples,
    sequence,
    tiles,
)
from blockpruner.scoring.metrics import METRICS
from blockpruner.search.registry import SEARCHES

INTRO = (
    "What is left of a language model when transformer blocks (attention: MHA, feed-forward: MLP) are taken out. "
    "Dense: the model with all its blocks."
)


def write_report(
    out: Path, title: str, targets: Sequence[str], labels: Mapping[str, RunLabels], data: Path, plots: bool
) -> None:
    """Write the report of `targets` in the place of `out`.

    Args:
        out: folder of the report; replaced as a whole, or left as it is on failure.
        targets: names of folders in data/plans and data/results.
        labels: by run, what its model and data are.
        data: folder of plans/, results/ and timings/.
        plots: whether to draw; the CSV files are written in any case.
    """
    studies = read_studies(targets, labels, data)
    files = {
        "curve.csv": curve_csv(studies),
        "iterations.csv": iterations_csv(studies),
        "pareto.csv": pareto_csv(comparisons(studies)),
    }
    write_page(out, build_page(title, studies, plots), files)


def build_page(title: str, studies: Sequence[ReportedRun], draw: bool) -> Page:
    sections = [section for found in comparisons(studies) for section in _sections(found, draw)]
    made = made_line(made for study in studies for option in study.options for made in option.model.made)
    return Page(title, INTRO, tuple(sections), made)


def _sections(comparison: Comparison, draw: bool) -> list[Section]:
    """Give the verdict on one dense model, then the evidence of each run."""
    studies, targets = comparison.studies, comparison.targets
    shown = recommended(targets) or targets[0]
    signs = [finding for study in studies for finding in warnings(study.targets, study.traces)]
    verdict = Section(
        studies[0].labels.name,
        (
            Findings((stop(targets),)),
            tiles(shown),
            *([Findings(tuple(signs))] if signs else []),
            *(of_search(shown) if draw else []),
            *([compared(comparison)] if len(targets) > 1 else []),
            *([trade_off(comparison)] if draw and len(targets) > 1 else []),
            *samples([comparison.options[0], *targets]),
            *(_use(target, target is not shown) for target in sorted(targets, key=lambda target: target is not shown)),
        ),
    )
    return [verdict, *(_evidence(study, shown, draw) for study in studies)]


def _use(target: PrunedOption, folded: bool) -> Facts:
    """Tell where a target's checkpoints are, and how to start engines on them."""
    lines, places = [], {place.name: place for place in target.checkpoints}
    for form in (form for form in EXPORTS if form in places):
        export, place = EXPORTS[form], places[form]
        lines.append((export.title, str(place)))
        engines = [*zip(export.engines, export.commands, strict=False)]
        if KINDS[target.plan.kind].exports == frozenset({"hf"}):  # a model class of ours, which only transformers loads
            engines = engines[:1]
        lines += [(name, text.format(path=place)) for name, text in engines]
        if form == "hf":
            dense = place.parents[2] / "models" / target.plan.run
            lines.append(("beside dense", f'blockpruner compare {dense} {place} --prompt "{PROMPTS[-1]}"'))
    return Facts(f"Use {target.name}", tuple(lines), is_code=True, folded=folded)


def _evidence(study: ReportedRun, shown: Option, draw: bool) -> Section:
    """Show all that was measured of a run. The search of the option `shown` is drawn already."""
    searches = [*study.traces, *(target for target in study.targets if not target.removals)]
    drawn = [plot for target in searches if target is not shown for plot in of_search(target)]
    return Section(
        f"Evidence: {study.run}",
        (
            headline(study),
            Findings((noise(study),)),
            *((*figures(study), *drawn) if draw else ()),
            *map(sequence, study.traces),
            Facts("Model, data and work", _facts(study)),
        ),
    )


def _facts(study: ReportedRun) -> tuple[tuple[str, str], ...]:
    calibration, text, labels = study.targets[0].plan.calibration, study.dense.model.heldout, study.labels
    tasks = ", ".join(f"{task} ({score.items:,} items)" for task, score in study.scores.items())
    mended = [_mended(target) for target in study.targets if target.compensation]
    trained = [target.name for target in study.targets if target.plan.train]
    return (
        ("Model", labels.model),
        ("Calibration", f"{labels.calibration}: {calibration['rows']:,} rows, {calibration['tokens']:,} tokens"),
        ("Held-out text", f"{labels.heldout}: {text.rows:,} rows, {text.tokens:,} tokens"),
        ("Tasks", f"{labels.tasks}: {tasks}"),
        *([("Compensation", f"{labels.compensation}; {'; '.join(mended)}")] if mended else []),
        *([("Training", f"{labels.training}: {listed(trained)}")] if trained else []),
        ("Speed", study.targets[0].race.pruned.setting if study.dense.is_timed else NOT_TIMED),
        *_metric(study),
        _made(study),
    )


def _mended(target: PrunedOption) -> str:
    """Tell what compensation changed on the rows that it held out."""
    found = target.compensation["perplexity"]
    rows = f"{number(found['before'])} → {number(found['after'])} (dense {number(found['dense'])})"
    return f"{target.name}: {target.plan.compensate}, {rows if target.helped else 'no help, left out'}"


def _metric(study: ReportedRun) -> tuple[tuple[str, str], ...]:
    """Tell what the search compared candidates by, if it compared any."""
    plans = [target.plan for target in study.targets if KINDS[target.plan.kind].removes_blocks]
    rows = dict.fromkeys(METRICS[plan.metric] for plan in plans if SEARCHES[plan.method].asks != "nothing")
    return (("Metric", "; ".join(f"{row.title}: {row.formula}" for row in rows)),) if rows else ()


def _made(study: ReportedRun) -> tuple[str, str]:
    """Tell how the plans of a run came about: the method in words, and its work or its steps."""
    counts, words = study.counts, listed(list(dict.fromkeys(target.method for target in study.targets)))
    if any(target.considered for target in study.targets):
        work = counts and (
            f"; the last run of its stage computed {counts['trials_computed']:,} trials and reused "
            f"{counts['trials_reused']:,}, in {counts['seconds']:,.0f} s of scoring"
        )
        return "Search", f"{words}: {_nested(study) if study.traces else _budget_by_budget(study)}{work or ''}"
    steps = [
        f"{target.name}: {text}" for target in study.targets if (text := KINDS[target.plan.kind].steps(target.plan))
    ]
    return "Method", "; ".join([words, *steps])


def _nested(study: ReportedRun) -> str:
    """Tell how much of a search for all budgets was spared, and what its audits found."""
    removals = [removal for trace in study.traces for removal in trace.removals]
    candidates, scored = sum(r.candidates for r in removals), sum(len(r.costs) for r in removals)
    steps = sum(r.candidates > 0 for r in removals)
    if not steps:
        return "no candidate was scored"
    text = f"{scored:,} candidates scored on all rows in {steps:,} iteration{'s' if steps > 1 else ''}"
    if scored < candidates:
        partial, share = sum(r.partial for r in removals), sum(r.work for r in removals) / candidates
        text += (
            f" of {candidates:,}; {partial:,} were dropped early, {candidates - scored - partial:,} not considered:"
            f" {percent(share)} of all pairs of candidate and row computed"
        )
    audited = [r for r in removals if r.lazy_choice is not None]
    if audited:
        other = [
            f"{format_mask(r.added)}, not {format_mask(r.lazy_choice or DENSE)}"
            for r in audited
            if r.lazy_choice != r.added
        ]
        text += f"; {len(audited)} audits, " + (f"which chose otherwise: {'; '.join(other)}" if other else "all agree")
    return text


def _budget_by_budget(study: ReportedRun) -> str:
    """Tell what a search that starts anew for each budget asked for."""
    searches = {t.plan.budget: t.considered for t in study.targets if t.considered is not None}.values()
    partial = sum(search.partial for search in searches)
    return (
        f"{sum(search.complete for search in searches):,} masks scored on all rows"
        + (f" and {partial:,} on the first rows only" if partial else "")
        + f", in {sum(search.steps for search in searches):,} steps"
        + (f" of {len(searches)} searches, one for each budget" if len(searches) > 1 else "")
    )
