"""Held-out perplexity, the way of arXiv 2406.10594 and of SliceGPT's code.

Decides how held-out texts become rows and how their NLL is averaged. It runs a model's own forward
pass, and does not use the scoring engine.
"""

import math
from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from random import Random
from typing import Any

import torch
from transformers import PreTrainedModel

from blockpruner.core.errors import InputError, NonFiniteLossError, named
from blockpruner.evaluation.settings import Perplexity
from blockpruner.inputs.calibration import beginning, cut
from blockpruner.inputs.texts import by_kind
from blockpruner.model import accelerator
from blockpruner.model.models import head_of, room_beside
from blockpruner.scoring.losses import token_nll
from blockpruner.scoring.metrics import perplexity
from blockpruner.scoring.work import logits_bytes
from blockpruner.store.provenance import fingerprint

SEED = 0
"""The seed of the order in which documents fill rows. It is no setting: one text has one set of
rows."""

SHORT = 32
"""A document of fewer tokens is left out: it says next to nothing. Of the 2,349 documents of an
English Wikipedia extract, 1,299 are that short, and 1,254 of them a bare title. They have 2 % of
its tokens."""

Packed = tuple[Sequence[tuple[int, ...]], Sequence[str], int]
"""The fields of HeldOut, and how many texts were passed over because they have fewer than SHORT
tokens."""


@dataclass(frozen=True)
class HeldOut:
    rows: tuple[tuple[int, ...], ...]
    """Token ids."""
    documents: tuple[str, ...]
    """The texts that are in the rows, wholly or in part; all, if texts are joined and no row is
    left over. Nothing that decides what is pruned may see them."""
    kinds: tuple[str, ...] = ()
    """The kind of text of each row; empty where all are of one."""

    @property
    def digest(self) -> str:
        return fingerprint({"rows": self.rows, "kinds": self.kinds})


@dataclass(frozen=True)
class HeldOutPerplexity:
    perplexity: float
    """exp(nll)."""
    nll: float
    """Mean of row_nll."""
    rows: int
    tokens: int
    """Tokens of all rows; the first one of each is not predicted."""
    row_nll: tuple[float, ...]
    """Each row's mean NLL, nats per token."""


def held_out(tokenizer: Any, texts: Sequence[str], wanted: Perplexity) -> HeldOut:
    """Make rows of `wanted.seq_len` tokens of texts, at most `wanted.max_rows`; of a mix, so many
    of the kind with the largest share, and of the others by theirs. Raises InputError if the texts,
    or those of one kind, are shorter than one row.

    packing "joined": all texts are joined with a blank line, tokenized once and cut into rows; the
    tail is dropped.
    "joined_bos": each of these rows begins with what the tokenizer puts before a text
        (`beginning`).
    "documents": the texts come in one order drawn with SEED. A row is the next texts joined with a
        blank line until it
    is full; the rest of the last one is dropped, and the next row begins with the next text. So
    every text begins at its beginning, and none is in two rows. Texts of fewer than SHORT tokens
    (in an encyclopaedia, bare titles) are passed over. A single document is cut into rows as
    "joined_bos".
    """
    if len(parts := by_kind(texts)) > 1:
        whole, largest = HeldOut((), ()), max(kind.share if kind else 1.0 for kind in parts)
        for kind, own in parts.items():
            name = kind.name if kind else "others"
            with named(f"{name}: "):
                share = (kind.share if kind else 1.0) / largest
                most = None if wanted.max_rows is None else math.ceil(share * wanted.max_rows)
                found = held_out(tokenizer, own, wanted.model_copy(update={"max_rows": most}))
            kinds = (*whole.kinds, *[name] * len(found.rows))
            whole = HeldOut(whole.rows + found.rows, whole.documents + found.documents, kinds)
        return whole
    several = wanted.packing == "documents" and len(texts) > 1
    rows, documents, short = (_documents if several else _joined)(tokenizer, texts, wanted)
    if not rows:
        tokens = len(_ids(tokenizer, texts))
        left_out = f" ({short} of them have fewer than {SHORT} and are left out)" if short else ""
        fix = (
            "set packing to joined_bos, which leaves none out"
            if short
            else f"lower seq_len to at most {tokens}"
        )
        raise InputError(
            f"held-out perplexity has no row: {len(texts)} texts are {tokens} tokens{left_out},"
            f" fewer than one row of evaluate.perplexity.seq_len {wanted.seq_len}; {fix}, or choose"
            " longer texts",
            rule="too-few-tokens",
            key="evaluate.perplexity.seq_len",
            value=wanted.seq_len,
        )
    return HeldOut(tuple(rows), tuple(documents))


