"""The tensors of a batch of rows. Which rows go together is decided in `work`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Batch:
    """Rows padded on the right; pads follow every real token, so causal attention never sees them.
    The indices are made on the CPU. Boolean ones would have a device tell their number first, and
    wait for it."""

    input_ids: Tensor
    """[B, T] int64."""
    is_real: Tensor
    """[B, T] bool."""
    targets: Tensor
    """[N] int64: the real tokens that are predicted and scored, row by row."""
    places: Tensor
    """[N] int64: where they are predicted, among all B * (T - 1) positions but the last of each
    row."""
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
            ids.to(device),
            is_real.to(device),
            targets.to(device),
            places.to(device),
            is_target.sum(dim=1),
            packed,
        )

    def repeated(self, times: int) -> Tensor | None:
        """`packed` for so many copies of the rows, one after the other."""
        if self.packed is None or times == 1:
            return self.packed
        starts = torch.arange(times, device=self.packed.device) * self.is_real.numel()
        return (starts[:, None] + self.packed).flatten()
