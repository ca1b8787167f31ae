"""A page as a list of sections, as HTML and as Markdown, and its files, written at once.

Decides which parts a page can have. page.html and page.md decide the markup. The HTML is one file
that loads nothing: its style and its plots are inside. The Markdown (the GitHub dialect) links to
PNG files.
"""

import re
from base64 import b64encode
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import ClassVar

from jinja2 import Environment, FileSystemLoader, StrictUndefined, select_autoescape

from blockpruner.core.markdown import plain
from blockpruner.reporting.findings import Finding, Level
from blockpruner.reporting.formats import listed
from blockpruner.reporting.plots import Plot
from blockpruner.reporting.table import Table
from blockpruner.store.files import replace_directory
from blockpruner.store.provenance import COMPUTING


@dataclass(frozen=True)
class Findings:
    kind: ClassVar = "findings"
    of: tuple[Finding, ...]


@dataclass(frozen=True)
class Facts:
    kind: ClassVar = "facts"
    title: str
    of: tuple[tuple[str, str], ...]
    is_code: bool = False
    """Whether the texts are paths and commands, to be copied."""
    folded: bool = False
    """Whether a page shows them only on request."""


Block = Findings | Table | Plot | Facts | str
"""A part of a section; a str is a sentence."""


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
    provenance: str = ""
    """Where and when the results were computed, as from `provenance_line`."""

    @property
    def plots(self) -> list[Plot]:
        blocks = chain.from_iterable(section.blocks for section in self.sections)
        return [block for block in blocks if isinstance(block, Plot)]


def write_page(out: Path, page: Page, files: Mapping[str, str]) -> None:
    """Write report.md, index.html, plots/ and more files of text in the place of `out`: all of
    them, or nothing."""
    html = to_html(page, [name for name in files if "/" not in name])
    plots = {f"plots/{plot.name}.svg": plot.svg for plot in page.plots}
    texts = {"report.md": to_markdown(page), "index.html": html, **files, **plots}

    def build(directory: Path) -> None:
        for name, text in texts.items():
            (directory / name).parent.mkdir(exist_ok=True)
            (directory / name).write_text(text, encoding="utf-8")
        for plot in page.plots:
            (directory / "plots" / f"{plot.name}.png").write_bytes(plot.png)

    replace_directory(out, build)


def provenance_line(results: Iterable[Mapping[str, str]]) -> str:
    """Write where and when results were computed: each environment once, and not where the page is
    written."""
    days_by_environment: dict[str, list[str]] = {}
    for record in filter(None, results):
        versions = [f"{name} {record[name]}" for name in ("python", *COMPUTING) if name in record]
        device = record["processor"]
        # On a GPU the processor says little of the speed, and is named second.
        if record["device"] != "cpu":
            device = f"{record['device_name']} ({device})"
        environment = f"on {device}, attention {record['attention']}, with {listed(versions)}"
        commit = record.get("commit")
        if commit:
            # Behind the 40 digits is the mark of a changed work tree.
            environment += f" at commit {commit[:12]}{commit[40:]}"
        days_by_environment.setdefault(environment, []).append(record["when"][:10])
    parts = []
    for environment, days in days_by_environment.items():
        period = " to ".join(sorted({min(days), max(days)}))
        parts.append(f"{len(days)} {environment}, {period}")
    return f"Results were computed: {'; '.join(parts)}." if parts else ""


def data_url(plot: Plot) -> str:
    return f"data:image/svg+xml;base64,{b64encode(plot.svg.encode()).decode()}"


TEMPLATES = Environment(
    loader=FileSystemLoader(Path(__file__).parent),
    autoescape=select_autoescape(["html"]),
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
    keep_trailing_newline=True,
)
TEMPLATES.filters |= {"plain": plain, "data_url": data_url}
TEMPLATES.globals["marks"] = {
    Level.RESULT: "",
    Level.NOTE: "",
    Level.WARNING: "⚠ ",
    Level.ADVICE: "➜ ",
}


def to_html(page: Page, files: Sequence[str] = ()) -> str:
    """Fill in page.html. `files` are in the page's folder and are linked at its end."""
    return TEMPLATES.get_template("page.html").render(page=page, files=files)


def to_markdown(page: Page) -> str:
    """Fill in page.md. One blank line separates its parts."""
    text = TEMPLATES.get_template("page.md").render(page=page)
    return re.sub(r"\n{3,}", "\n\n", text).strip() + "\n"
