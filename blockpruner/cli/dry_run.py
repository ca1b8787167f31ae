"""`blockpruner prune --dry-run`: what a run removes and needs, from the model's config alone;
nothing is computed."""

from collections.abc import Mapping
from typing import Any

from blockpruner.cli.pruning import own_dtype
from blockpruner.core.blocks import removable_units
from blockpruner.core.budgets import parse_budget
from blockpruner.core.families import Config, count_parameters
from blockpruner.healing.memory import step_bytes
from blockpruner.methods.recipes import compensation, proposals, require_reached
from blockpruner.methods.registry import kind_of_method
from blockpruner.reporting.formats import size
from blockpruner.scoring.metrics import METRICS
from blockpruner.scoring.work import BYTES
from blockpruner.settings import Run


def dry_run(run: Run, config: Config, budget: str) -> dict[str, Any]:
    """Count what a run removes and needs; raises InputError for a budget that no model of this
    shape reaches."""
    require_reached(run.score, config, budget)
    layers, counts = int(config["num_hidden_layers"]), count_parameters(config)
    wanted = parse_budget(budget, counts)
    share = wanted.ratio if wanted.resource == "parameters" else None
    masks = {
        name: len(removable_units(layers, score.unit, score.candidates))
        for name, score in proposals(run.score, config, budget).items()
        if kind_of_method(score.method).removes_blocks and not METRICS[score.metric].influence
    }
    others = [
        f"none ({name})" for name in proposals(run.score, config, budget) if name not in masks
    ]
    compensate = compensation(run.compensate.method, run.score.method)
    return {
        "model": f"{run.model.title}, {config['model_type']}, {run.model.dtype}",
        "blocks": f"{layers} MHA + {layers} MLP",
        "parameters": counts.total,
        "parameters_to_remove": share and round(share * counts.total),
        "first_step_masks": masks,
        "without_masks": others,
        "weights_bytes": counts.total * BYTES[run.model.dtype],
        "memory_bytes": step_bytes(
            config, run.model.dtype, run.score, compensate, run.train, budget
        ),
        "disk_bytes": counts.total * BYTES[own_dtype(config)],
        "is_local": run.model.source == "path",
    }


def in_words(found: Mapping[str, Any]) -> str:
    gone, masks = found["parameters_to_remove"], found["first_step_masks"]
    more = (
        "" if found["is_local"] else f", and {size(found['disk_bytes'])} for the download (HF_HOME)"
    )
    counted = [f"{count} ({name})" for name, count in masks.items()]
    lines = {
        "model": found["model"],
        "blocks": found["blocks"],
        "parameters": f"{found['parameters']:,}" + (f"; removed: {gone:,}" if gone else ""),
        "masks of the first step": ", ".join(counted + found["without_masks"]),
        "memory": "at least "
        + ", ".join(f"{size(most)} for {step}" for step, most in found["memory_bytes"].items()),
        "disk": f"less than {size(found['disk_bytes'])} for each checkpoint" + more,
    }
    return "\n".join(f"{name}: {value}" for name, value in lines.items())
