"""Registries: rows by name, among them the rows that other packages add.

A package adds rows with an entry point of the group `blockpruner.extensions` that names a list of
them:

    [project.entry-points."blockpruner.extensions"]
    my_package = "my_package:ROWS"          # ROWS = [Metric("mine", ...), Export("mine", ...)]

Each registry takes the rows of its own class. Entry points are read at the first look at more than
our own rows: a registry may be asked for one of those, but not be listed, while modules are
imported.
"""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import is_dataclass
from functools import cache, cached_property
from importlib.metadata import entry_points
from typing import Any, TypeVar

from blockpruner.core.errors import InputError

GROUP = "blockpruner.extensions"
Row = TypeVar("Row")


class UnknownNameError(InputError, KeyError):
    """A name that no row of a registry has."""

    __str__ = Exception.__str__


class Registry(Mapping[str, Row]):
    """The rows of one class by name; an unknown name raises InputError with the valid ones."""

    def __init__(
        self, title: str, of: type[Row], rows: Iterable[Row], *, key: str = "name", hint: str = ""
    ) -> None:
        """The title is what a name is, in messages ("score.metric"); the key is the field that
        holds a row's name; the hint is a sentence for the message of an unknown name."""
        self.title, self.hint = title, hint
        self._of, self._key = of, key
        self._rows: dict[str, Row] = {}
        for row in rows:
            self.add(row)

    def __getitem__(self, name: str) -> Row:
        if name not in self._rows and name not in self._all:
            message = f"{self.title} {name!r} is unknown; valid: {', '.join(self)}"
            message = f"{message}. {self.hint}" if self.hint else message
            raise UnknownNameError(message, rule="unknown-name", key=self.title, value=name)
        return self._rows[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._all)

    def __len__(self) -> int:
        return len(self._all)

    def add(self, row: Row) -> None:
        name = getattr(row, self._key)
        if self._rows.get(name, row) is not row:
            raise InputError(
                f"{self.title} {name!r} is there already; give the new {self._of.__name__} another"
                " name"
            )
        self._rows[name] = row

    @contextmanager
    def added(self, row: Row) -> Iterator[Row]:
        """A row for a while, for instance in a test."""
        name = getattr(row, self._key)
        is_new = name not in self._rows
        self.add(row)
        try:
            yield row
        finally:
            if is_new:
                del self._rows[name]

    @cached_property
    def _all(self) -> dict[str, Row]:
        for row in extension_rows():
            if isinstance(row, self._of):
                self.add(row)
        return self._rows


@cache
def extension_rows() -> tuple[Any, ...]:
    """The rows of every package that is installed here."""
    rows: list[Any] = []
    for point in entry_points(group=GROUP):
        package = point.dist.name if point.dist else "an unknown package"
        try:
            found = tuple(point.load())
        except Exception as error:  # code of others may raise anything
            raise InputError(
                f"extension {point.name} ({point.value}) of {package} cannot be loaded ({error!r});"
                f" repair {package}, or uninstall it"
            ) from error
        wrong = [row for row in found if not is_dataclass(row) or isinstance(row, type)]
        if wrong:
            raise InputError(
                f"extension {point.name} ({point.value}) of {package} lists {wrong[0]!r}, which is"
                " no row; valid: Family, Metric, Search, Kind, Export, Benchmark"
            )
        rows.extend(found)
    return tuple(rows)
