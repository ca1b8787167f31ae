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
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from transformers import PreTrainedModel

from blockpruner.core.blocks import BlockId, Channels, Cut, Mask
from blockpruner.fitting.memory import sums_bytes
from blockpruner.scoring.batches import Batch
from blockpruner.scoring.engine import Engine
from blockpruner.scoring.forward import LayerKwargs
from blockpruner.scoring.metrics import METRICS, NLL
from blockpruner.scoring.walk import Step
from blockpruner.scoring.work import Rows, Span, inner_size, live_numbers

HeldoutStates = Mapping[int, Tensor]
"""States of the held-out batches, by the batch's number."""


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

    @property
    def cut(self) -> Cut:
        """The cut of one of the models."""
        return next(iter(self.cuts.values()))

    def split_by(self, key_of: Callable[[Cut], Hashable]) -> list[Stream]:
        """One stream for each value of `key_of`, with the cuts that have it."""
        cuts_by_key: dict[Hashable, dict[str, Cut]] = {}
        for name, cut in self.cuts.items():
            cuts_by_key.setdefault(key_of(cut), {})[name] = cut
        return [replace(self, cuts=cuts) for cuts in cuts_by_key.values()]

    def pass_step_(self, step: Step) -> None:
        """Begin a fit point if blocks of a step are kept; the step's other blocks join the removed
        span."""
        cut = self.cut
        kept_blocks = _kept_blocks(step, cut.mask)
        if kept_blocks:
            narrowed = [block for block in kept_blocks if block in cut.channels]
            channels = {block: cut.channels[block] for block in narrowed}
            self.point = FitPoint(kept_blocks, (), channels)
        removed = tuple(block for block in step if block in cut.mask)
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
        engine = Engine(model)
        self._engine = engine
        self.steps = engine.steps
        self.blocks = list(chain.from_iterable(engine.steps))
        """All blocks, as the stream passes them."""
        row_numbers = range(len(rows))
        spans = list[Span]()
        # `row_batches` would make an empty batch of no rows.
        if fit_rows > 0:
            spans += engine.row_batches(rows, row_numbers[:fit_rows])
        fit_count = len(spans)
        if fit_rows < len(rows):
            spans += engine.row_batches(rows, row_numbers[fit_rows:])
        self.fit_batches = range(fit_count)
        """The batches that are fitted to."""
        self.heldout_batches = range(fit_count, len(spans))
        """The batches that are held out."""
        self._batches = list[Batch]()
        self._layer_kwargs = list[LayerKwargs]()
        embedded = list[Tensor]()
        for span in spans:
            batch_rows = [rows[number] for number in span]
            batch = Batch.of(batch_rows, engine.home)
            states, layer_kwargs = engine.prepare(batch.input_ids)
            self._batches.append(batch)
            self._layer_kwargs.append(layer_kwargs)
            embedded.append(states)
        self.is_real = [batch.is_real.cpu() for batch in self._batches]
        tokens = sum(is_real.numel() for is_real in self.is_real)
        device = self._states_device(tokens, models)
        dtype = torch.promote_types(embedded[0].dtype, torch.float32)
        self.dense = [states.to(device, dtype) for states in embedded]
        self._heldout_embedded = self.heldout(self.dense)
        self.old_values: dict[Tensor, Tensor] = {}
        """The former values of the weights that are changed at present."""

    def walk(self, cuts: Mapping[str, Cut]) -> Iterator[Stream]:
        """The streams of pruned models, each at all its fit points in order. The dense stream has
        passed the point's blocks and its removed span there, the pruned stream has not: the caller
        moves it on."""
        streams = [Stream(cuts, self.dense)]
        for step in self.steps:
            branches = list[Stream]()
            for stream in streams:
                branches += stream.split_by(partial(_keeps_block, step))
            streams = []
            for branch in branches:
                # A kept block ends the removed span of the point before it.
                if _keeps_block(step, branch.cut):
                    yield branch
                streams += branch.split_by(partial(_difference, step))
            for stream in streams:
                stream.pass_step_(step)
            self.dense = self.all_after(step, self.dense)
        yield from streams

    def heldout(self, states: Sequence[Tensor]) -> dict[int, Tensor]:
        """The held-out ones of all batches' states."""
        return {number: states[number] for number in self.heldout_batches}

    def heldout_final_states(
        self, states: HeldoutStates, passed: BlockId | None = None
    ) -> dict[int, Tensor]:
        """The states that the head reads of the held-out batches, from states behind the block
        `passed`, or before the first block."""
        start = 0
        for index, step in enumerate(self.steps):
            if passed in step:
                start = index + 1
        for step in self.steps[start:]:
            states = self._heldout_after(step, states)
        return {number: self._final_states(states, number) for number in states}

    def heldout_states(self, mask: Mask) -> HeldoutStates:
        """The states of the held-out batches behind the last block of the model without some
        blocks, with its present weights."""
        states: HeldoutStates = self._heldout_embedded
        for step in self.steps:
            states = self._heldout_after(_kept_blocks(step, mask), states)
        return states

    def losses(self, states: HeldoutStates) -> list[float]:
        """The loss of each held-out row, from states behind the last block."""
        losses = list[float]()
        for number in self.heldout_batches:
            batch = self._batches[number]
            final_states = self._final_states(states, number)
            loss_sums = self._engine.row_losses(final_states, None, batch, NLL)
            losses += (loss_sums.cpu() / batch.counts).tolist()
        return losses

    def predictions(self, final_states: HeldoutStates, stride: int) -> dict[int, Tensor]:
        """The logits of every `stride`-th prediction of the held-out batches."""
        logits = {}
        for number, states in final_states.items():
            logits[number] = self._engine.logits(states[::stride])
        return logits

    def divergence(self, final_states: HeldoutStates, dense: HeldoutStates, stride: int) -> float:
        """The mean KL divergence of `predictions` from the dense model's, which may be on any
        device, in nats."""
        kl = METRICS["kl"]
        divergences = list[Tensor]()
        for number, logits in self.predictions(final_states, stride).items():
            targets = self._batches[number].targets[::stride]
            dense_logits = dense[number].to(logits)
            divergences.append(kl.compute(logits, targets, dense_logits))
        token_divergences = torch.cat(divergences).double()
        return float(token_divergences.mean())

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
            added = self._engine.run_block(block, hidden, self._layer_kwargs[number])
            state = state + added.to(state.device)
        return state

    def all_after(self, step: Step, states: Sequence[Tensor]) -> list[Tensor]:
        """The states of all batches behind blocks that read them."""
        return [self.after(step, state, number) for number, state in enumerate(states)]

    def block_output(self, block: BlockId, state: Tensor, number: int) -> Tensor:
        """What a block adds to a state of a batch."""
        hidden = self._read(state)
        added = self._engine.run_block(block, hidden, self._layer_kwargs[number])
        return added.to(state)

    def module_tensors(self, block: BlockId, state: Tensor, number: int) -> tuple[Tensor, Tensor]:
        """The features and the output of a block's module on a state of a batch.

        The features are the input of its output projection, [B, T, p] in the model's dtype (p = 0
        for a block that has none). The output, [B, T, d], is that before a norm behind the
        module."""
        features = list[Tensor]()
        outputs = list[Tensor]()

        def record_output(module: nn.Module, args: Any, output: Any) -> None:
            # Attention also returns its weights.
            if isinstance(output, tuple):
                output = output[0]
            outputs.append(output)

        def record_features(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            features.append(args[0])

        projection = self.output_projection(block)
        with ExitStack() as hooks:
            module = self._module(block)
            hooks.enter_context(module.register_forward_hook(record_output))
            if projection is not None:
                hooks.enter_context(projection.register_forward_pre_hook(record_features))
            self._engine.run_block(block, self._read(state), self._layer_kwargs[number])
        (output,) = outputs
        if not features:
            features.append(output[..., :0])
        return features[0].to(state.device), output.to(state)

    def residual(self, block: BlockId, output: Tensor) -> Tensor:
        """What a block adds to the stream for an output of its module. Some families have a norm or
        a factor between the two."""
        norm = self.post_norm(block)
        if norm is not None:
            hidden = self._read(output)
            output = norm(hidden).to(output)
        return self.scaled(output)

    def scaled(self, states: Tensor) -> Tensor:
        """States by the factor of all that blocks add."""
        factor = self._engine.added_scale
        if factor is None:
            return states
        return states * factor

    def normalized(self, block: BlockId, output: Tensor) -> Tensor:
        """The output of a module behind its norm, without the norm's gains."""
        norm = self.post_norm(block)
        assert norm is not None
        weight = norm.get_parameter("weight")
        # A weight that is a gain less 1 is set to 0, not to 1; in the wider dtype of the gains.
        gain = self.gain(block).to(weight.device)
        unit_weight = weight + (1 - gain)
        module_output = output.to(weight.device)
        states: Tensor = functional_call(norm, {"weight": unit_weight}, module_output)
        return states.to(output)

    def gain(self, block: BlockId) -> Tensor:
        """The gains of the norm behind a module, [d]. A weight is a gain, or a gain less 1: both
        change by the same amount."""
        norm = self.post_norm(block)
        assert norm is not None
        device = norm.get_parameter("weight").device
        state = self.dense[0][0, 0]
        # The norm of a state of ones is its gains.
        gain: Tensor = norm(torch.ones_like(state, device=device))
        return gain.to(state)

    def output_projection(self, block: BlockId) -> nn.Linear | None:
        """The last projection of a block; None for a block with several, as a mixture of
        experts."""
        _, name = self._names(block)
        projection = getattr(self._module(block), name, None)
        if isinstance(projection, nn.Linear):
            return projection
        return None

    def output_weight(self, block: BlockId) -> Tensor:
        """The weight [d, p] of a block's output projection."""
        projection = self.output_projection(block)
        assert projection is not None, block
        return projection.weight

    def post_norm(self, block: BlockId) -> nn.Module | None:
        """The norm between a module and the stream."""
        engine = self._engine
        name = engine.family.branch(block.kind).post
        if name is None:
            return None
        norm: nn.Module = getattr(engine.layers[block.layer], name)
        return norm

    def set_(self, weight: Tensor, value: Tensor) -> None:
        """Give a weight another value, until `restore_`."""
        if weight not in self.old_values:
            self.old_values[weight] = weight.detach().clone().cpu()
        weight.copy_(value)

    def restore_(self) -> dict[Tensor, Tensor]:
        """Give the weights their former values back; returns the new values, on the host."""
        new_values = {}
        for weight, old_value in self.old_values.items():
            new_value = weight.to("cpu", copy=True)
            if not new_value.equal(old_value):
                new_values[weight] = new_value
            weight.copy_(old_value)
        self.old_values = {}
        return new_values

    def zero_channels_(self, channels: Mapping[BlockId, Channels]) -> None:
        """Set the columns of output projections to zero, but those of the channels that narrowed
        blocks keep."""
        for block, kept_channels in channels.items():
            weight = self.output_weight(block)
            is_kept = torch.zeros(weight.shape[1])
            is_kept[list(kept_channels)] = 1
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
        number_bytes = engine.head.weight.element_size()
        token_bytes = 4 * hidden * (models + 3) + number_bytes * inner
        batch_bytes = engine.batch_tokens * live_numbers(hidden, inner) * number_bytes
        needed = tokens * token_bytes + batch_bytes + sums_bytes(inner, hidden)
        if needed <= engine.room:
            return engine.home
        return torch.device("cpu")

    def _heldout_after(self, step: Step, states: HeldoutStates) -> HeldoutStates:
        return {number: self.after(step, state, number) for number, state in states.items()}

    def _final_states(self, states: HeldoutStates, number: int) -> Tensor:
        hidden = self._read(states[number])
        return self._engine.final_states(hidden, self._batches[number])

    def _names(self, block: BlockId) -> tuple[str, str]:
        """The names of a block's module in its layer, and of the output projection in the
        module."""
        branch = self._engine.family.branch(block.kind)
        return branch.names(self._engine.layers[block.layer])

    def _module(self, block: BlockId) -> nn.Module:
        name, _ = self._names(block)
        module: nn.Module = getattr(self._engine.layers[block.layer], name)
        return module

    def _read(self, state: Tensor) -> Tensor:
        """A state as the model's blocks and its head read it."""
        weight = self._engine.head.weight
        return state.to(weight.device, weight.dtype)


def _kept_blocks(step: Step, mask: Mask) -> Step:
    return tuple(block for block in step if block not in mask)


def _keeps_block(step: Step, cut: Cut) -> bool:
    return not cut.mask.issuperset(step)


def _difference(step: Step, cut: Cut) -> tuple[Mask, tuple[Channels | None, ...]]:
    """What a cut changes in a step."""
    channels = tuple(cut.channels.get(block) for block in step)
    return cut.mask.intersection(step), channels
