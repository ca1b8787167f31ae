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
    LlamaConfig,
    LlamaForCausalLM,
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

# The norms of each branch, by where a family has them: before it, after it, or both.
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

# Hybrids: the module of a linear attention, and the types of layers with and without one.
LINEAR = "linear_attn"
LINEAR_TYPE = "linear_attention"
FULL = "full_attention"


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
    """A function in place of a removed block's norm."""
    return hidden_states


def name_in(layer: nn.Module, module: str) -> str:
    """The name of a branch's module in this layer: in a hybrid, a layer may have a linear attention
    in its place."""
    return module if hasattr(layer, module) else LINEAR


def is_all_linear(layer_types) -> bool:
    """Whether a model has linear attentions alone."""
    return set(layer_types or ()) == {LINEAR_TYPE}


def remove_blocks_(layers: nn.ModuleList, mha: set[int], mlp: set[int], branches: Branches) -> None:
    """Replace the branches of some layers, norms included, by holes."""
    for removed, branch, hole_class in zip((mha, mlp), branches, (NoMHA, NoMLP), strict=True):
        module, *norms = branch
        for index in removed:
            layer = layers[index]
            name = name_in(layer, module)
            setattr(layer, name, NoLinearAttention() if name == LINEAR else hole_class())
            for norm in norms:
                # No module may stay: tools (llm-compressor's AWQ) find norms by modules' names, and
                # look for the linears behind each.
                layer._modules.pop(norm, None)
                setattr(layer, norm, unchanged)


def narrow_mlps_(layers: nn.ModuleList, widths, config, module: str) -> None:
    """Replace the MLPs that are not as wide as the family's by narrower ones."""
    for layer, width in zip(layers, widths or (), strict=False):
        if width == config.intermediate_size:
            continue
        narrow_config = copy.copy(config)
        narrow_config.intermediate_size = width
        mlp_class = type(getattr(layer, module))
        if "intermediate_size" in inspect.signature(mlp_class).parameters:
            mlp = mlp_class(narrow_config, width)
        else:
            mlp = mlp_class(narrow_config)
        setattr(layer, module, mlp)


def drop_layers_(layers: nn.ModuleList, kept_layers) -> None:
    """Keep only some layers, in order."""
    for index in reversed(range(len(layers))):
        if index not in kept_layers:
            del layers[index]


def number_attentions_(layers: nn.ModuleList, module: str) -> None:
    """Number the remaining attentions 0..n-1: a cache takes an attention's number for its slot, and
    takes the length of the past from slot 0."""
    number = 0
    for layer in layers:
        attention = getattr(layer, name_in(layer, module))
        if not isinstance(attention, NoMHA):
            attention.layer_idx = number
            number += 1


@dataclass(kw_only=True, repr=False, eq=False)
class BlockPrunedConfigMixin:
    """The fields that describe the holes; caches are sized for the attentions that exist.

    A dataclass, since transformers makes one of every config class, with an `__init__` of its own.
    """

    layers_without_mha: list[int] = field(default_factory=list)
    layers_without_mlp: list[int] = field(default_factory=list)
    source_layers: list[int] | None = None

    # transformers asks for it: `intermediate_size` is the width of all other MLPs.
    allow_global_per_layer_attribute_access = True

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
        """This config as a cache must see it: one layer for each attention. Attributes that are set
        on it are set on this config, too."""
        attentions = [i for i in range(self.num_hidden_layers) if i not in self.layers_without_mha]
        config = copy.deepcopy(self)
        config.per_layer_config = None
        config.layers_without_mha = config.layers_without_mlp = []
        config.num_hidden_layers = len(attentions)
        layer_types = getattr(self, "layer_types", None)
        if layer_types is not None:
            layer_types = [layer_types[i] for i in attentions]
            # A cache takes its length from a full attention: an unused one has length 0.
            if is_all_linear(layer_types):
                layer_types.append(FULL)
                config.num_hidden_layers += 1
            config.layer_types = layer_types
        config.__dict__["_model_config"] = self
        return config

    def __setattr__(self, name, value):
        super().__setattr__(name, value)
        model_config = self.__dict__.get("_model_config")
        if model_config is not None:
            setattr(model_config, name, value)

    def get_text_config(self, decoder=None, encoder=None):
        """Caches ask for the decoder's config, and only they pass `decoder` for a text model."""
        if not decoder:
            return self
        if self.layers_without_mha or is_all_linear(getattr(self, "layer_types", None)):
            return self.cache_config()
        return self

    def to_dict(self):
        self._register_in_peft()
        fields = super().to_dict()
        fields["auto_map"] = dict(type(self).auto_map)
        fields.pop("_model_config", None)
        fields_by_layer = {}
        for index, width in enumerate(self.mlp_widths or ()):
            if width != fields["intermediate_size"]:
                fields_by_layer[index] = {"intermediate_size": width}
        holes = {"attention": self.layers_without_mha, "mlp": self.layers_without_mlp}
        for name, removed in holes.items():
            for index in removed:
                fields_by_layer.setdefault(index, {}).setdefault("skip", []).append(name)
        fields["per_layer_config"] = {str(i): fields_by_layer[i] for i in sorted(fields_by_layer)}
        return fields

    def _register_in_peft(self):
        """Give this model type the base family's default targets in PEFT's tables. PEFT takes a
        config's fields as a dict and then looks up the model type, so it happens here."""
        constants = sys.modules.get("peft.utils.constants")
        if constants is None:
            return
        base_type = self.model_type.removesuffix("_blockpruned")
        for name, table in vars(constants).items():
            if name.startswith("TRANSFORMERS_MODELS_TO_") and base_type in table:
                table.setdefault(self.model_type, table[base_type])


