"""`blockpruner prune --dry-run`: what a run removes and needs, from the model's config alone; nothing is computed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from blockpruner.cli.pruning import own_dtype
from blockpruner.core.blocks import removable_units
from blockpruner.core.budgets import parse_budget, resources_of
from blockpruner.core.families import Config, count_parameters
from blockpruner.methods.registry import kind_of_method, require_budgets
from blockpruner.reporting.formats import size
from blockpruner.settings import Run

BYTES = {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2}
"""The bytes of a number, by dtype."""


def dry_run(run: Run, config: Config, budgets: Sequence[str]) -> dict[str, Any]:
    """Count what a run removes and needs.

    Raises:
        InputError: a budget that no model of this shape reaches.
    """
    require_budgets(run.score, config, tuple(budgets))
    layers, parameters = int(config["num_hidden_layers"]), count_parameters(config).total
    costs = resources_of(config)["parameters"]
    wanted = [parse_budget(text, costs) for text in budgets]
    shares = {budget.text: budget.ratio for budget in wanted if budget.resource == "parameters" and budget.ratio}
    units = removable_units(layers, run.score.unit, run.score.candidates)
    return {
        "model": f"{run.model.title}, {config['model_type']}, {run.model.dtype}",
        "blocks": f"{layers} MHA + {layers} MLP",
        "parameters": parameters,
        "parameters_to_remove": {text: round(share * parameters) for text, share in shares.items()},
        "first_step_masks": len(units) if kind_of_method(run.score.method).removes_blocks else 0,
        "weights_bytes": parameters * BYTES[run.model.dtype],
        "disk_bytes": parameters * BYTES[own_dtype(config)],
    }


def in_words(found: Mapping[str, Any]) -> str:
    """Write it for a reader."""
    removed = "; ".join(f"{count:,} at {text}" for text, count in found["parameters_to_remove"].items())
    lines = {
        "model": found["model"],
        "blocks": found["blocks"],
        "parameters": f"{found['parameters']:,}" + (f"; removed: {removed}" if removed else ""),
        "masks of the first step": found["first_step_masks"],
        "memory": f"{size(found['weights_bytes'])} of weights, and more for what is computed",
        "disk": f"{size(found['disk_bytes'])} for the copy in --trials, and less for each checkpoint",
    }
    return "\n".join(f"{name}: {value}" for name, value in lines.items())
