"""Modelling code of block-pruned checkpoints; ships inside them and needs only transformers.

Decides how a decoder runs without some of its blocks: a removed branch adds nothing to the residual stream and
holds no weights. Each class is transformers' own model of the base family with holes in it, so that attention
kernels, generation and caches are the family's.

Config fields beside the base family's (layers are those kept, numbered from 0):
    layers_without_mha, layers_without_mlp: indices of layers whose branch was removed;
    source_layers: the layer of the dense model that each kept layer was; None: no layer was dropped.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, field

import torch
from torch import nn
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    Olmo2Config,
    Olmo2ForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)
from transformers.masking_utils import create_causal_mask
from transformers.models.llama.modeling_llama import LlamaModel, LlamaPreTrainedModel

Branches = tuple[tuple[str, ...], tuple[str, ...]]
"""Attributes of the MHA and of the MLP branch in a decoder layer: module, then its norms."""


class NoMHA(nn.Module):
    """A removed attention: adds zero, touches no cache."""

    def forward(self, hidden_states: torch.Tensor, **kwargs: object) -> tuple[torch.Tensor, None]:
        return hidden_states.new_zeros(()), None


class NoMLP(nn.Module):
    """A removed MLP: adds zero."""

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return hidden_states.new_zeros(())


def remove_blocks_(layers: nn.ModuleList, mha: set[int], mlp: set[int], branches: Branches) -> None:
    """Replace the branches of the given layers, norms included, by holes."""
    for removed, (module, *norms), hole in ((mha, branches[0], NoMHA), (mlp, branches[1], NoMLP)):
        for index in removed:
            setattr(layers[index], module, hole())
            for norm in norms:
                setattr(layers[index], norm, nn.Identity())


def drop_layers_(layers: nn.ModuleList, kept) -> None:
    """Keep only the given layers, in order."""
    for index in reversed(range(len(layers))):
        if index not in kept:
            del layers[index]


def number_attentions_(layers: nn.ModuleList, module: str) -> None:
    """Number the remaining attentions 0..n-1: a cache takes an attention's number for its slot, and takes the
    length of the past from slot 0."""
    present = [attention for layer in layers if not isinstance(attention := getattr(layer, module), NoMHA)]
    for number, attention in enumerate(present):
        attention.layer_idx = number


@dataclass(kw_only=True, repr=False, eq=False)
class BlockPrunedConfigMixin:
    """The fields that describe the holes; caches are sized for the attentions that exist.

    A dataclass, since transformers makes one of every config class, with an `__init__` of its own.
    """

    layers_without_mha: list[int] = field(default_factory=list)
    layers_without_mlp: list[int] = field(default_factory=list)
    source_layers: list[int] | None = None

    def cache_config(self):
        """This config as a cache must see it: one layer for each attention."""
        removed = set(self.layers_without_mha)
        config = copy.deepcopy(self)
        config.layers_without_mha = []
        config.num_hidden_layers = self.num_hidden_layers - len(removed)
        if getattr(self, "layer_types", None) is not None:
            config.layer_types = [t for i, t in enumerate(self.layer_types) if i not in removed]
        return config

    def get_text_config(self, decoder=None, encoder=None):
        """Caches ask for the decoder's config, and only they pass `decoder` for a text model."""
        if decoder and self.layers_without_mha:
            return self.cache_config()
        return self


class BlockPrunedMixin:
    """A base-family causal LM with holes; where its layers are, and the branches within one."""

    decoder_layers = "model.layers"
    layer_branches: Branches = (("self_attn", "input_layernorm"), ("mlp", "post_attention_layernorm"))

    def __init__(self, config):
        super().__init__(config)
        layers = self.get_submodule(self.decoder_layers)
        remove_blocks_(layers, set(config.layers_without_mha), set(config.layers_without_mlp), self.layer_branches)
        number_attentions_(layers, module=self.layer_branches[0][0])

    @classmethod
    def _can_set_experts_implementation(cls):
        """As the base family: transformers looks for an answer in the file of the class, and this is another one."""
        family = next(base for base in cls.__mro__ if base.__module__.startswith("transformers.models."))
        return family._can_set_experts_implementation()


def alibi_slopes(heads: int) -> list[float]:
    """2^(-8 i / n) for i = 1 to n where the n heads are a power of two; where they are not, those of the power of two
    below, then every other one of the power of two above (arXiv 2108.12409)."""
    below = 1 << (heads.bit_length() - 1)
    first, second = ([2.0 ** (-8 * i / n) for i in range(1, n + 1)] for n in (below, 2 * below))
    return first + second[::2][: heads - below]


