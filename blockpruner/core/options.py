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


def read_options(method: str, model: type[O], values: Mapping[str, Any]) -> O:
    """The options of a run file, checked, and the defaults of the others; raises InputError."""
    # YAML has lists, and a strict model takes no list for a tuple.
    frozen = {key: tuple(v) if isinstance(v, list) else v for key, v in values.items()}
    return read_settings(model, frozen, f"method: {method}: ", "score.options.")
