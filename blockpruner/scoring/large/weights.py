"""The weights of a checkpoint, read from its safetensors with `preadv` into a model's parameters,
and taken out again.

Decides how a tensor gets from disk to where it is used: never mapped, in the dtype and on the
device of scoring, under the model's names, and while others are computed with. `streaming` decides
which weights are in memory at what time.
"""

import json
import os
import re
from collections.abc import Generator, Iterable, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch.nn.modules.module import register_module_parameter_registration_hook
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

from blockpruner.core.errors import InputError
from blockpruner.model.classes import read_config
from blockpruner.model.models import kernel_options, move_buffers_, usable
from blockpruner.scoring.large.ahead import in_turn

ALIGNMENT = 512
"""Bytes; the alignment of CUDA's allocator, and a multiple of torch's on a CPU."""

VECTOR = 64
"""Bytes. The start of a weight modulo VECTOR decides the order in which some kernels sum."""

SLABS = 2
"""Groups of weights in memory at once: one is being read while the other is computed with."""

FLOATS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


@dataclass(frozen=True)
class _Stored:
    """A tensor in a file."""

    file: Path
    offset: int
    dtype: torch.dtype | None
    """None where it is none of `FLOATS`; such a tensor is not read."""
    shape: torch.Size


class Weights:
    """Puts a checkpoint's tensors into a model's parameters, and takes them out again. A weight may
    be stored in parts: the model has one matrix for all experts of a mixture."""

    names: dict[str, tuple[str, ...]]
    """Each weight to be read, with the parameters that use it (a head may share the
    embedding's)."""

    def __init__(self, model: PreTrainedModel, checkpoint: Path, device: torch.device) -> None:
        self._model = model
        self._device = device
        self._empty = dict(model.named_parameters(remove_duplicate=False))
        self._stored, self.names = _matched(model, checkpoint, self._empty)
        self._files: dict[Path, int] = {}
        self.bytes_read = 0

    def bytes(self, names: Iterable[str]) -> int:
        """Memory of these weights in the dtype of scoring."""
        return sum(aligned(self._empty[name].nbytes + VECTOR) for name in names)

    def load(self, names: Sequence[str]) -> None:
        """Read these weights into new memory, which is freed once all of them are dropped."""
        slab = self._slab(self.bytes(names))
        self._use(self._read(names, slab))

    def in_turn(self, groups: Sequence[Sequence[str]]) -> Generator[None]:
        """Have one group of weights after another in memory: each from when it is yielded until the
        next one is requested. A thread reads the next group meanwhile."""
        largest = max(self.bytes(names) for names in groups)
        slabs = [self._slab(largest) for _ in range(SLABS)]
        with closing(in_turn(self._device, groups, slabs, self._read)) as read:
            for names, tensors in zip(groups, read, strict=True):
                self._use(tensors)
                yield
                self.drop(names)

    def _slab(self, size: int) -> Tensor:
        return torch.empty(size, dtype=torch.uint8, device=self._device)

    def _read(self, names: Sequence[str], slab: Tensor) -> dict[str, Tensor]:
        start = 0
        tensors = {}
        for name in sorted(names, key=self._file_order):
            empty = self._empty[name]
            stored = self._stored[name]
            offset = stored[0].offset
            is_direct = self._is_used_as_stored(name)
            begin = start
            # A model in memory uses tensors where safetensors maps them, aligned as in the file. It
            # copies a tensor that is made of several, or that is not aligned to its items.
            if is_direct and len(stored) == 1 and offset % empty.itemsize == 0:
                begin += offset % VECTOR
            target = slab[begin : begin + empty.nbytes].view(empty.dtype)
            sizes = [tensor.shape.numel() for tensor in stored]
            pieces = torch.split(target, sizes)
            for piece, tensor in zip(pieces, stored, strict=True):
                self._fill(piece, tensor, is_direct)
            tensors[name] = target.view(empty.shape)
            start += aligned(empty.nbytes + VECTOR)
        return tensors

    def _file_order(self, name: str) -> tuple[Path, int]:
        tensor = self._stored[name][0]
        return tensor.file, tensor.offset

    def _is_used_as_stored(self, name: str) -> bool:
        dtypes = {tensor.dtype for tensor in self._stored[name]}
        return self._device.type == "cpu" and dtypes == {self._empty[name].dtype}

    def _fill(self, target: Tensor, stored: _Stored, is_direct: bool) -> None:
        if stored.file not in self._files:
            self._files[stored.file] = os.open(stored.file, os.O_RDONLY)
        buffer = target
        # Another dtype or device needs a copy of what is read.
        if not is_direct:
            buffer = torch.empty(len(target), dtype=stored.dtype)
        read_into(self._files[stored.file], buffer, stored.offset, str(stored.file))
        self.bytes_read += buffer.nbytes
        if not is_direct:
            target.copy_(buffer)

    def _use(self, tensors: dict[str, Tensor]) -> None:
        for name, tensor in tensors.items():
            for use in self.names[name]:
                parameter = nn.Parameter(tensor, requires_grad=False)
                self._set(use, parameter)

    def drop(self, names: Iterable[str]) -> None:
        for name in names:
            for use in self.names[name]:
                self._set(use, self._empty[use])

    def close(self) -> None:
        for file in self._files.values():
            os.close(file)
        self._files.clear()

    def _set(self, name: str, parameter: nn.Parameter) -> None:
        path, _, leaf = name.rpartition(".")
        module = self._model.get_submodule(path)
        module._parameters[leaf] = parameter


