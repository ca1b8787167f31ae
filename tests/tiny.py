"""Tiny models and a tiny tokenizer, built in memory, the same in every process.

Weights have a standard deviation of 0.5: at the usual initialisation a wrong KV cache would not
show.
"""

from __future__ import annotations

from copy import deepcopy
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

import blockpruner.model.models  # noqa: F401  # tells transformers of the classes that it lacks
from blockpruner.core.families import FAMILIES
from blockpruner.model.modeling_blockpruned import BaichuanConfig

VOCABULARY = 260
GROUPED = {"num_key_value_heads": 2}
GEMMA = GROUPED | {
    "head_dim": 12,
    "sliding_window": 6,
    "query_pre_attn_scalar": 12,
    "tie_word_embeddings": False,
}
EXPERTS = {"num_experts_per_tok": 2}
DELTA = {
    "head_dim": 12,
    "full_attention_interval": 2,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 6,
}
SHARED = {"num_experts": 3, "moe_intermediate_size": 24, "shared_expert_intermediate_size": 20}
NEOX = {"rotary_pct": 0.5, "rotary_emb_base": 100}
EXTRA: dict[str, dict[str, Any]] = {
    "llama": GROUPED,
    "baichuan": {},
    "mistral": GROUPED | {"sliding_window": 6},
    "qwen2": GROUPED | {"use_sliding_window": True, "sliding_window": 6, "max_window_layers": 2},
    "qwen3": GROUPED | {"head_dim": 12},
    "phi3": GROUPED | {"sliding_window": 6},
    "gemma2": GEMMA | {"final_logit_softcapping": 20.0, "attn_logit_softcapping": 10.0},
    "gemma3_text": GEMMA | {"sliding_window_pattern": 2},
    "olmo2": GROUPED,
    "olmo3": GROUPED | {"sliding_window": 6},
    "exaone4": GROUPED | {"sliding_window": 6, "sliding_window_pattern": 2},
    "smollm3": GROUPED
    | {"no_rope_layer_interval": 2, "use_sliding_window": True, "sliding_window": 6},
    "seed_oss": GROUPED
    | {
        "head_dim": 12,
        "attention_out_bias": True,
        "attention_dropout": 0.0,
        "residual_dropout": 0.0,
    },
    "ernie4_5": GROUPED | {"head_dim": 12, "use_bias": True},
    "hunyuan_v1_dense": GROUPED | {"head_dim": 12},
    "ministral": GROUPED | {"head_dim": 12, "sliding_window": 6},
    "ministral3": GROUPED | {"head_dim": 12},
    "glm": GROUPED | {"head_dim": 12},
    "glm4": GROUPED | {"head_dim": 12},
    "granite": GROUPED
    | {
        "attention_multiplier": 0.3,
        "residual_multiplier": 0.4,
        "logits_scaling": 3.0,
        "embedding_multiplier": 5.0,
    },
    "cohere2": GROUPED | {"sliding_window": 6, "sliding_window_pattern": 2, "logit_scale": 0.3},
    "mixtral": GROUPED | EXPERTS | {"num_local_experts": 3},
    "qwen3_moe": GROUPED
    | EXPERTS
    | {"num_experts": 3, "moe_intermediate_size": 24, "mlp_only_layers": [2]},
    "qwen3_moe step": GROUPED
    | EXPERTS
    | {"num_experts": 3, "moe_intermediate_size": 24, "decoder_sparse_step": 2},
    "qwen3_next": GROUPED | EXPERTS | DELTA | SHARED | {"mlp_only_layers": [2]},
    "qwen3_5_text": GROUPED | DELTA,
    "qwen3_5_moe_text": GROUPED | EXPERTS | DELTA | SHARED,
    "gpt_neox": NEOX,
    "gpt_neox sequential": NEOX | {"use_parallel_residual": False},
}
"""What makes each family's tiny model use what is special to it; after the family, a variant's
name."""

