"""Modelling code of block-pruned checkpoints; ships inside them and needs only transformers.

Decides how a decoder runs without some of its blocks, or with narrower MLPs: a removed branch adds
nothing to the residual stream and holds no weights. Each class is transformers' own model of the
base family with holes in it, so that attention kernels, generation and caches are the family's.

Config fields beside the base family's (layers are those kept, numbered from 0):
    layers_without_mha, layers_without_mlp: indices of layers whose branch was removed;
    source_layers: the layer of the dense model that each kept layer was; None: no layer was
        dropped;
    per_layer_config: the same holes in transformers' own words, and each MLP that is narrower than
        `intermediate_size`; transformers reads them, and no released model class uses them.

Of a model's outputs, `hidden_states` has the embedding and then each kept layer's output.
`attentions` and the cache have an entry for each attention that is left, in order: entry k belongs
to the k-th layer not in `layers_without_mha`.
"""

from __future__ import annotations

import copy
import functools
import inspect
import sys
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
import transformers
from torch import nn

if tuple(int(number) for number in transformers.__version__.split(".")[:2]) < (5, 15):
    raise ImportError(
        f"this checkpoint needs transformers 5.15 or newer, and this is {transformers.__version__}"
    )

from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    Cohere2Config,
    Ernie4_5Config,
    Exaone4Config,
    Gemma2Config,
    Gemma3TextConfig,
    Glm4Config,
    GlmConfig,
    GPTNeoXConfig,
    GraniteConfig,
    HunYuanDenseV1Config,
    LlamaConfig,
    LlamaForCausalLM,
    Ministral3Config,
    MinistralConfig,
    MistralConfig,
    MixtralConfig,
    Olmo2Config,
    Olmo3Config,
    Phi3Config,
    Qwen2Config,
    Qwen3_5MoeTextConfig,
    Qwen3_5TextConfig,
    Qwen3Config,
    Qwen3MoeConfig,
    Qwen3NextConfig,
    SeedOssConfig,
    SmolLM3Config,
)
from transformers.masking_utils import create_causal_mask
from transformers.models.llama.modeling_llama import LlamaModel, LlamaPreTrainedModel

AUTO_CLASSES = (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    AutoModelForQuestionAnswering,
)
"""What loads a block-pruned checkpoint, where the base family has the head."""

Branches = tuple[tuple[str, ...], tuple[str, ...]]
"""Attributes of the MHA and of the MLP branch in a decoder layer: module, then its norms."""

BEFORE = (("self_attn", "input_layernorm"), ("mlp", "post_attention_layernorm"))
AFTER = (("self_attn", "post_attention_layernorm"), ("mlp", "post_feedforward_layernorm"))
AROUND = (
    ("self_attn", "input_layernorm", "post_attention_layernorm"),
    ("mlp", "pre_feedforward_layernorm", "post_feedforward_layernorm"),
)
AROUND_GLM4 = (
    ("self_attn", "input_layernorm", "post_self_attn_layernorm"),
    ("mlp", "post_attention_layernorm", "post_mlp_layernorm"),
)
"""Where a family has its norms."""

LINEAR, LINEAR_TYPE, FULL = "linear_attn", "linear_attention", "full_attention"
"""In hybrids: the module of a linear attention, and the types of layers with and without one."""


class NoMHA(nn.Module):
    """A removed attention: adds zero, touches no cache."""

    def forward(self, hidden_states: torch.Tensor, **kwargs: object) -> tuple[torch.Tensor, None]:
        return hidden_states.new_zeros(()), None


class NoLinearAttention(NoMHA):
    """A removed linear attention, which gives no weights."""

    def forward(self, hidden_states: torch.Tensor, **kwargs: object) -> torch.Tensor:
        return hidden_states.new_zeros(())


class NoMLP(nn.Module):
    """A removed MLP: adds zero."""

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return hidden_states.new_zeros(())


def unchanged(hidden_states: torch.Tensor) -> torch.Tensor:
    """In place of a removed block's norm."""
    return hidden_states


def name_in(layer: nn.Module, module: str) -> str:
    """The name of a branch's module in this layer: in a hybrid, a layer may have a linear attention
    in its place."""
    return module if hasattr(layer, module) else LINEAR


def remove_blocks_(layers: nn.ModuleList, mha: set[int], mlp: set[int], branches: Branches) -> None:
    """Replace the branches of the given layers, norms included, by holes."""
    for removed, (module, *norms), hole in ((mha, branches[0], NoMHA), (mlp, branches[1], NoMLP)):
        for index in removed:
            name = name_in(layers[index], module)
            setattr(layers[index], name, NoLinearAttention() if name == LINEAR else hole())
            for (
                norm
            ) in norms:  # tools find norms by modules' names, and look for the linears behind each
                layers[index]._modules.pop(norm, None)
                setattr(layers[index], norm, unchanged)


