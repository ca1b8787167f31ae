"""A page as a list of sections, as HTML and as Markdown, and its files, written at once.

Decides how findings, tables and plots are marked up. The HTML is one file (page.html, filled in) that loads nothing:
its style is inline, and its plots are inline SVG in the reader's own colours. The Markdown (the GitHub dialect) links
to PNG files.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from string import Template
from typing import Literal

from blockpruner.reporting.findings import Finding, Level
from blockpruner.reporting.formats import listed
from blockpruner.reporting.grids import Grid
from blockpruner.reporting.plots import INK, PAPER, Plot
from blockpruner.store.files import replace_directory
from blockpruner.store.provenance import COMPUTING


@dataclass(frozen=True)
class Findings:
    """A list of findings."""

    of: tuple[Finding, ...]


@dataclass(frozen=True)
class Facts:
    """Names, each with a text."""

    title: str
    of: tuple[tuple[str, str], ...]
    is_code: bool = False
    """Whether the texts are paths and commands, to be copied."""
    folded: bool = False
    """Whether a page shows them only on request."""


@dataclass(frozen=True)
class Tile:
    """One large number."""

    title: str
    value: str
    interval: str = ""
    detail: str = ""
    tone: Literal["", "good", "bad"] = ""
    """What the number is beyond noise."""


@dataclass(frozen=True)
class Tiles:
    """A row of large numbers."""

    of: tuple[Tile, ...]


Block = Findings | Grid | Plot | Facts | Tiles | str
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
    made: str = ""
    """As from `made_line`."""

    @property
    def blocks(self) -> list[Block]:
        return [block for section in self.sections for block in section.blocks]

    @property
    def grids(self) -> list[Grid]:
        return [block for block in self.blocks if isinstance(block, Grid)]

    @property
    def plots(self) -> list[Plot]:
        return [block for block in self.blocks if isinstance(block, Plot)]


def write_page(out: Path, page: Page, files: Mapping[str, str]) -> None:
    """Write report.md, index.html, plots/ and more files of text in the place of `out`: all of them, or nothing."""
    texts = {
        "report.md": to_markdown(page),
        "index.html": to_html(page, [name for name in files if "/" not in name]),
        **files,
    }
    texts |= {f"plots/{plot.name}.svg": plot.svg for plot in page.plots}

    def build(directory: Path) -> None:
        for name, text in texts.items():
            (directory / name).parent.mkdir(exist_ok=True)
            (directory / name).write_text(text, encoding="utf-8")
        for plot in page.plots:
            (directory / "plots" / f"{plot.name}.png").write_bytes(plot.png)

    replace_directory(out, build)


def made_line(results: Iterable[Mapping[str, str]]) -> str:
    """Where and when results were computed: each environment once, and not where the page is written.

    Results of before this was recorded have none, and are not counted.
    """
    found: dict[str, list[str]] = {}
    for made in filter(None, results):
        packages = listed([f"{name} {made[name]}" for name in ("python", *COMPUTING) if name in made])
        at = f" at commit {made['commit'][:12]}{made['commit'][40:]}" if made.get("commit") else ""
        place = made["processor"] if made["device"] == "cpu" else f"{made['device_name']} ({made['processor']})"
        found.setdefault(f"on {place}, attention {made['attention']}, with {packages}{at}", []).append(
            made["when"][:10]
        )
    parts = [f"{len(when)} {where}, {' to '.join(sorted({min(when), max(when)}))}" for where, when in found.items()]
    return f"Results were computed: {'; '.join(parts)}." if parts else ""


LONG = 24
"""A table's texts beyond this many characters may take several lines."""


def to_html(page: Page, files: Sequence[str] = ()) -> str:
    """Fill in page.html. `files` lie beside the page and are linked at its end."""
    links = "\n".join(
        f'<a href="#part-{i}">{escape(part.title)}</a>' for i, part in enumerate(page.sections, 1) if page.sections[1:]
    )
    sections = "\n".join(
        f'<section id="part-{i}">\n<h2>{escape(section.title)}</h2>\n'
        + "\n".join(_html(block, section.title) for block in section.blocks)
        + "\n</section>"
        for i, section in enumerate(page.sections, 1)
    )
    title, intro, made = map(escape, (page.title, page.intro, page.made))
    if files:
        made += " All numbers: " + ", ".join(f'<a href="{escape(name)}">{escape(name)}</a>' for name in files) + "."
    template = Template(Path(__file__).with_name("page.html").read_text(encoding="utf-8"))
    return template.substitute(title=title, intro=intro, links=links, sections=sections, made=made)


