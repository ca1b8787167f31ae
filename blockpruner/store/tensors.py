"""Sealed files of tensors and facts about them: safetensors whose metadata has the digest of all.

The metadata is one entry of JSON. safetensors writes several entries in an order that differs
between processes, so a file of the same content would have other bytes.
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

Tensors = Mapping[str, Tensor]
Facts = Mapping[str, str]
Contents = tuple[dict[str, Tensor], dict[str, str]]
"""The tensors of a file, and its facts."""


def write_tensors(path: Path, tensors: Tensors, facts: Facts) -> None:
    on_cpu = {}
    for name, tensor in tensors.items():
        on_cpu[name] = tensor.detach().cpu().contiguous()
    digest = _digest(on_cpu, facts)
    sealed_facts = json.dumps({**facts, DIGEST: digest}, sort_keys=True)
    metadata = {FACTS: sealed_facts}

    def write(temporary: Path) -> None:
        save_file(on_cpu, temporary, metadata)

    write_atomic(path, write)
    let_others_read(path.parent)


def read_facts(path: Path) -> dict[str, str]:
    """The facts of a file, whose tensors are neither read nor checked. Raises InputError."""
    _, facts = _read(path, with_tensors=False)
    return facts


def read_tensors(path: Path) -> Contents:
    """The tensors of a file, and its facts; raises InputError if it is damaged, or not written by
    `write_tensors`."""
    tensors, facts = _read(path, with_tensors=True)
    digest = facts.pop(DIGEST)
    if digest != _digest(tensors, facts):
        raise damaged(path)
    return tensors, facts


def _read(path: Path, with_tensors: bool) -> Contents:
    tensors = {}
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            text = metadata.get(FACTS, "{}")
            facts = json.loads(text)
            if with_tensors:
                for name in file.keys():  # noqa: SIM118 (no mapping)
                    tensors[name] = file.get_tensor(name)
    except (SafetensorError, ValueError) as error:
        raise damaged(path, f"is truncated or damaged ({error})") from error
    if not isinstance(facts, dict) or DIGEST not in facts:
        raise damaged(path, "has no digest, so it was not written here")
    return tensors, facts


def tensor_bytes(tensor: Tensor) -> memoryview:
    """The content of a tensor on the CPU, of any dtype."""
    # numpy has no bfloat16.
    flat = tensor.contiguous().reshape(-1)
    content = flat.view(torch.uint8)
    return content.numpy().data


def _digest(tensors: Tensors, facts: Facts) -> str:
    text = json.dumps(dict(facts), sort_keys=True)
    digest = hashlib.sha256(text.encode())
    for name, tensor in sorted(tensors.items()):
        shape = list(tensor.shape)
        description = f"{name} {tensor.dtype} {shape}"
        digest.update(description.encode())
        digest.update(tensor_bytes(tensor))
    return digest.hexdigest()
