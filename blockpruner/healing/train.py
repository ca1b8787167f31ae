"""Train a pruned model, and hand on the weights that changed."""

import shutil
from dataclasses import replace
from pathlib import Path

from transformers import PreTrainedModel

from blockpruner.core.progress import Observer
from blockpruner.evaluation.kinds import perplexities
from blockpruner.evaluation.perplexity import measure_perplexity
from blockpruner.healing.settings import Train
from blockpruner.healing.states import BEST
from blockpruner.healing.trainer import train_
from blockpruner.inputs.calibration import CalibrationSet, check_context
from blockpruner.methods.apply import Pruning, pruned_copy
from blockpruner.methods.healed import (
    changed_weights,
    load_healed_,
    parameter_digests,
    save_healed,
)
from blockpruner.scoring.metrics import perplexity
from blockpruner.store.files import read_json, replace_directory, write_json
from blockpruner.store.locks import hold, this_process
from blockpruner.store.manifest import TRAIN_FACTS
from blockpruner.store.provenance import fingerprint
from blockpruner.versions import WEIGHTS_VERSION

NO_ROWS = CalibrationSet(())
NOT_IN_KEY = {"data", "num_samples", "num_rows", "seq_len", "validation"}
"""The settings that do not decide the weights, given the rows."""


def write_trained(
    folder: Path,
    pruning: Pruning,
    recipe: Train,
    rows: CalibrationSet,
    validation: CalibrationSet | None,
    states: Path,
    observer: Observer,
    selection: CalibrationSet = NO_ROWS,
) -> None:
    """Train the model of a plan, from its healed weights on. Writes the weights that are not what
    the plan makes of them, and facts, to `folder`.

    The perplexity by kind of text is measured again on the rows of the selection split. `states`
    has a folder for each model, rows and recipe, from which a killed training goes on; it is
    removed at the end."""
    check_context(recipe.seq_len, read_json(pruning.dense / "config.json"), "train.seq_len")
    key = {
        "model": pruning.identity,
        "healed": pruning.healed and pruning.healed.digest,
        "dtype": pruning.dtype,
        "rows": rows.digest,
        "validation": validation and validation.digest,
        "version": [WEIGHTS_VERSION, BEST],
        "recipe": recipe.model_dump(mode="json", exclude=NOT_IN_KEY),
    }
    training_states = states / fingerprint(key)

    def note_busy(holder: str) -> None:
        observer.note(f"{holder} trains the same; waiting for it")

    with hold(training_states.with_suffix(".lock"), this_process(), note_busy):
        _write(folder, pruning, recipe, rows, validation, selection, training_states, observer)
        shutil.rmtree(training_states)


def _write(
    folder: Path,
    pruning: Pruning,
    recipe: Train,
    rows: CalibrationSet,
    validation: CalibrationSet | None,
    selection: CalibrationSet,
    states: Path,
    observer: Observer,
) -> None:
    plan = pruning.plan
    dense = pruning.load()
    heldout_perplexity = {}
    if validation is not None:
        heldout_perplexity["dense"] = measure_perplexity(dense, validation.rows).perplexity
    teacher = dense if recipe.distill else None
    model, plan_digests = _student(pruning, recipe, dense)
    facts = train_(
        model,
        rows,
        recipe,
        teacher=teacher,
        validation=validation,
        states=states,
        observer=observer,
    )
    if validation is not None:
        nll_by_step = {entry["step"]: entry["nll"] for entry in facts["validations"]}
        heldout_perplexity["before"] = perplexity(nll_by_step[0])
        heldout_perplexity["after"] = perplexity(nll_by_step[facts["step"]])

    perplexity_by_kind = dict[str, dict[str, float]]()
    if plan.kinds and selection.rows:
        row_nll = measure_perplexity(model, selection.rows).row_nll
        for kind, trained in perplexities(row_nll, selection.kinds).items():
            perplexity_by_kind[kind] = {"dense": plan.kinds[kind]["dense"], "after": trained}

    def build(directory: Path) -> None:
        save_healed(
            directory,
            changed_weights(model, plan_digests, plan),
            pruning.identity,
            f"then trained ({recipe.title}) on {len(rows.rows):,} rows of `{recipe.data.title}`,"
            f" {rows.tokens:,} tokens",
            recipe.data,
            pruning.healed,
            {"training": heldout_perplexity} if heldout_perplexity else {},
            perplexity_by_kind,
        )
        settings = {
            "enabled": True,
            **recipe.model_dump(),
            "rows": len(rows.rows),
            "tokens": rows.tokens,
        }
        write_json(directory / TRAIN_FACTS, settings | facts)

    replace_directory(folder, build)


def _student(
    pruning: Pruning, recipe: Train, dense: PreTrainedModel
) -> tuple[PreTrainedModel, dict[str, str]]:
    """The model to train, and the digests of its weights as the plan alone makes them."""
    # Adapters leave the model's own tensors alone until the end, so the teacher may share them.
    # float16 is trained as float32.
    is_shared = bool(recipe.distill) and recipe.weights == "lora" and pruning.dtype != "float16"
    if is_shared:
        student = pruned_copy(dense, pruning.plan, pruning.rows.rows)
    else:
        # Without a teacher nothing needs the dense model any more: it is pruned in place.
        unpruned = pruning.load() if recipe.distill else dense
        student = replace(pruning, healed=None).prune_(unpruned)
    plan_digests = parameter_digests(student)
    if pruning.healed is not None:
        load_healed_(student, pruning.healed.path, is_shared)
    return student, plan_digests
