"""Log-likelihoods of continuations, with what neighbouring requests have in common computed once.

The choices of an item share their beginning: lm-eval's own model class runs the model over it once for each choice, and
makes logits of all of its tokens. Here a group of requests is two passes: one over the common tokens, whose keys and
values are kept, and one over the rest of each request; and only states that predict a scored token reach the head.

Decides which requests form a group, and what goes through the model at once: on a device less and less, until it fits.
What a request is, and what is made of its answer, is lm-eval's.
"""

import copy
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import takewhile
from typing import Any, TypeVar

import torch
from torch import Tensor
from transformers import Cache, PreTrainedModel

from blockpruner.model import accelerator
from blockpruner.model.models import head_of
from blockpruner.scoring.losses import token_nll

TOKENS = 512
"""A pass on a CPU has at most so many tokens (or one row). And the head reads so many states at once anywhere, which
for a vocabulary of 128,256 makes logits of 0.3 GB in float32."""

DEVICE_TOKENS = 4096
"""A pass on another device has at most so many tokens, those in its cache with them. Calculated for Llama2-7B in
bfloat16 with 0.5 MB of keys and values a token: weights of 13.5 GB, common tokens and rows that continue them of 2.1 GB
each, 17.8 GB at most. It is 55 TFLOP, 0.14 s at 40 % of an H100's peak; 600 launches of 10 us
take 0.006 s."""

PADDED = 8
"""One token of so many may fill rows up."""

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
    common: int = 0
    """How many of the first are read with those of its group."""
    group: int = 0
    """Among those whose common tokens are read at once."""

    @property
    def given(self) -> int:
        """Tokens whose states predict nothing that is scored."""
        return len(self.tokens) - self.scored - 1

    @property
    def rest(self) -> tuple[int, ...]:
        """Those that are read behind the common ones."""
        return self.tokens[self.common : -1]


@dataclass(frozen=True)
class Group:
    """Neighbouring requests that begin with the same tokens."""

    common: int
    """How many tokens; 0 for a request on its own."""
    requests: tuple[Continuation, ...]


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
    # the state of a linear attention belongs to one request
    is_hybrid = "linear_attention" in (getattr(model.config, "layer_types", None) or ())
    made = [Group(0, (one,)) for one in cut] if is_hybrid else groups(cut)
    passes = _Passes(pass_tokens(model.device))

    def score(requests: Sequence[Continuation], before: Before | None = None) -> None:
        found.update(_score(model, requests, before))
        advance(len(found))

    def read(batch: Sequence[Group]) -> None:
        asked = ((number, group.common, one) for number, group in enumerate(batch) for one in group.requests)
        left = [replace(one, common=common, group=number) for number, common, one in asked if one.number not in found]
        before = _read(model, batch)
        held = 0 if model.device.type == "cpu" else before[1].shape[1]
        passes.over(left, lambda request: len(request.rest), partial(score, before=before), held)

    longest = max((len(request.tokens) for request in cut), default=0)
    with accelerator.named_if_too_large(f"one request of up to {longest} tokens", "use a larger device"):
        passes.over([group for group in made if group.common], lambda group: group.common, read)
        alone = [group.requests[0] for group in made if not group.common]
        passes.over(alone, lambda request: len(request.rest), score)
    return [found[number] for number in range(len(requests))]


def pass_tokens(device: torch.device) -> int:
    return TOKENS if device.type == "cpu" else DEVICE_TOKENS


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


@dataclass
class _Passes:
    """Work that is done pass by pass."""

    tokens: int
    """The most of a pass; halved where one does not fit into a device's memory."""

    def over(
        self, rows: Sequence[Row], length: Callable[[Row], int], work: Callable[[Sequence[Row]], object], held: int = 0
    ) -> None:
        """Do the work over rows of like lengths, the longest first; `held` tokens of each row are in a cache."""
        left = sorted(rows, key=length, reverse=True)
        while left:
            count = self._count(map(length, left), held)
            if accelerator.fits(partial(work, left[:count]), is_least=count == 1):
                del left[:count]
            else:
                self.tokens = count * (length(left[0]) + held) // 2

    def _count(self, lengths: Iterable[int], held: int) -> int:
        """How many of the first rows make a pass."""
        count = longest = real = 0
        for length in lengths:
            longest, real = max(longest, length), real + length
            padded = (count + 1) * longest
            is_full = padded + (count + 1) * held > self.tokens
            if count and (is_full or padded - real > self.tokens // PADDED):
                break
            count += 1
        return count


def _score(model: PreTrainedModel, requests: Sequence[Continuation], before: Before | None) -> dict[int, Answer]:
    """Run over what is left of requests behind common tokens, padded on the right, behind all that is scored."""
    longest = max(len(request.rest) for request in requests)
    ids = torch.tensor([[*request.rest, *[0] * (longest - len(request.rest))] for request in requests])
    is_real, places = torch.ones_like(ids), torch.arange(longest).repeat(len(requests), 1)
    kwargs: dict[str, Any] = {"use_cache": False}
    if before is not None:
        cache, is_common = before
        of = torch.tensor([request.group for request in requests])
        own = copy.copy(cache)
        own.layers = [copy.copy(layer) for layer in cache.layers]  # selecting gives them other tensors
        own.batch_select_indices(of)  # of the CPU: layers may lie on several devices
        places += is_common[of].sum(-1, keepdim=True)
        is_real = torch.cat([is_common[of], is_real], dim=-1)
        kwargs = {"use_cache": True, "cache": own}
    states = _run(model, ids, is_real, places, **kwargs).last_hidden_state
    rows = [row for row, request in enumerate(requests) for _ in range(request.scored)]
    columns = [request.given - request.common + i for request in requests for i in range(request.scored)]
    predicting = states[torch.tensor(rows), torch.tensor(columns)]
    wanted = torch.tensor([token for request in requests for token in request.tokens[-request.scored :]])
    nll, is_likeliest = [], []
    for part, tokens in zip(torch.split(predicting, TOKENS), torch.split(wanted, TOKENS), strict=True):
        logits = head_of(model)(part)
        tokens = tokens.to(logits.device)
        nll.append(token_nll(logits, tokens).double())
        is_likeliest.append(logits.argmax(-1) == tokens)
    sizes = [request.scored for request in requests]
    losses, hits = (torch.split(torch.cat(parts).cpu(), sizes) for parts in (nll, is_likeliest))
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
