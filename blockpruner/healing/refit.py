"""Refit: the output projections of a pruned model are fitted to the dense one, without training.

A removed span is what is removed between two kept blocks. Behind it the pruned model's residual
stream lacks what the span added, and the kept block before it is the last that can make up for
that. A narrowed block lacks channels, and makes up for them itself. Only output projections change,
the matrices through which blocks add to the stream. No weight is added, so every export and every
engine works as before.

All output projections from the first narrowed block, or the block before the first removed span,
are fitted one after the other by least squares: the stream behind the block and the removed span
that follows, to the dense model's. Each fit reads the stream that earlier fits have left, so it
also repairs what those could not. A token counts by its relative error, |dense - pruned|^2 /
|dense|^2. The first token of a row, whose state is a thousand times as long in many models, would
otherwise decide alone.

Some families have a norm behind each module. What such a block adds, g y / rms(y) with the gains g,
is linear in the output projection only while rms(y) stays, and its size does not depend on the
projection. Therefore the gains are fitted, too, and the actual error on held-out rows decides by
which step the projection changes.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from blockpruner.core.blocks import BlockId, Cut
from blockpruner.core.errors import InputError
from blockpruner.fitting.gram import symmetric_
from blockpruner.fitting.streams import Stream, Streams
from blockpruner.healing.ridge import Moments, best_change

RIDGE_PENALTIES = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0)
"""The penalties to choose from. Each fit takes the best one on the held-out rows, and begins its
search at that of the last fit."""

FIRST_GUESS_PENALTIES = (1.0,)
"""The penalty of a first guess."""

STEP_SIZES = (1.0, 0.5, 0.25, 0.0)
"""The steps of an output projection before a norm that are tried, each with the gains that fit
best."""

RefitStats = dict[str, Any]
"""What was done at a fit point, for the report: the removed span behind it (`hole`), the fitted
blocks (`writers`), the ridge penalty (`strength`) and the relative error that is left (`error`)."""


def refit(
    streams: Streams, cuts: Mapping[str, Cut], penalties: Sequence[float] = ()
) -> Iterator[tuple[Stream, RefitStats]]:
    """Fit the output projections of the models of some cuts. Yields each stream behind each of its
    fit points, with what was done there, if anything was. Raises InputError if no block of the
    model ends in a single matrix."""
    if all(streams.output_projection(block) is None for block in streams.blocks):
        message = (
            "compensate: no block of this model ends in a single matrix; set compensate.method:"
            " none"
        )
        raise InputError(message, rule="no-writer", key="compensate.method")
    for stream in streams.walk(cuts):
        point = stream.point
        if point.removed_span or point.channels:
            stream.is_pruned = True
        projections = dict[BlockId, nn.Linear]()
        for block in point.blocks:
            projection = streams.output_projection(block)
            # The experts of a mixture have no output projection in common.
            if projection is not None:
                projections[block] = projection
        stats: RefitStats = {}
        if not stream.is_pruned:
            # Up to the first removed span the pruned model is the dense one.
            stream.states = streams.dense
        elif projections:
            fitted_blocks = [str(block) for block in projections]
            stats = {"hole": point.removed_names, "writers": fitted_blocks}
            stats |= _fit_point_(streams, stream, projections, penalties or RIDGE_PENALTIES)
            stream.weights = {**stream.weights, **streams.restore_()}
        else:
            # A mixture of experts has no single matrix to fit.
            stream.states = streams.all_after(point.blocks, stream.states)
            if point.removed_span:
                stats = {"hole": point.removed_names, "writers": [], "error": 1.0}
        yield stream, stats


def _fit_point_(
    streams: Streams,
    stream: Stream,
    projections: Mapping[BlockId, nn.Linear],
    penalties: Sequence[float],
) -> RefitStats:
    """Fit the output projections of a fit point; two at once if both blocks of a layer read the
    same state."""
    site = _FitSite(streams, stream, projections)
    # With a norm behind the module the problem is not linear: see the module's docstring.
    norm = streams.post_norm(next(iter(projections)))
    if norm is not None:
        stats = _fit_before_norm_(site, norm.get_parameter("weight"), penalties)
    else:
        moments, heldout = site.moments()
        change, penalty, error = best_change(moments, heldout, penalties, stream.ridge_penalty)
        stream.ridge_penalty = penalty
        # Below 1 the change helps on the held-out rows.
        if error < 1:
            site.add_change_(change)
        stats = {"strength": penalty, "error": error}
    stream.states = [site.pruned_state(number) for number in range(len(streams.dense))]
    return stats


@dataclass
class _FitSite:
    """The blocks of a fit point, with what they read and give on the pruned stream."""

    streams: Streams
    stream: Stream
    projections: Mapping[BlockId, nn.Linear]
    features: dict[BlockId, list[Tensor]] = field(default_factory=dict)
    """The inputs of output projections, batch by batch."""
    outputs: dict[BlockId, list[Tensor]] = field(default_factory=dict)
    """The outputs of the blocks' modules, before a norm behind them."""

    def __post_init__(self) -> None:
        streams = self.streams
        self.scales = [1 / state.norm(dim=-1, keepdim=True) for state in streams.dense]
        # A narrowed MLP gives what its remaining channels give, before it is fitted.
        streams.zero_channels_(self.stream.point.channels)
        for block in self.stream.point.blocks:
            self.features[block] = []
            self.outputs[block] = []
            for number, state in enumerate(self.stream.states):
                features, output = streams.module_tensors(block, state, number)
                self.features[block].append(features)
                self.outputs[block].append(output)
        # With CPU offload the weights are on the device only since the blocks have run.
        self.device = next(iter(self.projections.values())).weight.device
        self.width, self.kept_features = self._count_features()

    def _count_features(self) -> tuple[int, Tensor]:
        """The number of features of all projections, which stand side by side as in
        `joint_features`, and the indices of those that are fitted: without the channels that a
        narrowed block lacks, whose columns stay zero."""
        kept_features = list[Tensor]()
        width = 0
        for block, projection in self.projections.items():
            inputs = projection.in_features
            channels = list(self.stream.point.channels.get(block, range(inputs)))
            # A bias is the weight of one more feature, which is always 1.
            if projection.bias is not None:
                channels.append(inputs)
                inputs += 1
            kept_features.append(width + torch.tensor(channels, device=self.device))
            width += inputs
        return width, torch.cat(kept_features)

    def joint_features(self, number: int) -> Tensor:
        """The features of all output projections for a batch, [B, T, p], with a column of ones for
        each bias."""
        columns = list[Tensor]()
        for block, projection in self.projections.items():
            columns.append(self.features[block][number].to(self.device))
            if projection.bias is not None:
                columns.append(torch.ones_like(columns[-1][..., :1]))
        # `cat` would copy a single tensor, too.
        return columns[0] if len(columns) == 1 else torch.cat(columns, -1)

    def pruned_state(self, number: int) -> Tensor:
        """The pruned stream behind the blocks."""
        state = self.stream.states[number]
        for block, outputs in self.outputs.items():
            state = state + self.streams.residual(block, outputs[number])
        return state

    def relative(self, number: int, states: Tensor) -> Tensor:
        """States of a batch, divided by the size of the dense stream, at real tokens, [N, k]."""
        return self.streams.real_tokens(number, states * self.scales[number].to(states.device))

    def residuals(self, number: int) -> Tensor:
        """The dense stream less the pruned one behind the blocks, relative, [N, d]."""
        return self.relative(number, self.streams.dense[number] - self.pruned_state(number))

    def heldout_error(self) -> float:
        """The sum of squares of the held-out residuals."""
        error = 0.0
        for number in self.streams.heldout_batches:
            residuals = self.residuals(number).double()
            error += float(residuals.square().sum())
        return error

    def tokens(self, number: int, has_norm: bool) -> tuple[Tensor, Tensor]:
        """The relative features [N, p] and residuals [N, d] of a batch."""
        features = self.joint_features(number)
        if has_norm:
            # The norm divides the output by its size.
            output = self.outputs[next(iter(self.projections))][number]
            mean_square = output.square().mean(dim=-1, keepdim=True)
            features = features * mean_square.rsqrt().to(self.device)
        features = self.relative(number, self.streams.scaled(features))
        return features, self.residuals(number).to(self.device)

    def moments(self, has_norm: bool = False) -> tuple[Moments, tuple[Tensor, Tensor]]:
        """The sums of the fit rows, and the features and residuals of the held-out rows; of
        narrowed blocks the kept channels are features."""
        streams = self.streams
        state = streams.dense[0]
        is_16_bit = next(iter(self.projections.values())).weight.dtype.itemsize == 2
        moments = Moments.zero(self.width, state.shape[-1], self.device, state.dtype, is_16_bit)
        for number in streams.fit_batches:
            moments.add(*self.tokens(number, has_norm))
        symmetric_(moments.gram)
        heldout = [self.tokens(number, has_norm) for number in streams.heldout_batches]
        features = torch.cat([batch_features for batch_features, _ in heldout])
        residuals = torch.cat([batch_residuals for _, batch_residuals in heldout])
        # Sums over all features cost less than gathering the kept ones of every batch.
        if len(self.kept_features) < self.width:
            moments.gram = moments.gram[self.kept_features][:, self.kept_features]
            moments.cross = moments.cross[self.kept_features]
            features = features[:, self.kept_features]
        return moments, (features, residuals)

    def add_change_(self, change: Tensor) -> None:
        """Add a change [kept features, d] to the output projections, and compute their outputs
        anew."""
        full_change = change.new_zeros(self.width, change.shape[1])
        full_change.index_copy_(0, self.kept_features, change)
        for block, projection in self.projections.items():
            weight = projection.weight
            bias = projection.bias
            inputs = projection.in_features
            # The rows of the change are the features of one projection after the other.
            size = inputs if bias is None else inputs + 1
            block_change = full_change[:size].to(weight.device)
            full_change = full_change[size:]
            self.streams.set_(weight, weight + block_change[:inputs].T)
            if bias is not None:
                self.streams.set_(bias, bias + block_change[-1])
            for number, features in enumerate(self.features[block]):
                output = projection(features.to(self.device))
                self.outputs[block][number] = output.to(self.outputs[block][number])