def skeleton(
    checkpoint: Path, dtype: str, device: torch.device, attention: str, trust_remote_code: bool
) -> PreTrainedModel:
    """The model with its parameters on the meta device and its buffers, which no checkpoint holds,
    on `device`."""
    config = read_config(checkpoint, trust_remote_code)
    options = kernel_options(attention, dtype, device)
    torch_dtype = getattr(torch, dtype)
    # Parameters lose their memory, which is still untouched, when a module registers them. Torch
    # types the hook as one that returns nothing, and takes what it returns.
    with usable(attention), register_module_parameter_registration_hook(_on_meta):  # type: ignore[arg-type]
        model = AutoModelForCausalLM.from_config(
            config, dtype=torch_dtype, trust_remote_code=trust_remote_code, **options
        )
    move_buffers_(model, device)
    model.eval()
    return cast(PreTrainedModel, model)


def _on_meta(module: nn.Module, name: str, parameter: nn.Parameter) -> nn.Parameter:
    if parameter.is_meta:
        return parameter
    empty = parameter.to("meta")
    return nn.Parameter(empty, requires_grad=False)


def _matched(
    model: PreTrainedModel, checkpoint: Path, expected: dict[str, nn.Parameter]
) -> tuple[dict[str, list[_Stored]], dict[str, tuple[str, ...]]]:
    """The checkpoint's tensors by the model's names, and the parameters that use each; checked as
    `load_model` does."""
    stored = _renamed(model, _read_headers(checkpoint), expected)
    uses: dict[str, tuple[str, ...]] = {name: (name,) for name in expected}
    for tied, source in model.all_tied_weights_keys.items():
        # Where both are stored they may differ, so each is read.
        if tied not in stored:
            uses[source] += uses.pop(tied)
        elif source not in stored:
            uses[tied] += uses.pop(source)
    ignored_patterns = [*(model._keys_to_ignore_on_load_unexpected or ()), r"rotary_emb\.inv_freq"]
    ignored = re.compile("|".join(ignored_patterns))
    mismatched = set()
    unreadable = set()
    for key in stored.keys() & uses.keys():
        shapes = [tensor.shape for tensor in stored[key]]
        if not _make_up(expected[key].shape, shapes):
            mismatched.add(key)
        if any(tensor.dtype is None for tensor in stored[key]):
            unreadable.add(key)
    extra = stored.keys() - uses.keys()
    problems = {
        "missing keys": uses.keys() - stored.keys(),
        "unexpected keys": {key for key in extra if not ignored.search(key)},
        "mismatched keys": mismatched,
        f"not of a dtype that is streamed ({', '.join(FLOATS)})": unreadable,
    }
    messages = []
    for problem, keys in problems.items():
        if keys:
            examples = sorted(keys)[:5]
            messages.append(f"{problem}: {', '.join(examples)}")
    if messages:
        raise InputError(
            f"the weights in {checkpoint} do not match its config.json ({'; '.join(messages)}); "
            "fetch the checkpoint again, or repair its config"
        )
    return stored, uses


