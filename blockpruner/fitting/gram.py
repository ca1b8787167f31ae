"""X^T X of features X, summed batch by batch: half of the products, and no finer than what a model
computes."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

COLUMNS = 512
"""Columns of X^T X that are summed at once. Entries left of them follow by symmetry and are not
computed."""


@contextmanager
def fast_matmul(is_fast: bool) -> Iterator[None]:
    """Let float32 products round their factors to 16 bits where the device is faster by that.

    For features that a model has computed in 16 bits: these lose nothing. Sums stay float32.
    """
    precision = torch.get_float32_matmul_precision()
    if is_fast:
        torch.set_float32_matmul_precision("medium")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(precision)


def add_gram_(gram: Tensor, features: Tensor) -> None:
    """Add X^T X of tokens X [N, p] to the upper triangle of a sum [p, p]."""
    for start in range(0, len(gram), COLUMNS):
        rows = slice(start, start + COLUMNS)
        gram[rows, start:].addmm_(features[:, rows].T, features[:, start:])


def symmetric_(gram: Tensor) -> Tensor:
    """Mirror the upper triangle of a matrix, a block at a time."""
    for start in range(0, len(gram), COLUMNS):
        rows = slice(start, start + COLUMNS)
        gram[start + COLUMNS :, rows] = gram[rows, start + COLUMNS :].T
    return gram


def cholesky(
    gram: Tensor, penalty: float, dtype: torch.dtype = torch.float64
) -> tuple[Tensor, bool]:
    """The Cholesky factor of X^T X + s mean(diag(X^T X)) for the ridge penalty s, and whether the
    dtype was too narrow for it."""
    # In place and by columns, as LAPACK wants it: no second matrix of this size is held.
    factor = gram.to(dtype, copy=True).mT
    factor.diagonal().add_(penalty * factor.diagonal().mean())
    failed = torch.zeros((), dtype=torch.int32, device=factor.device)
    torch.linalg.cholesky_ex(factor, out=(factor, failed))
    return factor, bool(failed)
