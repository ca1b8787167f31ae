"""How narrow each MLP may become, which channels it keeps, and what that costs.

From features X [tokens, p] of an MLP's writer W [p, d], each token divided by the size of the
residual stream behind the block, and H = X^T X / tokens + s mean(diag(X^T X)) / tokens: a channel j
of the best writer for those that are left costs |w_j|^2 / [H^-1]_jj. The cheapest leave some at a
time, and the others' part of writer and H^-1 is brought up to date in closed form (structured OBS;
ZipLM, arXiv 2302.04089, equations 2 and 3). What the stream loses, |X (W - W')|^2 / tokens, is its
mean squared relative change.

A change of the stream costs several times as much in one layer as in another. So the KL divergence
of the model with one MLP narrowed is measured, once for each, and a level's cost is what the stream
loses times the divergence for that. It says what the loss rises by, as far as the dense model
predicts texts well, and with far less noise: tokens that the text decides otherwise cancel.
"""

from __future__ import annotations

from collections.abc import Container, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from transformers import PreTrainedModel

from blockpruner.core.blocks import BlockId, BlockKind, format_channels
from blockpruner.core.progress import Observer
from blockpruner.scoring.gram import add_gram_, factor, products, symmetric_
from blockpruner.scoring.streams import Streams
from blockpruner.scoring.work import Rows

AT_ONCE = 48
"""One in so many of an MLP's channels leaves before costs are renewed."""

STRENGTH = 0.003
"""The pull to smaller writers, s."""

JUDGING, MOST, EVERY = 8, 8, 2
"""One of eight rows measures divergences, at most eight do, at every other token. The other rows
are summed."""


Pairs = Sequence[tuple[Tensor, Tensor]]
"""What the writer of an MLP reads and what its module gives, batch by batch; as from
`Streams.written`."""


@dataclass(frozen=True)
class Width:
    """One width of an MLP."""

    kept: str
    """Its channels, as from `format_channels`."""
    channels: int
    cost: float
    """The mean KL divergence of a token's prediction, in nats, as far as is known."""


@dataclass(frozen=True)
class Levels:
    """What was measured of one MLP."""

    block: str
    widths: Sequence[Width]
    """From wide to narrow; here a width's cost is what the stream loses."""
    rise: float
    """The divergence for each unit of that."""


@torch.no_grad()
def measure_levels(
    model: PreTrainedModel, rows: Rows, channels: int, known: Container[str], observer: Observer
) -> Iterator[Levels]:
    """The levels of each MLP that is not in `known`: so many channels gone, twice as many and more.
    There are two rows or more, of any lengths; all real tokens count. The model's device also takes
    `work.widths_bytes`."""
    places = range(len(rows))[JUDGING - 1 :: JUDGING][:MOST] or [len(rows) - 1]
    judging = [rows[place] for place in places]
    summed = [row for place, row in enumerate(rows) if place not in places]
    streams = Streams(model, (*summed, *judging), len(summed))
    mlps = [str(block) for block in streams.blocks if block.kind is BlockKind.MLP]
    finals = streams.final_states(None, dict(enumerate(streams.dense)))
    dense = {number: logits.cpu() for number, logits in streams.predictions(finals, EVERY).items()}
    for step in streams.steps:
        before, read = streams.dense, dict[BlockId, list[tuple[Tensor, Tensor]]]()
        for block in step:
            if str(block) in mlps and str(block) not in known:
                read[block] = [
                    streams.written(block, state, number) for number, state in enumerate(before)
                ]
                adds = [streams.added(block, gives) for _, gives in read[block]]
            else:
                adds = [streams.adds(block, state, number) for number, state in enumerate(before)]
            streams.dense = [
                state + added for state, added in zip(streams.dense, adds, strict=True)
            ]
        for block, pairs in read.items():
            gram, gain = _moments(streams, pairs, block)
            weight, rise, widths = streams.weight(block).T.double(), None, list[Width]()
            for width, change in levels(gram, weight, gain, channels):
                widths.append(width)
                if rise is None and (
                    2 * width.channels < len(weight) or width.channels <= channels
                ):
                    moved = _final_without(streams, pairs, block, change)
                    rise = streams.divergence(moved, dense, EVERY) / (width.cost or 1)
            assert rise is not None
            yield Levels(str(block), widths, rise)
            observer.advance(1 + mlps.index(str(block)), len(mlps), str(block))


