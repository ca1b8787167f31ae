"""The least memory of a device for each step of a run, counted from the model's shape before anything is searched."""

from __future__ import annotations

from collections.abc import Mapping

from blockpruner.core.errors import InputError
from blockpruner.core.families import FAMILIES, Config, count_parameters
from blockpruner.healing.settings import Train
from blockpruner.scoring.work import LOGITS_BYTES, live_numbers, sums_bytes

BYTES = {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2}
"""The bytes of a number, by dtype."""

TOKENS = 2048
"""Tokens of the smallest batches."""

HELD_OUT = 24 * 256
"""Tokens whose features choose the strength of a fit."""

MASTER = 4 + 8 + 4
"""Bytes of a trained weight beside what the model computes with: float32, two moments, gradient."""


def step_bytes(config: Config, dtype: str, compensate: str, train: Train | None) -> dict[str, int]:
    """Bytes by step: search, refit, training. Of training with adapters only the models count, which they share."""
    family, item, hidden = FAMILIES[str(config["model_type"])], BYTES[dtype], int(config["hidden_size"])
    costs, inner = count_parameters(config), int(config.get("intermediate_size") or 4 * hidden)
    weights = costs.total * item
    batch = TOKENS * live_numbers(hidden, inner) * item + 4 * LOGITS_BYTES
    found = {"search": weights + batch}
    if compensate == "refit":
        head = int(config.get("head_dim") or hidden // int(config["num_attention_heads"]))
        mha, mlp = int(config["num_attention_heads"]) * head, inner if family.has_one_mlp else 0
        width = mha + mlp if family.is_parallel(config) else max(mha, mlp)
        found["refit"] = weights + batch + sums_bytes(width, hidden) + 4 * HELD_OUT * (width + 2 * hidden)
    if train is not None:
        trained = sum(costs.blocks.values()) if train.weights == "all" else 0
        teacher = weights if trained and train.distill else 0
        found["training"] = weights + teacher + trained * (MASTER + item) + batch
    return found


def require_room(needs: Mapping[str, int], device: str, room: int) -> None:
    """Refuse a run before its search if the device cannot hold one of its steps; raises InputError."""
    for step, size in needs.items():
        if size > room:
            fix = {"search": "use --streaming", "refit": "set compensate: none", "training": "train adapters (lora)"}
            raise InputError(
                f"{step} takes {size / 2**30:.1f} GiB of memory at least, and {device} has {room / 2**30:.1f}; "
                f"{fix[step]}, choose a larger device, or device: cpu",
                rule="too-large", key="device", value=device,
            )  # fmt: skip