class NoRotation(nn.Module):
    """In place of rotary tables: cosine 1 and sine 0."""

    def forward(self, x: torch.Tensor, position_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return x.new_ones(1, 1, 1), x.new_zeros(1, 1, 1)


class BaichuanConfig(LlamaConfig):
    """Of Baichuan 13B, with queries, keys and values as Llama has them. `rope_parameters`, which every config of
    Llama's kind has, says nothing here."""

    model_type = "baichuan"


class BaichuanModel(LlamaModel):
    """Llama with ALiBi in place of rotary tables: head h adds slope_h (k - q) to what query q scores at key k."""

    config_class = BaichuanConfig
    _supports_flash_attn = _supports_flex_attn = False  # neither takes a bias

    def __init__(self, config):
        super().__init__(config)
        self.rotary_emb = NoRotation()

    def forward(self, input_ids=None, attention_mask=None, position_ids=None, cache=None, inputs_embeds=None, **kwargs):
        x = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        mask = create_causal_mask(self.config, x, attention_mask, cache, position_ids, allow_is_causal_skip=False)
        if attention_mask is None and position_ids is None:
            mask = mask[:1]  # all rows see alike; a bias for each would be large
        mask = self.with_alibi(mask, 0 if cache is None else cache.get_seq_length(), x.dtype)
        return super().forward(attention_mask=mask, position_ids=position_ids, cache=cache, inputs_embeds=x, **kwargs)

    def with_alibi(self, mask: torch.Tensor, past, dtype: torch.dtype) -> torch.Tensor:
        """A mask [B, 1, Q, K], of booleans or added to scores, as one [B, H, Q, K] that is added to scores.

        The distance is taken before it is scaled, and both in float32 at least: a bfloat16 does not tell apart tokens
        that are far along."""
        wide = torch.promote_types(dtype, torch.float32)
        queries, keys = (torch.arange(n, device=mask.device) for n in mask.shape[-2:])
        slopes = torch.tensor(alibi_slopes(self.config.num_attention_heads), dtype=wide, device=mask.device)
        bias = (slopes[:, None, None] * (keys - (past + queries)[:, None])).to(dtype)
        return torch.where(mask, bias, torch.finfo(dtype).min) if mask.dtype == torch.bool else bias + mask


class BaichuanForCausalLM(LlamaForCausalLM):
    config_class = BaichuanConfig
    _supports_flash_attn = _supports_flex_attn = False

    def __init__(self, config):
        LlamaPreTrainedModel.__init__(self, config)  # Llama's own would build a LlamaModel first
        self.model = BaichuanModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()


class LlamaBlockPrunedConfig(BlockPrunedConfigMixin, LlamaConfig):
    model_type = "llama_blockpruned"


class LlamaBlockPrunedForCausalLM(BlockPrunedMixin, LlamaForCausalLM):
    config_class = LlamaBlockPrunedConfig


class BaichuanBlockPrunedConfig(BlockPrunedConfigMixin, BaichuanConfig):
    model_type = "baichuan_blockpruned"


class BaichuanBlockPrunedForCausalLM(BlockPrunedMixin, BaichuanForCausalLM):
    config_class = BaichuanBlockPrunedConfig


class MistralBlockPrunedConfig(BlockPrunedConfigMixin, MistralConfig):
    model_type = "mistral_blockpruned"


class MistralBlockPrunedForCausalLM(BlockPrunedMixin, MistralForCausalLM):
    config_class = MistralBlockPrunedConfig


class Qwen2BlockPrunedConfig(BlockPrunedConfigMixin, Qwen2Config):
    model_type = "qwen2_blockpruned"


class Qwen2BlockPrunedForCausalLM(BlockPrunedMixin, Qwen2ForCausalLM):
    config_class = Qwen2BlockPrunedConfig


class Qwen3BlockPrunedConfig(BlockPrunedConfigMixin, Qwen3Config):
    model_type = "qwen3_blockpruned"


class Qwen3BlockPrunedForCausalLM(BlockPrunedMixin, Qwen3ForCausalLM):
    config_class = Qwen3BlockPrunedConfig


class Phi3BlockPrunedConfig(BlockPrunedConfigMixin, Phi3Config):
    model_type = "phi3_blockpruned"


class Phi3BlockPrunedForCausalLM(BlockPrunedMixin, Phi3ForCausalLM):
    config_class = Phi3BlockPrunedConfig


class Gemma2BlockPrunedConfig(BlockPrunedConfigMixin, Gemma2Config):
    model_type = "gemma2_blockpruned"


class Gemma2BlockPrunedForCausalLM(BlockPrunedMixin, Gemma2ForCausalLM):
    config_class = Gemma2BlockPrunedConfig
    layer_branches = (
        ("self_attn", "input_layernorm", "post_attention_layernorm"),
        ("mlp", "pre_feedforward_layernorm", "post_feedforward_layernorm"),
    )


class Gemma3BlockPrunedConfig(BlockPrunedConfigMixin, Gemma3TextConfig):
    model_type = "gemma3_text_blockpruned"


class Gemma3BlockPrunedForCausalLM(BlockPrunedMixin, Gemma3ForCausalLM):
    config_class = Gemma3BlockPrunedConfig
    layer_branches = (
        ("self_attn", "input_layernorm", "post_attention_layernorm"),
        ("mlp", "pre_feedforward_layernorm", "post_feedforward_layernorm"),
    )


class Olmo2BlockPrunedConfig(BlockPrunedConfigMixin, Olmo2Config):
    model_type = "olmo2_blockpruned"


class Olmo2BlockPrunedForCausalLM(BlockPrunedMixin, Olmo2ForCausalLM):
    config_class = Olmo2BlockPrunedConfig
    layer_branches = (("self_attn", "post_attention_layernorm"), ("mlp", "post_feedforward_layernorm"))


class MixtralBlockPrunedConfig(BlockPrunedConfigMixin, MixtralConfig):
    model_type = "mixtral_blockpruned"


class MixtralBlockPrunedForCausalLM(BlockPrunedMixin, MixtralForCausalLM):
    config_class = MixtralBlockPrunedConfig


class Qwen3MoeBlockPrunedConfig(BlockPrunedConfigMixin, Qwen3MoeConfig):
    model_type = "qwen3_moe_blockpruned"


class Qwen3MoeBlockPrunedForCausalLM(BlockPrunedMixin, Qwen3MoeForCausalLM):
    config_class = Qwen3MoeBlockPrunedConfig


class GPTNeoXBlockPrunedConfig(BlockPrunedConfigMixin, GPTNeoXConfig):
    model_type = "gpt_neox_blockpruned"


class GPTNeoXBlockPrunedForCausalLM(BlockPrunedMixin, GPTNeoXForCausalLM):
    config_class = GPTNeoXBlockPrunedConfig
    decoder_layers = "gpt_neox.layers"
    layer_branches = (("attention", "input_layernorm"), ("mlp", "post_attention_layernorm"))
