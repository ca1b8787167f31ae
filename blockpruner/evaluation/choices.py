"""Log-likelihoods of continuations, with what neighbouring requests have in common computed once.

The choices of an item share their beginning: lm-eval's own model class runs the model over it once for each choice, and
makes logits of all of its tokens. Here a group of requests is two passes: one over the common tokens, whose keys and
values are kept, and one over the rest of each request; and only states that predict a scored token reach the head.

Decides which requests form a group, and what goes through the model at once. What a request is, and what is made of its
answer, is lm-eval's.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Any, TypeVar

import torch
from torch import Tensor
from transformers import Cache, PreTrainedModel

from blockpruner.model.models import head_of
from blockpruner.scoring.losses import token_nll

TOKENS, PADDED = 512, 64
"""A pass has at most TOKENS tokens (or one row), of which at most PADDED fill rows up."""

WORTH = 8
"""Fewer common tokens than this are not worth a pass of their own."""

Answer = tuple[float, bool]
"""log p of a continuation in nats, and whether each of its tokens is the likeliest one."""


Before = tuple[Cache, Tensor]
"""Keys and values of common tokens, and which of these are real, [groups, T]."""

Row = TypeVar("Row")


@dataclass(frozen=True)
class Continuation:
    """Tokens to score behind tokens that are given."""

    number: int
    """Among all requests."""
    tokens: tuple[int, ...]
    """All but the last are read, and the last ones scored."""
    scored: int

    @property
    def given(self) -> int:
        """Tokens whose states predict nothing that is scored."""
        return len(self.tokens) - self.scored - 1


@dataclass(frozen=True)
class Group:
    """Neighbouring requests that begin with the same tokens."""

    common: int
    """How many tokens; 0 for a request on its own."""
    requests: tuple[Continuation, ...]


@dataclass(frozen=True)
class Rest:
    """What is left of a request behind the tokens that its group has in common."""

    request: Continuation
    common: int
    group: int
    """Among those whose common tokens are read at once."""

    @property
    def tokens(self) -> tuple[int, ...]:
        """Those that are read."""
        return self.request.tokens[self.common : -1]


@torch.inference_mode()
def answers(
    model: PreTrainedModel,
    requests: Sequence[tuple[Sequence[int], Sequence[int]]],
    max_length: int,
    advance: Callable[[int], None] = lambda count: None,
) -> list[Answer]:
    """Score (given, continuation) pairs of token ids, none of them empty.

    Args:
        max_length: the most tokens that the model reads; of a longer request the first ones are left out, as lm-eval
            does.
        advance: called with how many requests are done.
    """
    cut = [
        Continuation(number, (*given, *rest)[-(max_length + 1) :], len(rest))
        for number, (given, rest) in enumerate(requests)
    ]
    found: dict[int, Answer] = {}
    made = groups(cut)
    shared = [group for group in made if group.common]
    for batch in _passes(shared, lambda group: group.common):
        rests = [Rest(one, group.common, number) for number, group in enumerate(batch) for one in group.requests]
        before = _read(model, batch)
        for rows in _passes(rests, lambda rest: len(rest.tokens)):
            found |= _score(model, rows, before)
            advance(len(found))
    alone = [Rest(group.requests[0], 0, 0) for group in made if not group.common]
    for rows in _passes(alone, lambda rest: len(rest.tokens)):
        found |= _score(model, rows)
        advance(len(found))
    return [found[number] for number in range(len(requests))]


def groups(requests: Sequence[Continuation]) -> list[Group]:
    """Put neighbours together that have WORTH or more common tokens, none of which predicts what is scored."""
    made: list[Group] = []
    for request in requests:
        last = made[-1] if made else None
        common = _common(last.requests[-1], request) if last else 0
        if last is not None and common >= max(WORTH, last.common):
            made[-1] = Group(last.common or common, (*last.requests, request))
        else:
            made.append(Group(0, (request,)))
    return made


def _common(a: Continuation, b: Continuation) -> int:
    """How many given tokens both begin with."""
    pairs = zip(a.tokens[: a.given], b.tokens[: b.given], strict=False)
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))


def _passes(rows: Sequence[Row], length: Callable[[Row], int]) -> Iterator[list[Row]]:
    """Rows of like lengths, the longest first."""
    held: list[Row] = []
    real = 0
    for row in sorted(rows, key=length, reverse=True):
        padded, real = (len(held) + 1) * length(held[0] if held else row), real + length(row)
        if held and (padded > TOKENS or padded - real > PADDED):
            yield held
            held, real = [], length(row)
        held.append(row)
    if held:
        yield held


def _score(model: PreTrainedModel, rests: Sequence[Rest], before: Before | None = None) -> dict[int, Answer]:
    """Run over rests, padded on the right, behind all that is scored."""
    longest = max(len(rest.tokens) for rest in rests)
    ids = torch.tensor([[*rest.tokens, *[0] * (longest - len(rest.tokens))] for rest in rests])
    is_real, places = torch.ones_like(ids), torch.arange(longest).repeat(len(rests), 1)
    kwargs: dict[str, Any] = {"use_cache": False}
    if before is not None:
        cache, is_common = before
        of = torch.tensor([rest.group for rest in rests])
        own = copy.copy(cache)
        own.layers = [copy.copy(layer) for layer in cache.layers]  # selecting gives them other tensors
        own.batch_select_indices(of)  # of the CPU: layers may lie on several devices
        places += is_common[of].sum(-1, keepdim=True)
        is_real = torch.cat([is_common[of], is_real], dim=-1)
        kwargs = {"use_cache": True, "cache": own}
    states = _run(model, ids, is_real, places, **kwargs).last_hidden_state
    requests = [rest.request for rest in rests]
    first = [rest.request.given - rest.common for rest in rests]
    rows = [row for row, request in enumerate(requests) for _ in range(request.scored)]
    columns = [start + i for start, request in zip(first, requests, strict=True) for i in range(request.scored)]
    logits = head_of(model)(states[torch.tensor(rows), torch.tensor(columns)])
    wanted = torch.tensor([token for request in requests for token in request.tokens[-request.scored :]]).to(
        logits.device
    )
    sizes = [request.scored for request in requests]
    losses = torch.split(token_nll(logits, wanted).double().cpu(), sizes)
    hits = torch.split((logits.argmax(-1) == wanted).cpu(), sizes)
    return {
        request.number: (-loss.sum().item(), bool(hit.all()))
        for request, loss, hit in zip(requests, losses, hits, strict=True)
    }


def _read(model: PreTrainedModel, batch: Sequence[Group]) -> Before:
    """Run over common tokens, padded on the left."""
    width = max(group.common for group in batch)
    ids, is_real = torch.zeros(2, len(batch), width, dtype=torch.long)
    for row, group in enumerate(batch):
        ids[row, width - group.common :] = torch.tensor(group.requests[0].tokens[: group.common])
        is_real[row, width - group.common :] = 1
    places = (is_real.cumsum(-1) - 1).clamp(min=0)
    return _run(model, ids, is_real, places, use_cache=True).past_key_values, is_real


def _run(model: PreTrainedModel, ids: Tensor, is_real: Tensor, places: Tensor, **kwargs: Any) -> Any:
    """The decoder over token ids, [B, T]; `is_real` also tells of the tokens in a cache."""
    device = model.device
    return model.get_decoder()(
        input_ids=ids.to(device), attention_mask=is_real.to(device), position_ids=places.to(device), **kwargs
    )