def narrow_mlps_(layers: nn.ModuleList, widths, config, module: str) -> None:
    """Replace the MLPs that are not as wide as the family's by narrower ones."""
    for layer, width in zip(layers, widths or (), strict=False):
        if width != config.intermediate_size:
            narrow, kind = copy.copy(config), type(getattr(layer, module))
            narrow.intermediate_size = width
            takes_width = "intermediate_size" in inspect.signature(kind).parameters
            setattr(layer, module, kind(narrow, width) if takes_width else kind(narrow))


def drop_layers_(layers: nn.ModuleList, kept) -> None:
    """Keep only the given layers, in order."""
    for index in reversed(range(len(layers))):
        if index not in kept:
            del layers[index]


def number_attentions_(layers: nn.ModuleList, module: str) -> None:
    """Number the remaining attentions 0..n-1: a cache takes an attention's number for its slot, and
    takes the length of the past from slot 0."""
    found = (getattr(layer, name_in(layer, module)) for layer in layers)
    present = [attention for attention in found if not isinstance(attention, NoMHA)]
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

    allow_global_per_layer_attribute_access = (
        True  # `intermediate_size` is the width of all other MLPs
    )

    @property
    def mlp_widths(self):
        """The width of each layer's MLP; None: all have `intermediate_size`."""
        if "intermediate_size" not in (self.per_layer_attributes or ()):
            return None
        return [layer.intermediate_size for layer in self.per_layer_config]

    @mlp_widths.setter
    def mlp_widths(self, widths):
        self.per_layer_config = {
            layer: {"intermediate_size": width} for layer, width in enumerate(widths)
        }

    def cache_config(self):
        """This config as a cache must see it: one layer for each attention. What is written to it
        is written here."""
        removed = set(self.layers_without_mha)
        config = copy.deepcopy(self)
        config.per_layer_config = None
        config.layers_without_mha = config.layers_without_mlp = []
        config.num_hidden_layers = self.num_hidden_layers - len(removed)
        if getattr(self, "layer_types", None) is not None:
            config.layer_types = [t for i, t in enumerate(self.layer_types) if i not in removed]
            # a cache asks an attention of another type for its length: 0
            if {*config.layer_types} == {LINEAR_TYPE}:
                config.num_hidden_layers, config.layer_types = (
                    config.num_hidden_layers + 1,
                    [*config.layer_types, FULL],
                )
        config.__dict__["_whole"] = self
        return config

    def __setattr__(self, name, value):
        super().__setattr__(name, value)
        if (whole := self.__dict__.get("_whole")) is not None:
            setattr(whole, name, value)

    def get_text_config(self, decoder=None, encoder=None):
        """Caches ask for the decoder's config, and only they pass `decoder` for a text model."""
        if decoder and (
            self.layers_without_mha
            or {*(getattr(self, "layer_types", None) or ())} == {LINEAR_TYPE}
        ):
            return self.cache_config()
        return self

    def to_dict(self):
        self._tell_peft()
        holes = {"attention": self.layers_without_mha, "mlp": self.layers_without_mlp}
        fields = super().to_dict() | {"auto_map": dict(type(self).auto_map)}
        layers = {i: {"intermediate_size": width} for i, width in enumerate(self.mlp_widths or ())}
        layers = {
            i: own
            for i, own in layers.items()
            if own["intermediate_size"] != fields["intermediate_size"]
        }
        for name, removed in holes.items():
            for i in removed:
                layers.setdefault(i, {}).setdefault("skip", []).append(name)
        fields["per_layer_config"] = {str(i): layers[i] for i in sorted(layers)}
        fields.pop("_whole", None)
        return fields

    def _tell_peft(self):
        """Give PEFT's tables of default targets the base family's also for this model type. PEFT
        takes a config's fields as a dict and then looks up the model type, so that this is the
        moment."""
        base = self.model_type.removesuffix("_blockpruned")
        for name, table in vars(sys.modules.get("peft.utils.constants", object)).items():
            if name.startswith("TRANSFORMERS_MODELS_TO_") and base in table:
                table.setdefault(self.model_type, table[base])


