"""Scoring a model that is larger than memory: one pass over the weights for all masks, one layer
held at a time.

Decides what is in memory when. The arithmetic is the engine's (`engine.py`), so for the same
batches every value is the same to the bit. Only the order differs, breadth first instead of depth
first:

    embed the rows of every task
    for each layer: read its weights; advance every distinct state (masks that agree so far share
    one); drop them
    for every state: norm, head, loss

The next weights and the next state are fetched meanwhile (`ahead`). A state at rest is a tile [B,
T, H]. Tiles take at most half of the free memory, of the device and then of RAM. Where there are
too many, some masks wait for another pass: that reads all weights once more, but a disk would have
to write and read every tile in every layer. Weights are read with `preadv` into the memory they are
used from, never mapped; those of blocks that every mask removes are not read. Where a batch does
not fit, it is halved.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from blockpruner.core.blocks import DENSE, BlockId, BlockKind, Mask
from blockpruner.core.errors import DeviceMemoryError, InputError
from blockpruner.model import accelerator
from blockpruner.model.models import resolve_device
from blockpruner.scoring.batches import Batch
from blockpruner.scoring.engine import Engine
from blockpruner.scoring.forward import LayerKwargs, joined, map_tensors
from blockpruner.scoring.large.ahead import in_turn
from blockpruner.scoring.large.memory import available_memory
from blockpruner.scoring.large.sharing import unfinished
from blockpruner.scoring.large.weights import SLABS, Weights, aligned, skeleton
from blockpruner.scoring.walk import runs, walk
from blockpruner.scoring.work import Rows, ScoredRows, Task


@dataclass(frozen=True)
class PassPlan:
    """Where the states of one pass are kept; made before anything is read."""

    weights_held: int
    """Bytes at most at once, in the dtype of scoring."""
    weights_room: int
    """What they may take: half of the free memory of the device that computes."""
    tile: int
    """One state at rest."""
    tiles: int
    """The largest number of states at rest."""
    device_room: int
    """How many of them the device's own memory can hold; 0 on a CPU."""
    ram_room: int
    """How many RAM can hold."""


@dataclass
class _Work:
    """A task under way."""

    task: Task
    batch: Batch
    shape: torch.Size
    layer_kwargs: LayerKwargs
    states: list[tuple[Sequence[Mask], int]]
    """The distinct states: the masks that share one, and the slot of its tile."""


