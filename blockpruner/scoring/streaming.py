"""Scoring a model that is larger than memory: one pass over the weights for all masks, one layer held at a time.

Decides what is in memory when. The arithmetic is the engine's own (`engine.py`), so for the same batches every value
is bit for bit the same; only the order differs, breadth first instead of depth first:

    embed the rows of every task
    for each layer: read its weights; advance every distinct state (masks that agree so far share one); drop them
    for every state: norm, head, loss

A state at rest is a tile [B, T, H]. Tiles stay in RAM as far as it goes, the others in an unlinked file where TMPDIR
says. Weights are read with `preadv` into the memory they are used from, never mapped, and those of blocks that every
mask removes are not read. All of this is planned in bytes before the first weight is read, and refused if it cannot
fit. Which masks are asked for is decided above.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightRenaming, rename_source_key

from blockpruner.blocks import DENSE, BlockId, BlockKind, Mask
from blockpruner.errors import DeviceMemoryError, InputError, StorageError
from blockpruner.models import resolve_device
from blockpruner.scoring.engine import LOGITS_BYTES, Engine, LayerKwargs, _Batch, map_tensors
from blockpruner.scoring.work import Rows, Task, Unit

PIECE_BYTES = 4 * 2**20
"""Read of a weight at once: through a buffer of this size where it needs another dtype or device."""

SCRATCH_BYTES = 48 * 2**20
"""Allowance for what no tensor shows: code of the kernels, paged in by their first use, their packing buffers, and
what the allocator cannot give back."""

TILE_SHARE = 0.9
"""Of the memory left, that tiles may take: other processes want some, and so do pages on their way to the disk."""

ALIGNMENT = 512
"""Bytes; that of CUDA's allocator, and a multiple of that of torch's on a CPU."""

VECTOR = 64
"""Bytes; some kernels sum in an order that depends on where within so many bytes a weight starts."""

DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}

Shape = tuple[int, int]
"""Rows and padded tokens of a batch, [B, T]."""


@dataclass(frozen=True)
class Plan:
    """What one pass needs, in bytes, and what there is; made before anything is read.

    weights_read: in this pass; weights_held: at most at once, in the dtype of scoring; working: beside weights and
    tiles, for one state; tile: of one state at rest; tiles: states at rest at most; ram_tiles: of these in RAM;
    resident: what the process holds already; needed, available: beyond that, of main memory (on a CPU all of the
    above); device_needed, device_available: of the device's own memory, 0 on a CPU; spill_place, spill_free: where
    the other tiles go; batch_tokens: of the engine.
    """

    weights_read: int
    weights_held: int
    working: int
    tile: int
    tiles: int
    ram_tiles: int
    resident: int
    needed: int
    available: int
    device_needed: int
    device_available: int
    spill_place: str
    spill_free: int
    batch_tokens: int

    @property
    def spill(self) -> int:
        """Bytes of tiles on disk."""
        return (self.tiles - self.ram_tiles) * self.tile

    @property
    def peak(self) -> int:
        """Upper bound of the process's resident memory during the pass."""
        return self.resident + self.needed

    def lines(self) -> Iterator[str]:
        yield (
            f"streaming: {_size(self.weights_read)} of weights read in one pass, {_size(self.weights_held)} held at "
            f"once, {_size(self.working)} to work in; {self.tiles} states of {_size(self.tile)}, {self.ram_tiles} in "
            f"memory and {self.tiles - self.ram_tiles} on disk"
        )
        device = f", device {_size(self.device_needed)} of {_size(self.device_available)}" if self.device_needed else ""
        yield (
            f"streaming: memory at most {_size(self.peak)}, {_size(self.resident)} of it in use already "
            f"({_size(self.needed)} of {_size(self.available)} available){device}, disk {_size(self.spill)} of "
            f"{_size(self.spill_free)} free in {self.spill_place}"
        )

    def check(self) -> None:
        """Raise DeviceMemoryError if the pass cannot fit."""
        short = [
            f"{_size(needed)} of {what}, and {_size(there)} are free"
            for what, needed, there in (
                ("memory", self.needed, self.available),
                ("the device's memory", self.device_needed, self.device_available),
                (f"disk in {self.spill_place}", self.spill, self.spill_free),
            )
            if needed > there
        ]
        if short:
            raise DeviceMemoryError(
                f"a streamed pass needs {'; '.join(short)} (weights at once {_size(self.weights_held)}, working set "
                f"{_size(self.working)}, {self.tiles} states of {_size(self.tile)}, {self.ram_tiles} in memory). Lower "
                f"runtime.batch_tokens (now {self.batch_tokens}), calibration.num_samples or calibration.seq_len, set "
                "TMPDIR to a directory on a larger disk, or choose another runtime.device. Nothing was read"
            )