class BlockPrunedMixin:
    """A base-family model with holes; where its layers are in the causal LM, and the branches
    within one."""

    decoder_layers: str
    layer_branches: Branches

    def __init__(self, config):
        widths, spec = config.mlp_widths, config.__dict__.pop("_heterogeneity_spec", None)
        super().__init__(config)  # the family's own code reads one width
        layers = self.base_model.get_submodule(self.decoder_layers.partition(".")[2])
        narrow_mlps_(layers, widths, config, self.layer_branches[1][0])
        if spec is not None:
            config._heterogeneity_spec = spec
        remove_blocks_(
            layers,
            set(config.layers_without_mha),
            set(config.layers_without_mlp),
            self.layer_branches,
        )
        number_attentions_(layers, module=self.layer_branches[0][0])

    @classmethod
    def _can_set_experts_implementation(cls):
        """As the base family: transformers looks for an answer in the file of the class, and this
        is another one."""
        family = next(
            base for base in cls.__mro__ if base.__module__.startswith("transformers.models.")
        )
        return family._can_set_experts_implementation()

    def init_continuous_batching(self, *args, **kwargs):
        """The manager sizes its paged cache by `config`, layer by layer, and attentions have
        numbers of their own: it is made while `config` is the cache's.

        Raises:
            ValueError: there is nothing to cache.
        """
        if len(self.config.layers_without_mha) == self.config.num_hidden_layers:
            raise ValueError(
                "continuous batching caches attentions, and this model has none left; use generate"
            )
        with self._config_of_cache():
            manager = super().init_continuous_batching(*args, **kwargs)
        create = manager._create_batch_processor

        def create_for_attentions():
            with self._config_of_cache():
                return create()

        manager._create_batch_processor = create_for_attentions
        return manager

    @contextmanager
    def _config_of_cache(self):
        whole, self.config = self.config, self.config.cache_config()
        try:
            yield
        finally:
            self.config = whole


def checked(forward):
    """Make a forward refuse an engine that looks up an attention's window by its new number, and a
    cache of linear attentions alone, which does not count, before more tokens than one."""

    @functools.wraps(forward)
    def run(self, *args, **kwargs):
        cache = kwargs.get("cache", kwargs.get("past_key_values"))
        tokens = (*args[:1], kwargs.get("input_ids"), kwargs.get("inputs_embeds"))
        if any(given is not None and given.shape[1] > 1 for given in tokens):
            states = [
                getattr(layer, "has_previous_state", {}) for layer in getattr(cache, "layers", ())
            ]
            if any(any(state.values()) for state in states) and not cache.get_seq_length():
                raise ValueError(
                    "this model has linear attentions alone, whose cache is read a token at a time"
                    " only"
                )
        if kwargs.get("attention_instances") is not None and (
            types := getattr(self.config, "layer_types", None)
        ):
            left = self.config.cache_config().layer_types
            if left != types[: len(left)]:
                raise ValueError(
                    "this engine takes the window of an attention from the layer of the same"
                    " number, and here these differ: results would be wrong; vLLM needs"
                    " blockpruner's plugin, and transformers needs nothing"
                )
        return forward(self, *args, **kwargs)

    return run


def alibi_slopes(heads: int) -> list[float]:
    """2^(-8 i / n) for i = 1 to n where the n heads are a power of two; where they are not, those
    of the power of two below, then every other one of the power of two above (arXiv 2108.12409)."""
    below = 1 << (heads.bit_length() - 1)
    first, second = ([2.0 ** (-8 * i / n) for i in range(1, n + 1)] for n in (below, 2 * below))
    return first + second[::2][: heads - below]


