"""A table of numbers that keep their precision: text for people, CSV for machines, LaTeX for a
paper.

Decides how a number and its uncertainty are written. The modules of tables decide which numbers are
in which column.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from pandas import DataFrame

from blockpruner.reporting.formats import number
from blockpruner.reporting.statistics import Effect, Mean

BLANK = "–"


@dataclass(frozen=True)
class Number:
    """A value in the unit of its column, with its standard error or interval where it has one."""

    value: float
    digits: int | None = None
    """The digits behind the point. Without them, `write` decides."""
    stderr: float | None = None
    low: float | None = None
    high: float | None = None
    signed: bool = False
    """Whether it is a difference, which is written with its sign."""
    write: Callable[[float], str] = number
    mark: str = ""
    """The text behind the number."""

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
            return text.lstrip("-")
        return ("+" if self.signed and value > 0 else "") + text.replace("-", "−")


Cell = str | Number | None


def score(found: Mean, digits: int = 1, mark: str = "") -> Number:
    """Show an accuracy in per cent, ± 1 standard error."""
    return Number(100 * found.value, digits, 100 * found.stderr, mark=mark)


def points(found: Mean | Effect) -> Number:
    """Show a difference of accuracies in points, with its interval."""
    return Number(
        100 * found.value,
        1,
        low=100 * found.interval.low,
        high=100 * found.interval.high,
        signed=True,
    )


@dataclass(frozen=True)
class Column:
    key: str
    """The name in the CSV."""
    title: str
    """The title for people, with the unit."""


@dataclass(frozen=True)
class Table:
    """A table with a cell for each column in each row. A cell of which nothing is known is None."""

    kind: ClassVar = "table"
    name: str
    title: str
    columns: tuple[Column, ...]
    rows: tuple[tuple[Cell, ...], ...]
    notes: tuple[str, ...] = ()
    """The sentences under the table."""
    strong: frozenset[int] = frozenset()
    """The indices of the rows to stress."""
    folded: bool = False
    """Whether a page shows it only on request."""

    @property
    def head(self) -> tuple[str, ...]:
        return tuple(column.title for column in self.columns)

    @property
    def texts(self) -> list[tuple[str, ...]]:
        """The rows as people read them."""
        return [tuple(BLANK if cell is None else str(cell) for cell in row) for row in self.rows]

    @property
    def numeric(self) -> tuple[bool, ...]:
        """Whether a column holds numbers, which are set right."""
        return tuple(
            any(isinstance(row[i], Number) for row in self.rows) for i in range(len(self.columns))
        )

    @property
    def frame(self) -> DataFrame:
        """The values at full precision; errors and ends of intervals have columns of their own."""
        found: dict[str, list[Any]] = {}
        for index, column in enumerate(self.columns):
            cells = [row[index] for row in self.rows]
            for suffix, part in PARTS.items():
                own = [
                    getattr(cell, part) if isinstance(cell, Number) else None if suffix else cell
                    for cell in cells
                ]
                if not suffix or any(value is not None for value in own):
                    found[column.key + suffix] = own
        return DataFrame(found, dtype=object)


PARTS: Mapping[str, str] = {"": "value", "_se": "stderr", "_low": "low", "_high": "high"}
"""What a data frame has of a number, by the end of the column's name."""


def to_csv(table: Table | DataFrame) -> str:
    """Write all numbers at full precision, and None as nothing."""
    frame = table.frame if isinstance(table, Table) else table
    return str(frame.to_csv(index=False, lineterminator="\n"))


def to_markdown(table: Table) -> str:
    rule = ["---:" if is_number else "---" for is_number in table.numeric]
    rows = [table.head, rule, *table.texts]
    return "\n".join(
        f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in row)} |" for row in rows
    )
