"""What is left of a pruned model, as engines with fixed layers take it: each has an MHA, an MLP, or both.

Decides in which layer a block ends up, and what the embedding is. How a layer is written is decided by each format.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from blockpruner.core.blocks import BlockId, BlockKind, Mask, pack
from blockpruner.model.modeling_blockpruned import NoMHA, NoMLP
from blockpruner.model.models import decoder_layers, model_family

FOLD_ROWS = 4096
"""Rows of the embedding that go through an MLP at once."""


@dataclass(frozen=True)
class Packed:
    """layers: for each new layer, the decoder layer that has its MHA and the one that has its MLP, None: it has none;
    the first one has an MHA. embedding [V, H]; head [V, H], None: it is the embedding."""

    layers: tuple[tuple[nn.Module | None, nn.Module | None], ...]
    embedding: Tensor
    head: Tensor | None

    @property
    def is_whole(self) -> bool:
        return all(mha is not None and mlp is not None for mha, mlp in self.layers)


@torch.no_grad()
def packed(model: PreTrainedModel) -> Packed:
    """The blocks of a pruned model (`models.prune_`) in as few layers as their order allows.

    MLPs before the first MHA see nothing but a token's embedding, so they are folded into it, E' = E + MLP(norm(E)),
    since vLLM and llama.cpp cannot do without an MHA in their first layer; the head is untied then.
    """
    row, layers = model_family(model), decoder_layers(model)
    holes: Mask = frozenset(
        BlockId(kind, index)
        for index, layer in enumerate(layers)
        for kind, hole in ((BlockKind.MHA, NoMHA), (BlockKind.MLP, NoMLP))
        if isinstance(getattr(layer, row.branch(kind).module), hole)
    )
    result = [
        (None if mha is None else layers[mha], None if mlp is None else layers[mlp])
        for mha, mlp in pack(holes, len(layers))
    ]
    embedding, tied = model.get_input_embeddings().weight, bool(model.config.tie_word_embeddings)
    head = None if tied else model.lm_head.weight
    while result and result[0][0] is None:
        layer = result.pop(0)[1]
        assert layer is not None and row.mlp.norm is not None and row.mlp.post is None
        norm, mlp = getattr(layer, row.mlp.norm), getattr(layer, row.mlp.module)
        head = embedding if head is None else head
        embedding = torch.cat([part + mlp(norm(part)) for part in embedding.split(FOLD_ROWS)])
    return Packed(tuple(result), embedding, head)