class NoRotation(nn.Module):
    """In place of rotary tables: cosine 1 and sine 0."""

    def forward(
        self, x: torch.Tensor, position_ids: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return x.new_ones(1, 1, 1), x.new_zeros(1, 1, 1)


class BaichuanConfig(LlamaConfig):
    """The config of Baichuan 13B, with queries, keys and values as Llama has them.
    `rope_parameters`, which all configs of Llama's kind have, is not used."""

    model_type = "baichuan"


class BaichuanModel(LlamaModel):
    """Llama with ALiBi in place of rotary tables: head h adds slope_h (k - q) to what query q
    scores at key k."""

    config_class = BaichuanConfig
    _supports_flash_attn = _supports_flex_attn = False  # neither takes a bias

    def __init__(self, config):
        super().__init__(config)
        self.rotary_emb = NoRotation()

    def forward(
        self, input_ids=None, attention_mask=None, position_ids=None, inputs_embeds=None, **kwargs
    ):
        # before transformers 5.20 the latter
        cache = kwargs.get("cache", kwargs.get("past_key_values"))
        x = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        mask = create_causal_mask(
            self.config, x, attention_mask, cache, position_ids, allow_is_causal_skip=False
        )
        if attention_mask is None and position_ids is None:
            mask = mask[:1]  # all rows see alike; a bias for each would be large
        mask = self.with_alibi(mask, 0 if cache is None else cache.get_seq_length(), x.dtype)
        return super().forward(
            attention_mask=mask, position_ids=position_ids, inputs_embeds=x, **kwargs
        )

    def with_alibi(self, mask: torch.Tensor, past, dtype: torch.dtype) -> torch.Tensor:
        """A mask [B, 1, Q, K], of booleans or added to scores, as one [B, H, Q, K] that is added to
        scores.

        The distance is taken before it is scaled, and both in float32 at least: a bfloat16 does not
        tell apart tokens that are far along."""
        wide = torch.promote_types(dtype, torch.float32)
        queries, keys = (torch.arange(n, device=mask.device) for n in mask.shape[-2:])
        slopes = torch.tensor(
            alibi_slopes(self.config.num_attention_heads), dtype=wide, device=mask.device
        )
        bias = (slopes[:, None, None] * (keys - (past + queries)[:, None])).to(dtype)
        return (
            torch.where(mask, bias, torch.finfo(dtype).min)
            if mask.dtype == torch.bool
            else bias + mask
        )


class BaichuanForCausalLM(LlamaForCausalLM):
    config_class = BaichuanConfig
    _supports_flash_attn = _supports_flex_attn = False

    def __init__(self, config):
        LlamaPreTrainedModel.__init__(self, config)  # Llama's own would build a LlamaModel first
        self.model = BaichuanModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()


def add_family(config, prefix, branches: Branches = BEFORE, layers="model.layers", models=None):
    """Define a family's block-pruned classes in this module, and let the Auto classes build them
    from their config.

    Args:
        config: the base family's config class.
        prefix: of the classes' names, as in <prefix>BlockPrunedForCausalLM.
        layers: the path of the decoder's layers in the causal LM.
        models: the base family's model class for each Auto class; None: as transformers has them.
    """
    models = models or {
        auto: auto._model_mapping[config] for auto in AUTO_CLASSES if config in auto._model_mapping
    }
    names = {
        auto: f"{prefix}BlockPruned{auto.__name__.removeprefix('AutoModel') or 'Model'}"
        for auto in models
    }
    config_name, module = f"{prefix}BlockPrunedConfig", __name__.rpartition(".")[2]
    entries = {"AutoConfig": config_name} | {auto.__name__: name for auto, name in names.items()}
    described = {
        "model_type": f"{config.model_type}_blockpruned",
        "auto_map": {entry: f"{module}.{name}" for entry, name in entries.items()},
        "_auto_class": "AutoConfig",  # whoever saves a config or a model saves this file too
    }
    pruned = type(
        config_name, (BlockPrunedConfigMixin, config), {"__module__": __name__} | described
    )
    placed = {
        "__module__": __name__,
        "config_class": pruned,
        "decoder_layers": layers,
        "layer_branches": branches,
    }
    globals()[config_name] = pruned
    for auto, model in models.items():
        own = {"_auto_class": auto.__name__, "forward": checked(model.forward)}
        found = type(names[auto], (BlockPrunedMixin, model), placed | own)
        globals()[names[auto]] = found
        auto.register(pruned, found)


add_family(LlamaConfig, "Llama")
add_family(
    BaichuanConfig,
    "Baichuan",
    models={AutoModel: BaichuanModel, AutoModelForCausalLM: BaichuanForCausalLM},
)
add_family(MistralConfig, "Mistral")
add_family(Qwen2Config, "Qwen2")
add_family(Qwen3Config, "Qwen3")
add_family(Phi3Config, "Phi3")
add_family(Gemma2Config, "Gemma2", AROUND)
add_family(Gemma3TextConfig, "Gemma3", AROUND)
add_family(Olmo2Config, "Olmo2", AFTER)
add_family(Olmo3Config, "Olmo3", AFTER)
add_family(Exaone4Config, "Exaone4", AFTER)
add_family(SmolLM3Config, "SmolLM3")
add_family(SeedOssConfig, "SeedOss")
add_family(Ernie4_5Config, "Ernie4_5")
add_family(HunYuanDenseV1Config, "HunYuanDenseV1")
add_family(MinistralConfig, "Ministral")
add_family(Ministral3Config, "Ministral3")
add_family(GlmConfig, "Glm")
add_family(Glm4Config, "Glm4", AROUND_GLM4)
add_family(GraniteConfig, "Granite")
add_family(Cohere2Config, "Cohere2", (("self_attn",), ("mlp",)))  # both read one norm, which stays
add_family(MixtralConfig, "Mixtral")
add_family(Qwen3MoeConfig, "Qwen3Moe")
add_family(Qwen3NextConfig, "Qwen3Next")
add_family(Qwen3_5TextConfig, "Qwen3_5")
add_family(Qwen3_5MoeTextConfig, "Qwen3_5Moe")
add_family(
    GPTNeoXConfig,
    "GPTNeoX",
    (("attention", "input_layernorm"), ("mlp", "post_attention_layernorm")),
    "gpt_neox.layers",
)
