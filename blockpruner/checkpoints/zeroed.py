"""The `zeroed` export: the dense model's own shape, with zeros where a removed block would write.

It is for engines that need an MHA and an MLP in every layer. What loads the dense model loads it, and computes what the
pruned model computes. Nothing is smaller or faster.
"""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import PreTrainedModel

from blockpruner.checkpoints.card import model_card
from blockpruner.checkpoints.hf import code_file, save_checkpoint
from blockpruner.checkpoints.verification import reference_outputs, tolerance_of, write_verified
from blockpruner.core.blocks import Mask
from blockpruner.core.errors import InputError
from blockpruner.methods.apply import Pruning
from blockpruner.methods.registry import KINDS
from blockpruner.model.models import decoder_layers, masked, model_family

NOTE = """
This directory has the shape of the base model: the last projection of each removed block is zero. It computes what the
pruned model computes, in engines that only load the base model's shape, and is neither smaller nor faster.
"""


def export_zeroed(pruning: Pruning, out: Path) -> None:
    """Write the dense model with the blocks of `plan` silenced as a checkpoint directory at `out`, verified.

    Raises:
        InputError: the plan removes no blocks, or a fresh process does not reproduce the masked model; nothing is left
            at `out`.
    """
    plan = pruning.plan
    if not KINDS[plan.kind].removes_blocks:
        raise InputError(
            f"export zeroed silences removed blocks, and method {plan.method!r} of run {plan.run!r} removes none; "
            "leave zeroed out of that run's export"
        )
    model = pruning.load_for_export()

    def write(directory: Path, reference: Path) -> float:
        pruning.heal_(model)
        with masked(model, plan.mask) as reduced:
            outputs = reference_outputs(reduced, plan)
        save_file(outputs | {"attentions": torch.tensor(plan.layers)}, reference)
        zero_(model, plan.mask)
        card = model_card(plan, pruning.dense, code_file(model), pruning.healed, note=NOTE)
        save_checkpoint(model, plan, pruning.dense, directory, card)
        return tolerance_of(model)

    write_verified(out, write)


@torch.no_grad()
def zero_(model: PreTrainedModel, mask: Mask) -> None:
    """Zero the last projection, weight and bias, of each block of `mask`: the block then adds nothing."""
    family, layers = model_family(model), decoder_layers(model)
    for block in mask:
        branch = family.branch(block.kind)
        for name, parameter in getattr(layers[block.layer], branch.module).named_parameters():
            if branch.output in name.split("."):
                parameter.zero_()
