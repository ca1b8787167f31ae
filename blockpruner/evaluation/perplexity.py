"""Held-out perplexity, the way of arXiv 2406.10594 and of SliceGPT's code.

Decides how held-out texts become rows and how their NLL is averaged. It runs a model's own forward
pass, and does not use the scoring engine.
"""

import math
from bisect import bisect_left
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from random import Random
from typing import Any

import torch
from transformers import PreTrainedModel

from blockpruner.core.errors import InputError, NonFiniteLossError, named
from blockpruner.evaluation.settings import Perplexity
from blockpruner.inputs.calibration import beginning, cut
from blockpruner.inputs.texts import TextKind, by_kind
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
"""A document of fewer tokens is skipped: it is a bare title or little more. Of the 2,349 documents
of an English Wikipedia extract, 1,299 are that short, and 1,254 of them a bare title. They have 2 %
of its tokens."""


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


def held_out(tokenizer: Any, texts: Sequence[str], settings: Perplexity) -> HeldOut:
    """Make rows of `settings.seq_len` tokens of texts, at most `settings.max_rows`. In a mix, that
    is the limit of the kind with the largest share; the limits of the others follow from their
    shares. Raises InputError if the texts, or those of one kind, are shorter than one row.

    packing "joined": all texts are joined with a blank line, tokenized once and cut into rows; the
    tail is dropped.
    "joined_bos": each of these rows begins with what the tokenizer puts before a text
        (`beginning`).
    "documents": the texts come in one order drawn with SEED. A row is the next texts joined with a
        blank line until it is full. The rest of the last one is dropped, and the next row begins
        with the next text. So every text begins at its beginning, and none is in two rows. Texts of
        fewer than SHORT tokens are skipped. A single document is cut into rows as "joined_bos".
    """
    texts_by_kind = by_kind(texts)
    if len(texts_by_kind) > 1:
        return _held_out_mix(tokenizer, texts_by_kind, settings)
    if settings.packing == "documents" and len(texts) > 1:
        heldout, short_count = _pack_documents(tokenizer, texts, settings)
    else:
        heldout, short_count = _cut_joined(tokenizer, texts, settings), 0
    if not heldout.rows:
        tokens = len(_token_ids(tokenizer, texts))
        skipped, fix = "", f"lower seq_len to at most {tokens}"
        if short_count:
            skipped = f" ({short_count} of them have fewer than {SHORT} and are left out)"
            fix = "set packing to joined_bos, which leaves none out"
        raise InputError(
            f"held-out perplexity has no row: {len(texts)} texts are {tokens} tokens{skipped},"
            f" fewer than one row of evaluate.perplexity.seq_len {settings.seq_len}; {fix}, or"
            " choose longer texts",
            rule="too-few-tokens",
            key="evaluate.perplexity.seq_len",
            value=settings.seq_len,
        )
    return heldout


def _held_out_mix(
    tokenizer: Any, texts_by_kind: Mapping[TextKind | None, list[str]], settings: Perplexity
) -> HeldOut:
    mix = HeldOut((), ())
    shares = [kind.share if kind else 1.0 for kind in texts_by_kind]
    for (kind, texts), share in zip(texts_by_kind.items(), shares, strict=True):
        name = kind.name if kind else "others"
        limit = settings.max_rows
        if limit is not None:
            limit = math.ceil(share / max(shares) * limit)
        with named(f"{name}: "):
            rows = held_out(tokenizer, texts, settings.model_copy(update={"max_rows": limit}))
        kinds = (name,) * len(rows.rows)
        mix = HeldOut(mix.rows + rows.rows, mix.documents + rows.documents, mix.kinds + kinds)
    return mix


def _token_ids(tokenizer: Any, texts: Sequence[str]) -> list[int]:
    return list(tokenizer("\n\n".join(texts), verbose=False)["input_ids"])


def _cut_joined(tokenizer: Any, texts: Sequence[str], settings: Perplexity) -> HeldOut:
    prefix = 0 if settings.packing == "joined" else len(beginning(tokenizer))
    rows = cut(_token_ids(tokenizer, texts), settings.seq_len, prefix)
    rows_used = tuple(rows[: settings.max_rows])
    if len(rows_used) == len(rows):
        return HeldOut(rows_used, tuple(texts))
    # A cut row may end within a text: the texts in use are the fewest whose tokens fill the rows.
    tokens_used = prefix + (settings.seq_len - prefix) * len(rows_used)

    def tokens_of_first(count: int) -> int:
        return len(_token_ids(tokenizer, texts[:count]))

    count = bisect_left(range(len(texts)), tokens_used, key=tokens_of_first)
    return HeldOut(rows_used, tuple(texts[:count]))


