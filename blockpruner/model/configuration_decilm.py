"""The config of DeciLM checkpoints (`nemotron-nas`), which engines have a model for and
transformers no config.

Ships inside the `nas` export and needs only transformers.
"""

from transformers import LlamaConfig


class Block(dict):
    """A dict whose values are attributes, too."""

    def __init__(self, fields):
        super().__init__(fields)
        for key, value in fields.items():
            if isinstance(value, dict):
                self[key] = Block(value)

    def __getattr__(self, name):
        try:
            return self[name]
        except KeyError:
            raise AttributeError(name) from None


class DeciLMConfig(LlamaConfig):
    """Llama's config with `block_configs`: what each layer's attention and MLP are, or that there
    is none (`no_op`)."""

    model_type = "nemotron-nas"

    def __init__(self, block_configs=(), **fields):
        super().__init__(**fields)
        self.block_configs = [Block(fields_of_layer) for fields_of_layer in block_configs]
