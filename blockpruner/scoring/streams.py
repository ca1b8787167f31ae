"""The residual streams of the dense and of pruned models over the same rows, moved on together,
stop by stop.

Decides where they are compared, and what a kept block reads and writes there. All run on one copy
of the model: the dense stream passes a block before the block's weights change, and the new weights
are then put aside. Pruned models are one stream, with one stream, up to the first difference of
their cuts. So the dense model is used layer by layer, once, for any number of pruned ones. The
rows' states (a number of float32 for each token, column and stream) stay on the model's device
where it has the room, else in the host's memory.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.func import functional_call
from transformers import PreTrainedModel

from blockpruner.core.blocks import BlockId, Channels, Cut, Mask
from blockpruner.scoring.batches import Batch
from blockpruner.scoring.engine import Engine
from blockpruner.scoring.metrics import METRICS, NLL
from blockpruner.scoring.walk import Step
from blockpruner.scoring.work import Rows, inner_size, live_numbers, sums_bytes

Key = TypeVar("Key", bound=Hashable)


@dataclass(frozen=True)
class Stop:
    """A place in the model: kept blocks that read the same state, and what is removed up to the
    next kept one."""

    kept: Step
    hole: tuple[Step, ...]
    """The removed blocks that read the same state, state by state."""
    channels: Mapping[BlockId, Channels] = field(default_factory=dict)
    """What is kept of kept blocks that are narrowed."""

    @property
    def missing(self) -> list[str]:
        """The names of the removed blocks."""
        return [str(block) for step in self.hole for block in step]


@dataclass
class Stream:
    """Pruned models whose cuts agree so far."""

    cuts: Mapping[str, Cut]
    """By the models' names."""
    states: Sequence[Tensor]
    """Their stream, batch by batch."""
    stop: Stop = Stop((), ())
    """Where they are. The first stop has no kept block; its hole is what is removed before any is
    kept."""
    is_behind: bool = False
    """Whether something is removed up to here."""
    weights: Mapping[Tensor, Tensor] = field(default_factory=dict)
    """The new values of the weights that were changed, on the host."""
    strength: float = 0.3
    """The pull to the old weights of the last fit."""

    def parted(self, by: Callable[[Cut], Key]) -> list[tuple[Key, Stream]]:
        """The stream as one or several, each with the cuts of which `by` says the same."""
        found: dict[Key, dict[str, Cut]] = {}
        for name, cut in self.cuts.items():
            found.setdefault(by(cut), {})[name] = cut
        return [(key, replace(self, cuts=cuts)) for key, cuts in found.items()]


