"""`blockpruner prune --dry-run`: what a run removes and needs, from the model's config alone;
nothing is computed."""

from collections.abc import Mapping
from typing import Any

from blockpruner.cli.pruning import own_dtype
from blockpruner.config.sections import Run
from blockpruner.core.blocks import removable_units
from blockpruner.core.budgets import parse_budget
from blockpruner.core.families import Config, count_parameters
from blockpruner.healing.memory import step_bytes
from blockpruner.methods.recipes import compensation, proposals, require_reached
from blockpruner.methods.registry import kind_of_method
from blockpruner.reporting.formats import size
from blockpruner.scoring.metrics import METRICS
from blockpruner.scoring.work import BYTES


def dry_run(run: Run, config: Config, budget: str) -> dict[str, Any]:
    """Count what a run removes and takes; raises InputError for a budget that no model of this
    shape reaches."""
    require_reached(run.score, config, budget)
    layers = int(config["num_hidden_layers"])
    counts = count_parameters(config)
    target = parse_budget(budget, counts)
    share = target.ratio if target.resource == "parameters" else None
    masks, without_masks = {}, []
    for name, score in proposals(run.score, config, budget).items():
        # Only a search of blocks by losses scores masks; an influence is one pass over the rows.
        scores_masks = kind_of_method(score.method).removes_blocks
        if scores_masks and not METRICS[score.metric].influence:
            masks[name] = len(removable_units(layers, score.unit, score.candidates))
        else:
            without_masks.append(f"none ({name})")
    dtype = run.model.dtype
    compensate = compensation(run.compensate.method, run.score.method)
    return {
        "model": f"{run.model.title}, {config['model_type']}, {dtype}",
        "blocks": f"{layers} MHA + {layers} MLP",
        "parameters": counts.total,
        "parameters_to_remove": share and round(share * counts.total),
        "first_step_masks": masks,
        "without_masks": without_masks,
        "weights_bytes": counts.total * BYTES[dtype],
        "memory_bytes": step_bytes(config, dtype, run.score, compensate, run.train, budget),
        "disk_bytes": counts.total * BYTES[own_dtype(config)],
        "is_local": run.model.source == "path",
    }


def in_words(forecast: Mapping[str, Any]) -> str:
    parameters = f"{forecast['parameters']:,}"
    if forecast["parameters_to_remove"]:
        parameters += f"; removed: {forecast['parameters_to_remove']:,}"
    masks = [f"{count} ({name})" for name, count in forecast["first_step_masks"].items()]
    memory = [f"{size(count)} for {step}" for step, count in forecast["memory_bytes"].items()]
    disk = f"less than {size(forecast['disk_bytes'])} for each checkpoint"
    if not forecast["is_local"]:
        disk += f", and {size(forecast['disk_bytes'])} for the download (HF_HOME)"
    lines = {
        "model": forecast["model"],
        "blocks": forecast["blocks"],
        "parameters": parameters,
        "masks of the first step": ", ".join(masks + forecast["without_masks"]),
        "memory": f"at least {', '.join(memory)}",
        "disk": disk,
    }
    return "\n".join(f"{name}: {value}" for name, value in lines.items())