def _html(block: Block, section: str) -> str:
    match block:
        case Findings():
            items = (f'<li class="{f.level}"><b>{escape(f.title)}</b>{escape(f.text)}</li>' for f in block.of)
            return '<ul class="findings">\n' + "\n".join(items) + "\n</ul>"
        case Grid():
            table = _html_table(block) + "".join(f'\n<p class="legend">{escape(note)}</p>' for note in block.notes)
            return table if block.title == section else _titled(block.title, table, block.folded)
        case Plot():
            svg, kind = inline_svg(block), "wide" if block.wide else "small"
            if block.wide:
                svg = f'<div class="scroll"><div style="min-width:{int(block.width * 72)}px">{svg}</div></div>'
            return f'<figure class="{kind}">\n{svg}\n<figcaption>{escape(block.caption)}</figcaption>\n</figure>'
        case Facts():
            before, after = ("<pre>", "</pre>") if block.is_code else ("", "")
            items = (f"<dt>{escape(name)}</dt><dd>{before}{escape(text)}{after}</dd>" for name, text in block.of)
            return _titled(block.title, "<dl>\n" + "\n".join(items) + "\n</dl>", block.folded)
        case Tiles():
            return '<dl class="tiles">\n' + "\n".join(map(_html_tile, block.of)) + "\n</dl>"
        case str():
            return f'<p class="legend">{escape(block)}</p>'


def _titled(title: str, content: str, folded: bool) -> str:
    if folded:
        return f"<details><summary>{escape(title)}</summary>\n{content}\n</details>"
    return f"<h3>{escape(title)}</h3>\n{content}"


def _html_tile(tile: Tile) -> str:
    small = "".join(f"<small>{escape(text)}</small>" for text in (tile.interval, tile.detail) if text)
    return f'<div class="{tile.tone}"><dt>{escape(tile.title)}</dt><dd><b>{escape(tile.value)}</b>{small}</dd></div>'


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
    """Make a plot's SVG part of a page: no XML prolog, ids of its own, lines and text in the page's colour."""
    svg = plot.svg[plot.svg.index("<svg") :].replace(INK, "currentColor").replace(PAPER, "none")
    svg = re.sub(r'(\bid="|url\(#|href="#)', rf"\g<1>{plot.name}-", svg)
    return svg.replace("<svg ", '<svg role="img" ', 1)


MARKS = {Level.RESULT: "", Level.NOTE: "", Level.WARNING: "⚠ ", Level.ADVICE: "➜ "}


def to_markdown(page: Page) -> str:
    parts = [f"# {plain(page.title)}"]
    for section in page.sections:
        parts.append(f"## {plain(section.title)}")
        parts += [part for block in section.blocks for part in _markdown(block, section.title)]
    return "\n\n".join([*parts, plain(page.made)]).rstrip() + "\n"


def plain(text: str) -> str:
    """Keep Markdown from reading a text as markup; line breaks become spaces."""
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
        case Facts(of=of, is_code=True):
            return [f"### {plain(block.title)}", *(f"{plain(name)}:\n\n    {text}" for name, text in of)]
        case Facts():
            return ["\n".join(f"- **{plain(name)}:** {plain(text)}" for name, text in block.of)]
        case Tiles():
            facts = (
                (t.title, " ".join(filter(None, (t.value, t.interval, t.detail and f"({t.detail})")))) for t in block.of
            )
            return ["\n".join(f"- **{plain(name)}:** {plain(text)}" for name, text in facts)]
        case str():
            return [plain(block)]


def _markdown_table(grid: Grid) -> str:
    rows = [[plain(title) for title in grid.head], ["---:" if is_number else "---" for is_number in grid.numeric]]
    for i, row in enumerate(grid.texts):
        stress = "**" if i in grid.strong else ""
        rows.append([f"{stress}{plain(cell)}{stress}" if cell else "" for cell in row])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)
