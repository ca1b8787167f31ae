"""Errors for users: every message names the bad value, the valid ones and the fix.

Everything that a user can correct is an InputError. Our own invariants use `assert`.
"""

from collections.abc import Iterator
from contextlib import contextmanager


class InputError(ValueError):
    """A value, file or environment that the user can correct; stages print it without a traceback.
    Wordings may change; `rule` names what was broken ("unknown-method"), and `key` the settings key
    of the value given ("score.method")."""

    def __init__(
        self, message: str, *, rule: str = "", key: str = "", value: object = None
    ) -> None:
        super().__init__(message)
        self.rule, self.key, self.value = rule, key, value


class UnreachableError(InputError):
    """No pruned model of a method meets a budget; names the nearest that one does."""


class NonFiniteLossError(InputError):
    """The loss of the dense model, or of training, is NaN or infinite."""


class StorageError(InputError):
    """A result could not be written (disk full, read-only place); finished results are
    untouched."""


class DeviceMemoryError(InputError):
    """A model, or one row of tokens beside it, does not fit into the memory that there is; names
    the figures."""


class MissingPackageError(InputError, ImportError):
    """A package that only some uses need is not installed; names the extra that installs it."""


def package(extra: str = "") -> str:
    """What pip must be given in a clone to install this package: the name on PyPI may be
    anybody's."""
    return f"'.[{extra}]'" if extra else "'.'"


def missing(name: str, extra: str) -> MissingPackageError:
    return MissingPackageError(
        f"this needs the package {name}, which is not installed: in a clone of blockpruner, pip"
        f" install {package(extra)}"
    )


@contextmanager
def extra(name: str) -> Iterator[None]:
    """Within, packages are imported that an extra of pyproject.toml installs; raises
    MissingPackageError for one that is not installed."""
    try:
        yield
    except ModuleNotFoundError as error:
        raise missing(error.name or name, name) from error


@contextmanager
def named(prefix: str) -> Iterator[None]:
    """Within, messages of InputErrors begin with `prefix`."""
    try:
        yield
    except InputError as error:
        raise InputError(
            f"{prefix}{error}", rule=error.rule, key=error.key, value=error.value
        ) from None
