"""The tensors of a batch of rows. Which rows go together is decided in `work`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Batch:
    """Rows padded on the right. Pads follow every real token, so causal attention never sees them.

    Indices are made on the CPU: for a boolean mask, the CPU would wait for a device to count them.
    """

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
        lengths = torch.tensor([len(row) for row in rows])
        longest = int(lengths.max())
        ids = torch.zeros(len(rows), longest, dtype=torch.int64)
        for number, row in enumerate(rows):
            ids[number, : len(row)] = torch.tensor(row)
        is_real = torch.arange(longest)[None, :] < lengths[:, None]
        # A negative id is the complement of a token that is not scored.
        is_target = (is_real & (ids >= 0))[:, 1:]
        ids = torch.where(ids < 0, ~ids, ids)
        packed = None if is_real.all() else _indices(is_real).to(device)
        places = _indices(is_target)
        return cls(
            input_ids=ids.to(device),
            is_real=is_real.to(device),
            targets=ids[:, 1:].flatten()[places].to(device),
            places=places.to(device),
            counts=is_target.sum(dim=1),
            packed=packed,
        )

    def repeated(self, times: int) -> Tensor | None:
        """`packed` for several copies of the rows, one after the other."""
        if self.packed is None or times == 1:
            return self.packed
        starts = torch.arange(times, device=self.packed.device) * self.is_real.numel()
        return (starts[:, None] + self.packed).flatten()


def _indices(is_chosen: Tensor) -> Tensor:
    return is_chosen.flatten().nonzero()[:, 0]
