"""Ranges of a search's options; their types are checked where `SEARCHES` is read."""

from __future__ import annotations

from collections.abc import Sequence

from blockpruner.errors import InputError


def require_at_least(option: str, value: int, least: int) -> None:
    if value < least:
        raise InputError(f"score.options.{option} {value} is out of range; valid: {least} or more")


def require_one_of(option: str, value: str, valid: Sequence[str]) -> None:
    if value not in valid:
        raise InputError(f"score.options.{option} {value!r} is unknown; valid: {', '.join(valid)}")