def by_cost(found: Sequence[Levels]) -> dict[str, list[Width]]:
    """The widths of all MLPs with what each costs, as far as is known."""
    return {
        levels.block: [replace(width, cost=width.cost * levels.rise) for width in levels.widths]
        for levels in found
    }


def _moments(streams: Streams, pairs: Pairs, block: BlockId) -> tuple[Tensor, Tensor]:
    """X^T X / tokens [p, p] of an MLP, and how many times columns of W count [d], float64. Behind a
    norm these are its gains, and X is also divided by the size of what the module gives."""
    weight, norm, tokens = streams.weight(block), streams.norm_behind(block), 0
    gram = torch.zeros(2 * weight.shape[1:], dtype=streams.dense[0].dtype, device=weight.device)
    for number in streams.fitted:
        reads, gives = pairs[number]
        size = streams.dense[number].norm(dim=-1, keepdim=True)
        if norm is not None:
            size = size * gives.square().mean(dim=-1, keepdim=True).sqrt()
        features = streams.at_real(number, reads / size).to(weight.device)
        with products(weight.dtype.itemsize == 2):
            add_gram_(gram, features)
        tokens += len(features)
    gain = torch.ones(len(weight)) if norm is None else streams.gain(block)
    return symmetric_(gram).div_(tokens), gain.to(gram.device, torch.float64)


def _final_without(
    streams: Streams, pairs: Pairs, block: BlockId, change: Tensor
) -> dict[int, Tensor]:
    """The final states of the judging rows with this much less in the writer of a block [p, d]."""
    moved = {}
    for number in streams.held_out:
        reads, gives = pairs[number]
        less = gives - (reads.to(change.device) @ change.to(reads.dtype)).to(gives)
        moved[number] = (
            streams.dense[number] + streams.added(block, less) - streams.added(block, gives)
        )
    return streams.final_states(block, moved)


def levels(gram: Tensor, weight: Tensor, gain: Tensor, step: int) -> Iterator[tuple[Width, Tensor]]:
    """The widths of one MLP, each with W less the best writer of its channels, [p, d]; here a
    width's cost is what the stream loses.

    Args:
        gram: X^T X / tokens [p, p], in float32 or wider; what a width loses is computed so.
        weight, gain: W [p, d], float64, and how many times each of its columns counts, [d].
        step: so many channels leave from level to level.
    """
    at_once, left = max(1, len(weight) // AT_ONCE), weight.clone()
    inverse = factor(gram, STRENGTH)[0]
    torch.cholesky_inverse(inverse, out=inverse)
    kept = torch.arange(len(weight), device=weight.device)
    for goal in range(len(weight) - step, 0, -step):
        goes = torch.zeros_like(kept, dtype=torch.bool)
        for more in [at_once] * ((len(kept) - goal) // at_once) + [(len(kept) - goal) % at_once]:
            costs = ((left * gain).square().sum(1) / inverse.diagonal()).masked_fill(
                goes, torch.inf
            )
            now = costs.argsort(stable=True)[:more]
            columns, own = inverse[:, now], left[now]
            across = columns @ torch.linalg.inv(columns[now])
            left.addmm_(across, own, alpha=-1)
            inverse.addmm_(across, columns.T, alpha=-1)
            goes[now] = True
        kept, left, inverse = kept[~goes], left[~goes], inverse[~goes]
        inverse = inverse[:, ~goes]  # after the rows, which are free again
        change = weight.index_add(0, kept, -left)
        narrow = (change * gain).to(gram.dtype)
        loss = float((narrow * (gram @ narrow)).sum())
        yield Width(format_channels(kept.tolist(), len(weight)), goal, loss), change
