"""What one name stands for: the search, its acceleration and the compensation that go together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from blockpruner.core.budgets import read_budget
from blockpruner.core.errors import InputError
from blockpruner.core.families import Config
from blockpruner.scoring.settings import Score


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


HEALING: Mapping[str, Mapping[str, Any]] = {
    "all": {"weights": "all", "learning_rate": 3e-4},  # measured: docs/experiments.md, "Search and healing"
    "lora": {"weights": "lora", "learning_rate": 2e-4},  # the paper's rate; not measured with this loss
}
"""Recipes of training by the weights that are trained: values of `recover` in a run file, with those below."""

DISTILLATION: Mapping[str, Any] = {
    "distill": 1.0, "num_rows": 450, "seq_len": 512, "batch": 2, "accumulation": 1, "schedule": "cosine",
    "warmup": 0.05, "validation": 8,
}  # fmt: skip


def healing(name: str) -> dict[str, Any]:
    """Values of `recover` for a recipe of training; raises InputError for a name that is none."""
    if name not in HEALING:
        raise InputError(f"--heal {name!r} is unknown; valid: {', '.join(HEALING)}")
    return {**DISTILLATION, **HEALING[name]}


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


def rival(name: str, score: Score, config: Config, budget: str, compensation: str) -> Score | None:
    """The search of whole layers that the recommended one is held against, after both are compensated.

    Whole layers leave fewer and wider holes, which a refit mends better: they were first on Gemma 3 and at 30 % of
    SmolLM2 (docs/experiments.md). None for other recipes, and where layers cannot meet the budget.
    """
    from blockpruner.methods.registry import require_budgets

    free = (score.unit, score.candidates, dict(score.options)) == ("block", "all", {}) and compensation != "none"
    if name != RECOMMENDED or not free or read_budget(budget)[1] != "":
        return None
    layers = score.model_copy(update={"method": "greedy", "unit": "layer"})
    try:
        require_budgets(layers, config, (budget,))
    except InputError:
        return None
    return layers


def settled(scores: Sequence[Score], perplexities: Sequence[float]) -> str:
    """Which of several searches is taken, by the perplexity on the compensation's held-out rows, in words."""
    words = (f"{score.method} of {score.unit}s {value:.2f}" for score, value in zip(scores, perplexities, strict=True))
    return f"held-out perplexity, compensated: {', '.join(words)}; the lowest is taken"
