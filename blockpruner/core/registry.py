"""Registries: rows of one class by name.

Each registry is a visible list at the end of the file of its row class.
"""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import TypeVar

from blockpruner.core.errors import InputError

Row = TypeVar("Row")


class UnknownNameError(InputError, KeyError):
    """A name that no row of a registry has."""

    # KeyError would print the message in quotes.
    __str__ = Exception.__str__


class Registry(Mapping[str, Row]):
    """The rows of one class by name; an unknown name raises InputError with the valid ones."""

    def __init__(
        self,
        title: str,
        row_class: type[Row],
        rows: Iterable[Row],
        *,
        key: str = "name",
        hint: str = "",
    ) -> None:
        """The title describes a name in messages ("score.metric"). `key` is the field that holds a
        row's name. The hint is a sentence for the message of an unknown name."""
        self.title, self.hint = title, hint
        self._row_class, self._key = row_class, key
        self._rows: dict[str, Row] = {}
        for row in rows:
            self.add(row)

    def __getitem__(self, name: str) -> Row:
        if name not in self._rows:
            message = f"{self.title} {name!r} is unknown; valid: {', '.join(self)}"
            message = f"{message}. {self.hint}" if self.hint else message
            raise UnknownNameError(message, rule="unknown-name", key=self.title, value=name)
        return self._rows[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._rows)

    def __len__(self) -> int:
        return len(self._rows)

    def add(self, row: Row) -> None:
        name = getattr(row, self._key)
        if self._rows.get(name, row) is not row:
            raise InputError(
                f"{self.title} {name!r} is there already; give the new {self._row_class.__name__}"
                " another name"
            )
        self._rows[name] = row

    @contextmanager
    def added(self, row: Row) -> Iterator[Row]:
        """Hold a row of the user inside the `with`."""
        name = getattr(row, self._key)
        is_new = name not in self._rows
        self.add(row)
        try:
            yield row
        finally:
            # A user may also pass one of our own rows: it stays.
            if is_new:
                del self._rows[name]
