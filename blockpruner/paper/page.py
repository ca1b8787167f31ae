"""The report of a set of runs: what it says, in which order, and its files.

index.html, report.md, tables/*.csv and *.tex, plots/*.svg and *.png.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from blockpruner.paper.contrasts import claims
from blockpruner.paper.evidence import Subject
from blockpruner.paper.extra_tables import GRIDS, stopping
from blockpruner.paper.figures import FIGURES, SCATTERS, draw
from blockpruner.paper.tables import TABLES, paper_grids
from blockpruner.reporting.grids import to_csv, to_latex
from blockpruner.reporting.pages import Findings, Page, Section, made_line, write_page

INTRO = (
    "Rows “here” are measured by this project, rows “paper” are the numbers of arXiv 2406.10594. Neither is ever "
    "computed from the other, except in rows “here − paper”."
)


def build_set(name: str, subjects: Sequence[Subject], published: Path) -> Page:
    """Build a set's report. The paper's numbers lie in the folder `published`."""
    found = [subject.evidence for subject in subjects if subject.evidence is not None]
    sections = []
    if found:
        advice = Findings(tuple(finding for evidence in found for finding in evidence.findings))
        scatters = [draw(figure, found) for figure in SCATTERS]
        sections.append(Section("Quality against speed and memory", (advice, *scatters, stopping(found))))
    for evidence in found:
        findings, grid = claims(evidence)
        sections.append(Section(f"The paper’s claims on {evidence.dense.subject}", (Findings(findings), grid)))
    sections += [Section(table.title, tuple(paper_grids(table, subjects, published))) for table in TABLES]
    sections += [Section(figure.title, (draw(figure, found),)) for figure in FIGURES]
    beyond = [make(found) for make in GRIDS] if found else []
    sections += [Section(grid.title, (grid,)) for grid in beyond]
    models = {id(o.model): o.model for evidence in found for o in (evidence.dense, *evidence.entries)}.values()
    made = made_line(made for model in models for made in model.made)
    return Page(f"BlockPruner’s tables and figures: {name}", INTRO, tuple(sections), made)


def write_set(out: Path, name: str, subjects: Sequence[Subject], published: Path) -> None:
    """Write the report of a set in the place of `out`, as a whole or not at all."""
    page = build_set(name, subjects, published)
    csv = {f"tables/{grid.name}.csv": to_csv(grid) for grid in page.grids}
    tex = {f"tables/{grid.name}.tex": to_latex(grid) for grid in page.grids}
    write_page(out, page, csv | tex)
