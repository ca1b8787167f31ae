"""Train a pruned model, and hand on the weights that changed."""

import shutil
from dataclasses import replace
from pathlib import Path

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
from blockpruner.model.process_group import SINGLE_PROCESS, ProcessGroup, run_processes
from blockpruner.scoring.metrics import perplexity
from blockpruner.store.files import read_json, replace_directory, write_json
from blockpruner.store.locks import hold, this_process
from blockpruner.store.manifest import TRAIN_FACTS
from blockpruner.store.provenance import fingerprint
from blockpruner.versions import WEIGHTS_VERSION

NONE = CalibrationSet(())
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
    processes: int = 1,
    selection: CalibrationSet = NONE,
) -> None:
    """Train the model of a plan, from its healed weights on. Writes the weights that are not what
    the plan makes of them, and facts, to `folder`.

    What kinds of text lose is measured again on the rows of the selection split. `states` has a
    folder for each model, rows and recipe, from which a killed training goes on; it is removed at
    the end. The `processes` of this machine share the batches of a step."""
    check_context(recipe.seq_len, read_json(pruning.dense / "config.json"), "train.seq_len")
    processes = min(processes, recipe.accumulation)
    facts = {
        "model": pruning.identity,
        "healed": pruning.healed and pruning.healed.digest,
        "dtype": pruning.dtype,
        "rows": rows.digest,
        "validation": validation and validation.digest,
        "version": [WEIGHTS_VERSION, BEST, *([processes] if processes > 1 else [])],
        "recipe": recipe.model_dump(mode="json", exclude=NOT_IN_KEY),
    }
    run_states = states / fingerprint(facts)
    arguments = (folder, pruning, recipe, rows, validation, selection, run_states)

    def note_busy(holder: str) -> None:
        observer.note(f"{holder} trains the same; waiting for it")

    with hold(run_states.with_suffix(".lock"), this_process(), note_busy):
        if processes == 1:
            _write(SINGLE_PROCESS, pruning.device, observer, *arguments)
        else:
            run_processes(processes, pruning.device, _write, observer, *arguments)
        shutil.rmtree(run_states)


def _write(
    team: ProcessGroup,
    device: str,
    observer: Observer,
    folder: Path,
    pruning: Pruning,
    recipe: Train,
    rows: CalibrationSet,
    validation: CalibrationSet | None,
    selection: CalibrationSet,
    states: Path,
) -> None:
    """The work of one process; the first one writes."""
    pruning = replace(pruning, device=device)
    plan, healed = pruning.plan, pruning.healed
    if team.count > 1:
        states = states / str(team.rank)
    dense = pruning.load()
    heldout_perplexity = {}
    if validation is not None:
        heldout_perplexity["dense"] = measure_perplexity(dense, validation.rows).perplexity
    teacher = dense if recipe.distill else None
    # Adapters leave the model's own tensors alone until the end, so the teacher may share them.
    # float16 is trained as float32.
    is_shared = teacher is not None and recipe.weights == "lora" and pruning.dtype != "float16"
    if is_shared:
        model = pruned_copy(dense, plan, pruning.rows.rows)
    else:
        model = replace(pruning, healed=None).prune_(dense if teacher is None else pruning.load())
    plan_digests = parameter_digests(model)
    if healed is not None:
        load_healed_(model, healed.path, is_shared)
    facts = train_(
        model,
        rows,
        recipe,
        teacher=teacher,
        validation=validation,
        states=states,
        observer=observer,
        team=team,
    )
    by_step = {entry["step"]: perplexity(entry["nll"]) for entry in facts["validations"]}
    if by_step:
        heldout_perplexity["before"] = by_step[0]
        heldout_perplexity["after"] = by_step[facts["step"]]

    perplexity_by_kind = dict[str, dict[str, float]]()
    if plan.kinds and selection.rows:
        row_nll = measure_perplexity(model, selection.rows).row_nll
        for kind, after in perplexities(row_nll, selection.kinds).items():
            perplexity_by_kind[kind] = {"dense": plan.kinds[kind]["dense"], "after": after}

    def build(directory: Path) -> None:
        save_healed(
            directory,
            changed_weights(model, plan_digests, plan),
            pruning.identity,
            f"then trained ({recipe.title}) on {len(rows.rows):,} rows of `{recipe.data.title}`,"
            f" {rows.tokens:,} tokens",
            recipe.data,
            healed,
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

    if team.rank == 0:
        replace_directory(folder, build)
