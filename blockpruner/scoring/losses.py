"""Losses of a token: the pruned model's prediction against the text, or against the dense model's prediction.

Each function takes a chunk of tokens. Sums run in float32 at least. Their words and names are rows of `metrics`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import wraps

import torch
from torch import Tensor

Loss = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(logits [N, V], targets [N], logits of the dense model [N, V], or none where not needed) -> losses [N]."""

CACHED = 2 * 2**20
"""On a CPU, a loss takes so many bytes of logits at a time: it goes over them several times, and they stay in a core's
cache meanwhile."""

FEWEST = 4
"""Tokens to a piece, or more. Pieces are of like size, so none has a single token, whose sum torch would divide among
the threads and so round otherwise."""


def in_pieces(loss: Loss) -> Callable[..., Tensor]:
    """A loss with the same bits, on a CPU computed for a few tokens at a time (`CACHED`).

    For a gradient it is taken whole: each piece would fill a gradient of all logits with zeros.
    """

    @wraps(loss)
    def computed(logits: Tensor, targets: Tensor, dense: Tensor | None = None) -> Tensor:
        given = (logits, targets, logits[:0] if dense is None else dense)
        tokens = max(FEWEST, CACHED // (logits.shape[-1] * logits.element_size()))
        if logits.device.type != "cpu" or logits.requires_grad or len(logits) <= tokens:
            return loss(*given)
        count = math.ceil(len(logits) / tokens)
        return torch.cat([loss(*piece) for piece in zip(*(part.tensor_split(count) for part in given), strict=True)])

    return computed


@in_pieces
def token_nll(logits: Tensor, targets: Tensor, dense: Tensor | None = None) -> Tensor:
    """-log p(target) of each token, in nats, [N]: the log-sum-exp of its logits [N, V] less the target's logit.

    `cross_entropy` would do, but over a vocabulary of 49,152 its sum is off by 4e-6 on average, always to the same
    side; `logsumexp` is exact to 2e-6 and unbiased.
    """
    wide = _wide(logits)
    return wide.logsumexp(dim=-1) - wide.gather(-1, targets[:, None])[:, 0]


@in_pieces
def token_kl(logits: Tensor, targets: Tensor, dense: Tensor) -> Tensor:
    """KL(p || q) = sum_v p_v (log p_v - log q_v), nats, [N]; p: the dense model's distribution, q: the masked one's."""
    log_p, log_q = _log_probabilities(dense), _log_probabilities(logits)
    return (log_p.exp() * (log_p - log_q)).sum(dim=-1)


@in_pieces
def token_js(logits: Tensor, targets: Tensor, dense: Tensor) -> Tensor:
    """Jensen-Shannon divergence of the two output distributions, nats, at most ln 2, [N].

    JS = 1/2 KL(p || m) + 1/2 KL(q || m), m = (p + q) / 2 (the metric of FinerCut, arXiv 2405.18218, and of table 4 of
    arXiv 2406.10594).
    """
    log_p, log_q = _log_probabilities(dense), _log_probabilities(logits)
    log_m = torch.logaddexp(log_p, log_q) - math.log(2)
    return ((log_p.exp() * (log_p - log_m)).sum(dim=-1) + (log_q.exp() * (log_q - log_m)).sum(dim=-1)) / 2


def _wide(logits: Tensor) -> Tensor:
    return logits if logits.dtype == torch.float64 else logits.float()


def _log_probabilities(logits: Tensor) -> Tensor:
    return _wide(logits).log_softmax(dim=-1)
