"""The blocks of a pruned model in the layers of an engine: a layer has an MHA, an MLP, or both.

Decides in which layer a block ends up, what the embedding is, and which models fit. Each format
decides how a layer is written.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from blockpruner.checkpoints.registry import READABLE
from blockpruner.checkpoints.verify import in_float32
from blockpruner.core.blocks import BlockId, BlockKind, Mask, pack_layers
from blockpruner.core.errors import InputError
from blockpruner.core.plan import Plan
from blockpruner.model.modeling_blockpruned import NoMHA, NoMLP
from blockpruner.model.models import decoder_layers, model_family

FOLD_ROWS = 4096
"""Rows of the embedding that go through an MLP at once."""


ROPE_TYPES = ("default", "linear", "llama3")
"""The kinds that transformers, vLLM, mlx-lm and llama.cpp compute in the same way."""


Limit = tuple[Any, Sequence[Any]]
"""The value of a model's field, and the valid ones."""
Limits = dict[str, Limit]


def require_fit(form: str, config: Mapping[str, Any], plan: Plan, **limits: Limit) -> None:
    """Raise InputError for a model or a plan that a format cannot hold, or that its engines compute
    otherwise; `limits` are the format's own, by field."""
    rope = config.get("rope_parameters", {})
    rope_type = rope.get("rope_type", "default")
    all_limits: Limits = {
        "model_type": (config["model_type"], READABLE),
        "sliding_window": (config.get("sliding_window"), (None,)),
        "rope_type": (rope_type, ROPE_TYPES),
        "hidden_act": (config.get("hidden_act"), ("silu",)),
        **limits,
    }
    for field, (value, valid) in all_limits.items():
        # An engine that ignores a field computes another model, without an error.
        if value not in valid:
            raise InputError(
                f"export {form}: engines that read models without some blocks do not know {field}"
                f" {value!r}; valid: {', '.join(map(str, valid))}. Use export: [hf], a plain"
                " checkpoint if the plan removes whole layers",
                rule="export-limits",
                key="export",
                value=value,
            )
    if plan.blocks["mha"] == plan.layers:
        raise InputError(
            f"export {form}: the plan removes all {plan.layers} MHA blocks, and engines need at"
            " least one; use export: [hf], or a smaller budget",
            rule="export-limits",
            key="export",
            value="mha",
        )


Layer = tuple[nn.Module | None, nn.Module | None]
"""The decoder layers that hold the MHA and the MLP of a new layer; None for no block."""


@dataclass(frozen=True)
class PackedModel:
    """A pruned model in as few layers as possible."""

    layers: tuple[Layer, ...]
    """The new layers. The first has an MHA."""
    embedding: Tensor
    """[V, H]."""
    head: Tensor | None
    """[V, H]; None for a head that is tied to the embedding."""

    @property
    def widths(self) -> list[int]:
        """The width of each new layer's MLP; 0 without one."""
        return [0 if layer is None else _mlp_width(layer) for _, layer in self.layers]

    @property
    def is_whole(self) -> bool:
        """Whether all layers have the same shape, and both blocks."""
        has_blocks = all(None not in blocks for blocks in self.layers)
        widths = set(self.widths)
        return has_blocks and len(widths) == 1


def _mlp_width(layer: nn.Module) -> int:
    weight = layer.get_parameter("mlp.down_proj.weight")
    return weight.shape[1]


@torch.no_grad()
def pack_model(model: PreTrainedModel) -> PackedModel:
    """The blocks of a pruned model (`models.prune_`) in as few layers as their order allows. vLLM
    and llama.cpp need an MHA in their first layer. MLPs before the first MHA read a token's
    embedding alone, and are folded into it, in float32: E' = E + MLP(norm(E)). The head is untied
    then."""
    layers = decoder_layers(model)
    packed: list[Layer] = []
    removed = _removed_blocks(model)
    for mha, mlp in pack_layers(removed, len(layers)):
        mha_layer = None if mha is None else layers[mha]
        mlp_layer = None if mlp is None else layers[mlp]
        packed.append((mha_layer, mlp_layer))
    embedding: Tensor = model.get_input_embeddings().weight
    head = None
    if not model.config.tie_word_embeddings:
        head = model.lm_head.weight
    branch = model_family(model).mlp
    while packed and packed[0][0] is None:
        layer = packed.pop(0)[1]
        assert layer is not None and branch.norm is not None and branch.post is None
        # The folded embedding is no longer the head.
        if head is None:
            head = embedding
        norm = layer.get_submodule(branch.norm)
        mlp_module = layer.get_submodule(branch.module)
        folded = []
        with in_float32(norm, mlp_module):
            for rows in torch.split(embedding, FOLD_ROWS):
                x = rows.float()
                folded.append(x + mlp_module(norm(x)))
        embedding = torch.cat(folded)
    return PackedModel(tuple(packed), embedding, head)


def _removed_blocks(model: PreTrainedModel) -> Mask:
    family = model_family(model)
    removed = set()
    for index, layer in enumerate(decoder_layers(model)):
        mha = layer.get_submodule(family.mha.module)
        mlp = layer.get_submodule(family.mlp.module)
        if isinstance(mha, NoMHA):
            removed.add(BlockId(BlockKind.MHA, index))
        if isinstance(mlp, NoMLP):
            removed.add(BlockId(BlockKind.MLP, index))
    return frozenset(removed)