class StreamingEngine(Engine):
    """Scores masks of a checkpoint that need not fit into memory, exactly; its files are
    safetensors.

    Args:
        dtype, device, attention, trust_remote_code: as in `models.load_model`, on one device.
        batch_tokens: as in `Engine`; a pass reads the weights once for all batches.
        advance: receives the layers done, their number, and the name of the layer.
        memory: bytes of main memory that count as free, at most; None counts all that are.
    """

    _streaming_fix = ""

    def __init__(
        self,
        checkpoint: Path,
        dtype: str,
        *,
        device: str = "auto",
        batch_tokens: int | str = "auto",
        attention: str = "auto",
        trust_remote_code: bool = False,
        advance: Callable[[int, int, str], object] = lambda done, total, detail: None,
        memory: int | None = None,
    ) -> None:
        if sys.platform != "linux":
            raise InputError(
                "runtime.streaming: true needs Linux, where the free memory can be known; set it to"
                " false"
            )
        self._memory = memory
        self._target = resolve_device(device)
        model = skeleton(checkpoint, dtype, self._target, attention, trust_remote_code)
        super().__init__(model, 1)
        self._weights = Weights(model, checkpoint, self._target)
        self._advance = advance
        self._sort_outer_weights()
        # Half of the device's memory is for states.
        reserved = self._peak_bytes(self._groups(DENSE))
        if self._on_gpu:
            reserved += accelerator.total_memory(self._target) // 2
        self._set_batch_tokens(batch_tokens, reserved)

    def _sort_outer_weights(self) -> None:
        """Sort the weights outside of the layers by when they are in memory."""
        family = self.family
        layers = f"{family.layers}."
        norm = f"{family.final_norm}."
        head = f"{family.head}."
        self._embedding_weights: list[str] = []
        self._head_weights: list[str] = []
        self._resident_weights: list[str] = []
        for name, uses in self._weights.names.items():
            if name.startswith(layers):
                continue
            if all(use.startswith(head) for use in uses):
                self._head_weights.append(name)
            elif any(use.startswith((norm, head)) for use in uses):
                # The norm, which `prepare` runs, and weights that embedding and head share.
                self._resident_weights.append(name)
            else:
                self._embedding_weights.append(name)

    @property
    def home(self) -> torch.device:
        return self._target

    def device_of(self, layer: int) -> torch.device:
        return self._target

    def close(self) -> None:
        self._weights.close()

    @torch.inference_mode()
    def run(self, tasks: Sequence[Task], rows: Rows) -> Iterator[ScoredRows]:
        """Yield the values of each task, all at the end of a pass over the weights.

        If a batch does not fit into the device's memory, the unfinished tasks are done in another
        pass, in smaller batches. Raises what `Engine.run` raises, and InputError for an influence,
        which is not streamed.
        """
        for task in tasks:
            if task.metric.influence:
                raise InputError(
                    f"score.metric {task.metric.name} is taken from the model in memory, it is not"
                    " streamed; set runtime.streaming: false"
                )
        finished: list[ScoredRows] = []
        while tasks:
            reason = ""
            try:
                for group in self._passes(self.referenced(tasks, rows), rows):
                    with closing(self._pass(group, rows)) as values:
                        for scored in values:
                            finished.append(scored)
                            yield scored
            except RuntimeError as error:
                if not accelerator.is_out_of_memory(error):
                    raise
                reason = str(error).partition(". ")[0]
            finally:
                self._weights.drop(self._weights.names)
            if not reason:
                return
            tasks = unfinished(tasks, finished)
            largest = max(tasks, key=lambda task: len(task.span))
            # This halves the batch budget; all tasks are then cut by it.
            self._halved(largest, rows, reason)
            tasks = self._in_batches(tasks, rows)

    def _passes(self, tasks: Sequence[Task], rows: Rows) -> Iterator[list[Task]]:
        """The tasks in groups whose states fit into memory at once; masks that share prefixes stay
        together."""
        plan = self.plan_of(tasks, rows)
        if plan.weights_held > plan.weights_room:
            raise DeviceMemoryError(
                f"two layers' weights take {_size(plan.weights_held)}, and half of the free memory"
                f" is {_size(plan.weights_room)}; free some, or choose another runtime.device."
                " Nothing was read"
            )
        capacity = plan.device_room + plan.ram_room
        if capacity == 0:
            raise DeviceMemoryError(
                f"a state takes {_size(plan.tile)}, which half of the free memory does not hold;"
                " free some, or lower runtime.batch_tokens. Nothing was read"
            )
        group: list[Task] = []
        free = capacity
        for task in tasks:
            # In the order of the walk, masks that share prefixes are neighbours.
            masks: list[Mask] = []
            for agreeing_masks, _ in runs(self.steps, task.masks):
                masks += agreeing_masks
            while masks:
                fitting = tuple(masks[:free])
                group.append(replace(task, masks=fitting))
                masks = masks[free:]
                free -= len(fitting)
                if free == 0:
                    yield group
                    group = []
                    free = capacity
        if group:
            yield group

    def _pass(self, tasks: Sequence[Task], rows: Rows) -> Generator[ScoredRows]:
        tiles = _Tiles(self.plan_of(tasks, rows), self.head.weight.dtype, self._target)
        self._weights.load(self._resident_weights)
        groups = self._groups(_removed_by_all(tasks))
        # Each `next` brings the next group into memory: embedding, every layer, head.
        with closing(self._weights.in_turn(groups)) as weights:
            next(weights)
            works = self._embedded(tasks, rows, tiles)
            for layer in range(len(self.layers)):
                next(weights)
                for work in works:
                    work.states = list(self._advanced(layer, work, tiles))
                self._advance(layer + 1, len(self.layers), f"layer {layer}")
            next(weights)
            for work in works:
                mask_groups, slots = zip(*work.states, strict=True)
                with closing(tiles.in_turn(slots, work.shape)) as states:
                    launched = (
                        self._start_losses(masks, state, work.batch, work.task, rows)
                        for masks, state in zip(mask_groups, states, strict=True)
                    )
                    yield from self._values(launched, work.task)

    def _embedded(self, tasks: Sequence[Task], rows: Rows, tiles: _Tiles) -> list[_Work]:
        works = []
        share_equal = partial(_distinct, list[Tensor]())
        for task in tasks:
            batch_rows = [rows[row] for row in task.span]
            batch = Batch.of(batch_rows, self.home)
            hidden, layer_kwargs = self.prepare(batch.input_ids)
            layer_kwargs = tuple(map_tensors(kwargs, share_equal) for kwargs in layer_kwargs)
            slot = tiles.new()
            tiles.put(slot, hidden)
            works.append(_Work(task, batch, hidden.shape, layer_kwargs, [(task.masks, slot)]))
        return works

    def _advanced(
        self, layer: int, work: _Work, tiles: _Tiles
    ) -> Iterator[tuple[Sequence[Mask], int]]:
        """The states of a task after a layer. Among those that come from one state, one takes over
        its slot."""
        steps = self.steps_of_layer(layer)
        # The groups of masks that leave each state. Group 0 keeps the fewest blocks, perhaps none.
        branches = [(masks, slot, list(runs(steps, masks))) for masks, slot in work.states]
        read_slots = []
        for _, slot, groups in branches:
            if len(groups) > 1 or groups[0][1]:
                read_slots.append(slot)
        with closing(tiles.in_turn(read_slots, work.shape)) as states:
            for masks, slot, groups in branches:
                new_slots = [tiles.new() for _ in groups[1:]]
                # Only the last result may overwrite the state, as nothing more is computed from it.
                # A group without any block leaves it as it is.
                targets = [*new_slots, slot] if groups[0][1] else [slot, *new_slots]
                if slot in read_slots:
                    hidden = next(states)
                    run = partial(self._added, work.batch, work.layer_kwargs, 1)
                    results = walk(steps, masks, hidden, run, joined)
                    for target, (_, result) in zip(targets, results, strict=True):
                        if result is not hidden:
                            tiles.put(target, result)
                for target, (group, _) in zip(targets, groups, strict=True):
                    yield group, target

    def _groups(self, removed: Mask) -> list[list[str]]:
        """The names of the weights that are in memory in turn: for the embedding, for each layer
        without those that only blocks of `removed` use, and for the head."""
        groups = [self._embedding_weights]
        for layer in range(len(self.layers)):
            prefix = f"{self.family.layers}.{layer}."
            unread = set[str]()
            read = set[str]()
            for kind in BlockKind:
                branch = self.family.branch(kind)
                modules = unread if BlockId(kind, layer) in removed else read
                modules.update(f"{prefix}{name}." for name in (*branch.modules, *branch.norms))
            excluded = tuple(unread - read)
            names = [name for name in self._weights.names if name.startswith(prefix)]
            groups.append([name for name in names if not name.startswith(excluded)])
        return [*groups, self._head_weights]

    def _peak_bytes(self, groups: Sequence[Sequence[str]]) -> int:
        """The most bytes of weights that are in memory at once."""
        largest = max(self._weights.bytes(names) for names in groups)
        return self._weights.bytes(self._resident_weights) + SLABS * largest

    def plan_of(self, tasks: Sequence[Task], rows: Rows) -> PassPlan:
        """Plan a pass over these tasks; nothing is read.

        States may take half of what is free, of a device's memory and of RAM. The other half is for
        weights and for what a batch works in.
        """
        padded_tokens = 0
        for task in tasks:
            longest = max(len(rows[row]) for row in task.span)
            padded_tokens = max(padded_tokens, len(task.span) * longest)
        itemsize = self.head.weight.element_size()
        tile = aligned(padded_tokens * self.model.config.hidden_size * itemsize)
        ram = available_memory()
        if self._memory is not None:
            ram = min(self._memory, ram)
        device = accelerator.free_memory(self._target) if self._on_gpu else 0
        groups = self._groups(_removed_by_all(tasks))
        return PassPlan(
            weights_held=self._peak_bytes(groups),
            weights_room=(device or ram) // 2,
            tile=tile,
            tiles=sum(len(set(task.masks)) for task in tasks),
            device_room=device // 2 // tile,
            ram_room=ram // 2 // tile,
        )


