"""The paper's own numbers (arXiv 2406.10594), read from data/paper.

Decides which of its models a run is of. Nothing here is measured by this project.
"""

import csv
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from blockpruner.core.errors import InputError
from blockpruner.methods.recipes import RECIPES

DENSE = "dense"
"""The name of the dense model's rows, here and in data/paper."""


MODELS: Mapping[str, str] = {
    "meta-llama/Llama-2-7b-hf": "Llama2-7B",
    "meta-llama/Llama-2-13b-hf": "Llama2-13B",
    "baichuan-inc/Baichuan2-7B-Base": "Baichuan2-7B",
    "baichuan-inc/Baichuan2-13B-Base": "Baichuan2-13B",
    "Qwen/Qwen1.5-7B": "Qwen1.5-7B",
    "Qwen/Qwen1.5-14B": "Qwen1.5-14B",
    "mistralai/Mistral-7B-v0.3": "Mistral-7B-v0.3",
    "meta-llama/Meta-Llama-3-8B": "Llama3-8B",
}
"""The paper's name of a model, by its repository."""


@dataclass(frozen=True)
class Published:
    """A row of a table of the paper."""

    model: str
    key: str
    """The method: "dense", or one of a `Recipe.published`."""
    numbers: Mapping[str, float]
    """By column, in the paper's units: per cent, milliseconds, minutes."""

    @property
    def title(self) -> str:
        """The method as this project calls it."""
        titles = [recipe.title for recipe in RECIPES.values() if self.key in recipe.published]
        return titles[0] if titles else self.key


def read_published(folder: Path, name: str) -> list[Published]:
    """Read the rows of <name>.csv, whose first two columns are the model and the method."""
    path = folder / f"{name}.csv"
    if not path.exists():
        fix = f"it belongs to the repository: `git checkout {path}`"
        raise InputError(f"{path} does not exist; {fix}")
    header, *rows = csv.reader(path.read_text(encoding="utf-8").splitlines())
    published = []
    for model, method, *values in rows:
        numbers = dict(zip(header[2:], map(float, values), strict=True))
        published.append(Published(model, method, numbers))
    return published
