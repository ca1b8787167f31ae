"""The work of scoring as values: what a scorer is asked, what it answers, and what a scorer is.

A piece of an answer, which is logged at once, is some rows of one mask. Which rows go together is
decided here: it moves no loss by more than rounding. How it is computed is decided elsewhere: in
memory (`engine`), streamed from disk, or on many workers. No torch here.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

from blockpruner.core.blocks import DENSE, Mask
from blockpruner.core.families import Config
from blockpruner.scoring.metrics import NLL, Metric
from blockpruner.store.trials import Origin

Rows = Sequence[Sequence[int]]
"""Token rows. Rows of different lengths are padded on the right within a batch. A negative number
is a token that is given but not scored: the bitwise complement of its id."""

Span = range | tuple[int, ...]
"""Rows by their numbers: a range where they follow each other, else in any order."""

BYTES = {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2}
"""The bytes of a number, by dtype."""

TOKENS = 2048
"""Tokens of the smallest batches."""

FULL_TOKENS = 2048
"""A batch of so many real tokens ends where more rows would add too many pads."""

WASTE = 0.1
"""The largest part of pads in such a batch, of its real tokens."""

LOGITS_BYTES = 64 * 2**20
"""Upper bound of the logits held at once; the head runs over as many tokens as fit."""


def logits_bytes(room: int | None) -> int:
    """`LOGITS_BYTES`, and on a device with so much room more: the head's weights are read anew for
    each chunk. JS divergence holds eight tensors of this size at once."""
    return LOGITS_BYTES if room is None else max(LOGITS_BYTES, min(2**30, room // 16))


def live_numbers(hidden: int, inner: int) -> int:
    """How many numbers live at once for a token within a block, in a model of these widths."""
    return 12 * hidden + 4 * inner


def batch_bytes(config: Config, dtype: str) -> int:
    """What the smallest batches take beside the weights."""
    hidden, inner = int(config["hidden_size"]), inner_size(config)
    return TOKENS * live_numbers(hidden, inner) * BYTES[dtype] + 4 * LOGITS_BYTES


def inner_size(config: Config) -> int:
    """The width of an MLP; of a mixture's experts, of all that a token goes to."""
    dense_size = int(config.get("intermediate_size") or 0)
    num_experts = int(config.get("num_experts_per_tok") or 0)
    expert_size = int(config.get("moe_intermediate_size") or dense_size)
    shared_size = int(config.get("shared_expert_intermediate_size") or 0)
    experts_size = num_experts * expert_size + shared_size
    return max(dense_size, experts_size) or 4 * int(config["hidden_size"])


def row_batches(rows: Rows, span: Span, max_tokens: int, growth: float = 0.0) -> list[Span]:
    """Neighbours grouped so that a group has at most `max_tokens` padded tokens, and pads do not
    outweigh what is real; a longer row is a group of its own. `growth` is how much more memory a
    token takes for each token of its row, where attention keeps every head's map."""
    batches: list[Span] = []
    start, longest, real = 0, 0, 0
    for index, row in enumerate(span):
        length = len(rows[row])
        padded = max(longest, length) * (index - start + 1)
        is_full = padded * (1 + growth * max(longest, length)) > max_tokens
        # Below FULL_TOKENS one batch more would cost more than the pads do.
        is_waste = real >= FULL_TOKENS and padded > (1 + WASTE) * (real + length)
        if index > start and (is_full or is_waste):
            batches.append(span[start:index])
            start, longest, real = index, 0, 0
        longest = max(longest, length)
        real += length
    batches.append(span[start:])
    return batches


@dataclass(frozen=True)
class Task:
    """Masks that are scored on the same batch of rows."""

    span: Span
    """The rows."""
    masks: tuple[Mask, ...]
    metric: Metric = NLL
    base: Mask = DENSE
    """What is removed already; an influence is that of the unit mask - base."""


@dataclass(frozen=True)
class ScoredRows:
    """Values of one mask on some rows."""

    mask: Mask
    span: Span
    """The rows."""
    loss: tuple[float, ...]
    """The loss of each row, a mean over its tokens."""


class Scorer(Protocol):
    """Computes tasks, in any order and anywhere; the values are the same to rounding."""

    def row_batches(self, rows: Rows, span: Span) -> list[Span]:
        """The rows of `span` grouped into batches, in their order."""

    def run(self, tasks: Sequence[Task], rows: Rows) -> Iterator[ScoredRows]:
        """Yield the values of the tasks as soon as they are known; those of a mask may come in
        several parts."""

    def origin(self) -> Origin:
        """Where the next values come from; another one once batches are halved for lack of
        memory."""

    def close(self) -> None:
        """Give back workers and files."""
