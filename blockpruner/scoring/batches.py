"""Rows as batches: which rows go together, and the tensors of a batch.

Decides shapes. They move no loss by more than rounding.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from blockpruner.scoring.work import Rows, Span

FULL_TOKENS = 2048
"""A batch of so many real tokens ends where more rows would add too many pads."""

WASTE = 0.1
"""The largest part of pads in such a batch, of its real tokens."""


@dataclass(frozen=True)
class Batch:
    """Rows padded on the right; pads follow every real token, so causal attention never sees them. The indices are made
    on the CPU. Boolean ones would have a device tell their number first, and wait for it."""

    input_ids: Tensor
    """[B, T] int64."""
    is_real: Tensor
    """[B, T] bool."""
    targets: Tensor
    """[N] int64: the real tokens that are predicted and scored, row by row."""
    places: Tensor
    """[N] int64: where they are predicted, among all B * (T - 1) positions but the last of each row."""
    counts: Tensor
    """[B] int64 on the CPU: how many of them each row has."""
    packed: Tensor | None
    """[M] int64: where the M real tokens lie among all B * T; None if there is no pad."""

    @classmethod
    def of(cls, rows: Sequence[Sequence[int]], device: torch.device) -> Batch:
        longest = max(len(row) for row in rows)
        ids = torch.zeros(len(rows), longest, dtype=torch.int64)
        for i, row in enumerate(rows):
            ids[i, : len(row)] = torch.tensor(row)
        lengths = torch.tensor([len(row) for row in rows])
        is_real = torch.arange(longest)[None, :] < lengths[:, None]
        is_target = (is_real & (ids >= 0))[:, 1:]
        ids = torch.where(ids < 0, ~ids, ids)
        packed = None if is_real.all() else is_real.flatten().nonzero()[:, 0].to(device)
        places = is_target.flatten().nonzero()[:, 0]
        targets = ids[:, 1:].flatten()[places]
        return cls(
            ids.to(device), is_real.to(device), targets.to(device), places.to(device), is_target.sum(dim=1), packed
        )

    def repeated(self, times: int) -> Tensor | None:
        """`packed` for so many copies of the rows, one after the other."""
        if self.packed is None or times == 1:
            return self.packed
        starts = torch.arange(times, device=self.packed.device) * self.is_real.numel()
        return (starts[:, None] + self.packed).flatten()


def row_batches(rows: Rows, span: Span, most: int, growth: float = 0.0) -> list[Span]:
    """Neighbours grouped so that a group's padded tokens stay within a limit, and pads do not outweigh what is real.

    Args:
        most: tokens to a group; a longer row is a group of its own.
        growth: how much more memory a token takes for each token of its row, where attention keeps every head's map.
    """
    batches: list[Span] = []
    start, longest, real = 0, 0, 0
    for place, row in enumerate(span):
        length = len(rows[row])
        padded = max(longest, length) * (place - start + 1)
        is_full = padded * (1 + growth * max(longest, length)) > most
        is_waste = real >= FULL_TOKENS and padded > (1 + WASTE) * (real + length)
        if place > start and (is_full or is_waste):
            batches.append(span[start:place])
            start, longest, real = place, 0, 0
        longest, real = max(longest, length), real + length
    batches.append(span[start:])
    return batches
