"""Scoring a model that is larger than memory: one pass over the weights for all masks, one layer
held at a time.

Decides what is in memory when. The arithmetic is the engine's own (`engine.py`), so for the same
batches every value is the same to the bit. Only the order differs, breadth first instead of depth
first:

    embed the rows of every task for each layer: read its weights; advance every distinct state
    (masks that agree so far share one); drop them for every state: norm, head, loss

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
    """The distinct states, each as the masks that share it and the slot of its tile."""


class StreamingEngine(Engine):
    """Scores masks of a checkpoint that need not fit into memory, exactly; its files are
    safetensors.

    Args:
        dtype, device, attention, trust_remote_code: as in `models.load_model`, on one device.
        batch_tokens: as in `Engine`; a pass reads the weights once for all batches.
        advance: receives the layers done, their number, and the last one's name.
        memory: bytes of main memory that count as free, at most; None counts all that are.
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
        advance: Callable[[int, int, str], object] = lambda done, total, detail: None,
        memory: int | None = None,
    ) -> None:
        if sys.platform != "linux":
            raise InputError(
                "runtime.streaming: true needs Linux, where the free memory can be known; set it to"
                " false"
            )
        self._memory, self._place = memory, resolve_device(device)
        model = skeleton(checkpoint, dtype, self._place, attention, trust_remote_code)
        super().__init__(model, 1)
        self._weights = weights = Weights(model, checkpoint, self._place)
        self._advance = advance
        layers, norm, head = (
            f"{path}." for path in (self._family.layers, self._family.final_norm, self._family.head)
        )
        outer = [name for name in weights.names if not name.startswith(layers)]
        self._after = [
            name for name in outer if all(use.startswith(head) for use in weights.names[name])
        ]
        # kept from the embedding to the end: weights that both it and the head use, and the norm,
        # which `_prepare` runs
        rest = [name for name in outer if name not in self._after]
        self._kept = [
            name
            for name in rest
            if any(use.startswith((norm, head)) for use in weights.names[name])
        ]
        self._before = [name for name in rest if name not in self._kept]
        half = accelerator.total_memory(self._place) // 2 if self._on_gpu else 0  # for states
        self._set_batch_tokens(batch_tokens, self._held(self._groups(DENSE)) + half)

    _streaming_fix = ""

    @property
    def _home(self) -> torch.device:
        return self._place

    def _device(self, layer: int) -> torch.device:
        return self._place

    def close(self) -> None:
        self._weights.close()

    @torch.inference_mode()
    def run(self, tasks: Sequence[Task], rows: Rows) -> Iterator[ScoredRows]:
        """Yield the values of each task, all at the end of a pass over the weights.

        If a batch does not fit into the device's memory, what is left is done in another pass, in
        smaller batches. Raises what `Engine.run` raises, and InputError for an influence, which is
        not streamed.
        """
        influence = next((task.metric.name for task in tasks if task.metric.influence), None)
        if influence is not None:
            raise InputError(
                f"score.metric {influence} is taken from the model in memory, it is not streamed;"
                " set runtime.streaming: false"
            )
        known: list[ScoredRows] = []
        while tasks:
            reason = ""
            try:
                for part in self._passes(self.referenced(tasks, rows), rows):
                    with closing(self._pass(part, rows)) as found:
                        for scored in found:
                            known.append(scored)
                            yield scored
            except RuntimeError as error:
                if not accelerator.is_out_of_memory(error):
                    raise
                reason = str(error).partition(". ")[0]
            finally:
                self._weights.drop(self._weights.names)
            tasks = unfinished(tasks, known) if reason else []
            if reason:
                self._halved(max(tasks, key=lambda task: len(task.span)), rows, reason)
                tasks = [part for task in tasks for part in self._in_batches(task, rows)]

    def _passes(self, tasks: Sequence[Task], rows: Rows) -> Iterator[list[Task]]:
        """The tasks in parts whose states fit into memory at once; masks that share prefixes stay
        together."""
        plan = self.plan_of(tasks, rows)
        if plan.weights_held > plan.weights_room:
            raise DeviceMemoryError(
                f"two layers' weights take {_size(plan.weights_held)}, and half of the free memory"
                f" is {_size(plan.weights_room)}; free some, or choose another runtime.device."
                " Nothing was read"
            )
        room = plan.device_room + plan.ram_room
        if room == 0:
            raise DeviceMemoryError(
                f"a state takes {_size(plan.tile)}, which half of the free memory does not hold;"
                " free some, or lower runtime.batch_tokens. Nothing was read"
            )
        part: list[Task] = []
        left = room
        for task in tasks:
            masks = [mask for group, _ in runs(self.steps, task.masks) for mask in group]
            while masks:
                part.append(replace(task, masks=tuple(masks[:left])))
                masks, left = masks[left:], left - len(part[-1].masks)
                if not left:
                    yield part
                    part, left = [], room
        if part:
            yield part

    def _pass(self, tasks: Sequence[Task], rows: Rows) -> Generator[ScoredRows]:
        tiles = _Tiles(self.plan_of(tasks, rows), self._head.weight.dtype, self._place)
        self._weights.load(self._kept)
        with closing(self._weights.in_turn(self._groups(_removed(tasks)))) as weights:
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
        works, distinct = [], partial(_distinct, list[Tensor]())
        for task in tasks:
            batch = Batch.of([rows[i] for i in task.span], self._home)
            hidden, layer_kwargs = self._prepare(batch.input_ids)
            slot = tiles.new()
            tiles.put(slot, hidden)
            layer_kwargs = tuple(map_tensors(kwargs, distinct) for kwargs in layer_kwargs)
            works.append(_Work(task, batch, hidden.shape, layer_kwargs, [(task.masks, slot)]))
        return works

    def _advanced(
        self, layer: int, work: _Work, tiles: _Tiles
    ) -> Iterator[tuple[Sequence[Mask], int]]:
        """The states of a task after a layer. Among those that come from one state, one takes over
        its slot."""
        steps = [step for step in self.steps if step[0].layer == layer]
        # of each state the groups of masks that leave it; the first one keeps the fewest blocks,
        # perhaps none
        branches = [(masks, slot, list(runs(steps, masks))) for masks, slot in work.states]
        used = [slot for _, slot, ((_, ran), *others) in branches if ran or others]
        with closing(tiles.in_turn(used, work.shape)) as states:
            for masks, slot, groups in branches:
                fresh = [tiles.new() for _ in groups[1:]]
                # only the last result goes over the old state, when nothing more is computed from
                # it
                slots = [*fresh, slot] if groups[0][1] else [slot, *fresh]
                if slot in used:
                    hidden = next(states)
                    results = walk(
                        steps,
                        masks,
                        hidden,
                        partial(self._added, work.batch, work.layer_kwargs, 1),
                        joined,
                    )
                    for target, (_, result) in zip(slots, results, strict=True):
                        if result is not hidden:
                            tiles.put(target, result)
                yield from (
                    (group, target) for (group, _), target in zip(groups, slots, strict=True)
                )

    def _groups(self, removed: Mask) -> list[list[str]]:
        """The names of the weights that are in memory in turn: for the embedding, for each layer
        without those that only blocks of `removed` use, and for the head."""
        result = [self._before]
        for layer in range(self.layers):
            prefix = f"{self._family.layers}.{layer}."
            gone, used = set[str](), set[str]()
            for kind in BlockKind:
                branch = self._family.branch(kind)
                modules = (f"{prefix}{name}." for name in (*branch.modules, *branch.norms))
                (gone if BlockId(kind, layer) in removed else used).update(modules)
            unread = tuple(gone - used)
            names = self._weights.names
            result.append(
                [name for name in names if name.startswith(prefix) and not name.startswith(unread)]
            )
        return [*result, self._after]

    def _held(self, groups: Sequence[Sequence[str]]) -> int:
        """Bytes of weights at once."""
        return self._weights.bytes(self._kept) + SLABS * max(map(self._weights.bytes, groups))

    def plan_of(self, tasks: Sequence[Task], rows: Rows) -> PassPlan:
        """Plan a pass over these tasks; nothing is read. States may take half of what is free, of a
        device's memory and of RAM. The other half is for weights and for what a batch works in."""
        shapes = [(len(task.span), max(len(rows[i]) for i in task.span)) for task in tasks]
        hidden, item = self._model.config.hidden_size, self._head.weight.element_size()
        tile = aligned(max(batch * length for batch, length in shapes) * hidden * item)
        tiles = sum(len(set(task.masks)) for task in tasks)
        host = available_memory() if self._memory is None else min(self._memory, available_memory())
        own = accelerator.free_memory(self._place) if self._on_gpu else 0
        held, room = self._held(self._groups(_removed(tasks))), (own or host) // 2
        return PassPlan(
            held, room, tile, tiles, device_room=own // 2 // tile, ram_room=host // 2 // tile
        )


