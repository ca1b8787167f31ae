"""Model families as data: where blocks, norms, embedding and head are, and how many parameters each
has.

Decides everything that depends on the architecture. A new family is a row at the end of this file.
`model.classes` writes the classes of its pruned models from the row, where
`modeling_blockpruned.py` does not hold them; transformers must then export <prefix>Config, and
`AutoModelForCausalLM` build a model from it. The contract tests run over every family. Parameters
are counted from the config alone, without torch.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any

from pydantic import BaseModel, Field

from blockpruner.core.blocks import BlockId, BlockKind, Mask, all_blocks
from blockpruner.core.errors import InputError
from blockpruner.core.registry import Registry
from blockpruner.core.settings import read_settings

Config = Mapping[str, Any]


Size = Annotated[int, Field(ge=1, le=2**31)] | None


class Fields(BaseModel, strict=True):
    """The fields of any config.json that are read here, where it has them."""

    model_type: str
    vocab_size: Size = None
    hidden_size: Size = None
    num_hidden_layers: Annotated[int, Field(ge=1, le=10_000)] | None = None
    max_position_embeddings: Size = None
    quantization_config: Mapping[str, Any] | None = None


@dataclass(frozen=True)
class Branch:
    """One residual branch of a decoder layer, `x + post(module(norm(x)))`: the names of its
    attributes."""

    module: str
    norm: str | None
    """The norm before the module; None where there is none."""
    output: str
    """The last projection within the module (in a mixture, of each expert). Without it the branch
    adds zero."""
    post: str | None = None
    """The norm after the module; None where there is none."""
    shares_norm: bool = False
    """The layer's other branch reads the norm before the module, too; it goes with the layer
    only."""
    linear: tuple[str, str] | None = None
    """The names of module and output in a hybrid's layers of linear attention, whose state does not
    grow with the text and which return no weights."""

    def names(self, layer: object) -> tuple[str, str]:
        """Module and output, by the names that they have in this layer."""
        if self.linear and hasattr(layer, self.linear[0]):
            return self.linear
        return self.module, self.output

    @property
    def modules(self) -> tuple[str, ...]:
        """All names that the module has in one layer or another."""
        return (self.module, self.linear[0]) if self.linear else (self.module,)

    @property
    def norms(self) -> tuple[str, ...]:
        """Those that go with the branch."""
        norm = None if self.shares_norm else self.norm
        return tuple(name for name in (norm, self.post) if name is not None)


Count = Callable[[Config, int], int]
"""Parameters of a block without its norms, from a config and the block's layer."""


@dataclass(frozen=True)
class Family:
    """One decoder architecture of residual blocks."""

    model_type: str
    """The `model_type` of its config."""
    prefix: str
    """The prefix of its class names: LlamaConfig, LlamaForCausalLM."""
    mha_parameters: Count
    mlp_parameters: Count
    norm_bias: bool = False
    """Norms have a bias in addition to their weight."""
    parallel: str | None = None
    """The config field that tells whether MHA and MLP both read the layer's input: x + MHA(norm(x))
    + MLP(norm(x)). A family that always does so has it among its defaults alone."""
    added_scale: str | None = None
    """The config field of a factor of all that a block adds."""
    logit_cap: str | None = None
    """The config field of c, where the logits are c tanh(head / c)."""
    logit_scale: tuple[str, int] | None = None
    """The config field of a factor of all logits, and its power."""
    has_one_mlp: bool = True
    """The MLP of a layer is not a mixture of several."""
    in_vllm: bool = True
    """vLLM runs pruned models of the family."""
    renumbered: Callable[[Config, Sequence[tuple[int, int]]], Config] = lambda config, layers: (
        _layer_types(config, layers)
    )
    """The config fields that describe single layers, for new layers: (layer of its MHA, layer of
    its MLP) of each."""
    defaults: Config = field(default_factory=dict)
    """The values of config fields that a config.json may leave out."""
    decoder: str = "model"
    """Attribute path from the causal LM, as are the next three."""
    layers: str = "model.layers"
    final_norm: str = "model.norm"
    head: str = "lm_head"
    mha: Branch = Branch("self_attn", "input_layernorm", "o_proj")
    mlp: Branch = Branch("mlp", "post_attention_layernorm", "down_proj")

    def branch(self, kind: BlockKind) -> Branch:
        return self.mha if kind is BlockKind.MHA else self.mlp

    def is_parallel(self, config: Config) -> bool:
        if self.parallel is None:
            return False
        return bool(config.get(self.parallel, self.defaults.get(self.parallel)))