class BlockPrunedMixin:
    """A base-family model with holes; where its layers are in the causal LM, and the branches
    within one."""

    decoder_layers: str
    layer_branches: Branches

    def __init__(self, config):
        # The family's own code reads one width for all MLPs, and so do those that are replaced.
        widths = config.mlp_widths
        spec = config.__dict__.pop("_heterogeneity_spec", None)
        super().__init__(config)
        layers = self.base_model.get_submodule(self.decoder_layers.partition(".")[2])
        mha_branch, mlp_branch = self.layer_branches
        narrow_mlps_(layers, widths, config, mlp_branch[0])
        if spec is not None:
            config._heterogeneity_spec = spec
        without_mha = set(config.layers_without_mha)
        without_mlp = set(config.layers_without_mlp)
        remove_blocks_(layers, without_mha, without_mlp, self.layer_branches)
        number_attentions_(layers, mha_branch[0])

    @classmethod
    def _can_set_experts_implementation(cls):
        """As the base family: transformers looks for an answer in the file of the class, and this
        is another file."""
        for base in cls.__mro__:
            if base.__module__.startswith("transformers.models."):
                return base._can_set_experts_implementation()
        return False

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
        create_batch_processor = manager._create_batch_processor

        def create_for_attentions():
            with self._config_of_cache():
                return create_batch_processor()

        manager._create_batch_processor = create_for_attentions
        return manager

    @contextmanager
    def _config_of_cache(self):
        model_config = self.config
        self.config = model_config.cache_config()
        try:
            yield
        finally:
            self.config = model_config


def refuse_linear_prefill(cache, *inputs):
    """Raise ValueError for several tokens after a past in a cache of linear attentions alone: it
    does not count its tokens, so their positions would be wrong."""
    if all(tokens is None or tokens.shape[1] <= 1 for tokens in inputs):
        return
    for layer in getattr(cache, "layers", ()):
        states = getattr(layer, "has_previous_state", {})
        if any(states.values()) and not cache.get_seq_length():
            raise ValueError(
                "this model has linear attentions alone, whose cache is read a token at a time only"
            )


def refuse_windows_by_number(config):
    """Raise ValueError if attention i would get the window of another layer from layer i."""
    layer_types = getattr(config, "layer_types", None)
    if not layer_types:
        return
    cache_types = config.cache_config().layer_types
    if cache_types != layer_types[: len(cache_types)]:
        raise ValueError(
            "this engine takes the window of an attention from the layer of the same number, and"
            " here these differ: results would be wrong; vLLM needs blockpruner's plugin, and"
            " transformers needs nothing"
        )


def checked(forward):
    """A forward that refuses what would silently be wrong in a model with holes."""

    @functools.wraps(forward)
    def run(self, *args, **kwargs):
        cache = kwargs.get("cache", kwargs.get("past_key_values"))
        inputs = (*args[:1], kwargs.get("input_ids"), kwargs.get("inputs_embeds"))
        refuse_linear_prefill(cache, *inputs)
        # vLLM and SGLang pass their attentions to transformers' models.
        if kwargs.get("attention_instances") is not None:
            refuse_windows_by_number(self.config)
        return forward(self, *args, **kwargs)

    return run


def alibi_slopes(heads: int) -> list[float]:
    """The slope of each head (arXiv 2108.12409): 2^(-8 i / n) for i = 1 to n where the number of
    heads n is a power of two."""
    power = 1 << (heads.bit_length() - 1)
    slopes = [2.0 ** (-8 * i / power) for i in range(1, power + 1)]
    # Other heads take every other slope of the next power of two.
    between = [2.0 ** (-8 * i / (2 * power)) for i in range(1, 2 * power, 2)]
    return slopes + between[: heads - power]


