"""Baichuan checkpoints in their own layout, rewritten so that they need no code of theirs.

Decides how config, weights and tokenizer change. The 7B models are Llama models in all but name,
and become such. The 13B models have ALiBi in place of rotary tables, and get the layout of
`modeling_blockpruned.BaichuanForCausalLM`.

All have the same `model_type` and mostly the same `architectures`. The config.json and the code of
baichuan-inc on the hub (Baichuan-7B, Baichuan-13B-Base, Baichuan2-7B-Base, Baichuan2-13B-Base) tell
them apart:
    A 7B config (rotary, base 10,000) has `max_position_embeddings`; a 13B config (ALiBi) has
    `model_max_length` alone. Baichuan 2 normalizes each row of its head before use (`NormHead`),
    Baichuan does not. The vocabulary shows which one it is: 125,696 or 64,000 (vLLM decides by it,
    too). If it was resized, only Baichuan 2 has `z_loss_weight`.
"""

from collections.abc import Mapping
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize

from blockpruner.core.errors import InputError, missing
from blockpruner.inputs.weights import rewrite_weights_, weight_names
from blockpruner.store.files import read_json, write_json

PACKED, HEAD = "self_attn.W_pack.weight", "lm_head.weight"

DROPPED = (
    "auto_map",
    "_from_model_config",
    "_name_or_path",
    "tokenizer_class",
    "model_max_length",
    "z_loss_weight",
)
"""Fields of config.json that only the old code reads."""

Config = Mapping[str, Any]


def convert_(directory: Path) -> None:
    """Rewrite a checkpoint directory in place. One without packed attentions (`W_pack`) is ours and
    stays as it is. Raises InputError if the config belongs to none of the models above, or
    sentencepiece is missing for the tokenizer.
    """
    if not any(name.endswith(PACKED) for name in weight_names(directory)):
        return
    config = read_json(directory / "config.json")
    new_config = converted_config(config)
    rewrite_weights_(directory, partial(_converted_weight, unit_head=has_unit_head(config)))
    for path in directory.glob("*.py"):
        path.unlink()
    write_json(directory / "config.json", new_config)
    _convert_tokenizer(directory)


def converted_config(config: Config) -> dict[str, Any]:
    if "max_position_embeddings" in config:
        rotary = {"rope_type": "default", "rope_theta": 10000.0}
        new: Config = {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "rope_parameters": rotary,
        }
    elif "model_max_length" in config:
        new = {
            "architectures": ["BaichuanForCausalLM"],
            "max_position_embeddings": config["model_max_length"],
        }
    else:
        raise InputError(
            "config.json of model_type 'baichuan' has neither max_position_embeddings (7B: rotary)"
            " nor model_max_length (13B: ALiBi), and its positions stay unknown; take config.json"
            " from the base model"
        )
    fields = {key: value for key, value in config.items() if key not in DROPPED}
    return {**fields, **new, "tie_word_embeddings": False}


def has_unit_head(config: Config) -> bool:
    """Whether the rows of the head are normalized before use."""
    vocabulary = config.get("vocab_size")
    if vocabulary == 125_696 or "z_loss_weight" in config:
        return True
    if vocabulary == 64_000:
        return False
    raise InputError(
        f"config.json of model_type 'baichuan' has vocab_size {vocabulary}, and no z_loss_weight:"
        " it is neither Baichuan 2 (125,696: rows of the head are normalized) nor Baichuan"
        " (64,000: they are not); for a resized Baichuan 2 add z_loss_weight: 0 to it"
    )


def _converted_weight(name: str, tensor: Tensor, unit_head: bool) -> dict[str, Tensor]:
    """A weight by its new names; `unit_head` scales rows of the head to unit length."""
    if name.endswith(PACKED):
        query, key, value = tensor.chunk(3)
        projections = {"q_proj": query, "k_proj": key, "v_proj": value}
        return {
            name.replace("W_pack", projection): weight.contiguous()
            for projection, weight in projections.items()
        }
    if unit_head and name == HEAD:
        # In float32 it is rounded once, when the model is loaded.
        precise = tensor.to(torch.promote_types(tensor.dtype, torch.float32))
        return {name: normalize(precise)}
    return {name: tensor}


def _convert_tokenizer(directory: Path) -> None:
    """Make tokenizer.json from tokenizer.model, by the latter's own settings (Baichuan 2 has no
    dummy prefix)."""
    if not (directory / "tokenizer.model").exists():
        return
    if find_spec("sentencepiece") is None:  # transformers would ask for tiktoken
        raise missing("sentencepiece", "sentencepiece")
    from transformers import PreTrainedTokenizerFast

    path = directory / "tokenizer_config.json"
    settings = read_json(path)
    for key in ("auto_map", "tokenizer_class", "use_fast", "sp_model_kwargs"):
        settings.pop(key, None)
    write_json(path, settings)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(directory, local_files_only=True)
    tokenizer.save_pretrained(directory)
