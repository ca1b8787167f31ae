"""vLLM's plugin: what transformers must know for vLLM to load a `nas` checkpoint without remote code.

Decides how its config is read. vLLM has the model (`DeciLMForCausalLM`) but no config class for `nemotron-nas`; it
calls `register` in each of its processes, by the entry point in pyproject.toml. Imports nothing of blockpruner, and
works with transformers older than the library needs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from transformers import CONFIG_MAPPING, AutoConfig, LlamaConfig


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


def register() -> None:
    """Make the config known to transformers, once, unless it is."""
    if NemotronNasConfig.model_type not in CONFIG_MAPPING:
        AutoConfig.register(NemotronNasConfig.model_type, NemotronNasConfig)
