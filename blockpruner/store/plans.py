"""Plans on disk: one JSON file each."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

from blockpruner.core.plan import Plan
from blockpruner.store.files import read_json, write_json


def save_plan(plan: Plan, path: Path) -> None:
    write_json(path, asdict(plan))


def load_plan(path: Path) -> Plan:
    """Read a plan; raises InputError that names the file."""
    fields = read_json(path)
    for name in ("removed", "order", "ratios"):
        fields[name] = tuple(fields[name])
    return Plan(**fields)