def _renamed(
    model: PreTrainedModel, headers: dict[str, _Stored], expected: dict[str, nn.Parameter]
) -> dict[str, list[_Stored]]:
    """The tensors by the model's names. Those of a mixture are expert by expert, and the matrices
    of an expert in the order of the converter's patterns."""
    changes = get_model_conversion_mapping(model)
    renamings = [change for change in changes if isinstance(change, WeightRenaming)]
    merges = [change for change in changes if isinstance(change, WeightConverter)]
    patterns: list[str] = []
    for merge in merges:
        patterns += merge.source_patterns
    parts: dict[str, list[tuple[list[int], _Stored]]] = {}
    for key, tensor in headers.items():
        name, pattern = rename_source_key(key, renamings, merges, model.base_model_prefix, expected)
        position = []
        # A pattern means that the tensor is merged with others into one weight.
        if pattern is not None:
            experts = re.findall(r"experts\.(\d+)\.", key)
            position = [*map(int, experts), patterns.index(pattern)]
        parts.setdefault(name, []).append((position, tensor))
    stored = {}
    for name, positioned in parts.items():
        positioned.sort(key=lambda pair: pair[0])
        stored[name] = [tensor for _, tensor in positioned]
    return stored


def _make_up(weight: torch.Size, parts: Sequence[torch.Size]) -> bool:
    """Whether the parts, one after another, are the weight: itself, or matrices [*, H] of a weight
    [E, I, H]."""
    # The weight is stored whole.
    if len(parts) == 1:
        return parts[0] == weight
    has_all = sum(piece.numel() for piece in parts) == weight.numel()
    return has_all and all(piece[1:] == weight[2:] for piece in parts)


def _read_headers(checkpoint: Path) -> dict[str, _Stored]:
    """Every tensor of a checkpoint directory, by the name in its file."""
    single = checkpoint / "model.safetensors"
    index = checkpoint / "model.safetensors.index.json"
    if single.exists():
        names = {single.name}
    elif index.exists():
        content = json.loads(index.read_bytes())
        names = set(content["weight_map"].values())
    else:
        raise InputError(
            f"{checkpoint} holds neither {single.name} nor {index.name}; fetch the checkpoint again"
        )
    headers: dict[str, _Stored] = {}
    for name in sorted(names):
        headers |= _read_header(checkpoint / name)
    return headers


def _read_header(path: Path) -> dict[str, _Stored]:
    """The header of a safetensors file: its length in 8 bytes, then JSON of name -> dtype, shape,
    offsets."""
    try:
        # `safe_open` checks the header and the size of the file.
        with safe_open(path, framework="pt"), path.open("rb", buffering=0) as file:
            length = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(length))
    except (OSError, SafetensorError) as error:
        raise InputError(
            f"{path} cannot be read as safetensors: {error}; fetch the checkpoint again"
        ) from error
    header.pop("__metadata__", None)
    tensors = {}
    for name, entry in header.items():
        begin, _ = entry["data_offsets"]
        dtype = FLOATS.get(entry["dtype"])
        shape = torch.Size(entry["shape"])
        tensors[name] = _Stored(path, 8 + length + begin, dtype, shape)
    return tensors


def read_into(file: int, target: Tensor, offset: int, name: str) -> None:
    """Fill a contiguous tensor of main memory from `offset` of a file."""
    data = target.view(torch.uint8).numpy().data
    # The kernel may read less than is requested, so the rest is requested again.
    while data:
        count = os.preadv(file, [data], offset)
        if count == 0:
            raise InputError(
                f"{name} ends at byte {offset}, before its last tensor does; fetch the checkpoint"
                " again"
            )
        data = data[count:]
        offset += count


def aligned(size: int) -> int:
    """A size rounded up to a multiple of ALIGNMENT."""
    return -(-size // ALIGNMENT) * ALIGNMENT
