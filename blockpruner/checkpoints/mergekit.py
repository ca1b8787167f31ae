"""A plan of whole layers as a configuration of mergekit, which makes the same model of the public weights."""

from __future__ import annotations

import yaml

from blockpruner.core.blocks import BlockKind
from blockpruner.core.errors import InputError
from blockpruner.core.plan import Plan


def mergekit_config(plan: Plan, model: str, dtype: str) -> str:
    """YAML for `mergekit-yaml`: `passthrough` of the layers that are left, runs of neighbours as slices.

    Args:
        model: the dense model, a name on the hub or a folder.

    Raises:
        InputError: the plan leaves a layer with one of its blocks, or no layer, or other weights than the dense ones.
    """
    if plan.kind != "mask" or plan.compensate != "none" or plan.train:
        raise InputError(
            f"mergekit copies layers, and the plan is of other weights (method: {plan.method}, compensate: "
            f"{plan.compensate}); give a plan that only removes layers: prune with --unit layer --compensate none"
        )
    gone = [{block.layer for block in plan.mask if block.kind is kind} for kind in BlockKind]
    if holes := gone[0] ^ gone[1]:
        raise InputError(
            f"mergekit copies whole layers, and the plan leaves one block of {len(holes)} of them (layer "
            f"{min(holes)} is the first); give a plan of whole layers: prune with --unit layer --compensate none"
        )
    runs: list[list[int]] = []
    for layer in sorted({*range(plan.layers)} - gone[0]):
        if runs and runs[-1][1] == layer:
            runs[-1][1] += 1
        else:
            runs.append([layer, layer + 1])
    slices = [{"sources": [{"model": model, "layer_range": run}]} for run in runs]
    found: str = yaml.safe_dump({"slices": slices, "merge_method": "passthrough", "dtype": dtype}, sort_keys=False)
    return found
