"""X^T X of features X, summed batch by batch: half of the products, and no finer than what a model
computes."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

COLUMNS = 512
"""Columns of X^T X that are summed at once. Those before them, which are known by symmetry, are
left out."""


@contextmanager
def products(rough: bool) -> Iterator[None]:
    """Within, products of float32 may round what they multiply to 16 bits, and add up in float32,
    where that is faster: features that a model has computed in 16 bits have no more."""
    if not rough:
        yield
        return
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def add_gram_(gram: Tensor, features: Tensor) -> None:
    """Add X^T X of tokens X [N, p] to the upper triangle of a sum [p, p]."""
    for start in range(0, len(gram), COLUMNS):
        part = slice(start, start + COLUMNS)
        gram[part, start:].addmm_(features[:, part].T, features[:, start:])


def symmetric_(gram: Tensor) -> Tensor:
    """Mirror the upper triangle of a matrix, a block at a time."""
    for start in range(0, len(gram), COLUMNS):
        part = slice(start, start + COLUMNS)
        gram[start + COLUMNS :, part] = gram[part, start + COLUMNS :].T
    return gram


def factor(
    gram: Tensor, strength: float, dtype: torch.dtype = torch.float64
) -> tuple[Tensor, bool]:
    """The Cholesky factor of X^T X + s mean(diag(X^T X)), and whether the dtype was too narrow for
    it. In place: by columns, as the library wants it, so that no more than the factor itself is
    held."""
    found = gram.to(dtype, copy=True).mT
    found.diagonal().add_(strength * found.diagonal().mean())
    failed = torch.zeros((), dtype=torch.int32, device=found.device)
    torch.linalg.cholesky_ex(found, out=(found, failed))
    return found, bool(failed)
