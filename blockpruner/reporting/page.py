"""What a report says, in which order: one section a run. How it is marked up is decided in `html` and `markdown`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from blockpruner.blocks import DENSE, format_mask
from blockpruner.provenance import commit, machine, versions
from blockpruner.reporting.findings import Finding, findings
from blockpruner.reporting.formats import listed, percent
from blockpruner.reporting.inputs import Study
from blockpruner.reporting.plots import Plot, plots
from blockpruner.reporting.tables import LEGEND, Table, headline, sequence


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
class Page:
    """Everything is plain text; nothing in it is markup except the plots' SVG."""

    title: str
    sections: tuple[Section, ...]
    provenance: str


def build_page(title: str, studies: Sequence[Study], draw: bool) -> Page:
    return Page(title, tuple(_section(study, draw) for study in studies), provenance_line())


def provenance_line() -> str:
    found = commit()
    where = found[:12] + found[40:] if found else "unknown (no repository)"
    packages = ", ".join(f"{name} {version}" for name, version in versions().items())
    return f"Made at commit {where} with {packages}, on {machine()}."


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
    plan, dense, labels, counts = study.targets[0].plan, study.dense, study.labels, study.counts
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
        (
            "Search",
            f"{plan.method}: {_search(study)}; the last run of its stage computed {counts['trials_computed']:,} trials "
            f"and reused {counts['trials_reused']:,}, in {counts['seconds']:,.0f} s of scoring",
        ),
    )


def _search(study: Study) -> str:
    """How much of the search was spared, and what its audits say."""
    removals = [removal for trace in study.traces for removal in trace.removals]
    candidates, scored = sum(r.candidates for r in removals), sum(len(r.rises) for r in removals)
    text = f"{scored:,} candidates scored on all rows in {len(removals):,} iterations"
    if scored < candidates:
        partial, share = sum(r.partial for r in removals), sum(r.rows_share * r.candidates for r in removals)
        text += (
            f" of {candidates:,}; {partial:,} were dropped by a race, {candidates - scored - partial:,} not considered:"
            f" {percent(share / candidates)} of all pairs of candidate and row computed"
        )
    audited = [r for r in removals if r.lazy_choice is not None]
    if audited:
        other = [f"{format_mask(r.added)}, not {format_mask(r.lazy_choice or DENSE)}" for r in audited
                 if r.lazy_choice != r.added]  # fmt: skip
        text += f"; {len(audited)} audits, " + (f"which chose otherwise: {'; '.join(other)}" if other else "all agree")
    return text
