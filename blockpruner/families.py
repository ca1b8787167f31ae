"""Model families as data: where blocks, norms, embedding and head are, and how many parameters each has.

Decides everything that depends on the architecture. Adding a family is adding a row at the end of this file
(and its class pair in `modeling_blockpruned.py`); the contract tests run over every row.
No torch here: parameters are counted from the config alone.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from blockpruner.blocks import BlockId, BlockKind, Mask, all_blocks
from blockpruner.errors import InputError

Config = Mapping[str, Any]


@dataclass(frozen=True)
class Branch:
    """Attribute names, within a decoder layer, of one residual branch `x + module(norm(x))`."""

    norm: str
    module: str


@dataclass(frozen=True)
class Family:
    """One decoder architecture with pre-norm residual blocks.

    model_type: the `model_type` of its config; prefix: of its class names (LlamaConfig, LlamaForCausalLM);
    parallel: whether MHA and MLP both read the layer's input, x + MHA(norm(x)) + MLP(norm(x)), from a config;
    decoder, layers, final_norm, head: attribute paths from the causal LM;
    mha_parameters, mlp_parameters: parameters of one block without its norm, from a config;
    norm_bias: whether norms have a bias beside their weight.
    """

    model_type: str
    prefix: str
    mha_parameters: Callable[[Config], int]
    mlp_parameters: Callable[[Config], int]
    norm_bias: bool = False
    parallel: Callable[[Config], bool] = lambda config: False
    decoder: str = "model"
    layers: str = "model.layers"
    final_norm: str = "model.norm"
    head: str = "lm_head"
    mha: Branch = Branch("input_layernorm", "self_attn")
    mlp: Branch = Branch("post_attention_layernorm", "mlp")

    def branch(self, kind: BlockKind) -> Branch:
        return self.mha if kind is BlockKind.MHA else self.mlp


@dataclass(frozen=True)
class Costs:
    """What a dense model takes of one resource, and what each of its blocks does: parameters, numbers in the KV cache,
    nanoseconds."""

    total: int
    blocks: Mapping[BlockId, int]

    def ratio(self, mask: Mask) -> float:
        """Share of the whole that the mask removes, in [0, 1]; of parameters it is the pruning ratio.

        All parameters count, embeddings, head and norms included; a removed block's norm counts as removed
        (the convention by which every ratio of arXiv 2406.10594 decodes to whole blocks).
        """
        return sum(self.blocks[block] for block in mask) / self.total


def family_of(model_type: str) -> Family:
    """The family row of a config's `model_type`; raises InputError that names the supported ones."""
    if model_type not in FAMILIES:
        raise InputError(
            f"model family {model_type!r} is not supported; supported: {', '.join(sorted(FAMILIES))}. "
            "A new family is one row in blockpruner/families.py: where its blocks, norms and head are, and the "
            "parameters of a block"
        )
    return FAMILIES[model_type]


def count_parameters(config: Config) -> Costs:
    """Count parameters from a config (`config.json` as a mapping), without loading weights."""
    row = family_of(str(config["model_type"]))
    hidden, layers = int(config["hidden_size"]), int(config["num_hidden_layers"])
    norm = 2 * hidden if row.norm_bias else hidden
    counts = {BlockKind.MHA: row.mha_parameters(config) + norm, BlockKind.MLP: row.mlp_parameters(config) + norm}
    blocks = {block: counts[block.kind] for block in all_blocks(layers)}
    embeddings = int(config["vocab_size"]) * hidden * (1 if config.get("tie_word_embeddings", False) else 2)
    return Costs(total=embeddings + norm + sum(blocks.values()), blocks=blocks)


def count_kv_cache(config: Config) -> Costs:
    """Numbers that the KV cache holds for one token: keys and values of every MHA block."""
    heads, head = _heads(config)
    values = 2 * int(config.get("num_key_value_heads") or heads) * head
    blocks = {
        block: values if block.kind is BlockKind.MHA else 0 for block in all_blocks(int(config["num_hidden_layers"]))
    }
    return Costs(total=sum(blocks.values()), blocks=blocks)


def _heads(config: Config) -> tuple[int, int]:
    heads = int(config["num_attention_heads"])
    return heads, int(config.get("head_dim") or config["hidden_size"] // heads)


def _attention(config: Config, *, qkv_bias: bool, output_bias: bool, head_norms: bool = False) -> int:
    hidden = int(config["hidden_size"])
    heads, head = _heads(config)
    kv_heads = int(config.get("num_key_value_heads") or heads)
    projections = 2 * hidden * heads * head + 2 * hidden * kv_heads * head
    biases = (heads + 2 * kv_heads) * head if qkv_bias else 0
    biases += hidden if output_bias else 0
    return projections + biases + (2 * head if head_norms else 0)


def _gated_mlp(config: Config) -> int:
    hidden, inner = int(config["hidden_size"]), int(config["intermediate_size"])
    biases = 2 * inner + hidden if config.get("mlp_bias", False) else 0
    return 3 * hidden * inner + biases


def _plain_mlp(config: Config) -> int:
    hidden, inner = int(config["hidden_size"]), int(config["intermediate_size"])
    return 2 * hidden * inner + inner + hidden


def _optional_bias(config: Config, default: bool = False, head_norms: bool = False) -> int:
    bias = bool(config.get("attention_bias", default))
    return _attention(config, qkv_bias=bias, output_bias=bias, head_norms=head_norms)


FAMILIES: dict[str, Family] = {
    row.model_type: row
    for row in (
        Family("llama", "Llama", _optional_bias, _gated_mlp),
        Family("mistral", "Mistral", lambda c: _attention(c, qkv_bias=False, output_bias=False), _gated_mlp),
        Family("qwen2", "Qwen2", lambda c: _attention(c, qkv_bias=True, output_bias=False), _gated_mlp),
        Family("qwen3", "Qwen3", lambda c: _optional_bias(c, head_norms=True), _gated_mlp),
        Family(
            "gpt_neox",
            "GPTNeoX",
            lambda c: _optional_bias(c, default=True),
            _plain_mlp,
            norm_bias=True,
            parallel=lambda c: bool(c.get("use_parallel_residual", True)),  # older config.json leave it out
            decoder="gpt_neox",
            layers="gpt_neox.layers",
            final_norm="gpt_neox.final_layer_norm",
            mha=Branch("input_layernorm", "attention"),
        ),
    )
}
