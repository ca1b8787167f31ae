"""Held-out perplexity, the way of arXiv 2406.10594 and of SliceGPT's code.

Decides how held-out texts become rows and how their NLL is averaged. It runs a model's own forward pass, and does not
use the scoring engine.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel

from blockpruner.core.errors import InputError, NonFiniteLossError
from blockpruner.inputs.calibration import cut
from blockpruner.scoring.losses import token_nll
from blockpruner.scoring.work import LOGITS_BYTES


@dataclass(frozen=True)
class HeldOutPerplexity:
    """The perplexity of a model on held-out rows."""

    perplexity: float
    """exp(nll)."""
    nll: float
    """Mean of row_nll."""
    rows: int
    tokens: int
    """Tokens of all rows; the first one of each is not predicted."""
    row_nll: tuple[float, ...]
    """Each row's mean NLL, nats per token."""


def held_out_rows(
    tokenizer: Any, texts: Sequence[str], seq_len: int, max_rows: int | None = None
) -> list[tuple[int, ...]]:
    """Join all texts with a blank line, tokenize once, cut into rows of `seq_len` tokens, drop the tail.

    Raises:
        InputError: the texts are shorter than one row.
    """
    ids: list[int] = tokenizer("\n\n".join(texts), verbose=False)["input_ids"]
    rows = cut(ids, seq_len)
    if not rows:
        raise InputError(
            f"held-out perplexity has no row: {len(texts)} texts are {len(ids)} tokens, fewer than one row of "
            f"evaluate.perplexity.seq_len {seq_len}; lower seq_len to at most {len(ids)}, or choose longer texts"
        )
    return rows[:max_rows]


@torch.inference_mode()
def measure_perplexity(
    model: PreTrainedModel,
    rows: Sequence[Sequence[int]],
    advance: Callable[[int, int], None] = lambda done, total: None,
) -> HeldOutPerplexity:
    """PPL = exp(1/R * sum_r 1/(T-1) * sum_t -log p(x[r, t+1] | x[r, <=t])) over R rows of T tokens.

    Log-softmax in float32 or wider, sums in float64. The head runs over chunks of tokens: the logits [T, V] of a row
    never fill the memory.

    Args:
        rows: token ids, each row at least two.
        advance: called with (rows done, rows in all).

    Raises:
        NonFiniteLossError: the loss of a row is NaN or infinite; names the row.
    """
    decoder, head = model.get_decoder(), model.get_output_embeddings()
    chunk = max(1, LOGITS_BYTES // (model.config.vocab_size * 4))
    means: list[float] = []
    for number, row in enumerate(rows):
        ids = torch.tensor([row], device=model.device)  # [1, T]
        states = decoder(input_ids=ids, use_cache=False).last_hidden_state[0, :-1]  # [T-1, H]
        total = 0.0
        for part, targets in zip(torch.split(states, chunk), torch.split(ids[0, 1:], chunk), strict=True):
            total += token_nll(head(part), targets).double().sum().item()
        if not math.isfinite(total):
            raise NonFiniteLossError(
                f"held-out perplexity: the loss of row {number} is {total}; try a wider dtype (model.dtype: float32)"
            )
        means.append(total / (len(row) - 1))
        advance(number + 1, len(rows))
    nll = math.fsum(means) / len(means)
    return HeldOutPerplexity(math.exp(nll), nll, len(rows), sum(len(row) for row in rows), tuple(means))
