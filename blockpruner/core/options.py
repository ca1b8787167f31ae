"""Options of a method: the keys under `score.options`, which belong to one method alone.

Each method has a frozen model of its own, which lies beside its code. Here its errors become ours.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from blockpruner.core.errors import InputError


class Options(BaseModel):
    """A method without options. Others derive from it and add fields."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, use_attribute_docstrings=True)

    @property
    def price(self) -> str:
        """The resource that prices a removal, or "none"."""
        return "none"

    @property
    def has_greedy_steps(self) -> bool:
        """Whether the search takes greedy steps with these options, which can be accelerated."""
        return True


O = TypeVar("O", bound=Options)  # noqa: E741


def read_options(method: str, model: type[O], given: Mapping[str, Any]) -> O:
    """Check the options that a run file gives, and fill in the others.

    Raises:
        InputError: an unknown or missing option, or a value that is not valid; names the valid ones.
    """
    values = {key: tuple(value) if isinstance(value, list) else value for key, value in given.items()}
    try:
        return model.model_validate(values)
    except ValidationError as error:
        raise InputError("\n".join(_describe(method, model, fault) for fault in error.errors())) from error


def _describe(method: str, model: type[Options], fault: Mapping[str, Any]) -> str:
    key = "score.options." + ".".join(map(str, fault["loc"]))
    if fault["type"] == "extra_forbidden":
        return f"{key} is unknown to method: {method}; valid: {', '.join(model.model_fields) or 'none'}"
    if fault["type"] == "missing":
        return f"method: {method} needs {key}"
    return f"{key}: {fault['input']!r} is not valid: {str(fault['msg']).removeprefix('Value error, ')}"
