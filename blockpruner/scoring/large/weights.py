"""The weights of a checkpoint, read from its safetensors with `preadv` into a model's parameters, and taken out again.

Decides how a tensor gets from disk to where it is used: never mapped, in pieces, in the dtype and on the device of
scoring, under the model's own names, and while others are computed with. `streaming` decides which weights are in
memory at what time.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Generator, Iterable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

from blockpruner.core.errors import InputError
from blockpruner.model import accelerator
from blockpruner.model.models import kernel_options, usable
from blockpruner.scoring.large.ahead import in_turn

PIECE_BYTES = 4 * 2**20
"""So much of a weight is read at once, through one of two buffers if it needs another dtype or device."""

ALIGNMENT = 512
"""Bytes; the alignment of CUDA's allocator, and a multiple of torch's on a CPU."""

VECTOR = 64
"""Bytes; where a weight starts within them decides the order in which some kernels sum."""

FLOATS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
OTHERS = {
    "BOOL": torch.bool, "U8": torch.uint8, "I8": torch.int8, "I16": torch.int16, "I32": torch.int32,
    "I64": torch.int64, "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
}  # fmt: skip


@dataclass(frozen=True)
class _Stored:
    """Where a tensor lies."""

    file: Path
    offset: int
    dtype: torch.dtype
    shape: torch.Size

    @property
    def nbytes(self) -> int:
        return self.shape.numel() * self.dtype.itemsize


class Weights:
    """Puts a checkpoint's tensors into a model's parameters, and takes them out again.

    A weight may be stored in parts: the model has one matrix for all experts of a mixture.

    Attributes:
        names: each weight to be read, with the parameters that use it (a head may share the embedding's).
        forget: tell the system not to cache what was read; a pass over more than memory finds nothing again.
    """

    def __init__(self, model: PreTrainedModel, checkpoint: Path, device: torch.device) -> None:
        self._model, self._device = model, device
        self._empty = dict(model.named_parameters(remove_duplicate=False))
        self._stored, self.names = _matched(model, checkpoint, self._empty)
        direct = all(self._is_used_as_stored(name, part) for name in self.names for part in self._stored[name])
        is_pinned = device.type == "cuda"
        self.staging = torch.empty(2, 0 if direct else PIECE_BYTES, dtype=torch.uint8, pin_memory=is_pinned)
        self._staged: list[Any] = [None, None]
        """The event of each buffer that it has been copied."""
        self._files: dict[Path, int] = {}
        self._stops = False
        self.bytes_read = 0
        self.forget = False

    def bytes(self, names: Iterable[str]) -> int:
        """Memory of these weights in the dtype of scoring."""
        return sum(aligned(self._empty[name].nbytes + VECTOR) for name in names)

    def stored_bytes(self, names: Iterable[str]) -> int:
        return sum(part.nbytes for name in names for part in self._stored[name])

    def load(self, names: Sequence[str]) -> None:
        """Read these weights into new memory, which is freed once all of them are dropped."""
        self._use(self._read(names, self._slab(self.bytes(names))))

    def in_turn(self, groups: Sequence[Sequence[str]], slabs: int) -> Generator[None]:
        """Have one group of weights after another in memory: each from when it is yielded until the next one is asked
        for. With more than one slab the next groups are read meanwhile, by a thread.

        Args:
            slabs: pieces of memory, each as large as the largest group.
        """
        memory = [self._slab(max(map(self.bytes, groups))) for _ in range(slabs)]
        try:
            with closing(in_turn(self._device, groups, memory, self._read, self._stop)) as read:
                for names, tensors in zip(groups, read, strict=True):
                    self._use(tensors)
                    yield
                    self.drop(names)
        finally:
            self._stops = False

    def _stop(self) -> None:
        """What is being read ends with its piece."""
        self._stops = True

    def _slab(self, size: int) -> Tensor:
        return torch.empty(size, dtype=torch.uint8, device=self._device)

    def _read(self, names: Sequence[str], slab: Tensor) -> dict[str, Tensor]:
        start, tensors = 0, {}
        for name in sorted(names, key=lambda name: (self._stored[name][0].file, self._stored[name][0].offset)):
            empty, (stored, *others) = self._empty[name], self._stored[name]
            # a model in memory uses tensors where safetensors maps them, aligned as in the file; it uses a copy of a
            # tensor that is put together, or not aligned to its own items
            mapped = not others and self._is_used_as_stored(name, stored) and stored.offset % stored.dtype.itemsize == 0
            first = start + (stored.offset % VECTOR if mapped else 0)
            target = slab[first : first + empty.nbytes].view(empty.dtype).view(empty.shape)
            self._fill(target.view(-1), name)
            start += aligned(empty.nbytes + VECTOR)
            tensors[name] = target
        return tensors

    def _use(self, tensors: dict[str, Tensor]) -> None:
        for name, tensor in tensors.items():
            for use in self.names[name]:
                self._set(use, nn.Parameter(tensor, requires_grad=False))

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
        self._model.get_submodule(path)._parameters[leaf] = parameter

    def _is_used_as_stored(self, name: str, part: _Stored) -> bool:
        return self._device.type == "cpu" and self._empty[name].dtype == part.dtype

    def _fill(self, target: Tensor, name: str) -> None:
        for part in self._stored[name]:
            size = part.shape.numel()
            self._read_part(target[:size], part, self._is_used_as_stored(name, part))
            target = target[size:]

    def _read_part(self, target: Tensor, stored: _Stored, direct: bool) -> None:
        if stored.file not in self._files:
            self._files[stored.file] = os.open(stored.file, os.O_RDONLY)
        file, item = self._files[stored.file], stored.dtype.itemsize
        for number, start in enumerate(range(0, len(target), PIECE_BYTES // item)):
            if self._stops:
                return
            part, turn = target[start : start + PIECE_BYTES // item], number % 2
            if self._staged[turn] is not None:
                self._staged[turn].synchronize()
            piece = part if direct else self.staging[turn, : part.numel() * item].view(stored.dtype)
            read_into(file, piece, stored.offset + start * item, str(stored.file))
            self.bytes_read += piece.nbytes
            if not direct:
                part.copy_(piece, non_blocking=True)
                self._staged[turn] = accelerator.mark(self._device)
            if self.forget:  # from the file's start: pages that cross a tensor's start go only as a whole
                os.posix_fadvise(file, 0, stored.offset + start * item + piece.nbytes, os.POSIX_FADV_DONTNEED)


def skeleton(
    checkpoint: Path, dtype: str, device: torch.device, attention: str, trust_remote_code: bool
) -> PreTrainedModel:
    """The model with its parameters on the meta device and its buffers, which no checkpoint holds, on `device`."""
    config = AutoConfig.from_pretrained(checkpoint, local_files_only=True, trust_remote_code=trust_remote_code)
    options = kernel_options(attention, dtype, device)
    with usable(attention), _parameters_on_meta():
        model = AutoModelForCausalLM.from_config(
            config, dtype=getattr(torch, dtype), trust_remote_code=trust_remote_code, **options
        )
    for module in model.modules():
        module._buffers.update({name: buffer.to(device) for name, buffer in module._buffers.items()})
    result: PreTrainedModel = model.eval()
    return result


@contextmanager
def _parameters_on_meta() -> Iterator[None]:
    """Within, parameters lose their memory, which is still untouched, when a module registers them."""
    register = nn.Module.register_parameter

    def register_on_meta(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        if parameter is not None and not parameter.is_meta:
            parameter = nn.Parameter(parameter.to("meta"), requires_grad=False)
        register(module, name, parameter)

    nn.Module.register_parameter = register_on_meta  # type: ignore[assignment, method-assign]
    try:
        yield
    finally:
        nn.Module.register_parameter = register  # type: ignore[method-assign]


def _matched(
    model: PreTrainedModel, checkpoint: Path, expected: dict[str, nn.Parameter]
) -> tuple[dict[str, tuple[_Stored, ...]], dict[str, tuple[str, ...]]]:
    """The checkpoint's tensors by the model's names, and the parameters that use each; checked as `load_model` does."""
    changes = get_model_conversion_mapping(model)
    renamings = [change for change in changes if isinstance(change, WeightRenaming)]
    merges = [change for change in changes if isinstance(change, WeightConverter)]
    patterns = [pattern for merge in merges for pattern in merge.source_patterns]
    parts: dict[str, list[tuple[list[int], _Stored]]] = {}
    for key, entry in _read_headers(checkpoint).items():
        name, pattern = rename_source_key(key, renamings, merges, model.base_model_prefix, expected)
        # in a mixture: expert by expert, and the matrices of an expert in the order of the patterns
        place = [] if pattern is None else [*map(int, re.findall(r"experts\.(\d+)\.", key)), patterns.index(pattern)]
        parts.setdefault(name, []).append((place, entry))
    stored = {
        name: tuple(entry for _, entry in sorted(entries, key=lambda entry: entry[0]))
        for name, entries in parts.items()
    }
    uses: dict[str, tuple[str, ...]] = {name: (name,) for name in expected}
    for one, other in model.all_tied_weights_keys.items():
        if one not in stored or other not in stored:  # where both are stored they may differ, so each is read
            absent, present = (one, other) if other in stored or one not in stored else (other, one)
            uses[present] += uses.pop(absent)
    ignored = [*(model._keys_to_ignore_on_load_unexpected or ()), r"rotary_emb\.inv_freq"]
    problems = {
        "missing keys": uses.keys() - stored.keys(),
        "unexpected keys": {
            key for key in stored.keys() - uses.keys() if not any(re.search(pattern, key) for pattern in ignored)
        },
        "mismatched keys": {
            f"{key} {_count(stored[key])}{[*stored[key][0].shape]}, not {[*expected[key].shape]}"
            for key in stored.keys() & uses.keys()
            if not _make_up(expected[key].shape, [part.shape for part in stored[key]])
        },
        f"not of a dtype that is streamed ({', '.join(FLOATS)})": {
            f"{key} {part.dtype}"
            for key in stored.keys() & uses.keys()
            for part in stored[key]
            if part.dtype not in FLOATS.values()
        },
    }
    found = [f"{what}: {', '.join(sorted(keys)[:5])}" for what, keys in problems.items() if keys]
    if found:
        raise InputError(
            f"the weights in {checkpoint} do not match its config.json ({'; '.join(found)}); "
            "fetch the checkpoint again, or repair its config"
        )
    return stored, uses


def _count(parts: Sequence[_Stored]) -> str:
    return f"{len(parts)} parts, the first " if len(parts) > 1 else ""


def _make_up(whole: torch.Size, parts: Sequence[torch.Size]) -> bool:
    """Whether the parts, one after another, are the weight: itself, or matrices [*, H] of a weight [E, I, H]."""
    if len(parts) == 1:
        return parts[0] == whole
    return sum(part.numel() for part in parts) == whole.numel() and all(part[1:] == whole[2:] for part in parts)


def _read_headers(checkpoint: Path) -> dict[str, _Stored]:
    """Every tensor of a checkpoint directory, by the name in its file."""
    single, index = checkpoint / "model.safetensors", checkpoint / "model.safetensors.index.json"
    if single.exists():
        files = [single]
    elif index.exists():
        files = [checkpoint / name for name in sorted(set(json.loads(index.read_bytes())["weight_map"].values()))]
    else:
        raise InputError(f"{checkpoint} holds neither {single.name} nor {index.name}; fetch the checkpoint again")
    return {name: entry for file in files for name, entry in _read_header(file).items()}


def _read_header(path: Path) -> dict[str, _Stored]:
    """The header of a safetensors file: its length in 8 bytes, then JSON of name -> dtype, shape, offsets."""
    try:
        with path.open("rb", buffering=0) as file:
            length = int.from_bytes(file.read(8), "little")
            size = os.fstat(file.fileno()).st_size
            if length > size:
                raise ValueError(f"a header of {length} bytes in a file of {size}")
            header = json.loads(file.read(length))
        header.pop("__metadata__", None)
        result = {}
        for name, entry in header.items():
            start, stop = entry["data_offsets"]
            dtype = (FLOATS | OTHERS).get(entry["dtype"])
            if dtype is None:
                raise ValueError(f"{name} is of the unknown dtype {entry['dtype']}")
            stored = _Stored(path, 8 + length + start, dtype, torch.Size(entry["shape"]))
            if stored.nbytes != stop - start or 8 + length + stop > size:
                raise ValueError(f"{name} takes bytes {start} to {stop}, beyond the file's end or not of its shape")
            result[name] = stored
    except (OSError, ValueError) as error:
        raise InputError(f"{path} cannot be read as safetensors: {error}; fetch the checkpoint again") from error
    return result


def memory_of(tensor: Tensor) -> memoryview:
    return tensor.view(-1).view(torch.uint8).numpy().data


def read_into(file: int, target: Tensor, offset: int, name: str) -> None:
    """Fill a contiguous tensor of main memory from `offset` of a file."""
    data = memory_of(target)
    while data:
        count = os.preadv(file, [data], offset)
        if count == 0:
            raise InputError(f"{name} ends at byte {offset}, before its last tensor does; fetch the checkpoint again")
        data, offset = data[count:], offset + count


def aligned(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT
