"""Models to measure on: shapes of the paper with random weights, whose cost does not depend on their values."""

from collections.abc import Mapping
from typing import Any

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel
from transformers.initialization import no_init_weights

from blockpruner.core.families import Config

MODELS: Mapping[str, Config] = {
    "tiny": {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 3, "num_attention_heads": 4,
             "num_key_value_heads": 2, "vocab_size": 500},
    "llama2-7b": {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32,
                  "num_key_value_heads": 32, "vocab_size": 32000},
    "llama3-8b": {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
                  "num_key_value_heads": 8, "vocab_size": 128256},
}  # fmt: skip


def random_model(shape: str, dtype: torch.dtype, device: str = "cpu", **changes: Any) -> PreTrainedModel:
    """A Llama of a named shape on `device`, weights uniform with a deviation of 0.02, norms 1."""
    config = LlamaConfig(**{"max_position_embeddings": 4096, **MODELS[shape], **changes})
    torch.manual_seed(0)
    with torch.device(device), no_init_weights():
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    bound = 0.02 * 3**0.5
    for name, parameter in model.named_parameters():
        parameter.data.fill_(1.0) if "norm" in name else parameter.data.uniform_(-bound, bound)
    return model.eval().requires_grad_(False)  # type: ignore[no-any-return]


def random_rows(vocabulary: int, rows: int, length: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, vocabulary, (rows, length), generator=generator).tolist()  # type: ignore[no-any-return]
