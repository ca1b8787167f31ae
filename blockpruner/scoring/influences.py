"""Influences of a unit: how much it changes the residual stream, from one forward pass.

In functions of states x [B, T, H] is the state that a unit (a block, a layer) reads, f [B, T, H] is
what it adds, and is_real [B, T] tells tokens from pads. Numbers are float32 at least; lower means
less important. Their words are rows of `metrics`.
"""

from collections.abc import Callable

from torch import Tensor, linalg
from torch.nn import functional

Influence = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(x, f, is_real) -> [B]."""


def block_influence(x: Tensor, f: Tensor, is_real: Tensor) -> Tensor:
    """BI = 1 - mean over a row's tokens of cos(x, x + f), [B], in [0, 2] (ShortGPT, arXiv
    2403.03853, eq. 1).

    For a block it is the score of LLM-Drop (arXiv 2406.15786, eq. 2), and that of the paper's
    figure 1.
    """
    return 1 - _mean(functional.cosine_similarity(x, x + f, dim=-1), is_real)


def relative_magnitude(x: Tensor, f: Tensor, is_real: Tensor) -> Tensor:
    """RM = mean over a row's tokens of |f| / |x + f|, [B] (weight subcloning, arXiv 2312.09299)."""
    return _mean(linalg.vector_norm(f, dim=-1) / linalg.vector_norm(x + f, dim=-1), is_real)


def relative_magnitude_frobenius(x: Tensor, f: Tensor, is_real: Tensor) -> Tensor:
    """RM with one Frobenius norm over all tokens of a row: |F| / |X + F|, [B].

    Tokens of massive activation (often the first) outweigh all others here. The paper's rows for
    this method may have come about that way.
    """
    real = is_real[..., None]
    result: Tensor = linalg.vector_norm(f * real, dim=(1, 2)) / linalg.vector_norm(
        (x + f) * real, dim=(1, 2)
    )
    return result


def _mean(values: Tensor, is_real: Tensor) -> Tensor:
    # chosen, not multiplied: where a pad's embedding is zero, its ratio of norms may be 0 / 0
    return values.where(is_real, 0.0).sum(dim=1) / is_real.sum(dim=1)
