"""The blocks of a pruned model in layers, as engines want them: a layer has an MHA, an MLP, or
both.

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
"""The kinds that transformers, vLLM, mlx-lm and llama.cpp compute alike."""


def require_fit(
    form: str, config: Mapping[str, Any], plan: Plan, **limits: tuple[Any, Sequence[Any]]
) -> None:
    """Raise InputError for a model or a plan that a format cannot hold, or that its engines compute
    otherwise; `limits` are the format's own: by field, the value of the model and the valid
    ones."""
    found: dict[str, tuple[Any, Sequence[Any]]] = {
        "model_type": (config["model_type"], READABLE),
        "sliding_window": (config.get("sliding_window"), (None,)),
        "rope_type": (config.get("rope_parameters", {}).get("rope_type", "default"), ROPE_TYPES),
        "hidden_act": (config.get("hidden_act"), ("silu",)),
        **limits,
    }
    for field, (value, valid) in found.items():
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


@dataclass(frozen=True)
class PackedModel:
    """A pruned model in as few layers as possible."""

    layers: tuple[tuple[nn.Module | None, nn.Module | None], ...]
    """For each new layer, the decoder layers that hold its MHA and its MLP; None where it has none.
    The first has an MHA."""
    embedding: Tensor
    """[V, H]."""
    head: Tensor | None
    """[V, H]; None where it is the embedding."""

    @property
    def widths(self) -> list[int]:
        """The width of each new layer's MLP; 0 without one."""
        return [
            0 if layer is None else layer.get_parameter("mlp.down_proj.weight").shape[1]
            for _, layer in self.layers
        ]

    @property
    def is_whole(self) -> bool:
        """All layers have the same shape, and lack nothing."""
        return (
            all(mha is not None for mha, _ in self.layers)
            and 0 not in self.widths
            and len({*self.widths}) == 1
        )


@torch.no_grad()
def pack_model(model: PreTrainedModel) -> PackedModel:
    """The blocks of a pruned model (`models.prune_`) in as few layers as their order allows. vLLM
    and llama.cpp need an MHA in their first layer. MLPs before the first MHA see a token's
    embedding alone, and are folded into it, in float32: E' = E + MLP(norm(E)). The head is untied
    then."""
    family, layers = model_family(model), decoder_layers(model)
    holes: Mask = frozenset(
        BlockId(kind, index)
        for index, layer in enumerate(layers)
        for kind, hole in ((BlockKind.MHA, NoMHA), (BlockKind.MLP, NoMLP))
        if isinstance(getattr(layer, family.branch(kind).module), hole)
    )
    result = [
        (None if mha is None else layers[mha], None if mlp is None else layers[mlp])
        for mha, mlp in pack_layers(holes, len(layers))
    ]
    embedding, tied = model.get_input_embeddings().weight, bool(model.config.tie_word_embeddings)
    head = None if tied else model.lm_head.weight
    while result and result[0][0] is None:
        layer = result.pop(0)[1]
        assert layer is not None and family.mlp.norm is not None and family.mlp.post is None
        norm, mlp = getattr(layer, family.mlp.norm), getattr(layer, family.mlp.module)
        head = embedding if head is None else head
        with in_float32(norm, mlp):
            embedding = torch.cat(
                [part + mlp(norm(part)) for part in map(Tensor.float, embedding.split(FOLD_ROWS))]
            )
    return PackedModel(tuple(result), embedding, head)
