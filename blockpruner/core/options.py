"""Options of a method: the keys under `score.options`, which belong to one method alone."""

from collections.abc import Mapping
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict

from blockpruner.core.settings import read_settings


class Options(BaseModel):
    """The options of a method that has none. Others derive from it and add fields."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", strict=True, use_attribute_docstrings=True
    )

    @property
    def price(self) -> str:
        """The resource that prices a removal, or "none"."""
        return "none"


O = TypeVar("O", bound=Options)  # noqa: E741


def read_options(method: str, model: type[O], given: Mapping[str, Any]) -> O:
    """The options that a run file gives, checked, and the defaults of the others; raises
    InputError."""
    values = {
        key: tuple(value) if isinstance(value, list) else value for key, value in given.items()
    }
    return read_settings(model, values, f"method: {method}: ", "score.options.")
