"""Plans without a search, and fetched tiny checkpoints to export them from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from blockpruner.core.blocks import parse_mask
from blockpruner.core.plan import Plan
from blockpruner.core.settings import LocalModel, Score
from blockpruner.inputs.checkpoints import fetch_checkpoint
from blockpruner.methods.blocks.kind import choose
from blockpruner.search.trace import Current
from blockpruner.store.files import read_json
from tests.tiny import save_tiny


def plan_of(config: Mapping[str, Any] | Path, order: Sequence[str], /, **changes: Any) -> Plan:
    """The plan that removes these units in order, from a config or a checkpoint directory."""
    if isinstance(config, Path):
        config = read_json(config / "config.json")
    units = [parse_mask(unit) for unit in order]
    current = Current("mask", "s", True, Score(), store={}, calibration={"rows": 3, "tokens": 30})
    budget = f"{sum(map(len, units))}blocks"
    plan = choose(units, [2.0] * (len(units) + 1), config, budget, current)
    return replace(plan, **{"target": "t", "run": "r"} | changes)


def fetch(source: Path, out: Path, **settings: Any) -> Path:
    """Fetch a checkpoint directory into another one."""
    model = LocalModel(source="path", path=str(source), **settings)
    fetch_checkpoint(model, out, out.parent / "cache", out.parent / "pins.json")
    return out


def fetch_tiny(folder: Path, family: str = "llama", layers: int = 4, dtype: str = "float32", **config: Any) -> Path:
    """A fetched tiny checkpoint at <folder>/model."""
    return fetch(save_tiny(folder / "mine", family, layers, **config), folder / "model", dtype=dtype)
