"""The `zeroed` export: the dense model's own shape, with zeros where a removed block would write.

For engines that know no layer without an MHA or an MLP: whatever loads the dense model loads it, and says what the
pruned model says. Nothing is smaller or faster.
"""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import PreTrainedModel

from blockpruner.checkpoints.card import model_card
from blockpruner.checkpoints.hf import code_file, save_checkpoint
from blockpruner.checkpoints.verification import reference_beside, reference_outputs, tolerance_of, verify_checkpoint
from blockpruner.core.blocks import Mask
from blockpruner.core.errors import InputError
from blockpruner.core.plan import Plan
from blockpruner.methods.registry import KINDS
from blockpruner.model.models import decoder_layers, load_model, masked, model_family
from blockpruner.scoring.work import Rows
from blockpruner.store.files import replace_directory

NOTE = """
This directory has the shape of the base model: the last projection of each removed block is zero. It says what the
pruned model says in engines that only load the base model's shape, and is neither smaller nor faster.
"""


def export_zeroed(
    dense: Path, plan: Plan, out: Path, *, rows: Rows, dtype: str, device: str, trust_remote_code: bool = False
) -> None:
    """Write the dense model with the blocks of `plan` silenced as a checkpoint directory at `out`, verified.

    Raises:
        InputError: a plan that removes no blocks, or a fresh process that does not reproduce the masked model; nothing
            is left at `out`.
    """
    if not KINDS[plan.kind].removes_blocks:
        raise InputError(
            f"export zeroed silences removed blocks, and method {plan.method!r} of run {plan.run!r} removes none; "
            "leave zeroed out of that run's export"
        )
    model = load_model(dense, dtype, device, trust_remote_code)

    def build(directory: Path) -> None:
        with reference_beside(directory) as reference:
            with masked(model, plan.mask) as reduced:
                outputs = reference_outputs(reduced, plan)
            save_file(outputs | {"attentions": torch.tensor(plan.layers)}, reference)
            zero_(model, plan.mask)
            save_checkpoint(model, plan, dense, directory, model_card(plan, dense, code_file(model), note=NOTE))
            verify_checkpoint(directory, reference, tolerance_of(model))

    replace_directory(out, build)


@torch.no_grad()
def zero_(model: PreTrainedModel, mask: Mask) -> None:
    """Zero the last projection, weight and bias, of each block of `mask`, so that it adds nothing."""
    row, layers = model_family(model), decoder_layers(model)
    for block in mask:
        branch = row.branch(block.kind)
        for name, parameter in getattr(layers[block.layer], branch.module).named_parameters():
            if branch.output in name.split("."):
                parameter.zero_()
