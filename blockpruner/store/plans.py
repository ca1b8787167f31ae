"""Plans on disk: one JSON file each, of a numbered format; what it holds is read strictly.

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
"""The number of the format; a file without one is of the first."""

NUMBERS = {
    "blocks": ("mha", "mlp"),
    "parameters": ("dense", "pruned"),
    "calibration": ("rows", "tokens", "dense_perplexity", "perplexity"),
}
"""Keys of a plan's mappings that every plan has: numbers, in the last mapping also null."""


def unmeasured(plan: Plan) -> Plan:
    """The plan without the perplexities of a model that has other weights."""
    return replace(plan, calibration=dict.fromkeys(NUMBERS["calibration"]), kinds=None)


def plan_fields(plan: Plan) -> dict[str, Any]:
    """A plan as JSON."""
    return {"format": FORMAT} | {
        name: value for name, value in asdict(plan).items() if value is not None
    }


def save_plan(plan: Plan, path: Path) -> None:
    write_sealed_json(path, plan_fields(plan))


def load_plan(path: Path) -> Plan:
    """Read a plan; raises InputError that names the file."""
    fields, where = read_json(path, sealed=True), f"{path} is not a plan: "
    if isinstance(fields, dict) and (number := fields.pop("format", FORMAT)) != FORMAT:
        raise InputError(
            f"{path} is a plan of format {number!r}, and this version reads {FORMAT}; take the"
            " version of blockpruner that wrote it, or make the plan again",
            rule="plan-format",
            key="format",
            value=number,
        )
    try:
        plan = TypeAdapter(Plan).validate_json(json.dumps(fields))
    except ValidationError as error:
        raise input_error(error, where) from error
    try:
        _ = plan.cut, plan.details["channels"] if plan.kind == "narrow" else None
    except (KeyError, ValueError, AttributeError) as error:
        raise InputError(
            f"{where}details.channels: {error!r}", rule="settings", key="details"
        ) from error
    for name, keys in NUMBERS.items():
        for key in keys:
            value = getattr(plan, name).get(key, "missing")
            is_number = isinstance(value, int | float) and (value > 0 or name == "blocks")
            if not (is_number or (value is None and name == "calibration")):
                raise InputError(
                    f"{where}{name}.{key} is {value!r}; valid: above 0", rule="settings", key=name
                )
    for kind, own in (plan.kinds or {}).items():
        if own.keys() != {"dense", "after"} or not all(
            0 < value < math.inf for value in own.values()
        ):
            message = f"{where}kinds.{kind} is {own}; valid: dense and after, above 0"
            raise InputError(message, rule="settings", key="kinds")
    return plan
