"""A report as Markdown (the GitHub dialect), its plots as links to the PNG files beside it."""

from __future__ import annotations

import re

from blockpruner.reporting.findings import Level
from blockpruner.reporting.page import Overview, Page, Section
from blockpruner.reporting.plots import Plot
from blockpruner.reporting.tables import Table

MARKS = {Level.RESULT: "", Level.NOTE: "", Level.WARNING: "⚠ ", Level.ADVICE: "➜ "}


def render_markdown(page: Page) -> str:
    parts = [f"# {escape(page.title)}", *map(_overview, page.overviews), *map(_section, page.sections)]
    parts.append(escape(page.provenance))
    return "\n\n".join(parts) + "\n"


def escape(text: str) -> str:
    """Keep text from being read as markup; line breaks become spaces."""
    return re.sub(r"([\\`*\[\]<>|&])", r"\\\1", " ".join(text.split()))


def _overview(overview: Overview) -> str:
    parts = [f"## {escape(overview.title)}", markdown_table(overview.choices), *map(markdown_figure, overview.plots)]
    return "\n\n".join([*parts, "### All targets", markdown_table(overview.targets), escape(overview.legend)])


def markdown_figure(plot: Plot) -> str:
    return f"![{plot.name}](plots/{plot.name}.png)\n\n{escape(plot.caption)}"


def _section(section: Section) -> str:
    parts = [f"## {escape(section.run)}"]
    parts.append("\n".join(f"- {MARKS[f.level]}**{escape(f.title)}.** {escape(f.text)}" for f in section.findings))
    parts += [markdown_table(section.headline), escape(section.legend)]
    parts += map(markdown_figure, section.plots)
    for title, table in section.sequences:
        parts += [f"### {escape(title)}", markdown_table(table)]
    parts.append("\n".join(f"- **{escape(name)}:** {escape(text)}" for name, text in section.facts))
    return "\n\n".join(parts)


def markdown_table(table: Table) -> str:
    lines = [table.head, ("---", *("---:" for _ in table.head[1:]))]
    rows = ["| " + " | ".join(line if i else [escape(cell) for cell in line]) + " |" for i, line in enumerate(lines)]
    for i, row in enumerate(table.rows):
        stressed = "**" if i in table.strong else ""
        rows.append("| " + " | ".join(f"{stressed}{escape(cell)}{stressed}" if cell else "" for cell in row) + " |")
    return "\n".join(rows)
