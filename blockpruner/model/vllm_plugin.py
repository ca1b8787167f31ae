"""vLLM's plugin, which lets vLLM load an `hf` checkpoint without remote code.

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

PRUNED = "_blockpruned"
MODELS = "blockpruner.model.vllm_models"


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
        family_fields = dict(fields, model_type=family)
        family_fields.pop("auto_map", None)
        fields_by_layer = family_fields.pop("per_layer_config")
        dense_width = fields.get("intermediate_size")
        widths = [dense_width] * fields["num_hidden_layers"]
        for layer, layer_fields in fields_by_layer.items():
            widths[int(layer)] = layer_fields.get("intermediate_size", dense_width)
        if set(widths) - {dense_width}:
            family_fields["mlp_widths"] = widths
        return CONFIG_MAPPING[family].from_dict(family_fields, **kwargs)


def register() -> None:
    """Register the configs in transformers and the models in vLLM. Errors are logged: vLLM calls
    this outside of a try, and would not start for any model."""
    try:
        _register()
    except Exception as error:
        # Another version of vLLM or transformers may raise anything.
        logging.getLogger(__name__).warning("vLLM starts without blockpruner's models: %r", error)


def _register() -> None:
    from vllm import ModelRegistry

    supported = ModelRegistry.get_supported_archs()
    for family, architecture in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.items():
        prefix, suffix, _ = architecture.partition("ForCausalLM")
        if suffix and architecture in supported:
            AutoConfig.register(family + PRUNED, BlockPrunedConfig, exist_ok=True)
            name = f"{prefix}BlockPruned{suffix}"
            ModelRegistry.register_model(name, f"{MODELS}:{name}")
