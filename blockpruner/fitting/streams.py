"""The residual streams of the dense and of pruned models over the same rows, which move on from
fit point to fit point.

Decides where streams are compared, and what a kept block reads and writes there. All streams run on
one copy of the model: the dense stream passes a block before the block's weights change, and the
new weights are then put aside. Pruned models share one stream up to the first difference of their
cuts. The dense model is therefore used layer by layer, once, for any number of pruned ones. The
rows' states (a float32 for each token, column and stream) stay on the model's device if it has the
room, else in the host's memory.
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
from blockpruner.fitting.memory import sums_bytes
from blockpruner.scoring.batches import Batch
from blockpruner.scoring.engine import Engine
from blockpruner.scoring.metrics import METRICS, NLL
from blockpruner.scoring.walk import Step
from blockpruner.scoring.work import Rows, inner_size, live_numbers

Key = TypeVar("Key", bound=Hashable)


@dataclass(frozen=True)
class FitPoint:
    """Kept blocks that read the same state, and the span that is removed up to the next kept
    one."""

    blocks: Step
    """The kept blocks."""
    removed_span: tuple[Step, ...] = ()
    """The removed blocks that read the same state, state by state."""
    channels: Mapping[BlockId, Channels] = field(default_factory=dict)
    """The channels that narrowed blocks among `blocks` keep."""

    @property
    def removed_names(self) -> list[str]:
        """The names of the removed blocks."""
        return [str(block) for step in self.removed_span for block in step]


@dataclass
class Stream:
    """Pruned models whose cuts agree so far."""

    cuts: Mapping[str, Cut]
    """By the models' names."""
    states: Sequence[Tensor]
    """Their residual stream, batch by batch."""
    point: FitPoint = FitPoint(())
    """Where they are. The first point has no kept block, only the span that is removed before any
    block is kept."""
    is_pruned: bool = False
    """Whether something is removed up to here."""
    weights: Mapping[Tensor, Tensor] = field(default_factory=dict)
    """The new values of the weights that were changed, on the host."""
    ridge_penalty: float = 0.3
    """The penalty of the last fit."""

    def split_by(self, key_of: Callable[[Cut], Key]) -> list[tuple[Key, Stream]]:
        """One stream for each value of `key_of`, with the cuts that have it."""
        cuts_by_key: dict[Key, dict[str, Cut]] = {}
        for name, cut in self.cuts.items():
            cuts_by_key.setdefault(key_of(cut), {})[name] = cut
        return [(key, replace(self, cuts=cuts)) for key, cuts in cuts_by_key.items()]

    def pass_step_(self, step: Step, kept: Mapping[BlockId, Channels | None]) -> None:
        """Begin a fit point if blocks of a step are kept; the step's other blocks join the removed
        span."""
        if kept:
            channels = {block: keeps for block, keeps in kept.items() if keeps is not None}
            self.point = FitPoint(tuple(kept), (), channels)
        removed = tuple(block for block in step if block not in kept)
        if removed:
            span = (*self.point.removed_span, removed)
            self.point = replace(self.point, removed_span=span)


