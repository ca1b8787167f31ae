"""Modelling code of checkpoints sliced by SliceGPT (arXiv 2401.15024); ships inside them, needs
only transformers.

Decides how a decoder runs on a residual stream of fewer columns: each block has a basis of its own,
so what passes by it goes through a shortcut matrix from its basis to the next one's. Attention,
MLP, caches and generation are the family's.

Config field beside the base family's: `sliced_width` n, the columns of the residual stream;
`hidden_size` d stays the dense model's, as do heads and inner size. Only what the last MLP writes,
and so the head, has d columns.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)
from transformers.models.llama.modeling_llama import LlamaDecoderLayer
from transformers.models.mistral.modeling_mistral import MistralDecoderLayer
from transformers.models.qwen2.modeling_qwen2 import Qwen2DecoderLayer
from transformers.models.qwen3.modeling_qwen3 import Qwen3DecoderLayer

BLOCKS = (
    ("input_layernorm", "self_attn", ("q_proj", "k_proj", "v_proj"), "o_proj", "attn_shortcut"),
    ("post_attention_layernorm", "mlp", ("gate_proj", "up_proj"), "down_proj", "mlp_shortcut"),
)
"""A decoder layer's two blocks: norm, module, the linears that read the residual stream, the output
projection, and the shortcut around them."""


class ScaleFreeRMSNorm(nn.Module):
    """x / sqrt(sum(x^2) / d + eps), its scale folded into the linears that follow.

    d is the dense hidden size, also where x [..., n] has fewer columns: the columns that were
    sliced off held little of the sum, so that the norm stays what it was; a mean over the n that
    are left would shrink it by sqrt(n / d).
    """

    def __init__(self, hidden_size: int, eps: float) -> None:
        super().__init__()
        self.hidden_size = hidden_size
        self.eps = eps

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        wide = hidden_states if hidden_states.dtype == torch.float64 else hidden_states.float()
        mean_square = wide.square().sum(-1, keepdim=True) / self.hidden_size
        return (wide * torch.rsqrt(mean_square + self.eps)).to(hidden_states.dtype)


class SlicedLayerMixin:
    """A decoder layer whose residual stream changes its basis around each block."""

    def forward(self, hidden_states: torch.Tensor, **kwargs) -> torch.Tensor:
        normed = self.input_layernorm(hidden_states)
        attention_output, _ = self.self_attn(hidden_states=normed, **kwargs)
        hidden_states = self.attn_shortcut(hidden_states) + attention_output
        normed = self.post_attention_layernorm(hidden_states)
        return self.mlp_shortcut(hidden_states) + self.mlp(normed)


def resize_(block: nn.Module, name: str, in_features: int, out_features: int) -> None:
    """Replace a linear of a block by one of another size."""
    has_bias = getattr(block, name).bias is not None
    setattr(block, name, nn.Linear(in_features, out_features, bias=has_bias))


def slice_layer_(layer: nn.Module, config, mlp_columns: int) -> None:
    """Give a layer the shapes of a sliced residual stream, of which its MLP writes `mlp_columns`
    columns."""
    width = config.sliced_width
    for norm, module, readers, writer, shortcut in BLOCKS:
        block = getattr(layer, module)
        columns = mlp_columns if module == "mlp" else width
        for reader in readers:
            resize_(block, reader, width, getattr(block, reader).out_features)
        resize_(block, writer, getattr(block, writer).in_features, columns)
        setattr(layer, norm, ScaleFreeRMSNorm(config.hidden_size, config.rms_norm_eps))
        setattr(layer, shortcut, nn.Linear(width, columns, bias=False))


@dataclass(kw_only=True, repr=False, eq=False)
class SliceGPTConfigMixin:
    """A dataclass, since transformers makes one of every config class, with an `__init__` of its
    own.

    sliced_width: columns of the residual stream; None: the hidden size.
    """

    sliced_width: int | None = None

    def __post_init__(self, **kwargs):
        super().__post_init__(**kwargs)
        if self.sliced_width is None:
            self.sliced_width = self.hidden_size


class SliceGPTMixin:
    """A base-family causal LM of fewer columns. Embedding and head have different ones and are
    never tied."""

    _tied_weights_keys = None
    layer_class: type

    def __init__(self, config):
        super().__init__(config)
        for layer in self.model.layers:
            layer.__class__ = self.layer_class
            is_last = layer is self.model.layers[-1]
            slice_layer_(layer, config, config.hidden_size if is_last else config.sliced_width)
        self.model.embed_tokens = nn.Embedding(
            config.vocab_size, config.sliced_width, config.pad_token_id
        )
        self.model.norm = ScaleFreeRMSNorm(config.hidden_size, config.rms_norm_eps)


class LlamaSlicedLayer(SlicedLayerMixin, LlamaDecoderLayer):
    pass


class LlamaSliceGPTConfig(SliceGPTConfigMixin, LlamaConfig):
    model_type = "llama_slicegpt"


class LlamaSliceGPTForCausalLM(SliceGPTMixin, LlamaForCausalLM):
    config_class = LlamaSliceGPTConfig
    layer_class = LlamaSlicedLayer
    _no_split_modules = ("LlamaSlicedLayer",)


class MistralSlicedLayer(SlicedLayerMixin, MistralDecoderLayer):
    pass


class MistralSliceGPTConfig(SliceGPTConfigMixin, MistralConfig):
    model_type = "mistral_slicegpt"


class MistralSliceGPTForCausalLM(SliceGPTMixin, MistralForCausalLM):
    config_class = MistralSliceGPTConfig
    layer_class = MistralSlicedLayer
    _no_split_modules = ("MistralSlicedLayer",)


class Qwen2SlicedLayer(SlicedLayerMixin, Qwen2DecoderLayer):
    pass


class Qwen2SliceGPTConfig(SliceGPTConfigMixin, Qwen2Config):
    model_type = "qwen2_slicegpt"


class Qwen2SliceGPTForCausalLM(SliceGPTMixin, Qwen2ForCausalLM):
    config_class = Qwen2SliceGPTConfig
    layer_class = Qwen2SlicedLayer
    _no_split_modules = ("Qwen2SlicedLayer",)


class Qwen3SlicedLayer(SlicedLayerMixin, Qwen3DecoderLayer):
    pass


class Qwen3SliceGPTConfig(SliceGPTConfigMixin, Qwen3Config):
    model_type = "qwen3_slicegpt"


class Qwen3SliceGPTForCausalLM(SliceGPTMixin, Qwen3ForCausalLM):
    config_class = Qwen3SliceGPTConfig
    layer_class = Qwen3SlicedLayer
    _no_split_modules = ("Qwen3SlicedLayer",)