VARIANTS = sorted(EXTRA.keys() | FAMILIES)
"""Every family, a new row without extras too, and the variants."""

VARIANTS_DAILY = ("llama", "gemma3_text", "qwen3_moe", "qwen3_5_text", "gpt_neox")
"""One of each kind: plain; norms behind writers and sliding windows; experts; linear attentions;
parallel residuals."""

GRID = [
    pytest.param(name, marks=() if name in VARIANTS_DAILY else pytest.mark.slow)
    for name in VARIANTS
]
"""To parametrize: all variants, the others of a kind only in `make test-slow`."""


def tolerance(variant: str) -> float:
    """How far two computations of a float64 tiny model's logits or losses may be apart, in rows or
    batches of other lengths. Transformers' eager attention, which Gemma 2 has, takes its softmax in
    float32 whatever the model's dtype, as does its linear attention all of its products, and how
    that is rounded depends on the length, on the pads, and on the processor's vector
    instructions."""
    if FAMILIES[variant.split()[0]].mha.linear:
        return 1e-4
    return 1e-5 if variant == "gemma2" else 1e-10


def config_of(model_type: str, **fields: Any) -> Any:
    """The config of a family; transformers knows none of Baichuan."""
    if model_type == "baichuan":
        return BaichuanConfig(**fields)
    return AutoConfig.for_model(model_type, **fields)


def tiny_model(
    family: str = "llama", layers: int = 4, dtype: torch.dtype = torch.float64, **config: Any
) -> PreTrainedModel:
    """A random causal LM of a family or variant: hidden size 32, 4 query and 2 key/value heads
    (GPT-NeoX, Baichuan: 4), vocabulary 260, in eval mode."""
    fields: dict[str, Any] = {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "max_position_embeddings": 128,
        "initializer_range": 0.5,
        "bos_token_id": 257,
        "eos_token_id": 258,
        "pad_token_id": 0,
    }
    torch.manual_seed(7)
    config = fields | EXTRA.get(family, {}) | config
    if family == "qwen3_5_moe_text":  # which has no such field
        del config["intermediate_size"]
    model = AutoModelForCausalLM.from_config(
        config_of(family.split()[0], **config),
        dtype=dtype,
        experts_implementation="eager",  # the others know no float64
    )
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter, 0.0, 0.5)
        elif "norm" in name:
            torch.nn.init.normal_(parameter, 1.0, 0.3)
    return model.eval().requires_grad_(False)


@cache
def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """One token a byte (ids 1 to 256), <pad> 0, <s> 257, </s> 258; adds no special token by
    itself."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = (
        {"<pad>": 0} | {byte: i for i, byte in enumerate(alphabet, 1)} | {"<s>": 257, "</s>": 258}
    )
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        model_max_length=128,
    )


def bos_tokenizer() -> PreTrainedTokenizerFast:
    """The tiny tokenizer, which begins each text with <s> as Gemma's and Llama's do."""
    tokenizer = deepcopy(tiny_tokenizer())
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        "<s> $A", special_tokens=[("<s>", 257)]
    )
    return tokenizer


def save_tiny(directory: Path, family: str = "llama", layers: int = 4, **config: Any) -> Path:
    """Write a tiny float32 checkpoint with its tokenizer."""
    tiny_model(family, layers, torch.float32, **config).save_pretrained(directory)
    tiny_tokenizer().save_pretrained(directory)
    return directory


def full_nll(model: PreTrainedModel, row: list[int] | tuple[int, ...]) -> float:
    """Mean negative log-likelihood of a row by one plain forward pass of the whole model: the
    oracle."""
    ids = torch.tensor([list(row)])
    with torch.no_grad():
        logits = model(input_ids=ids, use_cache=False).logits[0, :-1].double()
    picked = logits.log_softmax(-1).gather(1, ids[0, 1:, None])
    return -picked.mean().item()