class Streams:
    """The streams of some rows, float32 or wider, batch by batch; and the dense model's weights,
    which may be changed: those of a fit point's blocks once the point is reached, and not before.

    Args:
        fit_rows: how many of the first rows are fitted to; the others are held out.
        models: the number of pruned models.
    """

    def __init__(self, model: PreTrainedModel, rows: Rows, fit_rows: int, models: int = 1) -> None:
        self._engine = Engine(model)
        self.steps = self._engine.steps
        self.blocks = [block for step in self.steps for block in step]
        """All blocks, as the stream passes them."""
        spans = self._engine.row_batches(rows, range(fit_rows)) if fit_rows else []
        self.fit_batches = range(len(spans))
        """The batches that are fitted to."""
        if fit_rows < len(rows):
            spans = [*spans, *self._engine.row_batches(rows, range(fit_rows, len(rows)))]
        self.heldout_batches = range(len(self.fit_batches), len(spans))
        """The batches that are held out."""
        self._batches = [Batch.of([rows[i] for i in span], self._engine.home) for span in spans]
        self.is_real = [batch.is_real.cpu() for batch in self._batches]
        prepared = [self._engine.prepare(batch.input_ids) for batch in self._batches]
        self._kwargs = [kwargs for _, kwargs in prepared]
        tokens = sum(batch.input_ids.numel() for batch in self._batches)
        device = self._states_device(tokens, models)
        self.dense = [
            states.to(device, torch.promote_types(states.dtype, torch.float32))
            for states, _ in prepared
        ]
        self._embedded = self._heldout(self.dense)
        self.old_values: dict[Tensor, Tensor] = {}
        """The former values of the weights that are changed at present."""

    def walk(self, cuts: Mapping[str, Cut]) -> Iterator[Stream]:
        """The streams of pruned models, each at all its fit points in order. The dense stream has
        passed the point's blocks and its removed span there, the pruned stream has not: the caller
        moves it on."""
        streams = [Stream(cuts, self.dense)]
        for step in self.steps:
            branches = list[tuple[bool, Stream]]()
            for stream in streams:
                branches += stream.split_by(partial(_keeps_block, step))
            streams = []
            for keeps_block, branch in branches:
                # A kept block ends the removed span of the point before it.
                if keeps_block:
                    yield branch
                for kept, part in branch.split_by(partial(_kept_blocks, step)):
                    part.pass_step_(step, dict(kept))
                    streams.append(part)
            self.dense = self.all_after(step, self.dense)
        yield from streams

    def heldout_final_states(
        self, states: Mapping[int, Tensor], passed: BlockId | None = None
    ) -> dict[int, Tensor]:
        """The states that the head reads of the held-out batches, from states behind the block
        `passed`, or before the first block."""
        start = 0
        for index, step in enumerate(self.steps):
            if passed in step:
                start = index + 1
        for step in self.steps[start:]:
            states = self._heldout_after(step, states)
        return {
            number: self._engine.final_states(self._read(state), self._batches[number])
            for number, state in states.items()
        }

    def heldout_states(self, mask: Mask) -> Mapping[int, Tensor]:
        """The states of the held-out batches behind the last block of the model without some
        blocks, with its present weights."""
        states: Mapping[int, Tensor] = self._embedded
        for step in self.steps:
            kept = tuple(block for block in step if block not in mask)
            states = self._heldout_after(kept, states)
        return states

    def losses(self, states: Mapping[int, Tensor]) -> list[float]:
        """The loss of each held-out row, from states behind the last block."""
        losses = list[float]()
        for number in self.heldout_batches:
            batch = self._batches[number]
            final_states = self._engine.final_states(self._read(states[number]), batch)
            sums = self._engine.row_losses(final_states, None, batch, NLL)
            losses += (sums.cpu() / batch.counts).tolist()
        return losses

    def predictions(self, final_states: Mapping[int, Tensor], stride: int) -> dict[int, Tensor]:
        """The logits of every `stride`-th prediction of the held-out batches."""
        logits = {}
        for number, states in final_states.items():
            logits[number] = self._engine.logits(states[::stride])
        return logits

    def divergence(
        self, final_states: Mapping[int, Tensor], dense: Mapping[int, Tensor], stride: int
    ) -> float:
        """The mean KL divergence of `predictions` from the dense model's, which may be on any
        device, in nats."""
        divergences = list[Tensor]()
        for number, logits in self.predictions(final_states, stride).items():
            targets = self._batches[number].targets[::stride]
            divergences.append(METRICS["kl"].compute(logits, targets, dense[number].to(logits)))
        return float(torch.cat(divergences).double().mean())

    def real_tokens(self, number: int, states: Tensor) -> Tensor:
        """States of a batch [B, T, k] at its real tokens, [N, k]."""
        is_real = self.is_real[number]
        if is_real.all():
            return states.flatten(0, 1)
        return states[is_real.to(states.device)]

    def after(self, step: Step, state: Tensor, number: int) -> Tensor:
        """A state of a batch, [B, T, d], behind blocks that read it."""
        hidden = self._read(state)
        for block in step:
            added = self._engine.run_block(block, hidden, self._kwargs[number])
            state = state + added.to(state.device)
        return state

    def all_after(self, step: Step, states: Sequence[Tensor]) -> list[Tensor]:
        """The states of all batches behind blocks that read them."""
        return [self.after(step, state, number) for number, state in enumerate(states)]

    def block_output(self, block: BlockId, state: Tensor, number: int) -> Tensor:
        """What a block adds to a state of a batch."""
        return self._engine.run_block(block, self._read(state), self._kwargs[number]).to(state)

    def module_tensors(self, block: BlockId, state: Tensor, number: int) -> tuple[Tensor, Tensor]:
        """The features and the output of a block's module on a state of a batch.

        The features are the input of its output projection, [B, T, p] in the model's dtype (p = 0
        for a block that has none). The output, [B, T, d], is that before a norm behind the
        module."""
        features, outputs = list[Tensor](), list[Tensor]()

        def keep_output(module: nn.Module, args: Any, output: Tensor | tuple[Tensor, ...]) -> None:
            outputs.append(output[0] if isinstance(output, tuple) else output)

        def keep_features(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            features.append(args[0])

        with ExitStack() as hooks:
            hooks.enter_context(self._module(block).register_forward_hook(keep_output))
            projection = self.output_projection(block)
            if projection is not None:
                hooks.enter_context(projection.register_forward_pre_hook(keep_features))
            self._engine.run_block(block, self._read(state), self._kwargs[number])
        output = outputs[0]
        if not features:
            features.append(output[..., :0])
        return features[0].to(state.device), output.to(state)

    def residual(self, block: BlockId, output: Tensor) -> Tensor:
        """What a block adds to the stream for an output of its module. Some families have a norm or
        a factor between the two."""
        norm = self.post_norm(block)
        if norm is not None:
            output = norm(self._read(output)).to(output)
        return self.scaled(output)

    def scaled(self, states: Tensor) -> Tensor:
        """States by the factor of all that blocks add."""
        return states if self._engine.added_scale is None else states * self._engine.added_scale

    def normalized(self, block: BlockId, output: Tensor) -> Tensor:
        """The output of a module behind its norm, without the norm's gains."""
        norm = self.post_norm(block)
        assert norm is not None
        weight = norm.get_parameter("weight")
        ones = weight + (1 - self.gain(block).to(weight.device))  # wider than the weight
        states: Tensor = functional_call(norm, {"weight": ones}, output.to(weight.device))
        return states.to(output)

    def gain(self, block: BlockId) -> Tensor:
        """The gains of the norm behind a module, [d]. A weight is a gain, or a gain less 1: both
        change by the same amount."""
        norm = self.post_norm(block)
        assert norm is not None
        state = self.dense[0]
        unit_state = torch.ones_like(state[0, 0], device=norm.get_parameter("weight").device)
        gain: Tensor = norm(unit_state)
        return gain.to(state)

    def output_projection(self, block: BlockId) -> nn.Linear | None:
        """The last projection of a block; None for a block with several, as a mixture of
        experts."""
        name = self._engine.family.branch(block.kind).names(self._engine.layers[block.layer])[1]
        projection = getattr(self._module(block), name, None)
        return projection if isinstance(projection, nn.Linear) else None

    def output_weight(self, block: BlockId) -> Tensor:
        """The weight [d, p] of a block's output projection."""
        projection = self.output_projection(block)
        assert projection is not None, block
        return projection.weight

    def post_norm(self, block: BlockId) -> nn.Module | None:
        """The norm between a module and the stream."""
        name = self._engine.family.branch(block.kind).post
        return None if name is None else getattr(self._engine.layers[block.layer], name)

    def set_(self, weight: Tensor, value: Tensor) -> None:
        """Give a weight another value, until `restore_`."""
        if weight not in self.old_values:
            self.old_values[weight] = weight.detach().clone().cpu()
        weight.copy_(value)

    def restore_(self) -> dict[Tensor, Tensor]:
        """Give the weights their former values back; returns the new values, on the host."""
        new_values = {}
        for weight, old_value in self.old_values.items():
            if not weight.cpu().equal(old_value):
                new_values[weight] = weight.clone().cpu()
            weight.copy_(old_value)
        self.old_values = {}
        return new_values

    def zero_channels_(self, channels: Mapping[BlockId, Channels]) -> None:
        """Set the columns of output projections to zero, but those of the channels that narrowed
        blocks keep."""
        for block, kept_channels in channels.items():
            weight = self.output_weight(block)
            is_kept = torch.zeros(weight.shape[1]).index_fill(0, torch.tensor(kept_channels), 1)
            self.set_(weight, weight * is_kept.to(weight))

    def _states_device(self, tokens: int, models: int) -> torch.device:
        """The device for the states. It needs room for each stream, for one more while they move
        on, and for the features of a fit point."""
        engine = self._engine
        if engine.room is None:
            return engine.home
        config = engine.model.config
        hidden = config.hidden_size
        inner = max(inner_size(config.to_dict()), 2 * hidden)
        item = engine.head.weight.element_size()
        states_bytes = tokens * (4 * hidden * (models + 3) + item * inner)
        batch_bytes = engine.batch_tokens * live_numbers(hidden, inner) * item
        if states_bytes + batch_bytes + sums_bytes(inner, hidden) <= engine.room:
            return engine.home
        return torch.device("cpu")

    def _heldout(self, states: Sequence[Tensor]) -> dict[int, Tensor]:
        return {number: states[number] for number in self.heldout_batches}

    def _heldout_after(self, step: Step, states: Mapping[int, Tensor]) -> dict[int, Tensor]:
        return {number: self.after(step, state, number) for number, state in states.items()}

    def _module(self, block: BlockId) -> nn.Module:
        layer = self._engine.layers[block.layer]
        module: nn.Module = getattr(layer, self._engine.family.branch(block.kind).names(layer)[0])
        return module

    def _read(self, state: Tensor) -> Tensor:
        return state.to(self._engine.home, self._engine.head.weight.dtype)


def _kept_blocks(step: Step, cut: Cut) -> tuple[tuple[BlockId, Channels | None], ...]:
    """The blocks of a step that a cut keeps, each with its channels if it is narrowed."""
    return tuple((block, cut.channels.get(block)) for block in step if block not in cut.mask)


def _keeps_block(step: Step, cut: Cut) -> bool:
    return not cut.mask.issuperset(step)