class Streams(Engine):
    """The streams of some rows, float32 or wider, batch by batch; and the dense model's weights,
    which may be changed: those of a stop's kept blocks once the stop is reached, and not before. To
    the first `fitted` rows something is fitted, and the others are held out; there will be so many
    `pruned` models."""

    def __init__(self, model: PreTrainedModel, rows: Rows, fitted: int, pruned: int = 1) -> None:
        super().__init__(model)
        parts = (range(fitted), range(fitted, len(rows)))
        self.blocks = [block for step in self.steps for block in step]
        """All blocks, as the stream passes them."""
        spans = [span for part in parts if part for span in self.row_batches(rows, part)]
        self.fitted = [number for number, span in enumerate(spans) if span[-1] < fitted]
        """The batches that something is fitted to."""
        self.held_out = [number for number, span in enumerate(spans) if span[-1] >= fitted]
        self._batches = [Batch.of([rows[i] for i in span], self._home) for span in spans]
        self.real = [batch.is_real.cpu() for batch in self._batches]
        prepared = [self._prepare(batch.input_ids) for batch in self._batches]
        self._kwargs = [kwargs for _, kwargs in prepared]
        rest = self._resting_place(sum(batch.input_ids.numel() for batch in self._batches), pruned)
        self.dense = [
            states.to(rest, torch.promote_types(states.dtype, torch.float32))
            for states, _ in prepared
        ]
        self._first = {number: self.dense[number] for number in self.held_out}
        self.old: dict[Tensor, Tensor] = {}
        """The former values of the weights that are changed at present."""

    def walk(self, cuts: Mapping[str, Cut]) -> Iterator[Stream]:
        """The streams of pruned models, each at all its stops in order. There the dense stream is
        behind kept blocks and hole, and the pruned one before the kept blocks; the caller moves it
        on."""
        streams = [Stream(cuts, self.dense)]
        for step in self.steps:
            arrived = [part for stream in streams for part in stream.parted(partial(_keeps, step))]
            streams = []
            for is_next, stream in arrived:
                if is_next:
                    yield stream
                for kept, part in stream.parted(partial(_kept, step)):
                    blocks = tuple(block for block, _ in kept)
                    gone = tuple(block for block in step if block not in blocks)
                    narrow = {block: channels for block, channels in kept if channels is not None}
                    last = Stop(blocks, (), narrow) if kept else part.stop
                    part.stop = replace(last, hole=(*last.hole, gone) if gone else last.hole)
                    streams.append(part)
            self.dense = [
                self.behind(step, state, number) for number, state in enumerate(self.dense)
            ]
        yield from streams

    def final_states(
        self, block: BlockId | None, states: Mapping[int, Tensor]
    ) -> dict[int, Tensor]:
        """What the head reads of the rows that are held out, from states behind a block on, by the
        number of the batch; None: before the first block."""
        ahead, found = (
            1 + next((n for n, step in enumerate(self.steps) if block in step), -1),
            dict[int, Tensor](),
        )
        for number in self.held_out:
            state = states[number]
            for step in self.steps[ahead:]:
                state = self.behind(step, state, number)
            found[number] = self._final_states(self._read(state), self._batches[number])
        return found

    def ends(self, mask: Mask) -> dict[int, Tensor]:
        """The states behind the last block of the rows that are held out, in the model as it is
        without some blocks."""
        found = dict(self._first)
        for step in self.steps:
            kept = tuple(block for block in step if block not in mask)
            found = (
                {number: self.behind(kept, state, number) for number, state in found.items()}
                if kept
                else found
            )
        return found

    def losses(self, states: Mapping[int, Tensor]) -> list[float]:
        """The loss of each row that is held out, from states behind the last block."""
        found = list[float]()
        for number in self.held_out:
            batch = self._batches[number]
            finals = self._final_states(self._read(states[number]), batch)
            found += (self._losses(finals, None, batch, NLL).cpu() / batch.counts).tolist()
        return found

    def predictions(self, finals: Mapping[int, Tensor], every: int) -> dict[int, Tensor]:
        """The logits of one of so many predictions, from `final_states`."""
        return {number: self._logits(finals[number][::every]) for number in self.held_out}

    def divergence(
        self, finals: Mapping[int, Tensor], dense: Mapping[int, Tensor], every: int
    ) -> float:
        """The mean KL divergence of `predictions` from the dense model's, which are anywhere, in
        nats."""
        found = list[Tensor]()
        for number, ours in self.predictions(finals, every).items():
            found.append(
                METRICS["kl"].compute(
                    ours, self._batches[number].targets[::every], dense[number].to(ours)
                )
            )
        return float(torch.cat(found).double().mean())

    def at_real(self, number: int, states: Tensor) -> Tensor:
        """States of a batch [B, T, k] at its real tokens, [N, k]."""
        real = self.real[number]
        return states.flatten(0, 1) if real.all() else states[real.to(states.device)]

    def put_aside_(self) -> dict[Tensor, Tensor]:
        """Give the weights their former values back; returns the new ones, on the host."""
        new = {
            weight: weight.clone().cpu()
            for weight, old in self.old.items()
            if not weight.cpu().equal(old)
        }
        for weight, value in self.old.items():
            weight.copy_(value)
        self.old = {}
        return new

    def behind(self, step: Step, state: Tensor, number: int) -> Tensor:
        """A state of a batch, [B, T, d], behind blocks that read it."""
        hidden = self._read(state)
        for block in step:
            state = state + self._block(block, hidden, self._kwargs[number]).to(state.device)
        return state

    def adds(self, block: BlockId, state: Tensor, number: int) -> Tensor:
        """What a block adds to a state of a batch."""
        return self._block(block, self._read(state), self._kwargs[number]).to(state)

    def written(self, block: BlockId, state: Tensor, number: int) -> tuple[Tensor, Tensor]:
        """What the writer of a block reads where the block reads a state of a batch, [B, T, p] (no
        column without a writer) and of the model's dtype, and what its module gives, before a norm
        behind it, [B, T, d]."""
        found: list[Tensor] = []

        def note(module: nn.Module, given: Any, out: Tensor | tuple[Tensor, ...]) -> None:
            found.append(out[0] if isinstance(out, tuple) else out)

        with ExitStack() as hooks:
            hooks.enter_context(self._module(block).register_forward_hook(note))
            if (writer := self.writer(block)) is not None:
                hooks.enter_context(
                    writer.register_forward_pre_hook(lambda _, given: found.append(given[0]))
                )
            self._block(block, self._read(state), self._kwargs[number])
        *reads, gives = found
        return (reads[0] if reads else gives[..., :0]).to(state.device), gives.to(state)

    def added(self, block: BlockId, gives: Tensor) -> Tensor:
        """What a block adds to the stream if its module gives this; some families have a norm or a
        factor between."""
        norm = self.norm_behind(block)
        return self.scaled(gives if norm is None else norm(self._read(gives)).to(gives))

    def scaled(self, states: Tensor) -> Tensor:
        """States by the factor of all that blocks add."""
        return states if self._scale is None else states * self._scale

    def unit(self, block: BlockId, gives: Tensor) -> Tensor:
        """What the norm behind a module makes of this before the gains."""
        norm = self.norm_behind(block)
        assert norm is not None
        weight = norm.get_parameter("weight")
        ones = weight + (1 - self.gain(block).to(weight.device))  # wider than the weight
        states: Tensor = functional_call(norm, {"weight": ones}, gives.to(weight.device))
        return states.to(gives)

    def gain(self, block: BlockId) -> Tensor:
        """What the norm behind a module multiplies the columns of a state of unit size with, [d]. A
        weight is a gain, or 1 less than it: both change alike."""
        norm, state = self.norm_behind(block), self.dense[0]
        assert norm is not None
        gain: Tensor = norm(
            torch.ones_like(state[0, 0], device=norm.get_parameter("weight").device)
        )
        return gain.to(state)

    def writer(self, block: BlockId) -> nn.Linear | None:
        """The last projection of a block; None where it has many, as a mixture of experts."""
        name = self._family.branch(block.kind).names(self._layers[block.layer])[1]
        found = getattr(self._module(block), name, None)
        return found if isinstance(found, nn.Linear) else None

    def weight(self, block: BlockId) -> Tensor:
        """The weight [d, p] of the writer of a block that has one."""
        writer = self.writer(block)
        assert writer is not None, block
        return writer.weight

    def norm_behind(self, block: BlockId) -> nn.Module | None:
        """The norm between a module and the stream."""
        post = self._family.branch(block.kind).post
        return None if post is None else getattr(self._layers[block.layer], post)

    def change_(self, weight: Tensor, value: Tensor) -> None:
        """Give a weight another value, until `put_aside_`."""
        if weight not in self.old:
            self.old[weight] = weight.detach().clone().cpu()
        weight.copy_(value)

    def narrow_(self, channels: Mapping[BlockId, Channels]) -> None:
        """Let the writers of narrowed blocks read the other channels no more."""
        for block, kept in channels.items():
            weight = self.weight(block)
            is_kept = torch.zeros(weight.shape[1]).index_fill(0, torch.tensor(kept), 1)
            self.change_(weight, weight * is_kept.to(weight))

    def _resting_place(self, tokens: int, pruned: int) -> torch.device:
        """Where states stay: of each stream, once more as they move on, and what the writers of a
        stop read."""
        if self._room is None:
            return self._home
        config, item = self._model.config, self._head.weight.element_size()
        hidden, inner = (
            config.hidden_size,
            max(inner_size(config.to_dict()), 2 * config.hidden_size),
        )
        states = tokens * (4 * hidden * (pruned + 3) + item * inner)
        batch = self._tokens * live_numbers(hidden, inner) * item
        return (
            self._home
            if states + batch + sums_bytes(inner, hidden) <= self._room
            else torch.device("cpu")
        )

    def _module(self, block: BlockId) -> nn.Module:
        layer = self._layers[block.layer]
        found: nn.Module = getattr(layer, self._family.branch(block.kind).names(layer)[0])
        return found

    def _read(self, state: Tensor) -> Tensor:
        return state.to(self._home, self._head.weight.dtype)


def _kept(step: Step, cut: Cut) -> tuple[tuple[BlockId, Channels | None], ...]:
    return tuple((block, cut.channels.get(block)) for block in step if block not in cut.mask)


def _keeps(step: Step, cut: Cut) -> bool:
    return not cut.mask.issuperset(step)
