"""vLLM's plugin: what vLLM must know to load an `hf` checkpoint without remote code.

Decides how their configs are read, and which of vLLM's classes get one for models with holes
(`vllm_models`): those of every family that both vLLM and transformers have. No type of others is
registered: vLLM would read their models by our class. vLLM calls `register` in each of its
processes, by the entry point in pyproject.toml. Imports next to nothing of blockpruner, and works
with transformers older than the library needs.
"""

import logging
from collections.abc import Mapping
from typing import Any

from transformers import CONFIG_MAPPING, AutoConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from blockpruner.model.known import require_format

PRUNED, MODELS = "_blockpruned", "blockpruner.model.vllm_models"


class BlockPrunedConfig:
    """Reads the config.json of an `hf` checkpoint as the base family's config, with the lists of
    holes beside it.

    vLLM and transformers then treat the model as one of the family; only `architectures` tells that
    it has holes.
    """

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any], **kwargs: Any) -> Any:
        require_format(fields)
        family = str(fields["model_type"]).removesuffix(PRUNED)
        kept = {
            name: value
            for name, value in fields.items()
            if name not in ("auto_map", "per_layer_config")
        }
        width = fields.get("intermediate_size")
        own = {
            int(layer): each.get("intermediate_size", width)
            for layer, each in fields["per_layer_config"].items()
        }
        if {*own.values()} - {width}:
            kept["mlp_widths"] = [
                own.get(layer, width) for layer in range(fields["num_hidden_layers"])
            ]
        return CONFIG_MAPPING[family].from_dict(kept | {"model_type": family}, **kwargs)


def register() -> None:
    """Make the configs known to transformers and the models to vLLM. What fails is logged: vLLM
    calls this outside of a try, and would not start for any model."""
    try:
        _register()
    except Exception as error:  # of a vLLM or transformers that is not as this module knows it
        logging.getLogger(__name__).warning("vLLM starts without blockpruner's models: %r", error)


def _register() -> None:
    from vllm import ModelRegistry

    known = ModelRegistry.get_supported_archs()
    for family, architecture in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.items():
        prefix, suffix, _ = architecture.partition("ForCausalLM")
        if suffix and architecture in known:
            AutoConfig.register(family + PRUNED, BlockPrunedConfig, exist_ok=True)
            name = f"{prefix}BlockPruned{suffix}"
            ModelRegistry.register_model(name, f"{MODELS}:{name}")
