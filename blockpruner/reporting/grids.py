"""The earlier names of `table`, for modules that are not yet moved to it."""

from blockpruner.reporting.table import (
    BLANK,
    Cell,
    Column,
    Field,
    Number,
    columns_of,
    escape_latex,
    factor,
    p_value,
    percentage,
    points,
    score,
    share,
    to_csv,
    to_latex,
)
from blockpruner.reporting.table import Table as Grid
from blockpruner.reporting.table import points as difference
from blockpruner.reporting.table import table_of as grid_of

__all__ = [
    "BLANK", "Cell", "Column", "Field", "Grid", "Number", "columns_of", "difference", "escape_latex", "factor",
    "grid_of", "p_value", "percentage", "points", "score", "share", "to_csv", "to_latex",
]  # fmt: skip
