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
        text = self._format(self.value)
        if self.stderr is not None and math.isfinite(self.stderr):
            text += f" ± {self._format(self.stderr).lstrip('+')}"
        # The interval of a single measurement is infinite.
        if self.low is not None and self.high is not None and math.isfinite(self.high - self.low):
            text += f" [{self._format(self.low)}, {self._format(self.high)}]"
        return f"{text} {self.mark}".rstrip()

    def _format(self, value: float) -> str:
        if self.digits is None:
            return self.write(value)
        text = f"{value:,.{self.digits}f}"
        # What is rounded to 0 has no sign.
        if float(text.replace(",", "")) == 0:
            return text.lstrip("-")
        sign = "+" if self.signed and value > 0 else ""
        return sign + text.replace("-", "−")


Cell = str | Number | None


def score(mean: Mean, mark: str = "") -> Number:
    """Show an accuracy in per cent, ± 1 standard error."""
    return Number(100 * mean.value, 1, 100 * mean.stderr, mark=mark)


def points(difference: Mean | Effect) -> Number:
    """Show a difference of accuracies in points, with its interval."""
    low, high = 100 * difference.interval.low, 100 * difference.interval.high
    return Number(100 * difference.value, 1, low=low, high=high, signed=True)


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
        flags = []
        for index in range(len(self.columns)):
            flags.append(any(isinstance(row[index], Number) for row in self.rows))
        return tuple(flags)

    @property
    def frame(self) -> DataFrame:
        """The values at full precision; errors and ends of intervals have columns of their own."""
        values: dict[str, list[Any]] = {}
        for index, column in enumerate(self.columns):
            cells = [row[index] for row in self.rows]
            values[column.key] = [
                cell.value if isinstance(cell, Number) else cell for cell in cells
            ]
            for suffix, field in EXTRAS.items():
                extras = [
                    getattr(cell, field) if isinstance(cell, Number) else None for cell in cells
                ]
                if any(extra is not None for extra in extras):
                    values[column.key + suffix] = extras
        return DataFrame(values, dtype=object)


EXTRAS: Mapping[str, str] = {"_se": "stderr", "_low": "low", "_high": "high"}
"""What a data frame has of a number beside its value, by the end of the column's name."""


def to_csv(table: Table | DataFrame) -> str:
    """Write all numbers at full precision, and None as nothing."""
    frame = table.frame if isinstance(table, Table) else table
    return str(frame.to_csv(index=False, lineterminator="\n"))


def to_markdown(table: Table) -> str:
    rule = ["---:" if is_number else "---" for is_number in table.numeric]
    lines = []
    for row in (table.head, rule, *table.texts):
        cells = [cell.replace("|", "\\|") for cell in row]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)
