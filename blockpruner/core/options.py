"""Options of a method: a mapping beside `method` in a run file, checked against the method's own defaults.

Decides types and what is filled in; which options there are is each method's affair.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from blockpruner.core.errors import InputError


def fill_options(method: str, defaults: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """The given options, and the defaults of the others.

    Args:
        defaults: a value, whose type the option has; a type, where it must be given; None, where it is a whole number
            or nothing.

    Raises:
        InputError: an unknown option, one of another type, or a missing one.
    """
    given = {key: tuple(value) if isinstance(value, list) else value for key, value in given.items()}
    for key, value in given.items():
        if key not in defaults:
            raise InputError(
                f"score.options.{key} is unknown to method: {method}; valid: {', '.join(defaults) or 'none'}"
            )
        wanted = _type_of(defaults[key])
        if defaults[key] is None and value is None:
            continue
        if not isinstance(value, wanted) or (isinstance(value, bool) and wanted is not bool):
            raise InputError(f"score.options.{key}: {value!r} is not of type {wanted.__name__}")
    for key, default in defaults.items():
        if isinstance(default, type) and key not in given:
            raise InputError(f"method: {method} needs score.options.{key}, of type {default.__name__}")
    return {key: given.get(key, default) for key, default in defaults.items()}


def _type_of(default: Any) -> type:
    if default is None:
        return int
    return default if isinstance(default, type) else type(default)


def require_at_least(option: str, value: int, least: int) -> None:
    if value < least:
        raise InputError(f"score.options.{option} {value} is out of range; valid: {least} or more")


def require_one_of(option: str, value: str, valid: Sequence[str]) -> None:
    if value not in valid:
        raise InputError(f"score.options.{option} {value!r} is unknown; valid: {', '.join(valid)}")
