"""Methods of compensation: COMPENSATIONS, one row each.

A hole is what is removed between two kept blocks. Behind it the pruned model's residual stream lacks what the hole
added, and the kept block before it is the last that can make good for that. Each method changes writers: the matrices
through which blocks add to the stream. No weight is added, so every export and every engine works as before.

- map (ReplaceMe, arXiv 2505.02819): the writer W before the hole becomes T W, with T by least squares.
- refit: all writers from the one before the first hole on, each itself by least squares.

Both fit the stream to the dense model's: behind the hole, and with refit behind every kept block that
follows, too. They go from the first hole to the last with what the pruned model itself reads, so a fit mends what
earlier ones have left. A token counts by its relative error,
|dense - pruned|^2 / |dense|^2. The first token of a row, whose state is a thousand times as long in many models, would
otherwise decide alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from blockpruner.core.blocks import BlockId, Mask
from blockpruner.core.errors import InputError
from blockpruner.core.registry import Registry
from blockpruner.healing.ridge import Moments, best_change
from blockpruner.healing.streams import Stop, Streams

STRENGTHS = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0)
"""Pulls to the old weights. Each fit takes the one that does best on the held-out rows."""

Mended = dict[str, Any]
"""What was done at a stop, for the report: the blocks missing behind it (`hole`), and how they were made up for."""


@dataclass(frozen=True)
class Compensation:
    """One method."""

    name: str
    """As in `compensate.method` of a run file."""
    title: str
    change_: Callable[[Streams, Mask], Iterator[Mended]]
    """Changes weights of the streams' model in place, stop by stop. It moves the pruned stream on."""


@dataclass(frozen=True)
class _Form:
    """What a fit may change of a writer y = W x + b."""

    features: Callable[[nn.Linear, Tensor, Tensor], Tensor]
    """(writer, x [..., p], y [..., d]) -> [..., k], on which the change of y depends linearly."""
    delta: Callable[[nn.Linear, Tensor], tuple[Tensor | float, Tensor | float]]
    """(writer, D [k, d]) -> what is added to W and b."""
    everywhere: bool = False
    """Writers behind the first hole are fitted although no hole follows them: they mend what is left of the errors."""


def _with_one(writer: nn.Linear, x: Tensor) -> Tensor:
    return x if writer.bias is None else torch.cat([x, torch.ones_like(x[..., :1])], dim=-1)


MAP = _Form(
    lambda writer, x, y: y,
    lambda writer, D: (D.T @ writer.weight.to(D), 0.0 if writer.bias is None else D.T @ writer.bias.to(D)),
)
REFIT = _Form(
    lambda writer, x, y: _with_one(writer, x),
    lambda writer, D: (D[: writer.in_features].T, D[-1]),
    everywhere=True,
)


def _fit_(form: _Form, streams: Streams, mask: Mask) -> Iterator[Mended]:
    if all(streams.writer(block) is None for block in streams.blocks):
        raise InputError(
            "compensate: no block of this model ends in a single matrix; set compensate.method: none",
            rule="no-writer",
            key="compensate.method",
        )
    behind = False
    for stop in streams.stops(mask):
        behind = behind or bool(stop.hole)
        writers = {block: streams.writer(block) for block in stop.kept}
        able = {block: writer for block, writer in writers.items() if writer is not None}
        if able and (stop.hole or (behind and form.everywhere)):
            yield {"hole": stop.missing, "writers": [str(block) for block in able]} | _fit_stop_(
                form, streams, stop, able
            )
            continue
        streams.pruned = [streams.behind(stop.kept, state, number) for number, state in enumerate(streams.pruned)]
        if stop.hole:
            yield {"hole": stop.missing, "writers": [], "error": 1.0}


def _fit_stop_(form: _Form, streams: Streams, stop: Stop, writers: Mapping[BlockId, nn.Linear]) -> Mended:
    """Fit the writers of a stop; two at once where both blocks of a layer read the same state."""
    batches = range(len(streams.real))
    reads, gives = dict[BlockId, list[Tensor]](), dict[BlockId, list[Tensor]]()
    for block in stop.kept:
        pairs = [streams.written(block, number) for number in batches]
        reads[block], gives[block] = [x for x, _ in pairs], [y for _, y in pairs]

    def moved(number: int) -> Tensor:
        return streams.pruned[number] + sum(streams.added(block, gives[block][number]) for block in stop.kept)

    def features(number: int) -> list[Tensor]:
        return [form.features(writer, reads[block][number], gives[block][number]) for block, writer in writers.items()]

    sizes = [part.shape[-1] for part in features(0)]
    first, outputs = next(iter(writers)), streams.dense[0].shape[-1]
    home = writers[first].weight.device
    fitted, held_out = (Moments.zero(sum(sizes), outputs, home) for _ in range(2))
    for number in batches:
        missing = streams.dense[number] - moved(number)
        weight = 1 / streams.dense[number].norm(dim=-1, keepdim=True)
        per_unit, gain = weight, streams.gain(first)
        if gain is not None:  # behind the module a norm, linear in the module's output at its present size
            missing = missing / gain
            per_unit = weight * gives[first][number].square().mean(dim=-1, keepdim=True).rsqrt()
        real, moments = streams.real[number], fitted if streams.is_fitted[number] else held_out
        moments.add((torch.cat(features(number), -1) * per_unit)[real].to(home), (missing * weight)[real].to(home))
    change, strength, error = best_change(fitted, held_out, STRENGTHS)
    if error < 1:
        for (block, writer), part in zip(writers.items(), torch.split(change, sizes), strict=True):
            _change_(form, streams, writer, part, reads[block], gives[block])
    streams.pruned = [moved(number) for number in batches]
    return {"strength": strength, "error": error}


def _change_(
    form: _Form, streams: Streams, writer: nn.Linear, change: Tensor, reads: Sequence[Tensor], gives: list[Tensor]
) -> None:
    """Change a writer, and what it gives of what it reads."""
    weight, bias = form.delta(writer, change)
    step = streams.change_(writer.weight, writer.weight + weight).T.to(reads[0])
    shift: Tensor | float = 0.0
    if writer.bias is not None:
        shift = streams.change_(writer.bias, writer.bias + bias).to(reads[0])
    for number, x in enumerate(reads):
        gives[number] = gives[number] + x @ step + shift


COMPENSATIONS: Registry[Compensation] = Registry(
    "compensate.method",
    Compensation,
    [
        Compensation("map", "writers mapped", partial(_fit_, MAP)),
        Compensation("refit", "writers refitted", partial(_fit_, REFIT)),
    ],
)
