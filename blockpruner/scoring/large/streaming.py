"""Scoring a model that is larger than memory: one pass over the weights for all masks, one layer held at a time.

Decides what is in memory when. The arithmetic is the engine's own (`engine.py`), so for the same batches every value
is the same to the bit. Only the order differs, breadth first instead of depth first:

    embed the rows of every task
    for each layer: read its weights; advance every distinct state (masks that agree so far share one); drop them
    for every state: norm, head, loss

A state at rest is a tile [B, T, H]. Tiles stay in RAM while there is room; the others go to an unlinked file in
TMPDIR. Weights are read with `preadv` into the memory they are used from, never mapped; those of blocks that every
mask removes are not read. The pass is planned in bytes before the first weight is read, and refused if it cannot fit.
"""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain
from pathlib import Path

import torch
from torch import Tensor

from blockpruner.core.blocks import DENSE, BlockId, BlockKind, Mask
from blockpruner.core.errors import DeviceMemoryError, InputError, StorageError
from blockpruner.model import accelerator
from blockpruner.model.models import resolve_device
from blockpruner.scoring.batches import Batch
from blockpruner.scoring.engine import Engine
from blockpruner.scoring.forward import LayerKwargs, joined, map_tensors
from blockpruner.scoring.large.memory import available_memory, is_in_memory, resident_memory
from blockpruner.scoring.large.weights import Weights, aligned, memory_of, read_into, skeleton
from blockpruner.scoring.walk import runs, walk
from blockpruner.scoring.work import Rows, ScoredRows, Task

SCRATCH_BYTES = 48 * 2**20
"""Allowance for memory outside tensors: code of the kernels, paged in at their first use, their packing buffers, and
what the allocator cannot give back."""

TILE_SHARE = 0.9
"""Share of the memory left that tiles may take; other processes need some, and so do pages on their way to disk."""

Shape = tuple[int, int]
"""Rows and padded tokens of a batch, [B, T]."""


@dataclass(frozen=True)
class PassPlan:
    """What one pass needs, in bytes, and what there is; made before anything is read."""

    weights_read: int
    weights_held: int
    """At most at once, in the dtype of scoring."""
    working: int
    """For one state, in addition to weights and tiles."""
    tile: int
    """One state at rest."""
    tiles: int
    """The largest number of states at rest."""
    ram_tiles: int
    """How many of them are in RAM."""
    resident: int
    """What the process holds already."""
    needed: int
    """Main memory in addition to `resident`; on a CPU all of the above."""
    available: int
    device_needed: int
    """The device's own memory; 0 on a CPU."""
    device_available: int
    spill_place: str
    """Where the other tiles go."""
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
    """A task under way."""

    task: Task
    batch: Batch
    shape: torch.Size
    layer_kwargs: LayerKwargs
    states: list[tuple[Sequence[Mask], int]]
    """The distinct states, each as the masks that share it and the slot of its tile."""


