"""The report of a set: what it says, in which order, and its files, written at once.

index.html, report.md, tables/*.csv and *.tex, plots/*.svg and *.png.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from jinja2 import Environment
from markupsafe import Markup

from blockpruner.paper.advice import advice
from blockpruner.paper.beyond import beyond, stopping
from blockpruner.paper.claims import claims
from blockpruner.paper.evidence import Subject
from blockpruner.paper.figures import Drawn, figures, scatters
from blockpruner.paper.tables import TABLES, paper_grids
from blockpruner.reporting.findings import Finding
from blockpruner.reporting.grids import Grid, to_csv, to_latex
from blockpruner.reporting.html import HEAD, MACROS, STYLE, inline_svg
from blockpruner.reporting.markdown import MARKS, escape, markdown_figure, markdown_table
from blockpruner.reporting.page import provenance_line
from blockpruner.reporting.plots import Plot
from blockpruner.store.files import replace_directory


@dataclass(frozen=True)
class Part:
    """A section. drawn: figures, or why there is none."""

    title: str
    findings: tuple[Finding, ...] = ()
    drawn: tuple[Drawn, ...] = ()
    grids: tuple[Grid, ...] = ()


@dataclass(frozen=True)
class SetPage:
    title: str
    parts: tuple[Part, ...]
    provenance: str

    @property
    def grids(self) -> list[Grid]:
        return [grid for part in self.parts for grid in part.grids]

    @property
    def plots(self) -> list[Plot]:
        return [drawn.plot for part in self.parts for drawn in part.drawn if drawn.plot is not None]


def build_set(name: str, subjects: Sequence[Subject], published: Path) -> SetPage:
    """All of a set's report. published: folder of the paper's numbers."""
    found = [(s.model, s.evidence) for s in subjects if s.evidence is not None]
    parts = []
    if found:
        parts.append(
            Part(
                "Quality against speed and memory",
                tuple(finding for _, evidence in found for finding in advice(evidence).findings),
                tuple(scatters(found)),
                (stopping(found),),
            )
        )
        for model, evidence in found:
            said, grid = claims(model, evidence)
            parts.append(Part(f"The paper’s claims on {model}", said, grids=(grid,)))
    parts += [Part(table.title, grids=tuple(paper_grids(table, subjects, published))) for table in TABLES]
    parts += [Part(drawn.figure.title, drawn=(drawn,)) for drawn in figures(found)]
    parts += [Part(grid.title, grids=(grid,)) for grid in beyond(subjects)]
    return SetPage(f"BlockPruner’s tables and figures: {name}", tuple(parts), provenance_line())


def write_set(out: Path, name: str, subjects: Sequence[Subject], published: Path) -> None:
    """Write the report of a set in the place of `out`, as a whole or not at all."""
    page = build_set(name, subjects, published)

    def build(directory: Path) -> None:
        files = {"report.md": to_markdown(page), "index.html": to_html(page)}
        for grid in page.grids:
            files[f"tables/{grid.name}.csv"] = to_csv(grid)
            files[f"tables/{grid.name}.tex"] = to_latex(grid)
        for plot in page.plots:
            files[f"plots/{plot.name}.svg"] = plot.svg
        for folder in ("tables", "plots"):
            (directory / folder).mkdir()
        for path, text in files.items():
            (directory / path).write_text(text, encoding="utf-8")
        for plot in page.plots:
            (directory / "plots" / f"{plot.name}.png").write_bytes(plot.png)

    replace_directory(out, build)


TEMPLATE = """\
{% macro numbers(grid) -%}
{% set data, right = grid.table, grid.numeric %}
<div class="scroll"><table class="set">
<thead><tr>{% for cell in data.head %}<th scope="col"{% if right[loop.index0] %} class="n"{% endif %}>{{ cell }}</th>
{%- endfor %}</tr></thead>
<tbody>
{% for row in data.rows -%}
<tr{% if loop.index0 in data.strong %} class="strong"{% endif %}><th scope="row">{{ row[0] }}</th>
{%- for cell in row[1:] %}<td{% if right[loop.index] %} class="n"{% endif %}>{{ cell }}</td>{% endfor %}</tr>
{% endfor -%}
</tbody>
</table></div>
{%- endmacro %}
<header>
<h1>{{ page.title }}</h1>
<p>Rows “here” are measured by this project, rows “paper” are the numbers of arXiv 2406.10594; neither is ever
computed from the other but in rows “here − paper”.</p>
<nav><ul>
{% for part in page.parts %}<li><a href="#part-{{ loop.index }}">{{ part.title }}</a></li>
{% endfor %}</ul></nav>
</header>
<main>
{% for part in page.parts %}
<section id="part-{{ loop.index }}">
<h2>{{ part.title }}</h2>
{% if part.findings %}
<ul class="findings">
{% for finding in part.findings %}<li class="{{ finding.level }}"><b>{{ finding.title }}</b>{{ finding.text }}</li>
{% endfor %}</ul>
{% endif %}
{% for drawn in part.drawn %}
{% if drawn.plot %}{{ figure(drawn.plot) }}
{% else %}<p class="legend">No figure: {{ drawn.figure.missing }}.</p>
{% endif %}
{% endfor %}
{% for grid in part.grids %}
{% if grid.folded %}<details><summary>{{ grid.title }}</summary>
{% elif grid.title != part.title %}<h3>{{ grid.title }}</h3>
{% endif %}
{{ numbers(grid) }}
{% for note in grid.notes %}<p class="legend">{{ note }}</p>
{% endfor %}
{% if grid.folded %}</details>
{% endif %}
{% endfor %}
</section>
{% endfor %}
</main>
<footer>{{ page.provenance }}</footer>
</body>
</html>
"""

SET_STYLE = """
.set{font-size:.875rem}.set th,.set td{padding:4px 8px}.set thead th{white-space:normal;vertical-align:bottom}
main,header,footer{max-width:1360px}
.set th:first-child{white-space:normal;min-width:9.5em;padding-left:0;position:sticky;left:0;background:var(--page)}
.set th,.set td{text-align:left}.set .n{text-align:right}
.findings{margin-bottom:20px}
nav ul{columns:3 18em;padding-left:1.2em;font-size:.875rem}a{color:var(--accent)}
"""


def to_html(page: SetPage) -> str:
    environment = Environment(autoescape=True, trim_blocks=True)
    template = environment.from_string(HEAD + MACROS + TEMPLATE)
    return template.render(page=page, style=Markup(STYLE + SET_STYLE), svg=inline_svg)


def to_markdown(page: SetPage) -> str:
    parts = [f"# {escape(page.title)}"]
    for part in page.parts:
        parts.append(f"## {escape(part.title)}")
        if part.findings:
            parts.append("\n".join(f"- {MARKS[f.level]}**{escape(f.title)}.** {escape(f.text)}" for f in part.findings))
        for drawn in part.drawn:
            missing = f"No figure: {escape(drawn.figure.missing)}."
            parts.append(markdown_figure(drawn.plot) if drawn.plot else missing)
        for grid in part.grids:
            parts += [f"### {escape(grid.title)}"] if grid.title != part.title else []
            parts += [markdown_table(grid.table), *map(escape, grid.notes)]
    return "\n\n".join([*parts, escape(page.provenance)]) + "\n"
