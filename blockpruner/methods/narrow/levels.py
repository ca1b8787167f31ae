"""How narrow each MLP may become, which channels it keeps, and what that costs.

Features X [tokens, p] are the input of an MLP's output projection W [p, d], each token divided by
the size of the residual stream behind the block. H = X^T X / tokens + s mean(diag(X^T X)) / tokens.
Channel j of the best projection for the kept channels costs |w_j|^2 / [H^-1]_jj. The cheapest
channels are removed, some at a time, and the projection and H^-1 of the others are updated in
closed form (structured OBS; ZipLM, arXiv 2302.04089, equations 2 and 3). What the stream loses,
|X (W - W')|^2 / tokens, is its mean squared relative change.

The same change of the stream costs several times as much in one layer as in another. Therefore the
KL divergence of the model with one MLP narrowed is measured, once for each MLP, and the cost of a
width is what the stream loses times the divergence for that. The divergence estimates the rise of
the loss, as far as the dense model predicts texts well, with far less noise: tokens of the text
that the dense model did not expect cancel.
"""

from __future__ import annotations

from collections.abc import Container, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from transformers import PreTrainedModel

from blockpruner.core.blocks import BlockId, BlockKind, format_channels
from blockpruner.core.progress import Observer
from blockpruner.fitting.gram import add_gram_, cholesky, fast_matmul, symmetric_
from blockpruner.fitting.streams import Streams
from blockpruner.scoring.walk import Step
from blockpruner.scoring.work import Rows

REMOVED_AT_ONCE = 48
"""One in 48 of an MLP's channels is removed before costs are computed again."""

RIDGE_PENALTY = 0.003
"""s in H."""

JUDGE_EVERY, MAX_JUDGES, TOKEN_STRIDE = 8, 8, 2
"""One of eight rows, and at most eight rows, measure divergences at every other token. The other
rows are summed."""


ModuleTensors = Sequence[tuple[Tensor, Tensor]]
"""The features and the output of an MLP, batch by batch, as from `Streams.module_tensors`."""


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
    model: PreTrainedModel, rows: Rows, channels: int, measured: Container[str], observer: Observer
) -> Iterator[Levels]:
    """The levels of each MLP that is not in `measured`: `channels` channels removed, twice as many
    and so on. There are two rows or more, of any lengths; all real tokens count. The model's device
    also takes `widths_bytes`."""
    judges = range(len(rows))[JUDGE_EVERY - 1 :: JUDGE_EVERY][:MAX_JUDGES] or [len(rows) - 1]
    judging_rows = [rows[index] for index in judges]
    summed_rows = [row for index, row in enumerate(rows) if index not in judges]
    streams = Streams(model, (*summed_rows, *judging_rows), len(summed_rows))
    mlps = [str(block) for block in streams.blocks if block.kind is BlockKind.MLP]
    final_states = streams.heldout_final_states(dict(enumerate(streams.dense)))
    dense_logits = {
        number: logits.cpu()
        for number, logits in streams.predictions(final_states, TOKEN_STRIDE).items()
    }
    for step in streams.steps:
        todo = [block for block in step if str(block) in mlps and str(block) not in measured]
        tensors_by_block = _pass_(streams, step, todo)
        for block, tensors in tensors_by_block.items():
            gram, gain = _gram(streams, tensors, block)
            weight = streams.output_weight(block).T.double()
            rise: float | None = None
            widths = list[Width]()
            for width, change in levels(gram, weight, gain, channels):
                widths.append(width)
                # Measured once, at about half of the channels.
                is_half = 2 * width.channels < len(weight) or width.channels <= channels
                if rise is None and is_half:
                    changed_states = _final_states_without(streams, tensors, block, change)
                    divergence = streams.divergence(changed_states, dense_logits, TOKEN_STRIDE)
                    rise = divergence / (width.cost or 1)
            assert rise is not None
            yield Levels(str(block), widths, rise)
            observer.advance(1 + mlps.index(str(block)), len(mlps), str(block))


def by_cost(measured: Sequence[Levels]) -> dict[str, list[Width]]:
    """The widths of all MLPs with what each costs, as far as is known."""
    return {
        levels.block: [replace(width, cost=width.cost * levels.rise) for width in levels.widths]
        for levels in measured
    }


