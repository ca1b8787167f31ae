"""Scoring a model that is larger than memory: one pass over the weights for all masks, one layer held at a time.

Decides what is in memory when. The arithmetic is the engine's own (`engine.py`), so for the same batches every value
is the same to the bit. Only the order differs, breadth first instead of depth first:

    embed the rows of every task
    for each layer: read its weights; advance every distinct state (masks that agree so far share one); drop them
    for every state: norm, head, loss

The next weights, if there is room for them, and the next state are fetched meanwhile (`ahead`). A state at rest is a
tile [B, T, H]. Tiles stay on the device while there is room, then in RAM; the others go to an unlinked file in TMPDIR.
Weights are read with `preadv` into the memory they are used from, never mapped; those of blocks that every mask removes
are not read. The pass is planned in bytes before the first weight is read, and refused if it cannot fit.
"""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import closing
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
from blockpruner.scoring.large.ahead import in_turn
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
    slabs: int
    """How many layers' weights are held: of two, one is being read while the other computes."""
    working: int
    """For one state, in addition to weights and tiles."""
    tile: int
    """One state at rest."""
    tiles: int
    """The largest number of states at rest."""
    device_tiles: int
    """How many of them are in the device's own memory; 0 on a CPU."""
    ram_tiles: int
    """How many are in RAM."""
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
        return (self.tiles - self.device_tiles - self.ram_tiles) * self.tile

    @property
    def peak(self) -> int:
        """Upper bound of the process's resident memory during the pass."""
        return self.resident + self.needed

    def lines(self) -> Iterator[str]:
        held = f"{_size(self.weights_held)} held at once{' (the next layer is read ahead)' if self.slabs > 1 else ''}"
        on_device = f"{self.device_tiles} on the device, " if self.device_needed else ""
        yield (
            f"streaming: {_size(self.weights_read)} of weights read in one pass, {held}, {_size(self.working)} to work "
            f"in; {self.tiles} states of {_size(self.tile)}, {on_device}{self.ram_tiles} in memory and "
            f"{self.tiles - self.device_tiles - self.ram_tiles} on disk"
        )
        device = f", device {_size(self.device_needed)} of {_size(self.device_available)}" if self.device_needed else ""
        yield (
            f"streaming: memory at most {_size(self.peak)}, {_size(self.resident)} of it in use already "
            f"({_size(self.needed)} of {_size(self.available)} available){device}, disk {_size(self.spill)} of "
            f"{_size(self.spill_free)} free in {self.spill_place}"
        )

    @property
    def short(self) -> list[str]:
        """What the pass cannot have."""
        return [
            f"{_size(needed)} of {what}, and {_size(there)} are free"
            for what, needed, there in (
                ("memory", self.needed, self.available),
                ("the device's memory", self.device_needed, self.device_available),
                (f"disk in {self.spill_place}", self.spill, self.spill_free),
            )
            if needed > there
        ]

    def check(self) -> None:
        """Raise DeviceMemoryError if the pass cannot fit."""
        if self.short:
            raise DeviceMemoryError(
                f"a streamed pass needs {'; '.join(self.short)} (weights at once {_size(self.weights_held)}, working "
                f"set {_size(self.working)}, {self.tiles} states of {_size(self.tile)}). Lower runtime.batch_tokens "
                f"(now {self.batch_tokens}), calibration.num_samples or calibration.seq_len, set "
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
        slabs: how many layers' weights are in memory at most; of two, one is read while the other computes.

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
        slabs: int = 2,
    ) -> None:
        if sys.platform != "linux":
            raise InputError("runtime.streaming: true needs Linux, where the free memory can be known; set it to false")
        self._memory, self._slabs = memory, slabs
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
        self._set_batch_tokens(batch_tokens, self._held(self._groups(DENSE), slabs))
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
        free = available_memory()
        workers = 1 if self._memory is None else max(1, free // self._memory)  # of equal shares, with one page cache
        self._weights.forget = plan.weights_read > free - workers * plan.needed
        try:
            with closing(_Tiles(plan, self._head.weight.dtype, self._place)) as tiles:
                yield from self._pass(tasks, rows, tiles)
                self.spill_bytes_read += tiles.bytes_read
                self.spill_bytes_written += tiles.bytes_written
        except RuntimeError as error:
            if not accelerator.is_out_of_memory(error):
                raise
            raise DeviceMemoryError(
                f"a streamed pass ran out of the device's memory ({str(error).partition('. ')[0]}); lower "
                f"runtime.batch_tokens, now {self._batch_tokens}. Trials finished before are kept"
            ) from None
        finally:
            self._weights.drop(self._weights.names)

    def _pass(self, tasks: Sequence[Task], rows: Rows, tiles: _Tiles) -> Iterator[ScoredRows]:
        assert self.plan is not None
        self._weights.load(self._kept)
        with closing(self._weights.in_turn(self._groups(_removed(tasks)), self.plan.slabs)) as weights:
            next(weights)
            works = self._embedded(tasks, rows, tiles)
            for layer in range(self.layers):
                next(weights)
                for work in works:
                    work.states = list(self._advanced(layer, work, tiles))
                self._advance(layer + 1, self.layers, f"layer {layer}")
            next(weights)
            for work in works:
                all_masks, slots = zip(*work.states, strict=True)
                with closing(tiles.in_turn(slots, work.shape)) as states:
                    launched = (
                        self._launched(masks, state, work.batch, work.task, rows)
                        for masks, state in zip(all_masks, states, strict=True)
                    )
                    yield from self._values(launched, work.task)

    def _embedded(self, tasks: Sequence[Task], rows: Rows, tiles: _Tiles) -> list[_Work]:
        works, distinct = [], _Distinct()
        for task in tasks:
            batch = self._batch([rows[i] for i in task.span])
            hidden, layer_kwargs = self._prepare(batch.input_ids)
            slot = tiles.new()
            tiles.put(slot, hidden)
            layer_kwargs = tuple(map_tensors(kwargs, distinct) for kwargs in layer_kwargs)
            works.append(_Work(task, batch, hidden.shape, layer_kwargs, [(task.masks, slot)]))
        return works

    def _advanced(self, layer: int, work: _Work, tiles: _Tiles) -> Iterator[tuple[Sequence[Mask], int]]:
        """The states of a task after a layer. Among those that come from one state, one takes over its slot."""
        per_layer = len(self._steps) // self.layers
        steps = self._steps[layer * per_layer : (layer + 1) * per_layer]
        # of each state the groups of masks that leave it; the first one keeps the fewest blocks, perhaps none
        branches = [(masks, slot, list(runs(steps, masks))) for masks, slot in work.states]
        used = [slot for _, slot, ((_, ran), *others) in branches if ran or others]
        with closing(tiles.in_turn(used, work.shape)) as states:
            for masks, slot, groups in branches:
                fresh = [tiles.new() for _ in groups[1:]]
                # only the last result goes over the old state, when nothing more is computed from it
                slots = [*fresh, slot] if groups[0][1] else [slot, *fresh]
                if slot in used:
                    hidden = next(states)
                    results = walk(steps, masks, hidden, partial(self._added, work.batch, work.layer_kwargs, 1), joined)
                    for target, (_, result) in zip(slots, results, strict=True):
                        if result is not hidden:
                            tiles.put(target, result)
                yield from ((group, target) for (group, _), target in zip(groups, slots, strict=True))

    def _groups(self, removed: Mask) -> list[list[str]]:
        """The names of the weights that are in memory in turn: for the embedding, for each layer without those that
        only blocks of `removed` use, and for the head."""
        result = [self._before]
        for layer in range(self.layers):
            prefix = f"{self._family.layers}.{layer}."
            gone, used = set[str](), set[str]()
            for kind in BlockKind:
                (gone if BlockId(kind, layer) in removed else used).update(self._modules(layer, kind))
            unread = tuple(gone - used)
            names = self._weights.names
            result.append([name for name in names if name.startswith(prefix) and not name.startswith(unread)])
        return [*result, self._after]

    def _held(self, groups: Sequence[Sequence[str]], slabs: int) -> int:
        """Bytes of weights at once."""
        return self._weights.bytes(self._kept) + slabs * max(map(self._weights.bytes, groups))

    def _modules(self, layer: int, kind: BlockKind) -> list[str]:
        branch = self._family.branch(kind)
        return [f"{self._family.layers}.{layer}.{name}." for name in (branch.module, *branch.norms)]

    def plan_of(self, tasks: Sequence[Task], rows: Rows) -> PassPlan:
        """Plan a pass over these tasks; nothing is read.

        Weights are read ahead where that sends no tile to the disk.
        """
        *ahead, least = (self._plan(tasks, rows, slabs) for slabs in range(self._slabs, 0, -1))
        return next((plan for plan in ahead if not plan.short and plan.spill <= least.spill), least)

    def _plan(self, tasks: Sequence[Task], rows: Rows, slabs: int) -> PassPlan:
        shapes = [(len(task.span), max(len(rows[i]) for i in task.span)) for task in tasks]
        hidden, item = self._model.config.hidden_size, self._head.weight.element_size()
        compared = any(task.metric.reference for task in tasks)
        tokens = sum(len(rows[i]) for i in {i for task in tasks for i in task.span}) if compared else 0
        tile = aligned(max(batch * length for batch, length in shapes) * hidden * item)
        tiles = sum(len(set(task.masks)) for task in tasks)
        groups, has_own = self._groups(_removed(tasks)), self._place.type != "cpu"
        working = max(
            max(self._embedding_bytes(shape), self._layer_bytes(shape), self._loss_bytes(shape, compared))
            for shape in shapes
        )
        spare = 2 * tile  # a tile on its way from or to another place
        weights_held = self._held(groups, slabs)
        at_once = weights_held + self._argument_bytes(set(shapes)) + working + spare
        fixed = SCRATCH_BYTES + self._weights.staging.nbytes + spare + tokens * hidden * item  # those kept of the dense
        on_device, on_host = (at_once, fixed) if has_own else (0, fixed + at_once)
        device_available, available = accelerator.free_memory(self._place) if has_own else 0, available_memory()
        available = available if self._memory is None else min(available, self._memory)

        def fitting(left: int, room: int) -> int:
            return min(left, int(TILE_SHARE * max(0, room)) // tile)

        device_tiles = fitting(tiles, device_available - on_device)
        ram_tiles = fitting(tiles - device_tiles, available - on_host)
        if self._tile_memory is not None:
            ram_tiles = min(ram_tiles, self._tile_memory // tile)
        place = tempfile.gettempdir()
        return PassPlan(
            weights_read=self._weights.stored_bytes([*self._kept, *chain(*groups)]),
            weights_held=weights_held,
            slabs=slabs,
            working=working,
            tile=tile,
            tiles=tiles,
            device_tiles=device_tiles,
            ram_tiles=ram_tiles,
            resident=resident_memory(),
            needed=on_host + ram_tiles * tile,
            available=available,
            device_needed=on_device + device_tiles * tile,
            device_available=device_available,
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
    """States at rest, in slots: the first ones on the device, the next in RAM, the others in an unlinked file."""

    def __init__(self, plan: PassPlan, dtype: torch.dtype, device: torch.device) -> None:
        self._size, self._dtype, self._device, self._used = plan.tile, dtype, device, 0
        own = [torch.empty(plan.tile, dtype=torch.uint8, device=device) for _ in range(plan.device_tiles)]
        self._ram = torch.empty(plan.ram_tiles, plan.tile, dtype=torch.uint8)
        self._held = [*own, *self._ram]
        self._at_home = len(own) if device.type != "cpu" else plan.ram_tiles
        away = plan.tile if self._at_home < plan.tiles else 0
        self._arrivals = [torch.empty(away, dtype=torch.uint8, device=device) for _ in range(2)]
        self._from_disk = torch.empty(plan.tile if plan.spill and device.type != "cpu" else 0, dtype=torch.uint8)
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
        accelerator.pin(self._ram, device)

    def new(self) -> int:
        self._used += 1
        return self._used - 1

    def put(self, slot: int, hidden: Tensor) -> None:
        if slot < len(self._held):
            self._tensor(self._held[slot], hidden.shape).copy_(hidden, non_blocking=True)
            return
        data = memory_of(hidden.cpu().contiguous())
        self.bytes_written += len(data)
        offset = self._offset(slot)
        while data:
            written = os.pwrite(self._file.fileno(), data, offset)
            data, offset = data[written:], offset + written

    def in_turn(self, slots: Sequence[int], shape: torch.Size) -> Generator[Tensor]:
        """The states of slots on the device, one after another; the next one is on its way while one is in use. A `put`
        to its own slot may overwrite a state."""
        return in_turn(self._device, slots, self._arrivals, partial(self._get, shape))

    def _get(self, shape: torch.Size, slot: int, arrival: Tensor) -> Tensor:
        if slot < self._at_home:
            return self._tensor(self._held[slot], shape)
        target = self._tensor(arrival, shape)
        if slot < len(self._held):
            return target.copy_(self._tensor(self._held[slot], shape), non_blocking=True)
        found = target if self._device.type == "cpu" else self._tensor(self._from_disk, shape)
        read_into(self._file.fileno(), found, self._offset(slot), "the file of tiles")
        self.bytes_read += found.nbytes
        return target if found is target else target.copy_(found)

    def close(self) -> None:
        accelerator.unpin(self._ram, self._device)
        self._file.close()

    def _offset(self, slot: int) -> int:
        return (slot - len(self._held)) * self._size

    def _tensor(self, memory: Tensor, shape: torch.Size) -> Tensor:
        return memory[: shape.numel() * self._dtype.itemsize].view(self._dtype).view(shape)


def _removed(tasks: Sequence[Task]) -> Mask:
    """Blocks that every mask removes."""
    return frozenset.intersection(*(mask for task in tasks for mask in task.masks))


def _size(count: int) -> str:
    return f"{count / 2**30:.1f} GiB" if count >= 2**30 else f"{count / 2**20:.1f} MiB"
