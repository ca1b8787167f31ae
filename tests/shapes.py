"""The shapes of published models, as the sizes in their config.json."""

from blockpruner.core.families import Config

FIELDS = (
    "model_type",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "vocab_size",
    "max_position_embeddings",
    "tie_word_embeddings",
)
SHAPES: dict[str, Config] = {
    name: dict(zip(FIELDS, values, strict=True))
    for name, values in {
        "meta-llama/Llama-2-7b-hf": ("llama", 4096, 11008, 32, 32, 32, 32000, 4096, False),
        "meta-llama/Llama-2-13b-hf": ("llama", 5120, 13824, 40, 40, 40, 32000, 4096, False),
        "meta-llama/Meta-Llama-3-8B": ("llama", 4096, 14336, 32, 32, 8, 128256, 8192, False),
        "baichuan-inc/Baichuan2-7B-Base": ("llama", 4096, 11008, 32, 32, 32, 125696, 4096, False),
        "baichuan-inc/Baichuan2-13B-Base": (
            "baichuan",
            5120,
            13696,
            40,
            40,
            40,
            125696,
            4096,
            False,
        ),
        "Qwen/Qwen1.5-7B": ("qwen2", 4096, 11008, 32, 32, 32, 151936, 32768, False),
        "Qwen/Qwen1.5-14B": ("qwen2", 5120, 13696, 40, 40, 40, 152064, 32768, False),
        "mistralai/Mistral-7B-v0.3": ("mistral", 4096, 14336, 32, 32, 8, 32768, 32768, False),
    }.items()
}