def _pack_documents(
    tokenizer: Any, texts: Sequence[str], settings: Perplexity
) -> tuple[HeldOut, int]:
    """Rows that begin with a document; and how many documents were skipped as too short."""
    rows: list[tuple[int, ...]] = []
    documents: list[str] = []
    row_texts: list[str] = []
    short_count = 0
    shuffled = Random(SEED).sample(texts, len(texts))
    for text in shuffled[settings.skip :]:
        if len(rows) == settings.max_rows:
            break
        text_ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        if len(text_ids) < SHORT:
            short_count += 1
            continue
        row_texts.append(text)
        ids = _token_ids(tokenizer, row_texts)
        if len(ids) >= settings.seq_len:
            rows.append(tuple(ids[: settings.seq_len]))
            documents += row_texts
            row_texts = []
    return HeldOut(tuple(rows), tuple(documents)), short_count


@torch.inference_mode()
def measure_perplexity(
    model: PreTrainedModel,
    rows: Sequence[Sequence[int]],
    advance: Callable[[int, int], None] = lambda done, total: None,
    batch: int = 1,
) -> HeldOutPerplexity:
    """PPL = exp(1/R * sum_r 1/(T-1) * sum_t -log p(x[r, t+1] | x[r, <=t])) over R rows of T tokens.

    Log-softmax in float32 or wider, sums in float64. Raises NonFiniteLossError that names the row
    whose loss is NaN or infinite, and DeviceMemoryError where a row does not fit. `batch` rows of
    one length are computed at once; in 16 bits it moves the last digits. `advance` is called with
    (rows done, rows in all).
    """
    row_means: list[float] = []
    chunk = _tokens_of_a_chunk(model)
    for start in range(0, len(rows), batch):
        batch_rows = rows[start : start + batch]
        length = len(batch_rows[0])
        size = "one row" if batch == 1 else f"{len(batch_rows)} rows"
        with accelerator.named_if_too_large(
            f"held-out perplexity: {size} of {length} tokens",
            "lower its seq_len, or use a larger device",
        ):
            totals = _row_totals(model, batch_rows, chunk)
        for row, total in enumerate(totals, start):
            if not math.isfinite(total):
                raise NonFiniteLossError(
                    f"held-out perplexity: the loss of row {row} is {total}; try a wider dtype"
                    " (model.dtype: float32)"
                )
            row_means.append(total / (length - 1))
        advance(len(row_means), len(rows))
    nll = math.fsum(row_means) / len(row_means)
    tokens = sum(len(row) for row in rows)
    return HeldOutPerplexity(perplexity(nll), nll, len(rows), tokens, tuple(row_means))


def _tokens_of_a_chunk(model: PreTrainedModel) -> int:
    """How many tokens' logits, in float32, are held at once."""
    head_device = model.get_output_embeddings().weight.device
    free_memory = None if head_device.type == "cpu" else room_beside(model, head_device)
    bytes_of_a_token = 4 * int(model.config.vocab_size)
    return max(1, logits_bytes(free_memory) // bytes_of_a_token)


def _row_totals(model: PreTrainedModel, rows: Sequence[Sequence[int]], chunk: int) -> list[float]:
    """The summed NLL of each row of one length, float64."""
    head = head_of(model)
    ids = torch.tensor(rows, device=model.device)  # [B, T]
    states = model.get_decoder()(input_ids=ids, use_cache=False).last_hidden_state
    states = states[:, :-1].flatten(0, 1)  # [B (T-1), H]
    targets = ids[:, 1:].flatten()
    token_losses = []
    # The logits [T, V] of 2,048 tokens of a vocabulary of 128,256 take 1 GiB in float32: the head
    # runs over chunks of tokens.
    for start in range(0, len(states), chunk):
        logits = head(states[start : start + chunk])
        chunk_targets = targets[start : start + chunk].to(logits.device)
        token_losses.append(token_nll(logits, chunk_targets).double())
    totals: list[float] = torch.cat(token_losses).view(len(rows), -1).sum(1).tolist()
    return totals