@dataclass
class _Work:
    """A task under way: its batch, and its distinct states, each with the slot of its tile."""

    span: range
    batch: _Batch
    shape: torch.Size
    layer_kwargs: LayerKwargs
    states: list[tuple[Sequence[Mask], int]]


class StreamingEngine(Engine):
    """Scores masks of a checkpoint that need not fit into memory, exactly.

    Args:
        checkpoint: a directory with config.json and safetensors, whole or in shards.
        dtype, device, attention, trust_remote_code: as in `models.load_model`, but for one device.
        batch_tokens: as in `Engine`. A pass reads the weights once, however many batches there are.
        note: is told the plan of each pass.
        advance: is told the layers done, of how many, and the last one's name.
        tile_memory: bytes of RAM for tiles at most; None is nine tenths of what is left.

    Attributes:
        plan: of the last pass.
        weight_bytes_read, spill_bytes_read, spill_bytes_written: over all passes.

    Raises:
        InputError: unsupported family, weights that do not match the config, or an attention that is not installed.
    """

    def __init__(
        self,
        checkpoint: Path,
        dtype: str,
        *,
        device: str = "auto",
        batch_tokens: int | str = "auto",
        attention: str = "auto",
        trust_remote_code: bool = False,
        note: Callable[[str], object] = lambda line: None,
        advance: Callable[[int, int, str], object] = lambda done, total, detail: None,
        tile_memory: int | None = None,
    ) -> None:
        self._place = resolve_device(device)
        model = _skeleton(checkpoint, dtype, self._place, attention, trust_remote_code)
        super().__init__(model, 1)
        self._weights = weights = _Weights(model, checkpoint, self._place)
        self._note, self._advance, self._tile_memory = note, advance, tile_memory
        layers, norm, head = (f"{path}." for path in (self._row.layers, self._row.final_norm, self._row.head))
        outer = [name for name in weights.names if not name.startswith(layers)]
        self._after = [name for name in outer if all(use.startswith(head) for use in weights.names[name])]
        # kept from the embedding to the end: what the head shares with it, and the norm, which `_prepare` runs too
        self._kept = [
            name
            for name in outer
            if name not in self._after and any(use.startswith((norm, head)) for use in weights.names[name])
        ]
        self._before = [name for name in outer if name not in self._after and name not in self._kept]
        held = weights.bytes(self._kept) + max(
            map(weights.bytes, (self._before, self._after, *self._layer_names(DENSE)))
        )
        self._batch_tokens = self._auto_batch_tokens(held) if batch_tokens == "auto" else int(batch_tokens)
        self.plan: Plan | None = None
        self.spill_bytes_read = self.spill_bytes_written = 0

    @property
    def weight_bytes_read(self) -> int:
        return self._weights.bytes_read

    @property
    def _home(self) -> torch.device:
        return self._place

    def _device(self, layer: int) -> torch.device:
        return self._place

    def close(self) -> None:
        self._weights.close()

    @torch.inference_mode()
    def run(self, tasks: Sequence[Task], rows: Rows) -> Iterator[Unit]:
        """Yield the units of each task, all at the end of one pass over the weights.

        Raises:
            NonFiniteLossError: a loss is NaN or infinite; names mask and row. Units yielded before are good.
            DeviceMemoryError: the pass cannot fit into memory and disk; known before anything is read.
            StorageError: the space for tiles on disk could not be had.
        """
        if not tasks:
            return
        plan = self.plan = self._plan(tasks, rows)
        for line in plan.lines():
            self._note(line)
        plan.check()
        tiles = _Tiles(plan, self._head.weight.dtype, self._place)
        self._weights.forget = plan.weights_read > plan.available
        try:
            yield from self._pass(tasks, rows, tiles)
        except torch.OutOfMemoryError as error:
            raise DeviceMemoryError(
                f"a streamed pass ran out of the device's memory ({str(error).partition('. ')[0]}); lower "
                f"runtime.batch_tokens, now {self._batch_tokens}. Trials finished before are kept"
            ) from None
        finally:
            self._weights.drop(self._weights.names)
            self.spill_bytes_read += tiles.bytes_read
            self.spill_bytes_written += tiles.bytes_written
            tiles.close()

    def _pass(self, tasks: Sequence[Task], rows: Rows, tiles: _Tiles) -> Iterator[Unit]:
        works = self._embedded(tasks, rows, tiles)
        layers = self._layer_names(_removed(tasks))
        slab = self._weights.slab(max(map(self._weights.bytes, layers)))
        for layer, names in enumerate(layers):
            self._weights.load(names, slab)
            for work in works:
                work.states = list(self._advanced(layer, work, tiles))
            self._weights.drop(names)
            self._advance(layer + 1, self.layers, f"layer {layer}")
        del slab
        self._weights.load(self._after)
        for work in works:
            for masks, slot in work.states:
                hidden = tiles.get(slot, work.shape)
                for mask in masks:
                    yield self._unit(mask, hidden, work.batch, work.span)

    def _embedded(self, tasks: Sequence[Task], rows: Rows, tiles: _Tiles) -> list[_Work]:
        self._weights.load(self._kept)
        self._weights.load(self._before)
        works, distinct = [], _Distinct()
        for task in tasks:
            batch = self._batch([rows[i] for i in task.span])
            hidden, layer_kwargs = self._prepare(batch.input_ids)
            slot = tiles.new()
            tiles.put(slot, hidden)
            layer_kwargs = tuple(map_tensors(kwargs, distinct) for kwargs in layer_kwargs)
            works.append(_Work(task.span, batch, hidden.shape, layer_kwargs, [(task.masks, slot)]))
        self._weights.drop(self._before)
        return works

    def _advanced(self, layer: int, work: _Work, tiles: _Tiles) -> Iterator[tuple[Sequence[Mask], int]]:
        """The states of a task after a layer; of those that come of one state, one takes over its slot."""
        per_layer = len(self._steps) // self.layers
        steps = range(layer * per_layer, (layer + 1) * per_layer)
        for masks, slot in work.states:
            parts = self._split(steps, masks)
            unchanged = all(BlockId(kind, layer) in parts[0][0] for kind in BlockKind)
            fresh = [tiles.new() for _ in parts[1:]]
            # a slot is written over by the last result alone, when nothing more is computed from what it held
            slots = [slot, *fresh] if unchanged else [*fresh, slot]
            if fresh or not unchanged:
                hidden = tiles.get(slot, work.shape)
                results = self._walk(steps, hidden, masks, work.layer_kwargs)
                for target, (_, result) in zip(slots, results, strict=True):
                    if result is not hidden:
                        tiles.put(target, result)
            yield from zip(parts, slots, strict=True)

    def _split(self, steps: range, masks: Sequence[Mask]) -> list[Sequence[Mask]]:
        """The masks grouped as `_walk` groups them, in its order, without computing anything."""
        groups = [masks]
        for position in steps:
            groups = [part for group in groups for _, part in self._parts(position, group)]
        return groups

    def _layer_names(self, removed: Mask) -> list[list[str]]:
        """For each layer the names of its weights, without those that only blocks of `removed` use."""
        result = []
        for layer in range(self.layers):
            prefix = f"{self._row.layers}.{layer}."
            gone, used = set[str](), set[str]()
            for kind in BlockKind:
                (gone if BlockId(kind, layer) in removed else used).update(self._modules(layer, kind))
            unread = tuple(gone - used)
            names = self._weights.names
            result.append([name for name in names if name.startswith(prefix) and not name.startswith(unread)])
        return result

    def _modules(self, layer: int, kind: BlockKind) -> tuple[str, str]:
        branch = self._row.branch(kind)
        return f"{self._row.layers}.{layer}.{branch.norm}.", f"{self._row.layers}.{layer}.{branch.module}."

    def _plan(self, tasks: Sequence[Task], rows: Rows) -> Plan:
        shapes = [(len(task.span), max(len(rows[i]) for i in task.span)) for task in tasks]
        hidden, item = self._model.config.hidden_size, self._head.weight.element_size()
        tile = _aligned(max(batch * length for batch, length in shapes) * hidden * item)
        tiles = sum(len(self._split(range(len(self._steps)), task.masks)) for task in tasks)
        layers, size = self._layer_names(_removed(tasks)), self._weights.bytes
        carried = size(self._kept) + self._argument_bytes(set(shapes))
        spare = 2 * tile  # a tile on its way from or to another place
        phases = (  # weights, working memory, tiles at rest
            (size(self._before), max(map(self._embedding_bytes, shapes)), len(tasks)),
            (max(map(size, layers)), max(map(self._layer_bytes, shapes)), tiles),
            (size(self._after), max(map(self._loss_bytes, shapes)), tiles),
        )
        on_device = [carried + weights + working + spare for weights, working, _ in phases]
        fixed = SCRATCH_BYTES + self._weights.staging.nbytes + spare
        on_host = [fixed + (need if self._place.type == "cpu" else 0) for need in on_device]
        available = available_memory()
        ram_tiles = tiles if self._tile_memory is None else min(tiles, self._tile_memory // tile)
        for need, (_, _, resting) in zip(on_host, phases, strict=True):
            room = int(TILE_SHARE * max(0, available - need)) // tile
            ram_tiles = min(ram_tiles, room) if room < resting else ram_tiles
        needed = max(
            need + min(ram_tiles, resting) * tile for need, (_, _, resting) in zip(on_host, phases, strict=True)
        )
        place = tempfile.gettempdir()
        cuda = self._place.type == "cuda"
        return Plan(
            weights_read=self._weights.stored_bytes([*self._before, *self._kept, *self._after, *chain(*layers)]),
            weights_held=size(self._kept) + max(weights for weights, _, _ in phases),
            working=max(working for _, working, _ in phases),
            tile=tile,
            tiles=tiles,
            ram_tiles=ram_tiles,
            resident=_resident(),
            needed=needed,
            available=available,
            device_needed=max(on_device) if cuda else 0,
            device_available=_free_on(self._place) if cuda else 0,
            spill_place=place,
            spill_free=0 if _is_in_memory(place) else shutil.disk_usage(place).free,
            batch_tokens=self._batch_tokens,
        )

    # What follows bounds, in bytes, what lives at once for a batch, beside weights and the tiles at rest. Norms compute
    # in float32 at least, with three copies. What a block makes between its matrices is as wide as they are, and three
    # (MHA: with rotary halves and repeated heads) or two (MLP) such sets exist at most.

    def _norm_bytes(self, shape: Shape) -> int:
        item = self._head.weight.element_size()
        return int(shape[0] * shape[1] * self._model.config.hidden_size * (2 * item + 3 * max(item, 4)))

    def _embedding_bytes(self, shape: Shape) -> int:
        return 2 * self._norm_bytes(shape)

    def _layer_bytes(self, shape: Shape) -> int:
        (batch, length), config, item = shape, self._model.config, self._head.weight.element_size()
        widths = (
            max(
                copies * sum(w.numel() for w in getattr(layer, self._row.branch(kind).module).parameters())
                for layer in self._layers
                for kind, copies in ((BlockKind.MHA, 3), (BlockKind.MLP, 2))
            )
            // config.hidden_size
        )
        states = 4 * config.hidden_size  # after the first step, what two blocks add, and the sum
        eager = config._attn_implementation == "eager"  # has every head's map, else there is at most a mask to widen
        scores = batch * length**2 * (config.num_attention_heads * 2 * (item + max(item, 4)) if eager else item)
        return int(self._norm_bytes(shape) + batch * length * (widths + states) * item + scores)

    def _loss_bytes(self, shape: Shape) -> int:
        vocabulary, item = self._head.weight.shape[0], self._head.weight.element_size()
        tokens = min(shape[0] * shape[1], max(1, LOGITS_BYTES // (vocabulary * 4)))
        logits = 2 * max(item, 4) + (item if item < 4 else 0)  # widened, their exponentials, and as the head gave them
        return 2 * self._norm_bytes(shape) + tokens * vocabulary * logits

    def _argument_bytes(self, shapes: Iterable[Shape]) -> int:
        """Of what the layers are passed, for distinct shapes: a mask for each kind of attention, rotary tables."""
        config, item = self._model.config, self._head.weight.element_size()
        mask = item if config._attn_implementation == "eager" else 1
        return sum(2 * batch * length**2 * mask + 4 * length * config.hidden_size * item for batch, length in shapes)


class _Distinct:
    """Gives equal tensors as one object: batches of one shape have the same masks and rotary tables."""

    def __init__(self) -> None:
        self._seen: dict[tuple[torch.Size, torch.dtype], list[Tensor]] = {}

    def __call__(self, tensor: Tensor) -> Tensor:
        seen = self._seen.setdefault((tensor.shape, tensor.dtype), [])
        for other in seen:
            if other is tensor or torch.equal(other, tensor):
                return other
        seen.append(tensor)
        return tensor


class _Tiles:
    """States at rest, in slots: the first in RAM, as many as the plan says, the others in an unlinked file."""

    def __init__(self, plan: Plan, dtype: torch.dtype, device: torch.device) -> None:
        self._size, self._dtype, self._device, self._used = plan.tile, dtype, device, 0
        self._ram = torch.empty(plan.ram_tiles, plan.tile, dtype=torch.uint8)
        self._arrival = torch.empty(plan.tile if plan.spill else 0, dtype=torch.uint8)
        self._file = tempfile.TemporaryFile(buffering=0)  # noqa: SIM115
        self.bytes_read = self.bytes_written = 0
        try:
            if plan.spill:
                os.posix_fallocate(self._file.fileno(), 0, plan.spill)
        except OSError as error:
            raise StorageError(
                f"no {_size(plan.spill)} for tiles in {plan.spill_place}: {error.strerror}; free space there, or set "
                "TMPDIR to a directory on a larger disk"
            ) from error

    def new(self) -> int:
        self._used += 1
        return self._used - 1

    def put(self, slot: int, hidden: Tensor) -> None:
        if slot < len(self._ram):
            self._tensor(self._ram[slot], hidden.shape).copy_(hidden)
            return
        data = _memory(hidden.cpu().contiguous())
        self.bytes_written += len(data)
        offset = self._offset(slot)
        while data:
            written = os.pwrite(self._file.fileno(), data, offset)
            data, offset = data[written:], offset + written

    def get(self, slot: int, shape: torch.Size) -> Tensor:
        """The state on the device; on a CPU it may be the slot itself, or lie where the next `get` puts its own."""
        if slot < len(self._ram):
            return self._tensor(self._ram[slot], shape).to(self._device)
        found = self._tensor(self._arrival, shape)
        _read(self._file.fileno(), found, self._offset(slot), "the file of tiles")
        self.bytes_read += found.nbytes
        return found.to(self._device)

    def close(self) -> None:
        self._file.close()

    def _offset(self, slot: int) -> int:
        return (slot - len(self._ram)) * self._size

    def _tensor(self, memory: Tensor, shape: torch.Size) -> Tensor:
        return memory[: shape.numel() * self._dtype.itemsize].view(self._dtype).view(shape)


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


class _Weights:
    """Puts a checkpoint's tensors into a model's parameters, and takes them out again.

    names: of each tensor to be read, with the parameters that use it (a head may share the embedding's).
    """

    def __init__(self, model: PreTrainedModel, checkpoint: Path, device: torch.device) -> None:
        self._model, self._device = model, device
        self._empty = dict(model.named_parameters(remove_duplicate=False))
        self._stored, self.names = _matched(model, checkpoint, self._empty)
        direct = all(self._is_used_as_stored(name) for name in self.names)
        self.staging = torch.empty(0 if direct else PIECE_BYTES, dtype=torch.uint8)
        self._files: dict[Path, int] = {}
        self.bytes_read = 0
        self.forget = False
        """Whether the system shall not cache what was read: a pass over more than memory finds nothing again."""

    def bytes(self, names: Iterable[str]) -> int:
        """Memory of these weights in the dtype of scoring."""
        return sum(_aligned(self._empty[name].nbytes + VECTOR) for name in names)

    def stored_bytes(self, names: Iterable[str]) -> int:
        return sum(self._stored[name].nbytes for name in names)

    def slab(self, size: int) -> Tensor:
        return torch.empty(size, dtype=torch.uint8, device=self._device)

    def load(self, names: Sequence[str], slab: Tensor | None = None) -> None:
        """Read these weights into `slab`, or into memory that is freed when all of them are dropped."""
        slab = self.slab(self.bytes(names)) if slab is None else slab
        start = 0
        for name in sorted(names, key=lambda name: (self._stored[name].file, self._stored[name].offset)):
            empty, stored = self._empty[name], self._stored[name]
            # a model in memory uses tensors where safetensors maps them, which is aligned as they are in the file
            first = start + (stored.offset % VECTOR if self._is_used_as_stored(name) else 0)
            target = slab[first : first + empty.nbytes].view(empty.dtype).view(empty.shape)
            self._fill(target.view(-1), name)
            start += _aligned(empty.nbytes + VECTOR)
            for use in self.names[name]:
                self._set(use, nn.Parameter(target, requires_grad=False))

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

    def _is_used_as_stored(self, name: str) -> bool:
        return self._device.type == "cpu" and self._empty[name].dtype == self._stored[name].dtype

    def _fill(self, target: Tensor, name: str) -> None:
        stored, direct = self._stored[name], self._is_used_as_stored(name)
        if stored.file not in self._files:
            self._files[stored.file] = os.open(stored.file, os.O_RDONLY)
        file, item = self._files[stored.file], stored.dtype.itemsize
        for start in range(0, len(target), PIECE_BYTES // item):
            part = target[start : start + PIECE_BYTES // item]
            piece = part if direct else self.staging[: part.numel() * item].view(stored.dtype)
            _read(file, piece, stored.offset + start * item, str(stored.file))
            self.bytes_read += piece.nbytes
            if not direct:
                part.copy_(piece)
            if self.forget:  # from the file's start: a page run that crosses a tensor's start goes only as a whole
                os.posix_fadvise(file, 0, stored.offset + start * item + piece.nbytes, os.POSIX_FADV_DONTNEED)


def _matched(
    model: PreTrainedModel, checkpoint: Path, expected: dict[str, nn.Parameter]
) -> tuple[dict[str, _Stored], dict[str, tuple[str, ...]]]:
    """The checkpoint's tensors by the model's names, and the parameters that use each; checked as `load_model` does."""
    renamings = [change for change in get_model_conversion_mapping(model) if isinstance(change, WeightRenaming)]
    stored = {
        rename_source_key(key, renamings, [], model.base_model_prefix, expected)[0]: entry
        for key, entry in _read_headers(checkpoint).items()
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
            f"{key} {[*stored[key].shape]}, not {[*expected[key].shape]}"
            for key in stored.keys() & uses.keys()
            if stored[key].shape != expected[key].shape
        },
    }
    found = [f"{what}: {', '.join(sorted(keys)[:5])}" for what, keys in problems.items() if keys]
    if found:
        raise InputError(
            f"the weights in {checkpoint} do not match its config.json ({'; '.join(found)}); "
            "fetch the checkpoint again, or repair its config"
        )
    return stored, uses


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
            if entry["dtype"] not in DTYPES:
                raise ValueError(f"{name} is of dtype {entry['dtype']}, and streamed are {', '.join(DTYPES)}")
            stored = _Stored(path, 8 + length + start, DTYPES[entry["dtype"]], torch.Size(entry["shape"]))
            if stored.nbytes != stop - start or 8 + length + stop > size:
                raise ValueError(f"{name} takes bytes {start} to {stop}, beyond the file's end or not of its shape")
            result[name] = stored
    except (OSError, ValueError) as error:
        raise InputError(f"{path} cannot be read as safetensors: {error}; fetch the checkpoint again") from error
    return result


def _skeleton(
    checkpoint: Path, dtype: str, device: torch.device, attention: str, trust_remote_code: bool
) -> PreTrainedModel:
    """The model with its parameters on the meta device, and its buffers, which no checkpoint holds, on `device`."""
    config = AutoConfig.from_pretrained(checkpoint, local_files_only=True, trust_remote_code=trust_remote_code)
    options: dict[str, str] = {} if attention == "auto" else {"attn_implementation": attention}
    try:
        with _parameters_on_meta():
            model = AutoModelForCausalLM.from_config(
                config, dtype=getattr(torch, dtype), trust_remote_code=trust_remote_code, **options
            )
    except ImportError as error:
        raise InputError(f"runtime.attention {attention!r} cannot be used here: {error}; use auto or sdpa") from error
    for module in model.modules():
        module._buffers.update({name: buffer.to(device) for name, buffer in module._buffers.items()})
    result: PreTrainedModel = model.eval()
    return result


@contextmanager
def _parameters_on_meta() -> Iterator[None]:
    """Within, a module's parameters lose their memory, untouched yet, as they are registered."""
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


def _removed(tasks: Sequence[Task]) -> Mask:
    """The blocks that every mask removes."""
    return frozenset.intersection(*(mask for task in tasks for mask in task.masks))


def _memory(tensor: Tensor) -> memoryview:
    return tensor.view(-1).view(torch.uint8).numpy().data


def _read(file: int, target: Tensor, offset: int, name: str) -> None:
    """Fill a contiguous tensor of main memory from `offset` of a file."""
    data = _memory(target)
    while data:
        count = os.preadv(file, [data], offset)
        if count == 0:
            raise InputError(f"{name} ends at byte {offset}, before its last tensor does; fetch the checkpoint again")
        data, offset = data[count:], offset + count


def available_memory() -> int:
    """Bytes of main memory to be had: of the system, and within each memory cgroup of this process."""
    text = Path("/proc/meminfo").read_text()
    system = int(re.search(r"MemAvailable:\s+(\d+)", text)[1]) * 1024  # type: ignore[index]
    return max(0, min([system, *_cgroup_rooms()]))


def _cgroup_rooms() -> Iterator[int]:
    """Limit less what cannot be reclaimed, of this process's memory cgroup and of those above it; v1 and v2.

    Cached pages of files can be reclaimed, but for those that are mapped: they are the code that runs.
    """
    groups = [line.split(":", 2)[1:] for line in Path("/proc/self/cgroup").read_text().splitlines()]
    for _, root, place, kind, options in _mounts():
        if kind == "cgroup2":
            limit, usage, stats = "memory.max", "memory.current", ("active_file", "inactive_file", "file_mapped")
            paths = [path for controllers, path in groups if not controllers]
        elif kind == "cgroup" and "memory" in options.split(","):
            limit, usage = "memory.limit_in_bytes", "memory.usage_in_bytes"
            stats = ("total_active_file", "total_inactive_file", "total_mapped_file")
            paths = [path for controllers, path in groups if "memory" in controllers.split(",")]
        else:
            continue
        for path in paths:
            top, inner = Path(place), os.path.relpath(path, root)
            group = top if inner.startswith("..") else top / inner  # in a container only its own part is mounted
            for directory in (group, *group.parents[: len(group.parts) - len(top.parts)]):
                text = (directory / limit).read_text().strip() if (directory / limit).exists() else "max"
                if text != "max":
                    stat = dict(line.split() for line in (directory / "memory.stat").read_text().splitlines())
                    active, inactive, mapped = (int(stat[name]) for name in stats)
                    used = int((directory / usage).read_text())
                    yield int(text) - used + max(0, active + inactive - mapped)


def _mounts() -> Iterator[tuple[str, str, str, str, str]]:
    """Device number, root, place, file system and its options, of every mount."""
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        left, _, right = line.partition(" - ")
        _, _, device, root, place, *_ = left.split()
        kind, _, options = right.split(" ", 2)
        yield device, root, place, kind, options


def _is_in_memory(place: str) -> bool:
    number = Path(place).stat().st_dev
    device = f"{os.major(number)}:{os.minor(number)}"
    return any(mount[0] == device and mount[3] in ("tmpfs", "ramfs") for mount in _mounts())


def _free_on(device: torch.device) -> int:
    """Bytes of the device's memory to be had, what torch holds in reserve included."""
    free, _ = torch.cuda.mem_get_info(device)
    return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)


def _resident() -> int:
    """Bytes of main memory that this process holds."""
    return int(re.search(r"VmRSS:\s+(\d+)", Path("/proc/self/status").read_text())[1]) * 1024  # type: ignore[index]


def _aligned(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT


def _size(count: int) -> str:
    return f"{count / 2**30:.1f} GiB" if count >= 2**30 else f"{count / 2**20:.1f} MiB"
