"""Losses of a token: the pruned model's prediction against the text, or against the dense model's
prediction.

Each function takes a chunk of tokens. Sums run in float32 at least. Their words and names are rows
of `metrics`.
"""

import math
from collections.abc import Callable, Iterator
from functools import wraps

import torch
from torch import Tensor

Loss = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(logits [N, V], targets [N], logits of the dense model [N, V], or none where not needed) ->
losses [N]."""

PIECE_BYTES = 2 * 2**20
"""On a CPU, a loss takes so many bytes of logits at a time, which stay in the cache while it goes
over them."""

PIECE_TOKENS = 4
"""A piece may have so many tokens, however large they are. Pieces are of like size, so none has one
token alone: torch divides the sum over a single token among its threads, and KL over 49,152 logits
then has other bits."""


def pieces(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Logits, and what else there is of each token, in pieces: of a few tokens each on a CPU, else
    all at once."""
    logits = tensors[0]
    number_bytes = max(4, logits.element_size())  # sums run in float32 at least
    max_tokens = max(PIECE_TOKENS, PIECE_BYTES // (logits.shape[-1] * number_bytes))
    num_pieces = 1
    # Only a CPU has a cache that the logits of a whole batch do not fit into.
    if logits.device.type == "cpu":
        num_pieces = max(1, math.ceil(len(logits) / max_tokens))
    return zip(*(tensor.tensor_split(num_pieces) for tensor in tensors), strict=True)


def in_pieces(loss: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """A loss with the same bits, on a CPU computed for a few tokens at a time."""

    @wraps(loss)
    def computed(*tensors: Tensor) -> Tensor:
        return torch.cat([loss(*piece) for piece in pieces(*tensors)])

    return computed


@in_pieces
def token_nll(logits: Tensor, targets: Tensor, dense: Tensor | None = None) -> Tensor:
    """-log p(target) of each token, in nats, [N]: the log-sum-exp of its logits [N, V] less the
    target's logit.

    `cross_entropy` would do, but over a vocabulary of 49,152 its sum is off by 4e-6 on average,
    always to the same side; `logsumexp` is exact to 2e-6 and unbiased.
    """
    logits = wide(logits)
    return logits.logsumexp(dim=-1) - logits.gather(-1, targets[:, None])[:, 0]


@in_pieces
def token_kl(logits: Tensor, targets: Tensor, dense: Tensor) -> Tensor:
    """KL(p || q) = sum_v p_v (log p_v - log q_v), nats, [N]; p: the dense model's distribution, q:
    the masked one's."""
    log_p, log_q = log_probabilities(dense), log_probabilities(logits)
    return (log_p.exp() * (log_p - log_q)).sum(dim=-1)


@in_pieces
def token_js(logits: Tensor, targets: Tensor, dense: Tensor) -> Tensor:
    """JS = 1/2 KL(p || m) + 1/2 KL(q || m), m = (p + q) / 2, nats, at most ln 2, [N] (the metric of
    FinerCut, arXiv 2405.18218, and of table 4 of arXiv 2406.10594)."""
    log_p, log_q = log_probabilities(dense), log_probabilities(logits)
    log_m = torch.logaddexp(log_p, log_q) - math.log(2)
    return (
        (log_p.exp() * (log_p - log_m)).sum(dim=-1) + (log_q.exp() * (log_q - log_m)).sum(dim=-1)
    ) / 2


def wide(tensor: Tensor) -> Tensor:
    """In float32, if it is in 16 bits."""
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def log_probabilities(logits: Tensor) -> Tensor:
    """Of logits [N, V], in float32 at least."""
    return wide(logits).log_softmax(dim=-1)
