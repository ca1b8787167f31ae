"""Plans on disk: one JSON file each, of a numbered format, whose content is read strictly.

A plan may come from a stranger. Whether it fits a model is decided where it is applied.
"""

import json
import math
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from blockpruner.core.errors import InputError
from blockpruner.core.plan import Plan
from blockpruner.core.settings import input_error
from blockpruner.store.files import read_json, write_sealed_json

PLAN_FILE = "blockpruner_plan.json"
"""The plan in a checkpoint directory."""

FORMAT = 1
"""The number of the format; a file without one is of format 1."""

NUMBERS = {
    "blocks": ("mha", "mlp"),
    "parameters": ("dense", "pruned"),
    "calibration": ("rows", "tokens", "dense_perplexity", "perplexity"),
}
"""The keys of a plan's mappings, which every plan has: numbers, in the last mapping also null."""


def unmeasured(plan: Plan) -> Plan:
    """The plan without the perplexities of a model that has other weights."""
    return replace(plan, calibration=dict.fromkeys(NUMBERS["calibration"]), kinds=None)


def plan_fields(plan: Plan) -> dict[str, Any]:
    """A plan as JSON."""
    fields = {name: value for name, value in asdict(plan).items() if value is not None}
    return {"format": FORMAT, **fields}


def save_plan(plan: Plan, path: Path) -> None:
    write_sealed_json(path, plan_fields(plan))


def load_plan(path: Path) -> Plan:
    """Read a plan; raises InputError that names the file."""
    fields = read_json(path, sealed=True)
    number = fields.pop("format", FORMAT)
    if number != FORMAT:
        raise InputError(
            f"{path} is a plan of format {number!r}, and this version reads {FORMAT}; take the"
            " version of blockpruner that wrote it, or make the plan again",
            rule="plan-format",
            key="format",
            value=number,
        )
    context = f"{path} is not a plan: "
    try:
        plan = TypeAdapter(Plan).validate_json(json.dumps(fields))
    except ValidationError as error:
        raise input_error(error, context) from error
    # The schema does not check the texts of blocks and channels.
    try:
        _ = plan.cut
        if plan.kind == "narrow":
            _ = plan.details["channels"]
    except (KeyError, ValueError, AttributeError) as error:
        raise InputError(
            f"{context}details.channels: {error!r}", rule="settings", key="details"
        ) from error
    # The schema allows any number, and the plan may come from a stranger.
    for name, keys in NUMBERS.items():
        for key in keys:
            _require_number(getattr(plan, name).get(key, "missing"), name, key, context)
    for kind, perplexity in (plan.kinds or {}).items():
        is_positive = all(0 < value < math.inf for value in perplexity.values())
        if perplexity.keys() != {"dense", "after"} or not is_positive:
            raise InputError(
                f"{context}kinds.{kind} is {perplexity}; valid: dense and after, above 0",
                rule="settings",
                key="kinds",
            )
    return plan


def _require_number(value: object, name: str, key: str, context: str) -> None:
    """Refuse a value that is not above 0. Counts of blocks may be 0, and perplexities null."""
    is_number = isinstance(value, int | float) and (value > 0 or name == "blocks")
    is_unmeasured = value is None and name == "calibration"
    if not is_number and not is_unmeasured:
        raise InputError(
            f"{context}{name}.{key} is {value!r}; valid: above 0", rule="settings", key=name
        )
