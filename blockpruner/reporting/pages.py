"""A page as a list of sections, as HTML and as Markdown, and its files, written at once.

Decides how findings, tables and plots are marked up. The HTML is one file that loads nothing: its style is inline, and
its plots are inline SVG in the reader's own colours. The Markdown (the GitHub dialect) links to PNG files.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

from blockpruner.reporting.findings import Finding, Level
from blockpruner.reporting.grids import Grid
from blockpruner.reporting.plots import INK, PAPER, Plot
from blockpruner.store.files import replace_directory
from blockpruner.store.provenance import commit, machine, versions


@dataclass(frozen=True)
class Findings:
    """A list of findings."""

    of: tuple[Finding, ...]


@dataclass(frozen=True)
class Facts:
    """Names with a text each."""

    title: str
    of: tuple[tuple[str, str], ...]


Block = Findings | Grid | Plot | Facts | str
"""A part of a section; a str is a sentence on what is not there."""


@dataclass(frozen=True)
class Section:
    title: str
    blocks: tuple[Block, ...]


@dataclass(frozen=True)
class Page:
    """Everything is plain text; nothing in it is markup except the plots' SVG."""

    title: str
    intro: str
    sections: tuple[Section, ...]

    @property
    def grids(self) -> list[Grid]:
        return [block for section in self.sections for block in section.blocks if isinstance(block, Grid)]

    @property
    def plots(self) -> list[Plot]:
        return [block for section in self.sections for block in section.blocks if isinstance(block, Plot)]


def write_page(out: Path, page: Page, files: Mapping[str, str]) -> None:
    """Write report.md, index.html, plots/ and more files of text in the place of `out`: all of them, or nothing."""
    texts = {"report.md": to_markdown(page), "index.html": to_html(page), **files}
    texts |= {f"plots/{plot.name}.svg": plot.svg for plot in page.plots}

    def build(directory: Path) -> None:
        for name, text in texts.items():
            (directory / name).parent.mkdir(exist_ok=True)
            (directory / name).write_text(text, encoding="utf-8")
        for plot in page.plots:
            (directory / "plots" / f"{plot.name}.png").write_bytes(plot.png)

    replace_directory(out, build)


def provenance_line() -> str:
    found = commit()
    where = found[:12] + found[40:] if found else "unknown (no repository)"
    packages = ", ".join(f"{name} {version}" for name, version in versions().items())
    return f"Made at commit {where} with {packages}, on {machine()}."


STYLE = """
:root{color-scheme:light dark;--page:#fff;--card:#f6f7f9;--ink:#1c1f24;--soft:#5b626d;--line:#dcdfe4;--accent:#1f6fab;
--warn:#b4471a;--warnbg:#fdf1eb;--good:#1f6fab;--goodbg:#ecf4fa}
@media(prefers-color-scheme:dark){:root{--page:#14161a;--card:#1d2025;--ink:#e4e6ea;--soft:#a0a7b2;--line:#343941;
--accent:#6cb2e6;--warn:#f0976b;--warnbg:#33211a;--good:#6cb2e6;--goodbg:#17283a}}
*{box-sizing:border-box}
body{margin:0;background:var(--page);color:var(--ink);font:16px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,
sans-serif}
main,header,footer{max-width:1280px;margin:0 auto;padding:0 20px}
header{padding-top:32px}
h1{font-size:1.8rem;line-height:1.2;margin:0 0 .3em;overflow-wrap:anywhere}
h2{font-size:1.35rem;margin:1.6em 0 .6em;padding-top:.8em;border-top:1px solid var(--line);overflow-wrap:anywhere}
h3{font-size:1.05rem;margin:1.8em 0 .5em}
header p,footer,.legend,figcaption{color:var(--soft);font-size:.875rem}
nav ul{columns:3 18em;padding-left:1.2em;font-size:.875rem}a{color:var(--accent)}
.findings{list-style:none;margin:0 0 20px;padding:0;display:grid;gap:10px}
.findings li{background:var(--card);border-left:4px solid var(--line);border-radius:4px;padding:10px 14px;
overflow-wrap:anywhere}
.findings b{display:block}
.findings .warning{background:var(--warnbg);border-color:var(--warn)}.findings .warning b{color:var(--warn)}
.findings .advice{background:var(--goodbg);border-color:var(--good)}.findings .advice b{color:var(--good)}
.scroll{overflow-x:auto;-webkit-overflow-scrolling:touch}
table{border-collapse:collapse;font-variant-numeric:tabular-nums;font-size:.875rem;min-width:min(100%,560px)}
th,td{padding:5px 9px;text-align:left;border-bottom:1px solid var(--line)}
td{white-space:nowrap}td.long{white-space:normal;min-width:13em}.n{text-align:right}
th:first-child{padding-left:0;position:sticky;left:0;background:var(--page)}
thead th{border-bottom:2px solid var(--line);vertical-align:bottom}tbody th{font-weight:400;min-width:9.5em}
tbody th.n{min-width:0}
tr.strong th,tr.strong td{font-weight:650}
figure{margin:0 0 26px}.scroll+figure{margin-top:26px}figcaption{margin-top:6px}
figure.small{display:inline-block;vertical-align:top;width:min(100%,390px);margin-right:20px}
figure svg{display:block;width:100%;height:auto}figure svg text{font-family:inherit!important}
details{margin:1em 0}summary{cursor:pointer;color:var(--accent)}
dl{display:grid;grid-template-columns:max-content 1fr;gap:4px 16px;font-size:.9375rem;margin:0}
dt{color:var(--soft)}dd{margin:0;overflow-wrap:anywhere}
footer{padding-top:20px;padding-bottom:40px;overflow-wrap:anywhere}
@media(max-width:560px){main,header,footer{padding-left:14px;padding-right:14px}header{padding-top:20px}
dl{grid-template-columns:1fr}dd{margin-bottom:8px}th,td{padding:5px 7px}}
@media print{details{display:block}.scroll{overflow:visible}}
"""