def _fit_before_norm_(
    site: _FitSite, gains: nn.Parameter, penalties: Sequence[float]
) -> RefitStats:
    """Fit an output projection and the gains of the norm behind it, unless that does harm on the
    held-out rows."""
    ((block, projection),) = site.projections.items()
    weights = [projection.weight, gains]
    if projection.bias is not None:
        weights.append(projection.bias)

    def snapshot() -> list[Tensor]:
        """All that changes: the weights, and the block's outputs."""
        return [*(weight.clone() for weight in weights), *site.outputs[block]]

    def restore_(values: Sequence[Tensor]) -> None:
        site.outputs[block] = list(values[len(weights) :])
        for weight, value in zip(weights, values, strict=False):
            weight.copy_(value)

    old = snapshot()
    old_error = site.heldout_error()
    gain = site.streams.gain(block).to(projection.weight.device)
    moments, heldout = site.moments(has_norm=True)
    penalty = site.stream.ridge_penalty
    change, penalty, _ = best_change(moments, heldout, penalties, penalty, gain)
    site.stream.ridge_penalty = penalty
    site.add_change_(change)
    new = snapshot()
    best = old
    least_error = old_error
    for step in STEP_SIZES:
        pairs = zip(old, new, strict=True)
        restore_([torch.lerp(old_value, new_value, step) for old_value, new_value in pairs])
        # Each step has its own best gains.
        site.streams.set_(gains, gains + _gain_change(site, block).to(gains.device))
        error = site.heldout_error()
        if error < least_error:
            best = snapshot()
            least_error = error
    restore_(best)
    relative_error = 1.0 if best is old else least_error / old_error
    return {"strength": penalty, "error": relative_error}


def _gain_change(site: _FitSite, block: BlockId) -> Tensor:
    """The best change of the gains of the norm behind a block, [d]: a ridge regression for each
    gain."""
    output = site.outputs[block][0]
    cross = torch.zeros(output.shape[-1], dtype=torch.float64, device=output.device)
    squares = torch.zeros_like(cross)
    for number in site.streams.fit_batches:
        normalized = site.streams.normalized(block, site.outputs[block][number])
        unit_features = site.relative(number, normalized)
        cross += (unit_features * site.residuals(number)).sum(0)
        squares += unit_features.square().sum(0)
    return cross / (squares + RIDGE_PENALTIES[0] * squares.mean())
