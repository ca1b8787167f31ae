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
    TRAIN_FACTS,
    changed_weights,
    load_healed_,
    parameter_digests,
    save_healed,
)
from blockpruner.model.process_group import SINGLE_PROCESS, ProcessGroup, run_processes
from blockpruner.scoring.metrics import perplexity
from blockpruner.store.files import read_json, replace_directory, write_json
from blockpruner.store.locks import hold, this_process
from blockpruner.store.provenance import fingerprint
from blockpruner.versions import WEIGHTS_VERSION

NONE = CalibrationSet(())
NOT_IN_KEY = {"data", "num_samples", "num_rows", "seq_len", "validation"}
"""The settings that do not decide the weights, given the rows."""


def write_trained(
    folder: Path,
    pruning: Pruning,
    wanted: Train,
    rows: CalibrationSet,
    validation: CalibrationSet | None,
    states: Path,
    observer: Observer,
    processes: int = 1,
    judge: CalibrationSet = NONE,
) -> None:
    """Train the model of a plan, from its healed weights on: the weights that are not what the plan
    makes of them, and facts, at `folder`. What kinds of text lose is measured anew on the rows that
    `judge`. A folder of `states` for each model, rows and recipe, from which a killed training goes
    on, is gone in the end. So many `processes` of this machine share out the batches of a step."""
    check_context(wanted.seq_len, read_json(pruning.dense / "config.json"), "train.seq_len")
    processes = min(processes, wanted.accumulation)
    facts = {
        "model": pruning.identity,
        "healed": pruning.healed and pruning.healed.digest,
        "dtype": pruning.dtype,
        "rows": rows.digest,
        "validation": validation and validation.digest,
        "version": [WEIGHTS_VERSION, BEST, *([processes] if processes > 1 else [])],
        "recipe": wanted.model_dump(mode="json", exclude=NOT_IN_KEY),
    }
    own = states / fingerprint(facts)
    given = folder, pruning, wanted, rows, validation, judge, own
    lock = own.with_suffix(".lock")
    with hold(
        lock,
        this_process(),
        lambda holder: observer.note(f"{holder} trains the same; waiting for it"),
    ):
        if processes == 1:
            _write(SINGLE_PROCESS, pruning.device, observer, *given)
        else:
            run_processes(processes, pruning.device, _write, observer, *given)
        shutil.rmtree(own)


def _write(
    team: ProcessGroup,
    device: str,
    observer: Observer,
    folder: Path,
    pruning: Pruning,
    wanted: Train,
    rows: CalibrationSet,
    validation: CalibrationSet | None,
    judge: CalibrationSet,
    states: Path,
) -> None:
    """The work of one process; the first one writes."""
    pruning = replace(pruning, device=device)
    healed, plan, own = (
        pruning.healed,
        pruning.plan,
        states / str(team.rank) if team.count > 1 else states,
    )
    dense = pruning.load()
    told = (
        {}
        if validation is None
        else {"dense": measure_perplexity(dense, validation.rows).perplexity}
    )
    teacher = dense if wanted.distill else None
    # adapters leave the model's own tensors alone until the end; float16 is trained as float32
    shared = teacher is not None and wanted.weights == "lora" and pruning.dtype != "float16"
    if shared:
        model = pruned_copy(dense, plan, pruning.rows.rows)
    else:
        model = replace(pruning, healed=None).prune_(dense if teacher is None else pruning.load())
    before = parameter_digests(model)
    if healed is not None:
        load_healed_(model, healed.path, shared)
    facts = train_(
        model,
        rows,
        wanted,
        teacher=teacher,
        validation=validation,
        states=own,
        observer=observer,
        team=team,
    )
    if by_step := {each["step"]: perplexity(each["nll"]) for each in facts["validations"]}:
        told |= {"before": by_step[0], "after": by_step[facts["step"]]}

    kinds = dict[str, dict[str, float]]()
    if plan.kinds and judge.rows:
        row_nll = measure_perplexity(model, judge.rows).row_nll
        for kind, after in perplexities(row_nll, judge.kinds).items():
            kinds[kind] = {"dense": plan.kinds[kind]["dense"], "after": after}

    def build(directory: Path) -> None:
        words = f"then trained ({wanted.title}) on {len(rows.rows):,} rows of `{wanted.data.title}`"
        words = f"{words}, {rows.tokens:,} tokens"
        weights = changed_weights(model, before, plan)
        held_out = {"training": told} if told else {}
        save_healed(
            directory, weights, pruning.identity, words, wanted.data, healed, held_out, kinds
        )
        drawn = {
            "enabled": True,
            **wanted.model_dump(),
            "rows": len(rows.rows),
            "tokens": rows.tokens,
        }
        write_json(directory / TRAIN_FACTS, drawn | facts)

    if team.rank == 0:
        replace_directory(folder, build)