def _distinct(seen_tensors: list[Tensor], tensor: Tensor) -> Tensor:
    """An equal tensor that came earlier, or this one: batches of one shape have the same masks and
    rotary tables."""
    for other in seen_tensors:
        if other is tensor:
            return other
        if other.dtype == tensor.dtype and torch.equal(other, tensor):
            return other
    seen_tensors.append(tensor)
    return tensor


class _Tiles:
    """States at rest, in slots: those of low number on the device, the others in RAM."""

    def __init__(self, plan: PassPlan, dtype: torch.dtype, device: torch.device) -> None:
        self._dtype = dtype
        self._device = device
        self._used = 0
        on_device = min(plan.tiles, plan.device_room)
        self._memory = [
            torch.empty(plan.tile, dtype=torch.uint8, device=device) for _ in range(on_device)
        ]
        self._memory += torch.empty(plan.tiles - on_device, plan.tile, dtype=torch.uint8)
        self._resident = plan.tiles if device.type == "cpu" else on_device
        """The number of slots that are used from where they are."""
        arrival = plan.tile if self._resident < plan.tiles else 0
        self._arrivals = [torch.empty(arrival, dtype=torch.uint8, device=device) for _ in range(2)]

    def new(self) -> int:
        self._used += 1
        return self._used - 1

    def put(self, slot: int, hidden: Tensor) -> None:
        tile = self._tensor(self._memory[slot], hidden.shape)
        tile.copy_(hidden, non_blocking=True)

    def in_turn(self, slots: Sequence[int], shape: torch.Size) -> Generator[Tensor]:
        """The states of slots on the device, one after another; the next one is on its way while
        one is in use. A `put` to its slot may overwrite a state."""
        return in_turn(self._device, slots, self._arrivals, partial(self._get, shape))

    def _get(self, shape: torch.Size, slot: int, arrival: Tensor) -> Tensor:
        state = self._tensor(self._memory[slot], shape)
        if slot < self._resident:
            return state
        arrived = self._tensor(arrival, shape)
        return arrived.copy_(state, non_blocking=True)

    def _tensor(self, memory: Tensor, shape: torch.Size) -> Tensor:
        size = shape.numel() * self._dtype.itemsize
        return memory[:size].view(self._dtype).view(shape)


def _removed_by_all(tasks: Sequence[Task]) -> Mask:
    return frozenset.intersection(*(mask for task in tasks for mask in task.masks))


def _size(count: int) -> str:
    if count >= 2**30:
        return f"{count / 2**30:.1f} GiB"
    return f"{count / 2**20:.1f} MiB"
