"""What a report says, in which order: what can stand in for each dense model, then one section a run.

How it is marked up is decided in `html` and `markdown`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain

from blockpruner.core.blocks import DENSE, format_mask
from blockpruner.reporting.comparison import Comparison, comparisons
from blockpruner.reporting.findings import Finding, findings
from blockpruner.reporting.formats import listed, percent
from blockpruner.reporting.inputs import Study
from blockpruner.reporting.methods import method_words
from blockpruner.reporting.plots import Plot, pareto_plot, plots
from blockpruner.reporting.tables import COMPARISON_LEGEND, LEGEND, Table, choices, compared, headline, sequence
from blockpruner.store.provenance import commit, machine, versions


@dataclass(frozen=True)
class Section:
    """facts: (name, text) pairs on model, data and work; sequences: a table of removals by target."""

    run: str
    findings: tuple[Finding, ...]
    headline: Table
    legend: str
    plots: tuple[Plot, ...]
    sequences: tuple[tuple[str, Table], ...]
    facts: tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class Overview:
    """All targets of one dense model, of several runs where it has them. choices: those on the front of speed."""

    title: str
    choices: Table
    targets: Table
    legend: str
    plots: tuple[Plot, ...]


@dataclass(frozen=True)
class Page:
    """Everything is plain text; nothing in it is markup except the plots' SVG."""

    title: str
    overviews: tuple[Overview, ...]
    sections: tuple[Section, ...]
    provenance: str

    @property
    def plots(self) -> tuple[Plot, ...]:
        return tuple(chain(*(o.plots for o in self.overviews), *(s.plots for s in self.sections)))


def build_page(title: str, studies: Sequence[Study], draw: bool) -> Page:
    overviews = tuple(_overview(found, draw) for found in comparisons(studies) if len(found.options) > 2)
    return Page(title, overviews, tuple(_section(study, draw) for study in studies), provenance_line())


def provenance_line() -> str:
    found = commit()
    where = found[:12] + found[40:] if found else "unknown (no repository)"
    packages = ", ".join(f"{name} {version}" for name, version in versions().items())
    return f"Made at commit {where} with {packages}, on {machine()}."


def _overview(comparison: Comparison, draw: bool) -> Overview:
    return Overview(
        title=f"What to take for {comparison.studies[0].labels.model}",
        choices=choices(comparison),
        targets=compared(comparison),
        legend=COMPARISON_LEGEND,
        plots=(pareto_plot(comparison),) if draw else (),
    )


def _section(study: Study, draw: bool) -> Section:
    return Section(
        run=study.run,
        findings=tuple(findings(study)),
        headline=headline(study),
        legend=LEGEND,
        plots=tuple(plots(study)) if draw else (),
        sequences=tuple((f"{t.name}: {len(t.removals)} removals in order", sequence(t)) for t in study.traces),
        facts=_facts(study),
    )


def _facts(study: Study) -> tuple[tuple[str, str], ...]:
    plan, dense, labels = study.targets[0].plan, study.dense, study.labels
    tasks = ", ".join(f"{task} ({items:,} items)" for task, items in dense.task_items.items())
    rows, tokens = plan.calibration["rows"], plan.calibration["tokens"]
    trained = [target.name for target in study.targets if target.plan.recover]
    return (
        ("Model", labels.model),
        ("Calibration", f"{labels.calibration}: {rows:,} rows, {tokens:,} tokens"),
        ("Held-out text", f"{labels.heldout}: {dense.heldout_rows:,} rows, {dense.heldout_tokens:,} tokens"),
        ("Tasks", f"{labels.tasks}: {tasks}"),
        *([("Recovery", f"LoRA on {labels.recovery}: {listed(trained)}")] if trained else []),
        ("Speed", study.targets[0].result.speed.setting),
        _made(study),
    )


def _made(study: Study) -> tuple[str, str]:
    """How the plans of a run came about: the method in words, and its work or its steps."""
    counts, words = study.counts, listed(list(dict.fromkeys(map(method_words, study.targets))))
    if counts:
        return "Search", (
            f"{words}: {_nested(study) if study.traces else _budget_by_budget(study)}; the last run of its stage "
            f"computed {counts['trials_computed']:,} trials and reused {counts['trials_reused']:,}, in "
            f"{counts['seconds']:,.0f} s of scoring"
        )
    merges = [
        f"{target.name}: {', '.join(target.plan.order)} (those above a similarity of "
        f"{target.plan.details['threshold']:.4g})"
        for target in study.targets
        if target.plan.kind == "laco"
    ]
    what = "; merges in order, N+k for the k layers above layer N of that moment into it, in " if merges else ""
    return "Method", f"{words}{what}{'; '.join(merges)}"


def _nested(study: Study) -> str:
    """How much of a search for all budgets was spared, and what its audits say."""
    removals = [removal for trace in study.traces for removal in trace.removals]
    candidates, scored = sum(r.candidates for r in removals), sum(len(r.costs) for r in removals)
    steps = sum(r.candidates > 0 for r in removals)
    if not steps:
        return "no candidate was scored"
    text = f"{scored:,} candidates scored on all rows in {steps:,} iteration{'s' if steps > 1 else ''}"
    if scored < candidates:
        partial, share = sum(r.partial for r in removals), sum(r.work for r in removals) / candidates
        text += (
            f" of {candidates:,}; {partial:,} were dropped by a race, {candidates - scored - partial:,} not considered:"
            f" {percent(share)} of all pairs of candidate and row computed"
        )
    audited = [r for r in removals if r.lazy_choice is not None]
    if audited:
        other = [f"{format_mask(r.added)}, not {format_mask(r.lazy_choice or DENSE)}" for r in audited
                 if r.lazy_choice != r.added]  # fmt: skip
        text += f"; {len(audited)} audits, " + (f"which chose otherwise: {'; '.join(other)}" if other else "all agree")
    return text


def _budget_by_budget(study: Study) -> str:
    """What a search that starts anew for each budget asked for."""
    searches = {t.plan.budget: t.considered for t in study.targets if t.considered is not None}.values()
    partial = sum(search.partial for search in searches)
    return (
        f"{sum(search.complete for search in searches):,} masks scored on all rows"
        + (f" and {partial:,} on the first rows only" if partial else "")
        + f", in {sum(search.steps for search in searches):,} steps"
        + (f" of {len(searches)} searches, one for each budget" if len(searches) > 1 else "")
    )