def _ids(tokenizer: Any, texts: Sequence[str]) -> list[int]:
    return list(tokenizer("\n\n".join(texts), verbose=False)["input_ids"])


def _joined(tokenizer: Any, texts: Sequence[str], wanted: Perplexity) -> Packed:
    head = 0 if wanted.packing == "joined" else len(beginning(tokenizer))
    rows = cut(_ids(tokenizer, texts), wanted.seq_len, head)
    used = rows[: wanted.max_rows]
    if len(used) == len(rows):
        return used, texts, 0
    tokens = head + (wanted.seq_len - head) * len(used)
    count = bisect_left(range(len(texts)), tokens, key=lambda n: len(_ids(tokenizer, texts[:n])))
    return used, texts[:count], 0


def _documents(tokenizer: Any, texts: Sequence[str], wanted: Perplexity) -> Packed:
    rows: list[tuple[int, ...]] = []
    documents: list[str] = []
    held: list[str] = []
    short = 0
    for text in Random(SEED).sample(texts, len(texts))[wanted.skip :]:
        if len(rows) == wanted.max_rows:
            break
        if len(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]) < SHORT:
            short += 1
            continue
        held.append(text)
        ids = _ids(tokenizer, held)
        if len(ids) >= wanted.seq_len:
            rows.append(tuple(ids[: wanted.seq_len]))
            documents += held
            held = []
    return rows, documents, short


@torch.inference_mode()
def measure_perplexity(
    model: PreTrainedModel,
    rows: Sequence[Sequence[int]],
    advance: Callable[[int, int], None] = lambda done, total: None,
    batch: int = 1,
) -> HeldOutPerplexity:
    """PPL = exp(1/R * sum_r 1/(T-1) * sum_t -log p(x[r, t+1] | x[r, <=t])) over R rows of T tokens.

    Log-softmax in float32 or wider, sums in float64. The head runs over chunks of tokens: the
    logits [T, V] of a row never fill the memory. Raises NonFiniteLossError that names the row whose
    loss is NaN or infinite, and DeviceMemoryError where a row does not fit. `batch` rows of one
    length are computed at once; in 16 bits it moves the last digits. `advance` is called with (rows
    done, rows in all).
    """
    decoder, head, place = (
        model.get_decoder(),
        head_of(model),
        model.get_output_embeddings().weight.device,
    )
    room = None if place.type == "cpu" else room_beside(model, place)
    chunk = max(1, logits_bytes(room) // (model.config.vocab_size * 4))
    means: list[float] = []
    for start in range(0, len(rows), batch):
        several = rows[start : start + batch]
        with accelerator.named_if_too_large(
            f"held-out perplexity: {'one row' if batch == 1 else f'{len(several)} rows'} of"
            f" {len(several[0])} tokens",
            "lower its seq_len, or use a larger device",
        ):
            ids = torch.tensor(several, device=model.device)  # [B, T]
            # [B (T-1), H]
            states = decoder(input_ids=ids, use_cache=False).last_hidden_state[:, :-1].flatten(0, 1)
            found = list[torch.Tensor]()
            for part, targets in zip(
                torch.split(states, chunk), torch.split(ids[:, 1:].flatten(), chunk), strict=True
            ):
                logits = head(part)  # perhaps on another device than the ids
                found.append(token_nll(logits, targets.to(logits.device)).double())
            totals = torch.cat(found).view(len(several), -1).sum(1).tolist()
        for number, total in enumerate(totals, start):
            if not math.isfinite(total):
                fix = "try a wider dtype (model.dtype: float32)"
                raise NonFiniteLossError(
                    f"held-out perplexity: the loss of row {number} is {total}; {fix}"
                )
        means += [total / (len(several[0]) - 1) for total in totals]
        advance(start + len(several), len(rows))
    nll = math.fsum(means) / len(means)
    return HeldOutPerplexity(
        perplexity(nll), nll, len(rows), sum(len(row) for row in rows), tuple(means)
    )