@dataclass(frozen=True)
class Costs:
    """How much of one resource a dense model takes, and how much each of its blocks: parameters,
    numbers in the KV cache, or nanoseconds."""

    total: int
    blocks: Mapping[BlockId, int]

    def ratio(self, mask: Mask) -> float:
        """The share that the mask removes, in [0, 1]. Of parameters it is the pruning ratio. All
        parameters count, those of embeddings, head and norms too. A removed block's norm counts as
        removed: by this convention every ratio of arXiv 2406.10594 decodes to whole blocks."""
        return sum(self.blocks[block] for block in mask) / self.total


def count_parameters(config: Config) -> Costs:
    """Count parameters from a config (`config.json` as a mapping), without loading weights."""
    family = FAMILIES[str(config["model_type"])]
    config = {**family.defaults, **config}
    hidden = int(config["hidden_size"])
    layers = int(config["num_hidden_layers"])
    norm = 2 * hidden if family.norm_bias else hidden
    blocks = {}
    for block in all_blocks(layers):
        count = family.mha_parameters if block.kind is BlockKind.MHA else family.mlp_parameters
        norms = norm * len(family.branch(block.kind).norms)
        blocks[block] = count(config, block.layer) + norms
    embeddings = int(config["vocab_size"]) * hidden
    if not config.get("tie_word_embeddings", False):
        embeddings *= 2  # the head has a matrix of its own
    # A norm that both branches read goes with neither: it counts with the final norm.
    unremovable_norms = norm * (1 + layers) if family.mha.shares_norm else norm
    return Costs(total=embeddings + unremovable_norms + sum(blocks.values()), blocks=blocks)


def count_kv_cache(config: Config) -> Costs:
    """Numbers that the KV cache holds for one token: keys and values of every MHA block. The state
    of a linear attention is as large whatever the number of tokens, and counts as none."""
    family = FAMILIES[str(config["model_type"])]
    _, kv_heads, head_dim = attention_heads({**family.defaults, **config})
    blocks = {}
    for block in all_blocks(int(config["num_hidden_layers"])):
        has_cache = block.kind is BlockKind.MHA and not is_linear(config, block.layer)
        blocks[block] = 2 * kv_heads * head_dim if has_cache else 0
    return Costs(total=sum(blocks.values()), blocks=blocks)


