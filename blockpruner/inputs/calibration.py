"""The calibration set: which samples are drawn, and how they become token rows.

Decides sampling, packing, which tokens are scored and the set's digest. Where texts come from, and
where a response begins in one, is decided in `texts`. What is evaluated is decided in `evaluation`.
"""

import hashlib
import json
import random
from bisect import bisect_left
from collections import Counter, deque
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field
from itertools import accumulate
from pathlib import Path
from typing import Any, Self, TypeVar

import numpy as np
import pyarrow as pa

from blockpruner.core.errors import InputError
from blockpruner.inputs.settings import Calibration
from blockpruner.inputs.texts import (
    ALPACA_WITH_INPUT,
    ALPACA_WITHOUT_INPUT,
    TextKind,
    by_kind,
    response_start,
)
from blockpruner.store.files import damaged, read_table, write_table

T = TypeVar("T")

CALIBRATION = pa.schema([pa.field("input_ids", pa.list_(pa.int32()), nullable=False)])

FEWEST_SCORED = 16
"""A row of text with fewer scored tokens is dropped: its mean says little, and weighs as much as
that of a long row. Where rows are shorter than 64 tokens, a quarter of a row is enough."""


@dataclass(frozen=True)
class CalibrationSet:
    """Token rows, each with at least two tokens."""

    rows: tuple[tuple[int, ...], ...]
    """Token ids. A row's first token is not scored. Neither are tokens that are only given to the
    model, such as the instruction before a response: they are stored as `~id`, a negative number.
    All other tokens are scored."""
    dropped: int = field(default=0, compare=False)
    """How many rows were left out, since too few of their tokens are scored."""
    kinds: tuple[str, ...] = field(default=(), compare=False)
    """The kind of text of each row, where rows were made kind by kind."""

    @property
    def tokens(self) -> int:
        return sum(len(row) for row in self.rows)

    @property
    def scored(self) -> int:
        return sum(map(_scored, self.rows))

    @property
    def row_keys(self) -> tuple[str, ...]:
        return tuple(
            hashlib.sha256(np.array(row, dtype="<i4").tobytes()).hexdigest()[:16]
            for row in self.rows
        )

    @property
    def digest(self) -> str:
        """SHA-256 of the rows' lengths and token ids."""
        digest = hashlib.sha256()
        for row in self.rows:
            digest.update(np.array([len(row), *row], dtype="<i4").tobytes())
        return digest.hexdigest()

    def save(self, path: Path, source: str) -> None:
        table = pa.table({"input_ids": [list(row) for row in self.rows]}, schema=CALIBRATION)
        facts = {"digest": self.digest, "source": source, "dropped": str(self.dropped)}
        write_table(path, table, facts | {"kinds": json.dumps(self.kinds)})

    @classmethod
    def load(cls, path: Path) -> Self:
        table, facts = read_table(path, CALIBRATION)
        rows = tuple(map(tuple, table.column("input_ids").to_pylist()))
        try:
            loaded = cls(rows, int(facts["dropped"]), tuple(json.loads(facts["kinds"])))
        except (KeyError, ValueError) as error:  # no digest covers the facts
            raise damaged(path) from error
        if facts.get("digest") != loaded.digest:
            raise damaged(path)
        return loaded


def draw(
    texts: Sequence[str],
    num_samples: int | None,
    split: str,
    seed: int,
    key: str = "calibration.num_samples",
    reserved: AbstractSet[str] = frozenset(),
    note: Callable[[str], object] = lambda message: None,
) -> list[str]:
    """Draw samples without replacement; raises InputError if there are fewer texts than
    `num_samples`.

    Args:
        num_samples: None draws all, in the order of the draw.
        split: "all": the samples are the first ones of one permutation of everything, so a larger
            draw begins with the smaller one; of a mix, each beginning has the kinds by their
            shares. "paper": as in the paper's public code, 20 % of the data are set aside for
            testing and split in half, both with `seed` (`datasets.train_test_split`); the samples
            are a `random.sample` of the first half.
        key: what asks for so many in the run file, for the message.
        reserved: texts that are passed over. They are left out after the order of "all" is drawn,
            which stays the same.
    """
    pool = list(texts)
    if split == "paper":
        import datasets

        whole = datasets.Dataset.from_dict({"index": list(range(len(pool)))})
        if len(pool) < 10:
            raise InputError(
                f"calibration.split: paper needs at least 10 texts to split, found {len(pool)}"
            )
        held_out = whole.train_test_split(test_size=0.2, seed=seed)["test"]
        half = held_out.train_test_split(test_size=0.5, seed=seed)["train"]
        pool = [pool[i] for i in half["index"]]
    chance = random.Random(seed)
    if split == "all":
        chance.shuffle(pool)
    pool = [text for text in pool if text not in reserved]
    if split == "all":
        own = by_kind(pool)
        pool = _by_share({kind: own[kind] for kind in by_kind(texts) if kind in own}, _weight)
    if num_samples is None:
        num_samples = len(pool)
    if num_samples > len(pool):
        raise InputError(
            f"{key} {num_samples} is more than the {len(pool)} texts that the source holds (split: "
            f"{split}); lower it to at most {len(pool)}"
        )
    if split == "paper":
        return [pool[i] for i in chance.sample(range(len(pool)), num_samples)]
    _note_gone(by_kind(pool), by_kind(pool[num_samples:]), key, note)
    return pool[:num_samples]


