"""Train a pruned model, and hand on the weights that changed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from blockpruner.core.progress import Observer
from blockpruner.healing.settings import Train
from blockpruner.healing.training import train_
from blockpruner.inputs.calibration import CalibrationSet, check_context
from blockpruner.methods.apply import Pruning, pruned_copy
from blockpruner.methods.healed import changed_weights, load_healed_, parameter_digests, save_healed
from blockpruner.model.models import depths_after
from blockpruner.store.files import read_json, replace_directory, write_json

TRAIN_FACTS = "train.json"


def write_trained(
    folder: Path,
    pruning: Pruning,
    wanted: Train,
    rows: CalibrationSet,
    validation: CalibrationSet | None,
    adapters: Path,
    observer: Observer,
) -> None:
    """Train the model of a plan, as `train` does: its weights and facts at `folder`."""
    weights, facts = train(pruning, wanted, rows, validation, adapters, observer)

    def build(directory: Path) -> None:
        words = f"then trained ({wanted.title}) on {len(rows.rows):,} rows of `{wanted.data.title}`"
        words = f"{words}, {rows.tokens:,} tokens"
        save_healed(directory, weights, pruning.identity, words, wanted.data, pruning.healed)
        drawn = {"enabled": True, **wanted.model_dump(), "rows": len(rows.rows), "tokens": rows.tokens}
        write_json(directory / TRAIN_FACTS, drawn | facts)

    replace_directory(folder, build)


def train(
    pruning: Pruning,
    wanted: Train,
    rows: CalibrationSet,
    validation: CalibrationSet | None,
    adapters: Path,
    observer: Observer,
) -> tuple[Mapping[str, Tensor], dict[str, Any]]:
    """Train the model of a plan; returns the weights that are not what the plan makes of them, and facts as JSON.

    Args:
        pruning: with healed weights, training begins with those.
        adapters: folder of the states of training, from which a killed one goes on.
    """
    check_context(wanted.seq_len, read_json(pruning.dense / "config.json"), "train.seq_len")
    of, healed, plan = pruning.identity, pruning.healed, pruning.plan
    teacher = pruning.load() if wanted.distill or wanted.hidden else None
    # adapters leave the model's own tensors alone until the end; float16 is trained as float32
    shared = teacher is not None and wanted.weights == "lora" and pruning.dtype != "float16"
    if teacher is not None and shared:
        model = pruned_copy(teacher, plan, pruning.rows.rows)
    else:
        model = replace(pruning, healed=None).prune_(pruning.load())
    before = parameter_digests(model)
    if healed is not None:
        load_healed_(model, healed.path, shared)
    depths = depths_after(teacher, plan.mask) if teacher and wanted.hidden else ()
    trained = train_(
        model, rows, wanted, teacher=teacher, validation=validation, depths=depths, adapters=adapters,
        identity=f"{of} {healed.digest}" if healed else of, observer=observer,
    )  # fmt: skip
    return changed_weights(trained.model, before, plan), trained.facts