def attention_heads(config: Config) -> tuple[int, int, int]:
    """The number of query heads, that of heads of keys and values, and the width of one."""
    heads = int(config["num_attention_heads"])
    kv_heads = int(config.get("num_key_value_heads") or heads)
    head_dim = int(config.get("head_dim") or config["hidden_size"] // heads)
    return heads, kv_heads, head_dim


def is_linear(config: Config, layer: int) -> bool:
    """Whether the layer's attention is linear, in a hybrid."""
    if FAMILIES[str(config["model_type"])].mha.linear is None:
        return False
    types = config.get("layer_types")
    if types:
        return bool(types[layer] == "linear_attention")
    # A config.json without types has an interval: every fourth attention is a full one.
    interval = int(config.get("full_attention_interval", 4))
    return (layer + 1) % interval != 0


def _layer_types(config: Config, layers: Sequence[tuple[int, int]]) -> Config:
    """`layer_types`, where a config has it: sliding window, full or linear attention."""
    types = config.get("layer_types")
    return {} if types is None else {"layer_types": [types[mha] for mha, _ in layers]}


def _rotated_layers(config: Config, layers: Sequence[tuple[int, int]]) -> Config:
    """SmolLM3: some attentions do without rotary tables."""
    rotated = [config["no_rope_layers"][mha] for mha, _ in layers]
    return {**_layer_types(config, layers), "no_rope_layers": rotated}


def _sparse_layers(config: Config, layers: Sequence[tuple[int, int]]) -> Config:
    """Qwen3-MoE: a list and a step decide which MLP is dense."""
    dense = [index for index, (_, mlp) in enumerate(layers) if not _is_sparse(config, mlp)]
    # The step cannot describe a layer that moves, so it becomes 1 and the list has all.
    return {**_layer_types(config, layers), "mlp_only_layers": dense, "decoder_sparse_step": 1}


def _is_sparse(config: Config, layer: int) -> bool:
    is_in_step = (layer + 1) % int(config["decoder_sparse_step"]) == 0
    return is_in_step and layer not in (config["mlp_only_layers"] or [])


def _attention(config: Config, *, qkv_bias: bool = False, output_bias: bool = False) -> int:
    hidden = int(config["hidden_size"])
    heads, kv_heads, head_dim = attention_heads(config)
    # Queries and outputs are as wide as all heads, keys and values as the heads of keys and values.
    parameters = 2 * hidden * (heads + kv_heads) * head_dim
    if qkv_bias:
        parameters += (heads + 2 * kv_heads) * head_dim
    if output_bias:
        parameters += hidden
    return parameters


def no_bias(config: Config, layer: int) -> int:
    return _attention(config)


def optional_bias(config: Config, layer: int) -> int:
    bias = bool(config.get("attention_bias", config.get("use_bias", False)))
    output_bias = bool(config.get("attention_out_bias", bias))
    return _attention(config, qkv_bias=bias, output_bias=output_bias)


def head_norms(config: Config, layer: int) -> int:
    """Queries and keys are normalized head by head."""
    _, _, head_dim = attention_heads(config)
    return optional_bias(config, layer) + 2 * head_dim


def wide_norms(config: Config, layer: int) -> int:
    """Queries and keys are normalized as wholes."""
    heads, kv_heads, head_dim = attention_heads(config)
    return optional_bias(config, layer) + (heads + kv_heads) * head_dim


def gated_attention(config: Config, layer: int) -> int:
    """Qwen3-Next's kinds: attention with head norms and a gate as wide as its queries; or a gated
    delta net."""
    if is_linear(config, layer):
        return _gated_delta_net(config)
    heads, _, head_dim = attention_heads(config)
    gate_inputs = int(config["hidden_size"]) + bool(config.get("attention_bias", False))
    return head_norms(config, layer) + heads * head_dim * gate_inputs


def _gated_delta_net(config: Config) -> int:
    hidden = int(config["hidden_size"])
    heads = int(config["linear_num_value_heads"])
    head_dim = int(config["linear_value_head_dim"])
    keys = int(config["linear_num_key_heads"]) * int(config["linear_key_head_dim"])
    values = heads * head_dim
    # Queries, keys, values, the gate z and the output; of each head, the rates of decay and update.
    projections = hidden * (2 * keys + 3 * values + 2 * heads)
    convolution = (2 * keys + values) * int(config["linear_conv_kernel_dim"])
    decay_biases, norm = 2 * heads, head_dim
    return projections + convolution + decay_biases + norm


def gated_mlp(config: Config, layer: int) -> int:
    inner = int(config["intermediate_size"])
    parameters = _gate_up_down(config, inner)
    if config.get("mlp_bias", config.get("use_bias", False)):
        parameters += 2 * inner + int(config["hidden_size"])
    return parameters


def _gate_up_down(config: Config, inner: int) -> int:
    return 3 * int(config["hidden_size"]) * inner


def plain_mlp(config: Config, layer: int) -> int:
    hidden = int(config["hidden_size"])
    inner = int(config["intermediate_size"])
    return 2 * hidden * inner + inner + hidden


def _mixture(config: Config, inner_field: str) -> int:
    """A mixture of gated MLPs with its router."""
    hidden = int(config["hidden_size"])
    experts = int(config.get("num_local_experts") or config["num_experts"])
    parameters = experts * (_gate_up_down(config, int(config[inner_field])) + hidden)
    if "shared_expert_intermediate_size" in config:
        # One expert sees every token. Its gate has one output.
        shared = int(config["shared_expert_intermediate_size"])
        parameters += _gate_up_down(config, shared) + hidden
    return parameters


def _dense_mixture(config: Config, layer: int) -> int:
    return _mixture(config, "intermediate_size")


def _moe_mixture(config: Config, layer: int) -> int:
    return _mixture(config, "moe_intermediate_size")


def _sparse_mlp(config: Config, layer: int) -> int:
    count = _moe_mixture if _is_sparse(config, layer) else gated_mlp
    return count(config, layer)


def _qkv_bias(config: Config, layer: int) -> int:
    return _attention(config, qkv_bias=True)


def _gemma(cap: float | None) -> dict[str, Any]:
    """What Gemma's generations have in common: norms on both sides, and config fields that may be
    left out."""
    mha = Branch("self_attn", "input_layernorm", "o_proj", "post_attention_layernorm")
    mlp = Branch("mlp", "pre_feedforward_layernorm", "down_proj", "post_feedforward_layernorm")
    defaults = {"tie_word_embeddings": True, "head_dim": 256, "final_logit_softcapping": cap}
    return {"logit_cap": "final_logit_softcapping", "defaults": defaults, "mha": mha, "mlp": mlp}


AFTER_NORMS: dict[str, Any] = {
    "mha": Branch("self_attn", None, "o_proj", "post_attention_layernorm"),
    "mlp": Branch("mlp", None, "down_proj", "post_feedforward_layernorm"),
}
HYBRID: dict[str, Any] = {
    "in_vllm": False,
    "mha": Branch("self_attn", "input_layernorm", "o_proj", linear=("linear_attn", "out_proj")),
}
SPARSE: dict[str, Any] = {
    "mlp_parameters": _sparse_mlp,
    "has_one_mlp": False,
    "renumbered": _sparse_layers,
}
STEPS: dict[str, Any] = {"mlp_only_layers": (), "decoder_sparse_step": 1}
QKV_BIAS = {"attention_bias": True, "attention_out_bias": False, "head_dim": 128}
TIED = {"tie_word_embeddings": True}
FAMILIES: Registry[Family] = Registry(
    "model family",
    Family,
    [
        Family("llama", "Llama", optional_bias, gated_mlp),
        Family("baichuan", "Baichuan", no_bias, gated_mlp, in_vllm=False),
        Family("mistral", "Mistral", no_bias, gated_mlp),
        Family("qwen2", "Qwen2", _qkv_bias, gated_mlp),
        Family("qwen3", "Qwen3", head_norms, gated_mlp),
        Family("phi3", "Phi3", no_bias, gated_mlp),
        Family("gemma2", "Gemma2", optional_bias, gated_mlp, **_gemma(cap=30.0)),
        Family("gemma3_text", "Gemma3", head_norms, gated_mlp, **_gemma(cap=None)),
        Family("olmo2", "Olmo2", wide_norms, gated_mlp, **AFTER_NORMS),
        Family("olmo3", "Olmo3", wide_norms, gated_mlp, **AFTER_NORMS),
        Family("exaone4", "Exaone4", head_norms, gated_mlp, **AFTER_NORMS),
        Family(
            "smollm3",
            "SmolLM3",
            optional_bias,
            gated_mlp,
            renumbered=_rotated_layers,
            defaults=TIED,
        ),
        Family("seed_oss", "SeedOss", optional_bias, gated_mlp, defaults=QKV_BIAS),
        Family("ernie4_5", "Ernie4_5", optional_bias, gated_mlp, defaults=TIED | {"head_dim": 128}),
        Family("hunyuan_v1_dense", "HunYuanDenseV1", head_norms, gated_mlp),
        Family("ministral", "Ministral", no_bias, gated_mlp, in_vllm=False),
        Family("ministral3", "Ministral3", no_bias, gated_mlp, defaults={"head_dim": 128}),
        Family("glm", "Glm", optional_bias, gated_mlp, defaults=QKV_BIAS),
        Family(
            "glm4",
            "Glm4",
            optional_bias,
            gated_mlp,
            defaults=QKV_BIAS,
            mha=Branch("self_attn", "input_layernorm", "o_proj", "post_self_attn_layernorm"),
            mlp=Branch("mlp", "post_attention_layernorm", "down_proj", "post_mlp_layernorm"),
        ),
        Family(
            "granite",
            "Granite",
            optional_bias,
            gated_mlp,
            added_scale="residual_multiplier",
            logit_scale=("logits_scaling", -1),
        ),
        Family(
            "cohere2",
            "Cohere2",
            optional_bias,
            gated_mlp,
            parallel="use_parallel_residual",
            logit_scale=("logit_scale", 1),
            defaults=TIED | {"use_parallel_residual": True},
            mha=Branch("self_attn", "input_layernorm", "o_proj", shares_norm=True),
            mlp=Branch("mlp", "input_layernorm", "down_proj", shares_norm=True),
        ),
        Family(
            "mixtral",
            "Mixtral",
            no_bias,
            _dense_mixture,
            has_one_mlp=False,
        ),
        Family("qwen3_moe", "Qwen3Moe", head_norms, **SPARSE, defaults=STEPS),
        Family(
            "qwen3_next",
            "Qwen3Next",
            gated_attention,
            **SPARSE,
            **HYBRID,
            defaults=STEPS | {"head_dim": 256},
        ),
        Family(
            "qwen3_5_text",
            "Qwen3_5",
            gated_attention,
            gated_mlp,
            defaults={"head_dim": 256},
            **HYBRID,
        ),
        Family(
            "qwen3_5_moe_text",
            "Qwen3_5Moe",
            gated_attention,
            _moe_mixture,
            has_one_mlp=False,
            defaults={"head_dim": 256},
            **HYBRID,
        ),
        Family(
            "gpt_neox",
            "GPTNeoX",
            optional_bias,
            plain_mlp,
            norm_bias=True,
            parallel="use_parallel_residual",
            defaults={"attention_bias": True, "use_parallel_residual": True},
            decoder="gpt_neox",
            layers="gpt_neox.layers",
            final_norm="gpt_neox.final_layer_norm",
            mha=Branch("attention", "input_layernorm", "dense"),
            mlp=Branch("mlp", "post_attention_layernorm", "dense_4h_to_h"),
        ),
    ],
    key="model_type",
    hint=(
        'A new one is one row in blockpruner/core/families.py (docs/architecture.md, "Model'
        ' families"). A pruned model is not pruned again: prune its dense model by more (its scores'
        " are kept)"
    ),
)


def require_supported(config: Config) -> None:
    """Refuse the config of a model that cannot be pruned: of no known family, quantized, or without
    the numbers that parameters are counted from; raises InputError."""
    FAMILIES[str(config.get("model_type"))]
    read_settings(Fields, config, "config.json: ")
    quantization = config.get("quantization_config")
    if quantization:
        method = quantization.get("quant_method", "by an unknown method")
        raise InputError(
            f"the model's weights are quantized ({method}), and pruning needs the plain ones; give"
            " the model that was quantized, in bfloat16, and quantize the result",
            rule="quantized-model",
            key="model",
            value=method,
        )
    try:
        count_parameters(config)
        count_kv_cache(config)
    except Exception as error:  # of a family's formula, for values that it does not expect
        raise InputError(
            f"config.json lacks what parameters are counted from, or has it otherwise ({error!r});"
            " fetch it again"
        ) from error
