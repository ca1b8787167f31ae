"""The `hf` export: a directory that `AutoModelForCausalLM.from_pretrained(..., trust_remote_code=True)` loads.

Decides what lies in it: safetensors without the removed weights, config with `auto_map`, the modelling file, the base
model's tokenizer, chat template and generation config, a model card, and `verification.json`, the report of a fresh
process that compared it with the masked dense model. A directory that failed does not exist.
"""

from __future__ import annotations

import shutil
from pathlib import Path

from safetensors.torch import save_file
from transformers import PreTrainedModel

from blockpruner.checkpoints.card import model_card
from blockpruner.checkpoints.verification import reference_outputs, tolerance_of, write_verified
from blockpruner.core.plan import Plan
from blockpruner.methods.apply import prune_by_plan_
from blockpruner.model.models import load_model
from blockpruner.scoring.work import Rows
from blockpruner.store.files import let_others_read, write_json, write_text

TOKENIZER_FILES = (
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab*",
    "merges.txt",
    "*.model",
    "*.jinja",
    "generation_config.json",
)


def export_hf(
    dense: Path, plan: Plan, out: Path, *, rows: Rows, dtype: str, device: str, trust_remote_code: bool = False
) -> None:
    """Write the pruned model of `plan` as a checkpoint directory at `out`, verified.

    Args:
        rows: the calibration rows; SliceGPT takes its directions from them.

    Raises:
        InputError: the fresh process does not reproduce the model in memory; nothing is left at `out`.
    """
    model = load_model(dense, dtype, device, trust_remote_code)

    def write(directory: Path, reference: Path) -> float:
        pruned = prune_by_plan_(
            model, plan, rows, lambda reduced: save_file(reference_outputs(reduced, plan), reference)
        )
        save_checkpoint(pruned, plan, dense, directory, model_card(plan, dense, code_file(pruned)))
        return tolerance_of(model)

    write_verified(out, write)


def save_recovered(model: PreTrainedModel, plan: Plan, dense: Path, out: Path, training: str) -> None:
    """Write a pruned and then trained model as a checkpoint directory at `out`, with the files of `export_hf`.

    Args:
        training: how it was trained, for the card; follows "and then".

    Raises:
        InputError: the fresh process does not reproduce `model`, with and without cache; nothing is left at `out`.
    """

    def write(directory: Path, reference: Path) -> float:
        save_file(reference_outputs(model, plan), reference)
        save_checkpoint(model, plan, dense, directory, model_card(plan, dense, code_file(model), f"then {training}"))
        return tolerance_of(model)

    write_verified(out, write)


def save_checkpoint(model: PreTrainedModel, plan: Plan, dense: Path, directory: Path, card: str) -> None:
    """Everything in a checkpoint directory but its verification."""
    save_pruned(model, directory)
    save_other_files(plan, dense, directory, card)


def save_other_files(plan: Plan, dense: Path, directory: Path, card: str) -> None:
    """The other files of a checkpoint; tokenizer and generation config come from `dense`."""
    for pattern in TOKENIZER_FILES:
        for path in dense.glob(pattern):
            shutil.copy(path, directory / path.name)
    write_text(directory / "README.md", card)
    write_json(directory / "blockpruner_plan.json", {**vars(plan)})


def save_pruned(model: PreTrainedModel, directory: Path) -> None:
    """Save a pruned model. If its class is ours, its modelling file is saved too, and `auto_map` names it."""
    code = code_file(model)
    if code:
        type(model).register_for_auto_class("AutoModelForCausalLM")
        type(model.config).register_for_auto_class("AutoConfig")
    model.save_pretrained(directory, max_shard_size="5GB")
    let_others_read(directory)
    assert not code or (directory / code).exists()


def code_file(model: PreTrainedModel) -> str | None:
    """The modelling file that the model's checkpoint needs; None for a class of transformers' own."""
    module = type(model).__module__.rpartition(".")[2]
    return None if type(model).__module__.startswith("transformers.") else f"{module}.py"
