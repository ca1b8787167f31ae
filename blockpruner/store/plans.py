"""Plans on disk: one JSON file each."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

from blockpruner.core.plan import Plan
from blockpruner.store.files import damaged, read_json, write_sealed_json

PLAN_FILE = "blockpruner_plan.json"
"""The plan in a checkpoint directory."""


def plan_fields(plan: Plan) -> dict[str, Any]:
    """A plan as JSON."""
    return {name: value for name, value in asdict(plan).items() if value is not None}


def save_plan(plan: Plan, path: Path) -> None:
    write_sealed_json(path, plan_fields(plan))


def load_plan(path: Path) -> Plan:
    """Read a plan; raises InputError that names the file."""
    fields = read_json(path, sealed=True)
    try:
        return Plan(**fields | {name: tuple(fields[name]) for name in ("removed", "order", "ratios")})
    except (TypeError, KeyError, ValueError) as error:
        raise damaged(path, f"is not a plan of this version ({error})") from error
