"""Refit: the writers of a pruned model are fitted to the dense one, without training.

A hole is what is removed between two kept blocks. Behind it the pruned model's residual stream
lacks what the hole added, and the kept block before it is the last that can make good for that. A
narrowed block lacks channels, and makes good for them itself. What changes are writers: the
matrices through which blocks add to the stream. No weight is added, so every export and every
engine works as before.

All writers from the first narrowed one, or the one before the first hole, are fitted, each by least
squares: the stream behind its block, and behind the hole that follows, to the dense model's. It
goes on to the last block with what the pruned model itself reads, so a fit mends what earlier ones
have left. A token counts by its relative error, |dense - pruned|^2 / |dense|^2. The first token of
a row, whose state is a thousand times as long in many models, would otherwise decide alone.

Some families have a norm behind each module. What such a block adds, g y / rms(y) with the gains g,
is linear in the writer only while rms(y) stays, and its size does not depend on the writer. So the
gains are fitted, too, and the real error on held-out rows decides how much of a writer's change is
kept.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from operator import itemgetter
from typing import Any

import torch
from torch import Tensor, nn

from blockpruner.core.blocks import BlockId, Cut
from blockpruner.core.errors import InputError
from blockpruner.healing.ridge import Moments, best_change
from blockpruner.scoring.gram import symmetric_
from blockpruner.scoring.streams import Stream, Streams

STRENGTHS = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0)
"""Pulls to the old weights. Each fit takes the one that does best on the held-out rows, near that
of the last fit."""

ROUGH = (1.0,)
"""The pull of a first guess."""

SHARES = (1.0, 0.5, 0.25, 0.0)
"""How much of a writer's change is tried before a norm, each time with the gains that fit best."""

Mended = dict[str, Any]
"""What was done at a stop, for the report: the blocks missing behind it (`hole`), and how they were
made up for."""


def refit(
    streams: Streams, cuts: Mapping[str, Cut], strengths: Sequence[float] = ()
) -> Iterator[tuple[Stream, Mended]]:
    """Find new writers for the models of some cuts. Yields each stream behind each of its stops,
    with what was done there, if anything was. Raises InputError if no block of the model ends in a
    single matrix."""
    if all(streams.writer(block) is None for block in streams.blocks):
        message = (
            "compensate: no block of this model ends in a single matrix; set compensate.method:"
            " none"
        )
        raise InputError(message, rule="no-writer", key="compensate.method")
    for stream in streams.walk(cuts):
        stop, mended = stream.stop, dict[str, Any]()
        stream.is_behind = stream.is_behind or bool(stop.hole or stop.channels)
        writers = {block: streams.writer(block) for block in stop.kept}
        able = {block: writer for block, writer in writers.items() if writer is not None}
        if able and stream.is_behind:
            mended = {"hole": stop.missing, "writers": [str(block) for block in able]}
            mended |= _fit_stop_(streams, stream, able, strengths or STRENGTHS)
            stream.weights = {**stream.weights, **streams.put_aside_()}
        elif stream.is_behind:
            stream.states = [
                streams.behind(stop.kept, state, number)
                for number, state in enumerate(stream.states)
            ]
            if stop.hole:
                mended = {"hole": stop.missing, "writers": [], "error": 1.0}
        else:
            stream.states = streams.dense
        yield stream, mended


def _fit_stop_(
    streams: Streams,
    stream: Stream,
    writers: Mapping[BlockId, nn.Linear],
    strengths: Sequence[float],
) -> Mended:
    """Fit the writers of a stop; two at once where both blocks of a layer read the same state."""
    place = _Place(streams, stream, writers)
    if (norm := streams.norm_behind(next(iter(writers)))) is not None:
        facts = _fit_before_norm_(place, norm.get_parameter("weight"), strengths)
    else:
        change, stream.strength, error = best_change(*place.moments(), strengths, stream.strength)
        if error < 1:
            place.change_(change)
        facts = {"strength": stream.strength, "error": error}
    stream.states = [place.moved(number) for number in range(len(streams.dense))]
    return facts