def _distinct(seen: list[Tensor], tensor: Tensor) -> Tensor:
    """An equal tensor that was seen, or this one: batches of one shape have the same masks and
    rotary tables."""
    for other in seen:
        if other is tensor or (other.dtype == tensor.dtype and torch.equal(other, tensor)):
            return other
    seen.append(tensor)
    return tensor


class _Tiles:
    """States at rest, in slots: the first ones on the device, the others in RAM."""

    def __init__(self, plan: PassPlan, dtype: torch.dtype, device: torch.device) -> None:
        self._dtype, self._device, self._used = dtype, device, 0
        on_device = min(plan.tiles, plan.device_room)
        own = [torch.empty(plan.tile, dtype=torch.uint8, device=device) for _ in range(on_device)]
        self._held = [*own, *torch.empty(plan.tiles - on_device, plan.tile, dtype=torch.uint8)]
        self._at_home = on_device if device.type != "cpu" else plan.tiles
        away = plan.tile if self._at_home < plan.tiles else 0
        self._arrivals = [torch.empty(away, dtype=torch.uint8, device=device) for _ in range(2)]

    def new(self) -> int:
        self._used += 1
        return self._used - 1

    def put(self, slot: int, hidden: Tensor) -> None:
        self._tensor(self._held[slot], hidden.shape).copy_(hidden, non_blocking=True)

    def in_turn(self, slots: Sequence[int], shape: torch.Size) -> Generator[Tensor]:
        """The states of slots on the device, one after another; the next one is on its way while
        one is in use. A `put` to its own slot may overwrite a state."""
        return in_turn(self._device, slots, self._arrivals, partial(self._get, shape))

    def _get(self, shape: torch.Size, slot: int, arrival: Tensor) -> Tensor:
        held = self._tensor(self._held[slot], shape)
        return (
            held
            if slot < self._at_home
            else self._tensor(arrival, shape).copy_(held, non_blocking=True)
        )

    def _tensor(self, memory: Tensor, shape: torch.Size) -> Tensor:
        return memory[: shape.numel() * self._dtype.itemsize].view(self._dtype).view(shape)


def _removed(tasks: Sequence[Task]) -> Mask:
    """Blocks that every mask removes."""
    return frozenset.intersection(*(mask for task in tasks for mask in task.masks))


def _size(count: int) -> str:
    return f"{count / 2**30:.1f} GiB" if count >= 2**30 else f"{count / 2**20:.1f} MiB"
