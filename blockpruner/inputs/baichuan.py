"""Baichuan checkpoints in their own layout, rewritten so that they need no code of theirs.

Decides how config, weights and tokenizer change. The 7B models are Llama models in all but name, and become such. The
13B models have ALiBi in place of rotary tables, and get the layout of `modeling_blockpruned.BaichuanForCausalLM`.

All have the same `model_type` and mostly the same `architectures`. The config.json and the code of baichuan-inc on the
hub (Baichuan-7B, Baichuan-13B-Base, Baichuan2-7B-Base, Baichuan2-13B-Base) tell them apart:
    A 7B config (rotary, base 10,000) has `max_position_embeddings`; a 13B config (ALiBi) has `model_max_length` alone.
    Baichuan 2 normalizes each row of its head before use (`NormHead`), Baichuan does not. The vocabulary shows which
    one it is: 125,696 or 64,000 (vLLM decides by it, too). If it was resized, only Baichuan 2 has `z_loss_weight`.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from blockpruner.core.errors import InputError, missing
from blockpruner.store.files import let_others_read, read_json, write_json

SHARD_BYTES = 2 * 2**30
"""Most bytes of one shard, which are held in memory at once. A larger tensor is a shard of its own."""

PACKED, HEAD = "self_attn.W_pack.weight", "lm_head.weight"

DROPPED = (
    "auto_map", "_from_model_config", "_name_or_path", "tokenizer_class", "model_max_length", "z_loss_weight",
)  # fmt: skip
"""Fields of config.json that only the old code reads."""

Config = Mapping[str, Any]


@dataclass(frozen=True)
class _Piece:
    """A tensor to write: rows of a stored one."""

    name: str
    size: int
    """Bytes."""
    file: Path
    stored: str
    """Name of the stored tensor in `file`."""
    rows: slice
    unit: bool
    """Whether each row is scaled to unit length."""

    def read(self) -> Tensor:
        with safe_open(self.file, "pt") as file:
            tensor: Tensor = file.get_slice(self.stored)[self.rows]
        if self.unit:
            # as F.normalize, in place; kept wide: a narrower dtype then rounds once, when the model is loaded
            tensor = tensor.to(_wide(tensor.dtype), copy=True)
            tensor /= tensor.norm(dim=1, keepdim=True).clamp_min(1e-12)
        return tensor.contiguous()


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def convert_(directory: Path) -> None:
    """Rewrite a checkpoint directory in place. One without packed attentions (`W_pack`) is ours and stays as it is.

    Raises:
        InputError: the config belongs to none of the models above, or sentencepiece is missing for the tokenizer.
    """
    if not any(piece.stored.endswith(PACKED) for piece in _pieces(directory, unit=False)):
        return
    config = read_json(directory / "config.json")
    new, unit = converted_config(config), has_unit_head(config)
    with tempfile.TemporaryDirectory(dir=directory) as folder:
        _write_weights(list(_pieces(directory, unit)), Path(folder))
        for path in [*directory.glob("*.safetensors*"), *directory.glob("*.py")]:
            path.unlink()
        for path in Path(folder).iterdir():
            path.rename(directory / path.name)
    let_others_read(directory)
    write_json(directory / "config.json", new)
    _convert_tokenizer(directory)


def converted_config(config: Config) -> dict[str, Any]:
    """config.json of the converted checkpoint."""
    if "max_position_embeddings" in config:
        rotary = {"rope_type": "default", "rope_theta": 10000.0}
        new: Config = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "rope_parameters": rotary}
    elif "model_max_length" in config:
        new = {"architectures": ["BaichuanForCausalLM"], "max_position_embeddings": config["model_max_length"]}
    else:
        raise InputError(
            "config.json of model_type 'baichuan' has neither max_position_embeddings (7B: rotary) nor "
            "model_max_length (13B: ALiBi), and its positions stay unknown; take config.json from the base model"
        )
    kept = {key: value for key, value in config.items() if key not in DROPPED}
    return {**kept, **new, "tie_word_embeddings": False}


def has_unit_head(config: Config) -> bool:
    """Whether the rows of the head are normalized before use."""
    vocabulary = config["vocab_size"]
    if vocabulary == 125_696 or "z_loss_weight" in config:
        return True
    if vocabulary == 64_000:
        return False
    raise InputError(
        f"config.json of model_type 'baichuan' has vocab_size {vocabulary}, and no z_loss_weight: it is neither "
        "Baichuan 2 (125,696: rows of the head are normalized) nor Baichuan (64,000: they are not); for a resized "
        "Baichuan 2 add z_loss_weight: 0 to it"
    )


def _pieces(directory: Path, unit: bool) -> Iterator[_Piece]:
    for path in sorted(directory.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            for stored in file.keys():  # noqa: SIM118
                part = file.get_slice(stored)
                dtype, shape = part[:0].dtype, part.get_shape()
                if stored.endswith(PACKED):
                    third, size = shape[0] // 3, math.prod(shape) // 3 * dtype.itemsize
                    for n, name in enumerate(("q_proj", "k_proj", "v_proj")):
                        rows = slice(n * third, (n + 1) * third)
                        yield _Piece(stored.replace("W_pack", name), size, path, stored, rows, False)
                else:
                    scaled = unit and stored == HEAD
                    size = math.prod(shape) * (_wide(dtype) if scaled else dtype).itemsize
                    yield _Piece(stored, size, path, stored, slice(None), scaled)


def _write_weights(pieces: Sequence[_Piece], folder: Path) -> None:
    shards: list[list[_Piece]] = [[]]
    for piece in pieces:
        if shards[-1] and sum(other.size for other in shards[-1]) + piece.size > SHARD_BYTES:
            shards.append([])
        shards[-1].append(piece)
    places: dict[str, str] = {}
    for n, shard in enumerate(shards, 1):
        name = f"model-{n:05}-of-{len(shards):05}.safetensors" if len(shards) > 1 else "model.safetensors"
        save_file({piece.name: piece.read() for piece in shard}, folder / name, metadata={"format": "pt"})
        places |= {piece.name: name for piece in shard}
    if len(shards) > 1:
        index = {"metadata": {"total_size": sum(piece.size for piece in pieces)}, "weight_map": places}
        write_json(folder / "model.safetensors.index.json", index)


def _convert_tokenizer(directory: Path) -> None:
    """Make tokenizer.json from tokenizer.model, by the latter's own settings (Baichuan 2 has no dummy prefix)."""
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
