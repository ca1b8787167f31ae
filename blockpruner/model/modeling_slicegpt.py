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
"""A decoder layer's two blocks: norm, module, the linears that read the residual stream, the one
that writes to it, and the shortcut around them."""


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
        attended, _ = self.self_attn(hidden_states=self.input_layernorm(hidden_states), **kwargs)
        hidden_states = self.attn_shortcut(hidden_states) + attended
        return self.mlp_shortcut(hidden_states) + self.mlp(
            self.post_attention_layernorm(hidden_states)
        )


def resized(linear: nn.Linear, columns: int, rows: int) -> nn.Linear:
    return nn.Linear(columns, rows, bias=linear.bias is not None)


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
        width, decoder = config.sliced_width, self.model
        for index, layer in enumerate(decoder.layers):
            layer.__class__ = self.layer_class
            for norm, module, readers, writer, shortcut in BLOCKS:
                block = getattr(layer, module)
                last = module == "mlp" and index == config.num_hidden_layers - 1
                columns = config.hidden_size if last else width
                for name in readers:
                    reader = getattr(block, name)
                    setattr(block, name, resized(reader, width, reader.out_features))
                output = getattr(block, writer)
                setattr(block, writer, resized(output, output.in_features, columns))
                setattr(layer, norm, ScaleFreeRMSNorm(config.hidden_size, config.rms_norm_eps))
                setattr(layer, shortcut, nn.Linear(width, columns, bias=False))
        decoder.embed_tokens = nn.Embedding(config.vocab_size, width, config.pad_token_id)
        decoder.norm = ScaleFreeRMSNorm(config.hidden_size, config.rms_norm_eps)


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