LONG = 24
"""A table's texts beyond this many characters may take several lines."""


def to_html(page: Page) -> str:
    links = "\n".join(
        f'<li><a href="#part-{i}">{escape(section.title)}</a></li>' for i, section in enumerate(page.sections, 1)
    )
    sections = "\n".join(
        f'<section id="part-{i}">\n<h2>{escape(section.title)}</h2>\n'
        + "\n".join(_html(block, section.title) for block in section.blocks)
        + "\n</section>"
        for i, section in enumerate(page.sections, 1)
    )
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'; img-src data:">
<title>{escape(page.title)}</title>
<style>{STYLE}</style>
</head>
<body>
<header>
<h1>{escape(page.title)}</h1>
<p>{escape(page.intro)}</p>
<nav><ul>
{links}
</ul></nav>
</header>
<main>
{sections}
</main>
<footer>{escape(provenance_line())}</footer>
</body>
</html>
"""


def _html(block: Block, section: str) -> str:
    match block:
        case Findings():
            items = (f'<li class="{f.level}"><b>{escape(f.title)}</b>{escape(f.text)}</li>' for f in block.of)
            return '<ul class="findings">\n' + "\n".join(items) + "\n</ul>"
        case Grid():
            table = _html_table(block) + "".join(f'\n<p class="legend">{escape(note)}</p>' for note in block.notes)
            if block.folded:
                return f"<details><summary>{escape(block.title)}</summary>\n{table}\n</details>"
            return table if block.title == section else f"<h3>{escape(block.title)}</h3>\n{table}"
        case Plot():
            svg, kind = inline_svg(block), "wide" if block.wide else "small"
            if block.wide:
                svg = f'<div class="scroll"><div style="min-width:{int(block.width * 72)}px">{svg}</div></div>'
            return f'<figure class="{kind}">\n{svg}\n<figcaption>{escape(block.caption)}</figcaption>\n</figure>'
        case Facts():
            items = (f"<dt>{escape(name)}</dt><dd>{escape(text)}</dd>" for name, text in block.of)
            return f"<h3>{escape(block.title)}</h3>\n<dl>\n" + "\n".join(items) + "\n</dl>"
        case str():
            return f'<p class="legend">{escape(block)}</p>'


def _html_table(grid: Grid) -> str:
    numeric = grid.numeric

    def cell(tag: str, text: str, column: int, scope: str = "") -> str:
        kind = ' class="n"' if numeric[column] else ' class="long"' if tag == "td" and len(text) > LONG else ""
        return f"<{tag}{scope}{kind}>{escape(text)}</{tag}>"

    head = "".join(cell("th", text, i, ' scope="col"') for i, text in enumerate(grid.head))
    rows = "\n".join(
        f"<tr{' class=strong' if i in grid.strong else ''}>"
        + cell("th", row[0], 0, ' scope="row"')
        + "".join(cell("td", text, j) for j, text in enumerate(row[1:], 1))
        + "</tr>"
        for i, row in enumerate(grid.texts)
    )
    return f'<div class="scroll"><table>\n<thead><tr>{head}</tr></thead>\n<tbody>\n{rows}\n</tbody>\n</table></div>'


def inline_svg(plot: Plot) -> str:
    """A plot's SVG for a page: no XML prolog, ids that are unique to the plot, lines and text in the page's colour."""
    svg = plot.svg[plot.svg.index("<svg") :].replace(INK, "currentColor").replace(PAPER, "none")
    svg = re.sub(r'(\bid="|url\(#|href="#)', rf"\g<1>{plot.name}-", svg)
    return svg.replace("<svg ", f'<svg role="img" aria-label="{escape(plot.caption)}" ', 1)


MARKS = {Level.RESULT: "", Level.NOTE: "", Level.WARNING: "⚠ ", Level.ADVICE: "➜ "}


def to_markdown(page: Page) -> str:
    parts = [f"# {plain(page.title)}"]
    for section in page.sections:
        parts.append(f"## {plain(section.title)}")
        parts += [part for block in section.blocks for part in _markdown(block, section.title)]
    return "\n\n".join([*parts, plain(provenance_line())]) + "\n"


def plain(text: str) -> str:
    """Text that Markdown does not read as markup; line breaks become spaces."""
    return re.sub(r"([\\`*\[\]<>|&])", r"\\\1", " ".join(text.split()))


def _markdown(block: Block, section: str) -> Sequence[str]:
    match block:
        case Findings():
            return ["\n".join(f"- {MARKS[f.level]}**{plain(f.title)}.** {plain(f.text)}" for f in block.of)]
        case Grid():
            title = [] if block.title == section else [f"### {plain(block.title)}"]
            return [*title, _markdown_table(block), *map(plain, block.notes)]
        case Plot():
            return [f"![{block.name}](plots/{block.name}.png)", plain(block.caption)]
        case Facts():
            return ["\n".join(f"- **{plain(name)}:** {plain(text)}" for name, text in block.of)]
        case str():
            return [plain(block)]


def _markdown_table(grid: Grid) -> str:
    rows = [[plain(title) for title in grid.head], ["---", *["---:"] * (len(grid.head) - 1)]]
    for i, row in enumerate(grid.texts):
        stress = "**" if i in grid.strong else ""
        rows.append([f"{stress}{plain(cell)}{stress}" if cell else "" for cell in row])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)
