"""What one name stands for: the search, its acceleration and the compensation that go together."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from blockpruner.core.errors import InputError


@dataclass(frozen=True)
class Recipe:
    """Values of `score.method`, `score.acceleration` and `compensate.method` in a run file."""

    method: str
    acceleration: str = "none"
    compensation: str = "none"


RECOMMENDED = "recommended"
RECIPES: Mapping[str, Recipe] = {
    RECOMMENDED: Recipe("floating", "lazy+race", "refit"),  # measured: docs/experiments.md, "Three calibration draws"
    "blockpruner": Recipe("greedy"),  # exactly as published, arXiv 2406.10594
}


def recipe(name: str, acceleration: str | None = None, compensation: str | None = None) -> Recipe:
    """Read a recipe's name, or that of a plain method, which is exact and not compensated.

    Args:
        acceleration, compensation: in place of the recipe's own.

    Raises:
        InputError: there is neither a recipe nor a method of this name; names those that there are.
    """
    from blockpruner.methods.registry import method_names  # takes a second, which `blockpruner --help` does without

    names = [*RECIPES, *method_names()]
    if name not in names:
        raise InputError(f"method {name!r} is unknown; valid: {', '.join(names)}")
    found = RECIPES.get(name, Recipe(name))
    return Recipe(found.method, acceleration or found.acceleration, compensation or found.compensation)