class NoRotation(nn.Module):
    """Rotary tables that turn nothing: cosine 1 and sine 0."""

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
        # transformers names it `past_key_values` before 5.20.
        cache = kwargs.get("cache", kwargs.get("past_key_values"))
        past_length = 0 if cache is None else cache.get_seq_length()
        x = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        mask = create_causal_mask(
            self.config, x, attention_mask, cache, position_ids, allow_is_causal_skip=False
        )
        if attention_mask is None and position_ids is None:
            mask = mask[:1]  # the same for all rows; a bias for each would be large
        mask = self.with_alibi(mask, past_length, x.dtype)
        return super().forward(
            attention_mask=mask, position_ids=position_ids, inputs_embeds=x, **kwargs
        )

    def with_alibi(self, mask: torch.Tensor, past_length: int, dtype: torch.dtype) -> torch.Tensor:
        """A mask [B, 1, Q, K], of booleans or added to scores, as one [B, H, Q, K] that is added to
        scores."""
        # bfloat16 cannot tell positions beyond 256 apart: the product is float32 at least, and
        # rounded at the end.
        wide = torch.promote_types(dtype, torch.float32)
        slopes = alibi_slopes(self.config.num_attention_heads)
        slopes = torch.tensor(slopes, dtype=wide, device=mask.device)
        queries = past_length + torch.arange(mask.shape[-2], device=mask.device)
        keys = torch.arange(mask.shape[-1], device=mask.device)
        distances = keys - queries[:, None]
        bias = (slopes[:, None, None] * distances).to(dtype)
        if mask.dtype == torch.bool:
            return torch.where(mask, bias, torch.finfo(dtype).min)
        return bias + mask


class BaichuanForCausalLM(LlamaForCausalLM):
    config_class = BaichuanConfig
    _supports_flash_attn = _supports_flex_attn = False

    def __init__(self, config):
        # Llama's own __init__ would build a LlamaModel first.
        LlamaPreTrainedModel.__init__(self, config)
        self.model = BaichuanModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()


def add_family(
    prefix, branches: Branches = BEFORE, layers="model.layers", config=None, models=None
):
    """Define a family's block-pruned classes in this module, and let the Auto classes build them
    from their config.

    Args:
        prefix: the beginning of the classes' names, as in <prefix>BlockPrunedForCausalLM.
        layers: the path of the decoder's layers in the causal LM.
        config: the base family's config class; None: transformers' <prefix>Config.
        models: the base family's model class for each Auto class; None: as transformers has them.
    """
    config = config or getattr(transformers, f"{prefix}Config")
    if models is None:
        autos = [auto for auto in AUTO_CLASSES if config in auto._model_mapping]
        models = {auto: auto._model_mapping[config] for auto in autos}
    file_name = __name__.rpartition(".")[2]
    config_name = f"{prefix}BlockPrunedConfig"
    auto_map = {"AutoConfig": f"{file_name}.{config_name}"}
    config_attributes = {
        "__module__": __name__,
        "model_type": f"{config.model_type}_blockpruned",
        "auto_map": auto_map,
        "_auto_class": "AutoConfig",  # saving a config or a model saves this file, too
    }
    config_class = type(config_name, (BlockPrunedConfigMixin, config), config_attributes)
    globals()[config_name] = config_class
    for auto, base in models.items():
        head = auto.__name__.removeprefix("AutoModel") or "Model"
        model_name = f"{prefix}BlockPruned{head}"
        auto_map[auto.__name__] = f"{file_name}.{model_name}"
        model_attributes = {
            "__module__": __name__,
            "_auto_class": auto.__name__,
            "config_class": config_class,
            "decoder_layers": layers,
            "layer_branches": branches,
            "forward": checked(base.forward),
        }
        model_class = type(model_name, (BlockPrunedMixin, base), model_attributes)
        globals()[model_name] = model_class
        auto.register(config_class, model_class)


for _prefix in (
    "Llama",
    "Mistral",
    "Mixtral",
    "Ministral",
    "Ministral3",
    "Phi3",
    "SmolLM3",
    "Qwen2",
    "Qwen3",
    "Qwen3Moe",
    "Qwen3Next",
    "SeedOss",
    "Ernie4_5",
    "Glm",
    "Granite",
    "HunYuanDenseV1",
):
    add_family(_prefix)
for _prefix in ("Olmo2", "Olmo3", "Exaone4"):
    add_family(_prefix, AFTER)
add_family("Qwen3_5", config=transformers.Qwen3_5TextConfig)
add_family("Qwen3_5Moe", config=transformers.Qwen3_5MoeTextConfig)
add_family("Gemma2", AROUND)
add_family("Gemma3", AROUND, config=transformers.Gemma3TextConfig)
add_family("Glm4", AROUND_GLM4)
# Both branches read one norm, which stays.
add_family("Cohere2", (("self_attn",), ("mlp",)))
add_family(
    "GPTNeoX",
    (("attention", "input_layernorm"), ("mlp", "post_attention_layernorm")),
    "gpt_neox.layers",
)
add_family(
    "Baichuan",
    config=BaichuanConfig,
    models={AutoModel: BaichuanModel, AutoModelForCausalLM: BaichuanForCausalLM},
)
