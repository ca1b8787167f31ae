"""A table of numbers that keep their precision: as text for people, as CSV for machines, as LaTeX for a paper.

Decides how a number with its uncertainty is written. Which numbers stand where is decided in `tables` and `beyond`.
"""

from __future__ import annotations

import csv
import io
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from blockpruner.reporting.formats import number
from blockpruner.reporting.tables import BLANK, Table


@dataclass(frozen=True)
class Number:
    """value: in the unit of its column; digits: behind the point, None: by size; stderr, low and high: its standard
    error or interval, where it has one; signed: a difference."""

    value: float
    digits: int | None = None
    stderr: float | None = None
    low: float | None = None
    high: float | None = None
    signed: bool = False
    is_p: bool = False

    def __str__(self) -> str:
        text = self._one(self.value)
        if self.stderr is not None and math.isfinite(self.stderr):
            text += f" ± {self._one(self.stderr).lstrip('+')}"
        if self.low is not None and self.high is not None and math.isfinite(self.high - self.low):
            text += f" [{self._one(self.low)}, {self._one(self.high)}]"
        return text

    def _one(self, value: float) -> str:
        text = number(value) if self.digits is None else f"{value:,.{self.digits}f}"
        if float(text.replace(",", "")) == 0:
            return (
                f"< {10**-self.digits:.{self.digits}f}" if self.digits and value > 0 and self.is_p else text.lstrip("-")
            )
        if self.signed and float(text.replace(",", "")) > 0:
            text = f"+{text}"
        return text.replace("-", "−")


Cell = str | Number | None


@dataclass(frozen=True)
class Column:
    """key: of the CSV; title: for people."""

    key: str
    title: str


@dataclass(frozen=True)
class Grid:
    """rows: a cell for each column, None: nothing is known; notes: sentences under it; strong: indices of rows;
    folded: shown on a page when asked for."""

    name: str
    title: str
    columns: tuple[Column, ...]
    rows: tuple[tuple[Cell, ...], ...]
    notes: tuple[str, ...] = ()
    strong: frozenset[int] = frozenset()
    folded: bool = False

    def __post_init__(self) -> None:
        assert all(len(row) == len(self.columns) for row in self.rows), self.name

    @property
    def numeric(self) -> tuple[bool, ...]:
        """Which columns hold numbers, and so go to the right."""
        return tuple(any(isinstance(row[i], Number) for row in self.rows) for i in range(len(self.columns)))

    @property
    def table(self) -> Table:
        return Table(
            tuple(column.title for column in self.columns),
            tuple(tuple(BLANK if cell is None else str(cell) for cell in row) for row in self.rows),
            self.strong,
        )


EXTRAS: Mapping[str, Callable[[Number], float | None]] = {
    "": lambda cell: cell.value,
    "_se": lambda cell: cell.stderr,
    "_low": lambda cell: cell.low,
    "_high": lambda cell: cell.high,
}
"""The CSV columns of a column, by what is put behind its key."""


def to_csv(grid: Grid) -> str:
    """At full precision; a column's standard errors and interval ends stand in columns of their own, if it has any."""
    head: list[str] = []
    columns: list[list[Any]] = []
    for index, column in enumerate(grid.columns):
        cells = [row[index] for row in grid.rows]
        for suffix, of in EXTRAS.items():
            values = [of(cell) if isinstance(cell, Number) else cell if not suffix else None for cell in cells]
            if not suffix or any(value is not None for value in values):
                head.append(column.key + suffix)
                columns.append(["" if value is None else value for value in values])
    out = io.StringIO()
    csv.writer(out, lineterminator="\n").writerows([head, *zip(*columns, strict=True)])
    return out.getvalue()


LATEX: Mapping[str, str] = {
    "\\": r"\textbackslash{}",
    **{sign: f"\\{sign}" for sign in "&%$#_{}"},
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "−": "$-$",
    "±": r"$\pm$",
    "×": r"$\times$",
    "≥": r"$\geq$",
    "≈": r"$\approx$",
    "→": r"$\rightarrow$",
    "–": "--",
    "’": "'",
}


def escape_latex(text: str) -> str:
    return re.sub("[" + re.escape("".join(LATEX)) + "]", lambda match: LATEX[match[0]], text)


def to_latex(grid: Grid) -> str:
    """A `table` for a document with the package booktabs; text columns are left, numbers right."""
    table = grid.table

    def line(cells: Sequence[str], strong: bool = False) -> str:
        texts = map(escape_latex, cells)
        return " & ".join(f"\\textbf{{{text}}}" if strong and text else text for text in texts) + r" \\"

    return "\n".join(
        [
            r"\begin{table}",
            r"\centering\small",
            f"\\caption{{{escape_latex(grid.title)}}}",
            f"\\label{{tab:{grid.name}}}",
            f"\\begin{{tabular}}{{{''.join('r' if is_number else 'l' for is_number in grid.numeric)}}}",
            r"\toprule",
            line(table.head),
            r"\midrule",
            *(line(row, i in table.strong) for i, row in enumerate(table.rows)),
            r"\bottomrule",
            r"\end{tabular}",
            *(f"\\par\\footnotesize {escape_latex(note)}" for note in grid.notes),
            r"\end{table}",
            "",
        ]
    )
