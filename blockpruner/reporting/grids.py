"""A table of numbers that keep their precision: text for people, CSV for machines, LaTeX for a paper.

Decides how a number and its uncertainty are written. The modules of tables decide which numbers stand where.
"""

from __future__ import annotations

import csv
import io
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from blockpruner.reporting.formats import number, percent
from blockpruner.reporting.statistics import Effect, Mean

BLANK = "–"

Row = TypeVar("Row")


@dataclass(frozen=True)
class Number:
    """A value in the unit of its column, with its standard error or interval where it has one."""

    value: float
    digits: int | None = None
    """Digits behind the point. Without them, `write` decides."""
    stderr: float | None = None
    low: float | None = None
    high: float | None = None
    signed: bool = False
    """A difference: it is written with its sign."""
    is_p: bool = False
    write: Callable[[float], str] = number
    mark: str = ""
    """What stands behind the number."""

    def __str__(self) -> str:
        text = self._one(self.value)
        if self.stderr is not None and math.isfinite(self.stderr):
            text += f" ± {self._one(self.stderr).lstrip('+')}"
        if self.low is not None and self.high is not None and math.isfinite(self.high - self.low):
            text += f" [{self._one(self.low)}, {self._one(self.high)}]"
        return f"{text} {self.mark}".rstrip()

    def _one(self, value: float) -> str:
        if self.digits is None:
            return self.write(value)
        text = f"{value:,.{self.digits}f}"
        if float(text.replace(",", "")) == 0:
            return f"< {10**-self.digits:.{self.digits}f}" if self.is_p and value > 0 else text.lstrip("-")
        return ("+" if self.signed and value > 0 else "") + text.replace("-", "−")


Cell = str | Number | None


def share(ratio: float) -> Number:
    """Show a share in per cent without the sign, with two digits."""
    return Number(100 * ratio, 2)


def percentage(ratio: float, digits: int = 1) -> Number:
    """Show a share with the sign of per cent."""
    return Number(ratio, write=lambda value: percent(value, digits))


def score(found: Mean, digits: int = 1, mark: str = "") -> Number:
    """Show an accuracy in per cent, ± 1 standard error."""
    return Number(100 * found.value, digits, 100 * found.stderr, mark=mark)


def difference(found: Mean) -> Number:
    """Show a difference of accuracies in points, with its interval."""
    low, high = 100 * found.interval.low, 100 * found.interval.high
    return Number(100 * found.value, 1, low=low, high=high, signed=True)


def points(found: Effect) -> Number:
    """Show a difference of accuracies in points, with its interval."""
    return Number(100 * found.value, 1, low=100 * found.interval.low, high=100 * found.interval.high, signed=True)


def factor(found: Effect) -> Number:
    """Show a quotient with its interval."""
    return Number(found.value, 3, low=found.interval.low, high=found.interval.high)


def p_value(p: float) -> Number:
    return Number(p, 4, is_p=True)


@dataclass(frozen=True)
class Column:
    """A column's key in the CSV, and its title for people."""

    key: str
    title: str


def columns_of(**titles: str) -> tuple[Column, ...]:
    return tuple(Column(key, title) for key, title in titles.items())


@dataclass(frozen=True)
class Field(Column, Generic[Row]):
    """A column together with what it shows of each row's value."""

    of: Callable[[Row], Cell]


@dataclass(frozen=True)
class Grid:
    """A table with a cell for each column in each row. A cell of which nothing is known is None."""

    name: str
    title: str
    columns: tuple[Column, ...]
    rows: tuple[tuple[Cell, ...], ...]
    notes: tuple[str, ...] = ()
    """Sentences under the table."""
    strong: frozenset[int] = frozenset()
    """Indices of the rows to stress."""
    folded: bool = False
    """Whether a page shows it only on request."""

    def __post_init__(self) -> None:
        assert all(len(row) == len(self.columns) for row in self.rows), self.name

    @property
    def head(self) -> tuple[str, ...]:
        return tuple(column.title for column in self.columns)

    @property
    def texts(self) -> list[tuple[str, ...]]:
        """Write the rows as people read them."""
        return [tuple(BLANK if cell is None else str(cell) for cell in row) for row in self.rows]

    @property
    def numeric(self) -> tuple[bool, ...]:
        """Tell which columns hold numbers: they are set right."""
        return tuple(any(isinstance(row[i], Number) for row in self.rows) for i in range(len(self.columns)))


def grid_of(
    name: str,
    title: str,
    fields: Sequence[Field[Row]],
    rows: Iterable[Row],
    notes: Sequence[str] = (),
    strong: Callable[[Row], bool] = lambda row: False,
    folded: bool = False,
) -> Grid:
    """One row of cells for each value."""
    rows = tuple(rows)
    cells = tuple(tuple(field.of(row) for field in fields) for row in rows)
    stressed = frozenset(i for i, row in enumerate(rows) if strong(row))
    return Grid(name, title, tuple(fields), cells, tuple(notes), stressed, folded)


EXTRAS: Mapping[str, Callable[[Number], float | None]] = {
    "": lambda cell: cell.value,
    "_se": lambda cell: cell.stderr,
    "_low": lambda cell: cell.low,
    "_high": lambda cell: cell.high,
}
"""What the CSV has of a number, by the end of the column's name."""


def to_csv(grid: Grid) -> str:
    """Write all numbers at full precision. Errors and ends of intervals have columns of their own."""
    head: list[str] = []
    columns: list[list[Any]] = []
    for index, column in enumerate(grid.columns):
        cells = [row[index] for row in grid.rows]
        for suffix, of in EXTRAS.items():
            values = [of(cell) if isinstance(cell, Number) else cell if not suffix else None for cell in cells]
            if not suffix or any(value is not None for value in values):
                head.append(column.key + suffix)
                columns.append(values)
    return csv_text([head, *zip(*columns, strict=True)])


def csv_text(rows: Iterable[Sequence[Any]]) -> str:
    """Write floats at full precision, and None as nothing."""
    out = io.StringIO()
    csv.writer(out, lineterminator="\n").writerows(rows)
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
    """Write a `table` for a document with the package booktabs. Texts are set left, numbers right."""

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
            line(grid.head),
            r"\midrule",
            *(line(row, i in grid.strong) for i, row in enumerate(grid.texts)),
            r"\bottomrule",
            r"\end{tabular}",
            *(f"\\par\\footnotesize {escape_latex(note)}" for note in grid.notes),
            r"\end{table}",
            "",
        ]
    )