def _by_share(own: Mapping[TextKind | None, Sequence[T]], weight: Callable[[T], float]) -> list[T]:
    """The items of some kinds in an order of which every part has the kinds by their shares, until
    one runs out. The kind comes next of which the least was taken, over its share; of equals, the
    first."""
    left = {kind: deque(items) for kind, items in own.items()}
    taken, found = dict.fromkeys(left, 0.0), list[T]()
    while left:
        kind = min(left, key=taken.__getitem__)
        found.append(item := left[kind].popleft())
        taken[kind] += weight(item) / (kind.share if kind else 1)
        if not left[kind]:
            del left[kind]
    return found


def _weight(text: str) -> float:
    """A text too short for a row counts as a tenth: half of an encyclopaedia may be bare titles."""
    # four characters to a token
    return 1.0 if len(text) - (response_start(text) or 0) >= 4 * FEWEST_SCORED else 0.1


def _note_gone(
    kinds: Iterable[TextKind | None],
    left: Collection[TextKind | None],
    key: str,
    note: Callable[[str], object],
) -> None:
    """Report the kinds of a mix of which nothing is left, where others go on."""
    if left and (gone := [kind.name for kind in kinds if kind and kind not in left]):
        note(
            f"{key}: all texts of {', '.join(gone)} are drawn; the others make up for what is"
            " missing"
        )


def without_evaluated(
    texts: Sequence[str], evaluated: Iterable[str], what: str, note: Callable[[str], object]
) -> list[str]:
    """The texts that share no paragraph with an evaluated text (`sharing`); a note counts the
    others."""
    known = sharing(texts, evaluated)
    pool = [text for text in texts if text not in known]
    if len(pool) < len(texts):
        note(
            f"{len(texts) - len(pool)} of {len(texts)} {what} texts are evaluated too: they are not"
            " drawn"
        )
    return pool


TEMPLATE = frozenset(
    line.casefold()
    for text in (ALPACA_WITH_INPUT, ALPACA_WITHOUT_INPUT)
    for line in text.splitlines()
)
"""Lines of the Alpaca template, which say nothing about where a text is from."""


COMMON = 8, 0.05
"""A line of more texts than these, as a number and as a share of all, tells as little: a system
prompt, a licence."""


def sharing(texts: Collection[str], others: Iterable[str]) -> set[str]:
    """The texts that share a paragraph with one of the others. A paragraph is a line of at least 50
    characters, or a text without such a line; lines that many texts have are none. White space and
    upper case make no difference."""
    seen = Counter(line for text in texts for line in _paragraphs(text, TEMPLATE))
    often = TEMPLATE | {
        line for line, number in seen.items() if number > max(COMMON[0], COMMON[1] * len(texts))
    }
    known = {paragraph for text in others for paragraph in _paragraphs(text, often)}
    return {text for text in texts if not known.isdisjoint(_paragraphs(text, often))}


def _paragraphs(text: str, often: AbstractSet[str]) -> AbstractSet[str]:
    lines = (" ".join(line.split()).casefold() for line in text.splitlines())
    return {line for line in lines if len(line) >= 50} - often or {
        " ".join(text.split()).casefold()
    }


