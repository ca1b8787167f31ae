"""vLLM's plugin: what vLLM must know to load an `hf` or a `nas` checkpoint without remote code.

Decides how their configs are read, and which of vLLM's classes get one for models with holes (`vllm_models`): those of
every family that both vLLM and transformers have. For `nas` vLLM has the model (`DeciLMForCausalLM`) but no config
class. vLLM calls `register` in each of its processes, by the entry point in pyproject.toml. Imports nothing of
blockpruner, and works with transformers older than the library needs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from transformers import CONFIG_MAPPING, AutoConfig, LlamaConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

PRUNED, MODELS = "_blockpruned", "blockpruner.model.vllm_models"


class Fields(dict[str, Any]):
    """A dict whose items are attributes too: vLLM asks for `block.attention.no_op`, and JSON takes it as it is."""

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(name) from None


class NemotronNasConfig(LlamaConfig):  # type: ignore[misc]  # transformers is untyped
    """Llama's config and, for each layer, which blocks it has (`checkpoints/nas.py`)."""

    model_type = "nemotron-nas"

    def __init__(self, block_configs: Sequence[Mapping[str, Mapping[str, Any]]] = (), **kwargs: Any) -> None:
        self.block_configs = [
            Fields({block: Fields(fields) for block, fields in config.items()}) for config in block_configs
        ]
        super().__init__(**kwargs)


class BlockPrunedConfig:
    """Reads the config.json of an `hf` checkpoint as the base family's config, with the lists of holes beside it.

    vLLM and transformers then treat the model as one of the family; only `architectures` tells that it has holes.
    """

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any], **kwargs: Any) -> Any:
        family = str(fields["model_type"]).removesuffix(PRUNED)
        kept = {name: value for name, value in fields.items() if name not in ("auto_map", "per_layer_config")}
        return CONFIG_MAPPING[family].from_dict(kept | {"model_type": family}, **kwargs)


def register() -> None:
    """Make the configs known to transformers and the models to vLLM, once; another's `nemotron-nas` stays."""
    from vllm import ModelRegistry

    if NemotronNasConfig.model_type not in CONFIG_MAPPING:
        AutoConfig.register(NemotronNasConfig.model_type, NemotronNasConfig)
    known = ModelRegistry.get_supported_archs()
    for family, architecture in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.items():
        prefix, suffix, _ = architecture.partition("ForCausalLM")
        if suffix and architecture in known:
            AutoConfig.register(family + PRUNED, BlockPrunedConfig, exist_ok=True)
            name = f"{prefix}BlockPruned{suffix}"
            ModelRegistry.register_model(name, f"{MODELS}:{name}")