class StreamingEngine(Engine):
    """Scores masks of a checkpoint that need not fit into memory, exactly.

    Args:
        checkpoint: a directory with config.json and safetensors, whole or in shards.
        dtype, device, attention, trust_remote_code: as in `models.load_model`, on one device.
        batch_tokens: as in `Engine`; a pass reads the weights once for all batches.
        note: receives the plan of each pass.
        advance: receives the layers done, their number, and the last one's name.
        tile_memory: most bytes of RAM for tiles; None allows nine tenths of what is left.
        memory: bytes of main memory that a pass may take; None allows all that is free.

    Attributes:
        plan: the plan of the last pass.
        weight_bytes_read, spill_bytes_read, spill_bytes_written: sums over all passes.

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
        memory: int | None = None,
    ) -> None:
        if sys.platform != "linux":
            raise InputError("runtime.streaming: true needs Linux, where the free memory can be known; set it to false")
        self._memory = memory
        self._place = resolve_device(device)
        model = skeleton(checkpoint, dtype, self._place, attention, trust_remote_code)
        super().__init__(model, 1)
        self._weights = weights = Weights(model, checkpoint, self._place)
        self._note, self._advance, self._tile_memory = note, advance, tile_memory
        layers, norm, head = (f"{path}." for path in (self._family.layers, self._family.final_norm, self._family.head))
        outer = [name for name in weights.names if not name.startswith(layers)]
        self._after = [name for name in outer if all(use.startswith(head) for use in weights.names[name])]
        # kept from the embedding to the end: weights that both it and the head use, and the norm, which `_prepare` runs
        self._kept = [
            name
            for name in outer
            if name not in self._after and any(use.startswith((norm, head)) for use in weights.names[name])
        ]
        self._before = [name for name in outer if name not in self._after and name not in self._kept]
        held = weights.bytes(self._kept) + max(
            map(weights.bytes, (self._before, self._after, *self._layer_names(DENSE)))
        )
        self._set_batch_tokens(batch_tokens, held)
        self.plan: PassPlan | None = None
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
    def run(self, tasks: Sequence[Task], rows: Rows) -> Iterator[ScoredRows]:
        """Yield the values of each task, all at the end of one pass over the weights.

        Raises:
            InputError: an influence, which is not streamed.
            NonFiniteLossError: a loss is NaN or infinite; names mask and row. Values yielded before are good.
            DeviceMemoryError: the pass cannot fit into memory and disk; known before anything is read.
            StorageError: the disk has no space for the tiles.
        """
        if not tasks:
            return
        influence = next((task.metric.name for task in tasks if task.metric.influence), None)
        if influence is not None:
            raise InputError(
                f"score.metric {influence} is taken from the model in memory, it is not streamed; set "
                "runtime.streaming: false"
            )
        if any(task.wide for task in tasks):
            raise InputError(
                "score.options.near_ties is for a model in memory, it is not streamed; leave it out, or set "
                "runtime.streaming: false"
            )
        tasks = self.referenced(tasks, rows)
        plan = self.plan = self.plan_of(tasks, rows)
        for line in plan.lines():
            self._note(line)
        plan.check()
        tiles = _Tiles(plan, self._head.weight.dtype, self._place)
        free = available_memory()
        workers = 1 if self._memory is None else max(1, free // self._memory)  # of equal shares, with one page cache
        self._weights.forget = plan.weights_read > free - workers * plan.needed
        try:
            yield from self._pass(tasks, rows, tiles)
        except RuntimeError as error:
            if not accelerator.is_out_of_memory(error):
                raise
            raise DeviceMemoryError(
                f"a streamed pass ran out of the device's memory ({str(error).partition('. ')[0]}); lower "
                f"runtime.batch_tokens, now {self._batch_tokens}. Trials finished before are kept"
            ) from None
        finally:
            self._weights.drop(self._weights.names)
            self.spill_bytes_read += tiles.bytes_read
            self.spill_bytes_written += tiles.bytes_written
            tiles.close()

    def _pass(self, tasks: Sequence[Task], rows: Rows, tiles: _Tiles) -> Iterator[ScoredRows]:
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
            states = ((masks, tiles.get(slot, work.shape)) for masks, slot in work.states)
            launched = (self._launched(masks, state, work.batch, work.task, rows) for masks, state in states)
            yield from self._values(launched, work.task)

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
            works.append(_Work(task, batch, hidden.shape, layer_kwargs, [(task.masks, slot)]))
        self._weights.drop(self._before)
        return works

    def _advanced(self, layer: int, work: _Work, tiles: _Tiles) -> Iterator[tuple[Sequence[Mask], int]]:
        """The states of a task after a layer. Among those that come from one state, one takes over its slot."""
        per_layer = len(self._steps) // self.layers
        steps = self._steps[layer * per_layer : (layer + 1) * per_layer]
        for masks, slot in work.states:
            groups, ran = zip(*runs(steps, masks), strict=True)
            unchanged = not ran[0]  # the first group keeps the fewest blocks, perhaps none
            fresh = [tiles.new() for _ in groups[1:]]
            # only the last result goes over the old state, when nothing more is computed from it
            slots = [slot, *fresh] if unchanged else [*fresh, slot]
            if fresh or not unchanged:
                hidden = tiles.get(slot, work.shape)
                results = walk(steps, masks, hidden, partial(self._added, work.batch, work.layer_kwargs, 1), joined)
                for target, (_, result) in zip(slots, results, strict=True):
                    if result is not hidden:
                        tiles.put(target, result)
            yield from zip(groups, slots, strict=True)

    def _layer_names(self, removed: Mask) -> list[list[str]]:
        """For each layer the names of its weights, without those that only blocks of `removed` use."""
        result = []
        for layer in range(self.layers):
            prefix = f"{self._family.layers}.{layer}."
            gone, used = set[str](), set[str]()
            for kind in BlockKind:
                (gone if BlockId(kind, layer) in removed else used).update(self._modules(layer, kind))
            unread = tuple(gone - used)
            names = self._weights.names
            result.append([name for name in names if name.startswith(prefix) and not name.startswith(unread)])
        return result

    def _modules(self, layer: int, kind: BlockKind) -> list[str]:
        branch = self._family.branch(kind)
        return [f"{self._family.layers}.{layer}.{name}." for name in (branch.module, *branch.norms)]

    def plan_of(self, tasks: Sequence[Task], rows: Rows) -> PassPlan:
        """Plan a pass over these tasks; nothing is read."""
        shapes = [(len(task.span), max(len(rows[i]) for i in task.span)) for task in tasks]
        hidden, item = self._model.config.hidden_size, self._head.weight.element_size()
        compared = any(task.metric.reference for task in tasks)
        tokens = sum(len(rows[i]) for i in {i for task in tasks for i in task.span}) if compared else 0
        tile = aligned(max(batch * length for batch, length in shapes) * hidden * item)
        tiles = sum(len(set(task.masks)) for task in tasks)
        layers, size = self._layer_names(_removed(tasks)), self._weights.bytes
        carried = size(self._kept) + self._argument_bytes(set(shapes))
        spare = 2 * tile  # a tile on its way from or to another place
        phases = (  # weights, working memory, tiles at rest
            (size(self._before), max(map(self._embedding_bytes, shapes)), len(tasks)),
            (max(map(size, layers)), max(map(self._layer_bytes, shapes)), tiles),
            (size(self._after), max(self._loss_bytes(shape, compared) for shape in shapes), tiles),
        )
        on_device = [carried + weights + working + spare for weights, working, _ in phases]
        fixed = SCRATCH_BYTES + self._weights.staging.nbytes + spare + tokens * hidden * item  # those kept of the dense
        on_host = [fixed + (need if self._place.type == "cpu" else 0) for need in on_device]
        available = available_memory()
        available = available if self._memory is None else min(available, self._memory)
        ram_tiles = tiles if self._tile_memory is None else min(tiles, self._tile_memory // tile)
        for need, (_, _, resting) in zip(on_host, phases, strict=True):
            room = int(TILE_SHARE * max(0, available - need)) // tile
            ram_tiles = min(ram_tiles, room) if room < resting else ram_tiles
        needed = max(
            need + min(ram_tiles, resting) * tile for need, (_, _, resting) in zip(on_host, phases, strict=True)
        )
        place = tempfile.gettempdir()
        has_own = self._place.type != "cpu"
        return PassPlan(
            weights_read=self._weights.stored_bytes([*self._before, *self._kept, *self._after, *chain(*layers)]),
            weights_held=size(self._kept) + max(weights for weights, _, _ in phases),
            working=max(working for _, working, _ in phases),
            tile=tile,
            tiles=tiles,
            ram_tiles=ram_tiles,
            resident=resident_memory(),
            needed=needed,
            available=available,
            device_needed=max(on_device) if has_own else 0,
            device_available=accelerator.free_memory(self._place) if has_own else 0,
            spill_place=place,
            spill_free=0 if is_in_memory(place) else shutil.disk_usage(place).free,
            batch_tokens=self._batch_tokens,
        )

    # The next methods bound the bytes that live at once for a batch, in addition to weights and tiles at rest. Norms
    # compute in float32 at least, with three copies. States within a block are as wide as its matrices; at most three
    # such sets (MHA: with rotary halves and repeated heads) or two (MLP) exist.

    def _norm_bytes(self, shape: Shape) -> int:
        item = self._head.weight.element_size()
        return int(shape[0] * shape[1] * self._model.config.hidden_size * (2 * item + 3 * max(item, 4)))

    def _embedding_bytes(self, shape: Shape) -> int:
        return 2 * self._norm_bytes(shape)

    def _layer_bytes(self, shape: Shape) -> int:
        (batch, length), config, item = shape, self._model.config, self._head.weight.element_size()
        widths = (
            max(
                copies * sum(w.numel() for w in getattr(layer, self._family.branch(kind).module).parameters())
                for layer in self._layers
                for kind, copies in ((BlockKind.MHA, 3), (BlockKind.MLP, 2))
            )
            // config.hidden_size
        )
        states = 4 * config.hidden_size  # after the first step, what two blocks add, and the sum
        eager = config._attn_implementation == "eager"  # has every head's map, else there is at most a mask to widen
        scores = batch * length**2 * (config.num_attention_heads * 2 * (item + max(item, 4)) if eager else item)
        return int(self._norm_bytes(shape) + batch * length * (widths + states) * item + scores)

    def _loss_bytes(self, shape: Shape, compared: bool) -> int:
        vocabulary, item = self._head.weight.shape[0], self._head.weight.element_size()
        tokens = min(shape[0] * shape[1], max(1, self._logits_bytes // (vocabulary * 4)))
        wide = 7 if compared else 2  # log-probabilities of both and of their mean, and what sums are made of
        logits = wide * max(item, 4) + (item if item < 4 else 0) * (1 + compared)  # and as the head gave them
        return 2 * self._norm_bytes(shape) + tokens * vocabulary * logits

    def _argument_bytes(self, shapes: Iterable[Shape]) -> int:
        """Arguments of the layers, for distinct shapes: a mask for each kind of attention, rotary tables."""
        config, item = self._model.config, self._head.weight.element_size()
        mask = item if config._attn_implementation == "eager" else 1
        # a bias for each head is made in float32 at least, from distances in int64, then narrowed, then masked
        biases = config.num_attention_heads * (item + max(item, 4)) + 8 if self._family.alibi else 0
        return sum(
            length**2 * (2 * batch * mask + biases) + 4 * length * config.hidden_size * item for batch, length in shapes
        )


class _Distinct:
    """Returns equal tensors as one object: batches of one shape have the same masks and rotary tables."""

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
    """States at rest, in slots: the first `plan.ram_tiles` in RAM, the others in an unlinked file."""

    def __init__(self, plan: PassPlan, dtype: torch.dtype, device: torch.device) -> None:
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
        data = memory_of(hidden.cpu().contiguous())
        self.bytes_written += len(data)
        offset = self._offset(slot)
        while data:
            written = os.pwrite(self._file.fileno(), data, offset)
            data, offset = data[written:], offset + written

    def get(self, slot: int, shape: torch.Size) -> Tensor:
        """The state on the device; on a CPU the next `put` to the slot, or the next `get`, may overwrite it."""
        if slot < len(self._ram):
            return self._tensor(self._ram[slot], shape).to(self._device)
        found = self._tensor(self._arrival, shape)
        read_into(self._file.fileno(), found, self._offset(slot), "the file of tiles")
        self.bytes_read += found.nbytes
        return found.to(self._device)

    def close(self) -> None:
        self._file.close()

    def _offset(self, slot: int) -> int:
        return (slot - len(self._ram)) * self._size

    def _tensor(self, memory: Tensor, shape: torch.Size) -> Tensor:
        return memory[: shape.numel() * self._dtype.itemsize].view(self._dtype).view(shape)


def _removed(tasks: Sequence[Task]) -> Mask:
    """Blocks that every mask removes."""
    return frozenset.intersection(*(mask for task in tasks for mask in task.masks))


def _size(count: int) -> str:
    return f"{count / 2**30:.1f} GiB" if count >= 2**30 else f"{count / 2**20:.1f} MiB"
