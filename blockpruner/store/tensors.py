"""Tensors in a file with facts about them, sealed: safetensors whose metadata has the digest of all
of it.

The metadata is one entry of JSON: safetensors writes several in an order of its own, another in
each process, and a file of the same content would have other bytes.
"""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path

import safetensors
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from blockpruner.store.files import DIGEST, damaged, let_others_read, write_atomic

FACTS = "facts"
"""The entry of the metadata."""


def write_tensors(path: Path, tensors: Mapping[str, Tensor], facts: Mapping[str, str]) -> None:
    held = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    sealed = json.dumps({**facts, DIGEST: _digest(held, facts)}, sort_keys=True)
    write_atomic(path, lambda temporary: save_file(held, temporary, {FACTS: sealed}))
    let_others_read(path.parent)


def read_facts(path: Path) -> dict[str, str]:
    """What a file says about its tensors, which are neither read nor checked. Raises InputError."""
    return _read(path, tensors=False)[1]


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors of a file, and its facts; raises InputError if it is damaged, or not written by
    `write_tensors`."""
    tensors, facts = _read(path, tensors=True)
    if facts.pop(DIGEST) != _digest(tensors, facts):
        raise damaged(path)
    return tensors, facts


def _read(path: Path, tensors: bool) -> tuple[dict[str, Tensor], dict[str, str]]:
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            facts = json.loads((file.metadata() or {}).get(FACTS, "{}"))
            names = file.keys() if tensors else ()
            found = {name: file.get_tensor(name) for name in names}
    except (SafetensorError, ValueError) as error:
        raise damaged(path, f"is truncated or damaged ({error})") from error
    if not isinstance(facts, dict) or DIGEST not in facts:
        raise damaged(path, "has no digest, so it was not written here")
    return found, facts


def tensor_bytes(tensor: Tensor) -> memoryview:
    """The content of a tensor on the CPU, of any dtype."""
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data


def _digest(tensors: Mapping[str, Tensor], facts: Mapping[str, str]) -> str:
    digest = hashlib.sha256(json.dumps(dict(facts), sort_keys=True).encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        digest.update(tensor_bytes(tensor))
    return digest.hexdigest()
