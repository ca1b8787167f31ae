"""The report of a set of runs: what it says, in which order, and its files.

index.html, report.md, tables/*.csv and *.tex, plots/*.svg and *.png.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from blockpruner.core.sets import SetGoal
from blockpruner.paper.beyond import TITLE, healing_grids
from blockpruner.paper.contrasts import claims
from blockpruner.paper.evidence import Subject
from blockpruner.paper.extra_tables import GRIDS, stopping
from blockpruner.paper.figures import FIGURES, HEALING, SCATTERS, draw
from blockpruner.paper.goals import TITLE as GOALS
from blockpruner.paper.goals import goals_grid
from blockpruner.paper.tables import TABLES, paper_grids
from blockpruner.reporting.findings import Finding
from blockpruner.reporting.grids import Grid, to_csv, to_latex
from blockpruner.reporting.pages import Findings, Page, Section, made_line, write_page

INTRO = (
    "Rows “here” are measured by this project, rows “paper” are the numbers of arXiv 2406.10594. Neither is ever "
    "computed from the other, except in rows “here − paper”."
)


NOT_MADE = (
    "Table 3 and Figure 9: this project holds neither their numbers nor their curves (data/paper), so nothing could be "
    "compared. Figures 2 and 3 explain the method and show no measurement. Figure 8, recovery by LoRA: what "
    "training brings here stands under Search and healing, if the study trains a model."
)


def _brief(subject: Subject) -> str:
    labels = subject.labels
    return f"Holds for {subject.model}, {labels.dtype}, search: {labels.search}; calibration: see Conditions."


def _stated(findings: Sequence[Finding], subject: Subject) -> tuple[Finding, ...]:
    """Let every finding tell what it holds for."""
    return tuple(replace(each, text=f"{each.text} {_brief(subject)}".lstrip()) for each in findings)


def _under(grid: Grid, subjects: Sequence[Subject]) -> Grid:
    """Add to a table of our numbers what they hold for."""
    return replace(grid, notes=(*grid.notes, *(_brief(each) for each in subjects if each.evidence is not None)))


def build_set(name: str, subjects: Sequence[Subject], published: Path, goals: Sequence[SetGoal] = ()) -> Page:
    """Build a set's report. The paper's numbers lie in the folder `published`."""
    found = [subject.evidence for subject in subjects if subject.evidence is not None]
    sections = []
    if found:
        stops = [finding for s in subjects if s.evidence is not None for finding in _stated(s.evidence.findings, s)]
        advice = Findings(tuple(stops))
        scatters = [draw(figure, found) for figure in SCATTERS]
        sections.append(
            Section("Quality against speed and memory", (advice, *scatters, _under(stopping(found), subjects)))
        )
        ours = (f"{s.model}: {s.labels.conditions}." for s in subjects if s.evidence is not None)
        sections.append(Section("Conditions", tuple(ours)))
    if healed := healing_grids(found):
        tables = (_under(grid, subjects) for grid in healed)
        sections.append(Section(TITLE, (draw(HEALING, found), *tables)))
    if goals and found:
        sections.append(Section(GOALS, (_under(goals_grid(goals, found), subjects),)))
    for subject in subjects:
        if subject.evidence is not None:
            findings, grid = claims(subject.evidence)
            title = f"The paper’s claims on {subject.model}"
            sections.append(Section(title, (Findings(_stated(findings, subject)), _under(grid, [subject]))))
    sections += [Section(table.title, tuple(paper_grids(table, subjects, published))) for table in TABLES]
    sections += [Section(figure.title, (draw(figure, found),)) for figure in FIGURES]
    sections.append(Section("Not made", (NOT_MADE,)))
    beyond = [grid for grid in (make(found) for make in GRIDS) if grid.rows] if found else []
    sections += [Section(grid.title, (_under(grid, subjects),)) for grid in beyond]
    models = {id(o.model): o.model for evidence in found for o in (evidence.dense, *evidence.entries)}.values()
    made = made_line(made for model in models for made in model.made)
    return Page(f"BlockPruner’s tables and figures: {name}", INTRO, tuple(sections), made)


def write_set(
    out: Path, name: str, subjects: Sequence[Subject], published: Path, goals: Sequence[SetGoal] = ()
) -> None:
    """Write the report of a set in the place of `out`, as a whole or not at all."""
    page = build_set(name, subjects, published, goals)
    csv = {f"tables/{grid.name}.csv": to_csv(grid) for grid in page.grids}
    tex = {f"tables/{grid.name}.tex": to_latex(grid) for grid in page.grids}
    write_page(out, page, csv | tex)