def _pass_(
    streams: Streams, step: Step, recorded: Container[BlockId]
) -> dict[BlockId, ModuleTensors]:
    """Move the dense stream past a step; returns the tensors of the blocks that are `recorded`."""
    states = streams.dense
    tensors_by_block = dict[BlockId, ModuleTensors]()
    for block in step:
        if block in recorded:
            tensors = [
                streams.module_tensors(block, state, number) for number, state in enumerate(states)
            ]
            tensors_by_block[block] = tensors
            residuals = [streams.residual(block, output) for _, output in tensors]
        else:
            residuals = [
                streams.block_output(block, state, number) for number, state in enumerate(states)
            ]
        pairs = zip(streams.dense, residuals, strict=True)
        streams.dense = [state + residual for state, residual in pairs]
    return tensors_by_block


def _gram(streams: Streams, tensors: ModuleTensors, block: BlockId) -> tuple[Tensor, Tensor]:
    """X^T X / tokens [p, p] of an MLP, and how many times columns of W count [d], float64. Behind a
    norm these are its gains, and X is also divided by the size of the module's output."""
    weight = streams.output_weight(block)
    norm = streams.post_norm(block)
    gram = torch.zeros(2 * weight.shape[1:], dtype=streams.dense[0].dtype, device=weight.device)
    tokens = 0
    for number in streams.fit_batches:
        features, output = tensors[number]
        size = streams.dense[number].norm(dim=-1, keepdim=True)
        if norm is not None:
            size = size * output.square().mean(dim=-1, keepdim=True).sqrt()
        relative_features = streams.real_tokens(number, features / size).to(weight.device)
        with fast_matmul(weight.dtype.itemsize == 2):
            add_gram_(gram, relative_features)
        tokens += len(relative_features)
    gain = torch.ones(len(weight)) if norm is None else streams.gain(block)
    return symmetric_(gram).div_(tokens), gain.to(gram.device, torch.float64)


def _final_states_without(
    streams: Streams, tensors: ModuleTensors, block: BlockId, change: Tensor
) -> dict[int, Tensor]:
    """The final states of the judging rows if the output projection of a block is smaller by a
    change [p, d]."""
    states = {}
    for number in streams.heldout_batches:
        features, output = tensors[number]
        change_of_output = features.to(change.device) @ change.to(features.dtype)
        new_output = output - change_of_output.to(output)
        new_residual = streams.residual(block, new_output)
        states[number] = streams.dense[number] + new_residual - streams.residual(block, output)
    return streams.heldout_final_states(states, passed=block)


def levels(gram: Tensor, weight: Tensor, gain: Tensor, step: int) -> Iterator[tuple[Width, Tensor]]:
    """The widths of one MLP, each with W less the best projection of its channels, [p, d]; here a
    width's cost is what the stream loses.

    Args:
        gram: X^T X / tokens [p, p], in float32 or wider; what a width loses is computed so.
        weight, gain: W [p, d], float64, and how many times each of its columns counts, [d].
        step: the number of channels that are removed from level to level.
    """
    at_once = max(1, len(weight) // REMOVED_AT_ONCE)
    kept_weight = weight.clone()
    kept = torch.arange(len(weight), device=weight.device)
    inverse = cholesky(gram, RIDGE_PENALTY)[0]
    torch.cholesky_inverse(inverse, out=inverse)
    for goal in range(len(weight) - step, 0, -step):
        rounds, rest = divmod(len(kept) - goal, at_once)
        is_removed = torch.zeros_like(kept, dtype=torch.bool)
        for count in [at_once] * rounds + [rest]:
            # Equation 2 of ZipLM: what the loss rises by without one channel.
            costs = (kept_weight * gain).square().sum(1) / inverse.diagonal()
            costs = costs.masked_fill(is_removed, torch.inf)
            cheapest = costs.argsort(stable=True)[:count]
            # Equation 3: the others make up for the removed channels.
            columns = inverse[:, cheapest]
            removed_weight = kept_weight[cheapest]
            transfer = columns @ torch.linalg.inv(columns[cheapest])
            kept_weight.addmm_(transfer, removed_weight, alpha=-1)
            inverse.addmm_(transfer, columns.T, alpha=-1)
            is_removed[cheapest] = True
        kept, kept_weight, inverse = (
            kept[~is_removed],
            kept_weight[~is_removed],
            inverse[~is_removed],
        )
        inverse = inverse[:, ~is_removed]  # after the rows, which are free again
        change = weight.index_add(0, kept, -kept_weight)
        scaled_change = (change * gain).to(gram.dtype)
        loss = float((scaled_change * (gram @ scaled_change)).sum())
        yield Width(format_channels(kept.tolist(), len(weight)), goal, loss), change
