"""The residual streams of the dense and of the pruned model over the same rows, moved on together, stop by stop.

Decides where both are compared, and what a kept block reads and writes there. Both run on one copy of the model: the
dense stream passes a block before the block's weights change. So the model is used layer by layer, once, and the rows'
states lie in the host's memory (two numbers of float32 for each token and column of the stream).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.func import functional_call
from transformers import PreTrainedModel

from blockpruner.core.blocks import BlockId, Mask
from blockpruner.scoring.engine import Engine
from blockpruner.scoring.walk import Step
from blockpruner.scoring.work import Rows


@dataclass(frozen=True)
class Stop:
    """A place in the model: kept blocks that read the same state, and what is removed up to the next kept one."""

    kept: Step
    hole: tuple[Step, ...]
    """The removed blocks that read the same state, state by state."""

    @property
    def missing(self) -> list[str]:
        """The names of the removed blocks."""
        return [str(block) for step in self.hole for block in step]


def stops_of(steps: Sequence[Step], mask: Mask) -> list[Stop]:
    """All stops in order. The first one has no kept block; its hole is what is removed before any is kept."""
    stops = [Stop((), ())]
    for step in steps:
        kept, gone = (tuple(block for block in step if (block in mask) is removed) for removed in (False, True))
        last = Stop(kept, ()) if kept else stops.pop()
        stops.append(Stop(last.kept, (*last.hole, gone) if gone else last.hole))
    return stops


class Streams(Engine):
    """The streams of some rows, float32 or wider, batch by batch; and the model's weights, which may be changed.

    Args:
        model: the dense model. Weights of a stop's kept blocks are changed once the stop is reached, and not before.
        fitted: how many of the rows, the first ones, something is fitted to; the others are held out.
    """

    def __init__(self, model: PreTrainedModel, rows: Rows, fitted: int, batch_tokens: int | str = "auto") -> None:
        super().__init__(model, batch_tokens)
        parts = (range(fitted), range(fitted, len(rows)))
        self.blocks = [block for step in self._steps for block in step]
        """All blocks, as the stream passes them."""
        spans = [span for part in parts if part for span in self.row_batches(rows, part)]
        self.is_fitted = [span[-1] < fitted for span in spans]
        batches = [self._batch([rows[i] for i in span]) for span in spans]
        self.real = [batch.is_real.cpu() for batch in batches]
        prepared = [self._prepare(batch.input_ids) for batch in batches]
        self._kwargs = [kwargs for _, kwargs in prepared]
        self.dense = [states.to(torch.promote_types(states.dtype, torch.float32)).cpu() for states, _ in prepared]
        self.pruned = [states.clone() for states in self.dense]
        self.old: dict[Tensor, Tensor] = {}
        """The former value of every weight that was changed."""

    def stops(self, mask: Mask) -> Iterator[Stop]:
        """The stops in order. At each, the dense stream is behind kept blocks and hole, and the pruned stream before
        the kept blocks; the caller moves it on."""
        steps = iter(self._steps)
        for stop in stops_of(self._steps, mask):
            passed = 0
            while passed < len(stop.kept) + len(stop.missing):
                step = next(steps)
                passed += len(step)
                self.dense = [self.behind(step, state, number) for number, state in enumerate(self.dense)]
            yield stop

    def behind(self, step: Step, state: Tensor, number: int) -> Tensor:
        """A state of a batch, [B, T, d], behind blocks that read it."""
        hidden = self._read(state)
        return state + sum(self._block(block, hidden, self._kwargs[number]).to(state) for block in step)

    def written(self, block: BlockId, number: int) -> tuple[Tensor, Tensor]:
        """What the writer of a block reads in the pruned stream of a batch, [B, T, p] (no column without a writer),
        and what its module gives, before a norm behind it, [B, T, d]."""
        found: list[Tensor] = []
        hooks = [
            self._module(block).register_forward_hook(lambda _, given, out: found.append(_first(out))),
        ]
        if (writer := self.writer(block)) is not None:
            hooks.insert(0, writer.register_forward_pre_hook(lambda _, given: found.append(given[0])))
        try:
            self._block(block, self._read(self.pruned[number]), self._kwargs[number])
        finally:
            for hook in hooks:
                hook.remove()
        *reads, gives = (states.to(self.pruned[number]) for states in found)
        return reads[0] if reads else gives[..., :0], gives

    def added(self, block: BlockId, gives: Tensor) -> Tensor:
        """What a block adds to the stream if its module gives this; some families have a norm between them."""
        norm = self.norm_behind(block)
        return gives if norm is None else norm(self._read(gives)).to(gives)

    def unit(self, block: BlockId, gives: Tensor) -> Tensor:
        """What the norm behind a module makes of this before the gains."""
        norm = self.norm_behind(block)
        assert norm is not None
        weight = norm.get_parameter("weight")
        ones = weight + (1 - self.gain(block).to(weight.device))  # wider than the weight
        states: Tensor = functional_call(norm, {"weight": ones}, gives.to(weight.device))
        return states.to(gives)

    def gain(self, block: BlockId) -> Tensor:
        """What the norm behind a module multiplies the columns of a state of unit size with, [d]. A weight is a gain,
        or 1 less than it: both change alike."""
        norm, state = self.norm_behind(block), self.pruned[0]
        assert norm is not None
        gain: Tensor = norm(torch.ones_like(state[0, 0], device=norm.get_parameter("weight").device))
        return gain.to(state)

    def writer(self, block: BlockId) -> nn.Linear | None:
        """The last projection of a block; None where it has many, as a mixture of experts."""
        found = getattr(self._module(block), self._family.branch(block.kind).output, None)
        return found if isinstance(found, nn.Linear) else None

    def norm_behind(self, block: BlockId) -> nn.Module | None:
        """The norm between a module and the stream."""
        post = self._family.branch(block.kind).post
        return None if post is None else getattr(self._layers[block.layer], post)

    def change_(self, weight: Tensor, value: Tensor) -> Tensor:
        """Give a weight another value; returns the difference as it is in the weight's dtype."""
        if weight not in self.old:
            self.old[weight] = weight.detach().clone().cpu()
        before = weight.detach().clone()
        weight.copy_(value)
        return weight.detach() - before

    def _module(self, block: BlockId) -> nn.Module:
        found: nn.Module = getattr(self._layers[block.layer], self._family.branch(block.kind).module)
        return found

    def _read(self, state: Tensor) -> Tensor:
        return state.to(self._home, self._head.weight.dtype)


def _first(out: Tensor | tuple[Tensor, ...]) -> Tensor:
    return out[0] if isinstance(out, tuple) else out
