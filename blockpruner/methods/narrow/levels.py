"""How narrow each MLP may become, which channels it keeps, and what that costs.

From features X [tokens, p] of an MLP's writer W [p, d], each token divided by the size of the residual stream behind
the block, and H = X^T X / tokens + s mean(diag(X^T X)) / tokens: a channel j of the best writer for those that are left
costs |w_j|^2 / [H^-1]_jj. The cheapest leave some at a time, and the others' part of writer and H^-1 is brought up to
date in closed form (structured OBS; ZipLM, arXiv 2302.04089, equations 2 and 3). What the stream loses,
|X (W - W')|^2 / tokens, is its mean squared relative change.

A change of the stream costs several times as much in one layer as in another. So the loss of the model with one MLP
narrowed is measured, once for each, and a level's cost is what the stream loses times what the loss rose by for that.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from statistics import median

import torch
from torch import Tensor
from transformers import PreTrainedModel

from blockpruner.core.blocks import DENSE, BlockId, BlockKind, Channels, Cut
from blockpruner.core.progress import Observer
from blockpruner.scoring.streams import Streams
from blockpruner.scoring.work import Rows

AT_ONCE = 32
"""So many channels leave before costs are renewed."""

STRENGTH = 0.003
"""The pull to smaller writers, s."""

JUDGING, MOST = 4, 16
"""One of so many rows measures losses, and no more rows than this; the others are summed."""

LEAST = 0.2
"""The least that a change of the stream may cost in a layer, by the median of all: what is measured is uncertain."""


@dataclass(frozen=True)
class Width:
    """One width of an MLP."""

    kept: Channels
    cost: float
    """What the mean negative log-likelihood of a token rises by, as far as is known."""


@torch.no_grad()
def levels_of(model: PreTrainedModel, rows: Rows, step: int, observer: Observer) -> dict[BlockId, list[Width]]:
    """The levels of each MLP of a dense model, from wide to narrow: `step`, 2 `step` and more channels gone, as long as
    some are left.

    Args:
        rows: two or more, of any lengths; all real tokens count. The host's memory takes their residual stream in
            float32, and the device three float64 matrices of the MLP's width.
    """
    places = range(len(rows))[JUDGING - 1 :: JUDGING][:MOST] or [len(rows) - 1]
    judging = [rows[place] for place in places]
    summed = [row for place, row in enumerate(rows) if place not in places]
    streams, found = Streams(model, (*summed, *judging), len(summed)), dict[BlockId, list[Width]]()
    count, rises = sum(block.kind is BlockKind.MLP for block in streams.blocks), dict[BlockId, float]()
    dense = streams.loss_behind(None, dict(enumerate(streams.dense)))
    for stream in streams.walk({"": Cut(DENSE)}):
        for block in (block for block in stream.stop.kept if block.kind is BlockKind.MLP):
            gram, gain = _moments(streams, stream.states, block)
            weight, found[block] = streams.weight(block).T.double(), []
            for level, writer in levels(gram, weight, gain, step):
                found[block].append(level)
                if block not in rises and (2 * len(level.kept) < len(weight) or len(level.kept) <= step):
                    change = weight.index_add(0, torch.tensor(level.kept, device=weight.device), -writer)
                    rises[block] = (_loss_without(streams, stream.states, block, change) - dense) / (level.cost or 1)
            observer.advance(len(found), count, str(block))
        stream.states = streams.dense
    least = LEAST * median(map(abs, rises.values()))
    return {
        block: [replace(level, cost=level.cost * max(least, rises[block])) for level in levels]
        for block, levels in found.items()
    }


def _moments(streams: Streams, states: Sequence[Tensor], block: BlockId) -> tuple[Tensor, Tensor]:
    """X^T X / tokens [p, p] of an MLP, and how many times columns of W count [d], float64. Behind a norm these are its
    gains, and X is also divided by the size of what the module gives."""
    weight, norm, tokens = streams.weight(block), streams.norm_behind(block), 0
    gram = torch.zeros(2 * weight.shape[1:], dtype=torch.float64, device=weight.device)
    for number in streams.fitted:
        reads, gives = streams.written(block, states[number], number)
        size = streams.dense[number].norm(dim=-1, keepdim=True)
        if norm is not None:
            size = size * gives.square().mean(dim=-1, keepdim=True).sqrt()
        features = (reads / size)[streams.real[number]].to(weight.device)
        gram += features.T @ features
        tokens += len(features)
    gain = torch.ones(len(weight)) if norm is None else streams.gain(block)
    return gram / tokens, gain.to(gram)


def _loss_without(streams: Streams, states: Sequence[Tensor], block: BlockId, change: Tensor) -> float:
    """The loss of the judging rows with this much less in the writer of a block [p, d]."""
    moved = {}
    for number in streams.held_out:
        reads, gives = streams.written(block, states[number], number)
        less = gives - reads @ change.to(reads)
        moved[number] = streams.dense[number] + streams.added(block, less) - streams.added(block, gives)
    return streams.loss_behind(block, moved)


def levels(gram: Tensor, weight: Tensor, gain: Tensor, step: int) -> Iterator[tuple[Width, Tensor]]:
    """The levels of one MLP, each with the best writer of its channels [k, d]; here a level's cost is what the stream
    loses.

    Args:
        gram: X^T X / tokens [p, p], float64, as all are.
        weight: W [p, d].
        gain: how many times each column of W counts, [d].
        step: so many channels leave from level to level.
    """
    shifted = gram.clone()
    shifted.diagonal().add_(STRENGTH * gram.diagonal().mean())
    inverse, left = torch.linalg.inv(shifted), weight.clone()
    kept, goal = torch.arange(len(weight), device=weight.device), len(weight) - step
    while goal > 0:
        costs = (left * gain).square().sum(1) / inverse.diagonal()
        goes = torch.zeros_like(kept, dtype=torch.bool)
        goes[costs.argsort(stable=True)[: min(AT_ONCE, len(kept) - goal)]] = True
        across = inverse[~goes][:, goes] @ torch.linalg.inv(inverse[goes][:, goes])
        left = left[~goes] - across @ left[goes]
        inverse = inverse[~goes][:, ~goes] - across @ inverse[goes][:, ~goes]
        kept = kept[~goes]
        if len(kept) == goal:
            change = weight.index_add(0, kept, -left) * gain
            yield Width(tuple(kept.tolist()), float((change * (gram @ change)).sum())), left
            goal -= step