@dataclass
class _Place:
    """The kept blocks of a stop: what they read and give, and what is missing behind them."""

    streams: Streams
    stream: Stream
    writers: Mapping[BlockId, nn.Linear]
    reads: dict[BlockId, list[Tensor]] = field(default_factory=dict)
    """What writers read, batch by batch."""
    gives: dict[BlockId, list[Tensor]] = field(default_factory=dict)
    """What the blocks add, before a norm behind them."""

    def __post_init__(self) -> None:
        streams, stop = self.streams, self.stream.stop
        self.scales = [1 / state.norm(dim=-1, keepdim=True) for state in streams.dense]
        streams.narrow_(stop.channels)
        for block in stop.kept:
            pairs = [
                streams.written(block, state, number)
                for number, state in enumerate(self.stream.states)
            ]
            self.reads[block], self.gives[block] = [x for x, _ in pairs], [y for _, y in pairs]
        self.home = next(
            iter(self.writers.values())
        ).weight.device  # once they have come: layers may only visit
        kept, start = list[Tensor](), 0
        for block, writer in self.writers.items():
            width = writer.in_features + (writer.bias is not None)
            own = [
                *stop.channels.get(block, range(writer.in_features)),
                *range(writer.in_features, width),
            ]
            kept.append(start + torch.tensor(own, device=self.home))
            start += width
        self.width, self.kept = start, torch.cat(kept)

    def features(self, number: int) -> Tensor:
        """What all writers read of a batch, [B, T, p], with a column of ones where one has a
        bias."""
        parts = list[Tensor]()
        for block, writer in self.writers.items():
            parts.append(self.reads[block][number].to(self.home))
            if writer.bias is not None:
                parts.append(torch.ones_like(parts[-1][..., :1]))
        return parts[0] if len(parts) == 1 else torch.cat(parts, -1)

    def moved(self, number: int) -> Tensor:
        """The pruned stream behind the blocks."""
        state = self.stream.states[number]
        for block, gives in self.gives.items():
            state = state + self.streams.added(block, gives[number])
        return state

    def relative(self, number: int, states: Tensor) -> Tensor:
        """States of a batch by the size of the dense stream, at real tokens, [N, k]."""
        return self.streams.at_real(number, states * self.scales[number].to(states.device))

    def missing(self, number: int) -> Tensor:
        """What the moved stream lacks, relatively, [N, d]."""
        return self.relative(number, self.streams.dense[number] - self.moved(number))

    def moments(self, gain: Tensor | None = None) -> tuple[Moments, tuple[Tensor, Tensor]]:
        """The sums of the fitted rows, and features and residuals of those that are held out; of
        narrowed blocks the kept channels are features. `gain` is what the norm behind the only
        writer multiplies its columns with."""
        streams, first = self.streams, next(iter(self.writers))

        def tokens(number: int) -> tuple[Tensor, Tensor]:
            features = self.features(number)
            if gain is not None:
                size = self.gives[first][number].square().mean(dim=-1, keepdim=True)
                features = features * size.rsqrt().to(self.home)
            return self.relative(number, streams.scaled(features)), self.missing(number).to(
                self.home
            )

        state, narrow = streams.dense[0], self.writers[first].weight.dtype
        fitted = Moments.zero(
            self.width, state.shape[-1], self.home, state.dtype, narrow.itemsize == 2
        )
        for number in streams.fitted:
            fitted.add(*tokens(number))
        features, missing = (
            torch.cat(parts) for parts in zip(*map(tokens, streams.held_out), strict=True)
        )
        symmetric_(fitted.gram)
        if len(self.kept) < self.width:
            fitted.gram, fitted.cross = (
                fitted.gram[self.kept][:, self.kept],
                fitted.cross[self.kept],
            )
            features = features[:, self.kept]
        return fitted, (features, missing)

    def change_(self, change: Tensor) -> None:
        """Change the writers, and what they give of what they read."""
        whole = change.new_zeros(self.width, change.shape[1]).index_copy_(0, self.kept, change)
        for block, writer in self.writers.items():
            count = writer.in_features + (writer.bias is not None)
            part, whole = whole[:count].to(writer.weight.device), whole[count:]
            self.streams.change_(writer.weight, writer.weight + part[: writer.in_features].T)
            if writer.bias is not None:
                self.streams.change_(writer.bias, writer.bias + part[-1])
            pairs = zip(self.reads[block], self.gives[block], strict=True)
            self.gives[block] = [writer(x.to(self.home)).to(y) for x, y in pairs]


def _fit_before_norm_(place: _Place, gains: nn.Parameter, strengths: Sequence[float]) -> Mended:
    """Fit a writer and the gains of the norm behind it, unless that does harm on the held-out
    rows."""
    streams, ((block, writer),) = place.streams, place.writers.items()
    weights = [weight for weight in (writer.weight, writer.bias, gains) if weight is not None]

    def error() -> float:
        return sum(
            float(place.missing(number).double().square().sum()) for number in streams.held_out
        )

    def values() -> list[Tensor]:
        """All that changes: the weights, and what the block gives."""
        return [*(weight.clone() for weight in weights), *place.gives[block]]

    def set_(values: Sequence[Tensor]) -> None:
        place.gives[block] = list(values[len(weights) :])
        for weight, value in zip(weights, values, strict=False):
            weight.copy_(value)

    def tried(share: float) -> tuple[float, list[Tensor]]:
        """The error with a share of the writer's change and the gains that are best then."""
        set_([torch.lerp(*pair, share) for pair in zip(old, new, strict=True)])
        streams.change_(gains, gains + _more_gain(place, block).to(gains.device))
        return error(), values()

    old, before, gain = values(), error(), streams.gain(block).to(writer.weight.device)
    change, strength, _ = best_change(*place.moments(gain), strengths, place.stream.strength, gain)
    place.stream.strength = strength
    place.change_(change)
    new = values()
    after, best = min(map(tried, SHARES), key=itemgetter(0))
    set_(best if after < before else old)
    return {"strength": strength, "error": after / before if after < before else 1.0}


def _more_gain(place: _Place, block: BlockId) -> Tensor:
    """What is best added to the gains of the norm behind a block, [d]: a ridge regression for each
    of them."""
    streams, given = place.streams, place.gives[block][0]
    cross, square = torch.zeros(2, given.shape[-1], dtype=torch.float64, device=given.device)
    for number in streams.fitted:
        unit = place.relative(number, streams.unit(block, place.gives[block][number]))
        cross += (unit * place.missing(number)).sum(0)
        square += unit.square().sum(0)
    more: Tensor = cross / (square + STRENGTHS[0] * square.mean())
    return more
