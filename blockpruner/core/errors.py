"""Errors for users: every message names the bad value, the valid ones and the fix.

Everything that a user can correct is an InputError. Our own invariants use `assert`.
"""

from __future__ import annotations


class InputError(ValueError):
    """A value, file or environment that the user can correct; stages print it without a traceback."""


class UnreachableError(InputError):
    """No pruned model of a method meets a budget; names the nearest that one does."""


class NonFiniteLossError(InputError):
    """The loss of one (mask, row) is NaN or infinite."""


class StorageError(InputError):
    """A result could not be written (disk full, read-only place); finished results are untouched."""


class DeviceMemoryError(InputError):
    """A model, or one row of tokens beside it, does not fit into the memory that there is; names the figures."""