def pack_rows(
    samples: Sequence[str],
    tokenizer: Any,
    seq_len: int,
    packing: str,
    score: str = "all",
    bos: str = "row",
) -> CalibrationSet:
    """Tokenize samples into rows; raises InputError if no row comes out, and names how many samples
    would do.

    Args:
        packing: "joined": all samples are joined with a blank line, tokenized once and cut into
            rows of `seq_len`; the tail is dropped. So does the paper's code: its 256 samples are
            about 15 rows of 2,048. "per_sample": each sample is a row, cut off at `seq_len`;
            batches pad rows on the right, outside attention and loss.
        bos: what the tokenizer puts before a text (`beginning`) stands before each "row", or of
            joined samples before the "first" row alone, as in the paper's code. Without it Gemma
            3's perplexity rises from 12 to 109.
        score: "all": every token after a row's first is scored. "response": only tokens that end in
            a response are; the instruction and the template around it are given. A text without the
            template is scored as a whole.
    """
    head = len(beginning(tokenizer)) if packing == "joined" and bos == "row" else 0
    if seq_len < max(2, head + 1):
        raise InputError(
            f"seq_len {seq_len} leaves no token to predict; give at least {max(2, head + 1)}"
        )
    tokenize = _mark_responses if score == "response" else _tokenize
    if packing == "joined":
        (ids,) = tokenize([samples], tokenizer)
        cut_rows = cut(ids, seq_len, head)
        if not cut_rows:
            needed = -(-seq_len * len(samples) // max(len(ids), 1))
            raise InputError(
                f"calibration has no row: {len(samples)} samples are {len(ids)} tokens, fewer than"
                f" one row of seq_len {seq_len}; about {needed} samples would do: raise"
                " calibration.num_samples, or lower seq_len"
            )
    else:
        cut_rows = [
            tuple(ids[:seq_len]) for ids in tokenize([[sample] for sample in samples], tokenizer)
        ]
    enough = min(FEWEST_SCORED, max(1, seq_len // 4))
    rows = tuple(row for row in cut_rows if _scored(row) >= enough)
    if not rows:
        raise InputError(
            f"calibration has no row: in none of {len(cut_rows)} rows of at most {seq_len} tokens"
            f" are {enough} or more scored (calibration.score: {score}); raise calibration.seq_len,"
            " choose longer texts, or set score: all"
        )
    return CalibrationSet(rows, len(cut_rows) - len(rows))


def beginning(tokenizer: Any) -> list[int]:
    """What the tokenizer puts before a text: the BOS of Llama and Gemma, and nothing for most
    others."""
    plain, ids = (
        tokenizer("a", add_special_tokens=special)["input_ids"] for special in (False, True)
    )
    return next((ids[:n] for n in range(len(ids)) if ids[n : n + len(plain)] == plain), [])


def _tokenize(groups: Sequence[Sequence[str]], tokenizer: Any) -> list[list[int]]:
    """Token ids of each group of samples, joined with blank lines."""
    return list(tokenizer(["\n\n".join(group) for group in groups])["input_ids"])


def _mark_responses(groups: Sequence[Sequence[str]], tokenizer: Any) -> list[list[int]]:
    """As `_tokenize`, with the complement of each token that does not end in a response."""
    if not tokenizer.is_fast:
        raise InputError(
            "calibration.score: response needs to know which characters a token is, and"
            f" {type(tokenizer).__name__} does not tell; set calibration.score: all"
        )
    starts = {sample: response_start(sample) for group in groups for sample in group}
    encoded = tokenizer(["\n\n".join(group) for group in groups], return_offsets_mapping=True)
    marked: list[list[int]] = []
    for group, ids, offsets in zip(
        groups, encoded["input_ids"], encoded["offset_mapping"], strict=True
    ):
        begins, ends, start = [], [], 0
        for sample in group:
            begins.append(start + (starts[sample] or 0))
            ends.append(start + len(sample))
            start += len(sample) + 2
        marked.append([])
        for token, (_, end) in zip(ids, offsets, strict=True):
            # the last response that begins before the token's end
            number = bisect_left(begins, end) - 1
            marked[-1].append(token if number >= 0 and end <= ends[number] else ~token)
    return marked


def _scored(row: Sequence[int]) -> int:
    return sum(token >= 0 for token in row[1:])


def draw_rows(
    texts: Sequence[str],
    tokenizer: Any,
    wanted: Calibration,
    evaluated: Iterable[str],
    note: Callable[[str], object],
    at_most: bool = False,
    reserved: AbstractSet[str] = frozenset(),
) -> CalibrationSet:
    """Draw the samples that a run file asks for, and pack them into rows. Raises InputError if it
    asks for responses and no text has one, and as `pack_rows` and `fill_rows` do.

    Args:
        evaluated: texts on which models are evaluated; samples that share a paragraph with one are
            not drawn.
        at_most: fewer than `wanted.num_rows` will do.
    """
    pool = without_evaluated(texts, evaluated, "calibration", note)
    if wanted.score == "response" and pool and all(response_start(text) is None for text in pool):
        raise InputError(
            "calibration.score: response is for instructions with responses (format: alpaca), and"
            f" {pool[0][:40]!r}... has none; set calibration.score: all, or choose other data"
        )
    if wanted.num_rows is not None:
        rows = fill_rows(
            pool, tokenizer, wanted, wanted.num_rows, note=note, at_most=at_most, reserved=reserved
        )
    else:
        # draws places in the list: with a text less in it, all samples would be others
        if wanted.split == "paper":
            drawn = draw(texts, wanted.num_samples, "paper", wanted.seed)
            kept = {*pool} - reserved
            samples = [text for text in drawn if text in kept]
        else:
            samples = draw(
                pool, wanted.num_samples, wanted.split, wanted.seed, reserved=reserved, note=note
            )
        bos = "first" if wanted.split == "paper" else "row"
        rows = pack_rows(samples, tokenizer, wanted.seq_len, wanted.packing, wanted.score, bos)
        if bos == "first" and wanted.packing == "joined" and beginning(tokenizer):
            note(
                "warning: of these joined rows only the first begins with the tokenizer's BOS, as"
                " in the paper's code. Gemma cannot read the others; set calibration.split: all,"
                " and each row begins with it"
            )
    if rows.dropped:
        note(
            f"{rows.dropped} of {rows.dropped + len(rows.rows)} rows are dropped: too few of their"
            " tokens are scored"
        )
    return rows


def fill_rows(
    pool: Sequence[str],
    tokenizer: Any,
    wanted: Calibration,
    num_rows: int,
    key: str = "calibration.num_rows",
    at_most: bool = False,
    reserved: AbstractSet[str] = frozenset(),
    note: Callable[[str], object] = lambda message: None,
) -> CalibrationSet:
    """The first `num_rows` rows of all texts joined, in the order in which they are drawn; raises
    InputError if the texts are fewer rows, unless that will do (`at_most`).

    The texts of each kind of a mix are joined by themselves, and of the rows every part has the
    kinds by their shares.
    """
    samples, dropped = by_kind(draw(pool, None, wanted.split, wanted.seed, reserved=reserved)), 0
    parts = dict[TextKind | None, Sequence[tuple[int, ...]]]()
    for kind, own in samples.items():
        try:
            part = _first_rows(own, tokenizer, wanted, num_rows)
        except InputError:
            if len(samples) == 1:
                raise
            continue
        parts[kind], dropped = part.rows, dropped + part.dropped
    rows = _by_share(parts, lambda row: 1.0)
    if len(rows) < num_rows and not at_most:
        raise InputError(
            f"{key} {num_rows} is more than the {len(rows)} rows of {wanted.seq_len} tokens that"
            f" the {sum(map(len, samples.values()))} texts of the source fill; lower it to at most"
            f" {len(rows)}, or choose a larger source"
        )
    left = set(rows[num_rows:])
    _note_gone(
        samples, [kind for kind, own in parts.items() if not left.isdisjoint(own)], key, note
    )
    return CalibrationSet(tuple(rows[:num_rows]), dropped)


def _first_rows(
    samples: Sequence[str], tokenizer: Any, wanted: Calibration, num_rows: int
) -> CalibrationSet:
    """At least `num_rows` joined rows of the first samples, or all that they fill."""
    # characters; to tokenize all of a large pool takes minutes
    enough = 8 * num_rows * wanted.seq_len
    sizes = enumerate(accumulate(map(len, samples)), 1)
    taken = next((count for count, size in sizes if size >= enough), len(samples))
    # The rows end far before twice as many characters: of a text that long, the rest is left out,
    # and no row changes.
    beginnings = [sample[: 2 * enough] for sample in samples[:taken]]
    found = pack_rows(beginnings, tokenizer, wanted.seq_len, wanted.packing, wanted.score)
    if len(found.rows) < num_rows and beginnings != samples:
        found = pack_rows(samples, tokenizer, wanted.seq_len, wanted.packing, wanted.score)
    return found


def cut(ids: Sequence[int], seq_len: int, repeated: int = 0) -> list[tuple[int, ...]]:
    """Cut tokens into rows of `seq_len`, and drop the tail. The first `repeated` tokens stand
    before each row."""
    head, ids, size = tuple(ids[:repeated]), ids[repeated:], seq_len - repeated
    return [(*head, *ids[i : i + size]) for i in range(0, len(ids) - size + 1, size)]


def require_embedded(
    rows: Iterable[Sequence[int]], tokenizer: Any, config: Mapping[str, Any]
) -> None:
    """Refuse rows with a token that the model of this config has no embedding of; on a GPU it would
    end the process."""
    last, size = (
        max((max(token, ~token) for row in rows for token in row), default=0),
        config["vocab_size"],
    )
    if last >= size:
        raise InputError(
            f"the tokenizer ({type(tokenizer).__name__} of {tokenizer.name_or_path or 'no file'})"
            f" gives token {last}, and the model"
            f" {config.get('_name_or_path') or config['model_type']} has embeddings of the tokens 0"
            f" to {size - 1}; give the tokenizer that the model was trained with",
            rule="token-without-embedding",
            value=last,
        )


def check_context(seq_len: int, config: dict[str, Any], key: str) -> None:
    context = config.get("max_position_embeddings")
    if context is not None and seq_len > context:
        message = (
            f"{key} {seq_len} is longer than the model's context of {context} tokens; lower it"
        )
        raise InputError(message, rule="longer-than-context", key=key, value=seq_len)
