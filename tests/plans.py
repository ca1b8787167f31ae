"""Plans without a search, healed weights without healing, and fetched tiny checkpoints to export
them from."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel

from blockpruner.checkpoints import hf
from blockpruner.core.blocks import format_channels, parse_mask
from blockpruner.core.families import count_parameters
from blockpruner.core.plan import Plan
from blockpruner.core.settings import HubTexts, LocalModel
from blockpruner.inputs.calibration import CalibrationSet
from blockpruner.inputs.checkpoints import fetch_checkpoint
from blockpruner.methods.apply import Pruning
from blockpruner.methods.blocks.kind import choose
from blockpruner.methods.healed import Healed, find_healed, save_healed
from blockpruner.methods.kind import make_plan
from blockpruner.methods.narrow.kind import channel_parameters
from blockpruner.scoring.settings import Score
from blockpruner.scoring.work import Rows
from blockpruner.search.trace import Current
from blockpruner.store.files import new_directory, read_json
from tests.tiny import save_tiny


def plan_of(config: Mapping[str, Any] | Path, order: Sequence[str], /, **changes: Any) -> Plan:
    """The plan that removes these units in order, from a config or a checkpoint directory."""
    if isinstance(config, Path):
        config = read_json(config / "config.json")
    units = [parse_mask(unit) for unit in order]
    current = Current(
        "mask", "s", True, Score(method="greedy"), store={}, calibration={"rows": 3, "tokens": 30}
    )
    budget = f"{sum(map(len, units))}blocks"
    plan = choose(units, [2.0] * (len(units) + 1), config, budget, current)
    return replace(plan, **{"target": "t", "run": "r"} | changes)


def narrow_plan(config: Mapping[str, Any] | Path, kept: Mapping[str, Sequence[int]], /) -> Plan:
    """The plan that keeps these channels of MLPs."""
    if isinstance(config, Path):
        config = read_json(config / "config.json")
    width = int(config["intermediate_size"])
    details = {
        "channels": {name: format_channels(channels, width) for name, channels in kept.items()},
        "cost": 0.5,
    }
    gone = sum(width - len(channels) for channels in kept.values())
    pruned = count_parameters(config).total - gone * channel_parameters(config)
    current = Current(
        "narrow",
        "s",
        False,
        Score(method="narrow"),
        store={},
        calibration={"rows": 3, "tokens": 30},
    )
    plan = make_plan(
        current, "0.1", config, perplexities=(2.0, None), pruned=pruned, details=details
    )
    return replace(plan, target="t", run="r")


def pruning(
    dense: Path, plan: Plan, dtype: str = "float32", rows: Rows = (), **more: Any
) -> Pruning:
    return Pruning(dense, plan, CalibrationSet(tuple(rows)), dtype, "cpu", **more)


def fetch(source: Path, out: Path, **settings: Any) -> Path:
    """Fetch a checkpoint directory into another one."""
    model = LocalModel(source="path", path=str(source), **settings)
    fetch_checkpoint(model, out, out.parent / "cache", out.parent / "pins.json")
    return out


def fetch_tiny(
    folder: Path, family: str = "llama", layers: int = 4, dtype: str = "float32", **config: Any
) -> Path:
    """A fetched tiny checkpoint at <folder>/model."""
    return fetch(
        save_tiny(folder / "mine", family, layers, **config), folder / "model", dtype=dtype
    )


def save_pruned(model: PreTrainedModel, directory: Path) -> None:
    """Write a pruned model as a new directory."""
    new_directory(directory, partial(hf.save_pruned, model))


SOMEONE = HubTexts(source="hub", repo="someone/texts")


def healed_of(dense: Path, plan: Plan, folder: Path, weights: Mapping[str, Tensor]) -> Healed:
    """A file in `folder` with these weights of the pruned model of a plan."""
    of = pruning(dense, plan).identity
    save_healed(folder, weights, of, "healed by hand", SOMEONE)
    found = find_healed([folder], of)
    assert found is not None
    return found


def with_weights(dense: Path, out: Path, weights: Mapping[str, Tensor]) -> Path:
    """A copy of a checkpoint directory with other weights."""
    shutil.copytree(dense, out)
    save_file(
        load_file(dense / "model.safetensors") | weights,
        out / "model.safetensors",
        {"format": "pt"},
    )
    return out
