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

MIN_SCORED = 16
"""A row of text with fewer scored tokens is dropped: its mean says little, and weighs as much as
that of a long row. Where rows are shorter than 64 tokens, a quarter of a row is enough."""

MIN_PARAGRAPH = 50
"""Characters of a line that is long enough to show where a text is from."""

COMMON_LINES = 8, 0.05
"""A line of more texts than these, as a number and as a share of all, does not show where a text is
from: a system prompt, a licence."""

Note = Callable[[str], object]
"""Receives one line of information for the user."""


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
        return sum(_scored_tokens(row) for row in self.rows)

    @property
    def row_keys(self) -> tuple[str, ...]:
        contents = [np.array(row, dtype="<i4").tobytes() for row in self.rows]
        return tuple(hashlib.sha256(content).hexdigest()[:16] for content in contents)

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
        except (KeyError, ValueError) as error:
            # No digest covers the facts: they may be damaged while the rows are not.
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
    note: Note = lambda message: None,
) -> list[str]:
    """Draw samples without replacement; raises InputError if there are fewer texts than
    `num_samples`.

    Args:
        num_samples: None draws all, in the order of the draw.
        split: "all": the samples are the first ones of one permutation of everything, so a larger
            draw begins with the smaller one; of a mix, each beginning has the kinds by their
            shares. "paper": a `random.sample` of the tenth that `_paper_split` sets aside.
        key: the settings key of `num_samples`, for the message.
        reserved: texts that are passed over. They are left out after the order of "all" is drawn,
            which stays the same.
    """
    generator = random.Random(seed)
    if split == "paper":
        pool = _paper_split(texts, seed)
    else:
        pool = list(texts)
        generator.shuffle(pool)
    pool = [text for text in pool if text not in reserved]
    if split == "all":
        pool_by_kind = by_kind(pool)
        kinds = [kind for kind in by_kind(texts) if kind in pool_by_kind]
        pool = _interleave_by_share({kind: pool_by_kind[kind] for kind in kinds}, _text_weight)
    if num_samples is None:
        num_samples = len(pool)
    if num_samples > len(pool):
        raise InputError(
            f"{key} {num_samples} is more than the {len(pool)} texts that the source holds (split: "
            f"{split}); lower it to at most {len(pool)}"
        )
    if split == "paper":
        # Positions and not texts are sampled, as in the paper's code.
        return [pool[position] for position in generator.sample(range(len(pool)), num_samples)]
    _note_exhausted(by_kind(pool), by_kind(pool[num_samples:]), key, note)
    return pool[:num_samples]


def _paper_split(texts: Sequence[str], seed: int) -> list[str]:
    """The tenth of the texts that the paper's public code draws from: 20 % are set aside for
    testing, and split in half."""
    import datasets

    if len(texts) < 10:
        raise InputError(
            f"calibration.split: paper needs at least 10 texts to split, found {len(texts)}"
        )
    positions = datasets.Dataset.from_dict({"index": list(range(len(texts)))})
    test_split = positions.train_test_split(test_size=0.2, seed=seed)["test"]
    first_half = test_split.train_test_split(test_size=0.5, seed=seed)["train"]
    return [texts[position] for position in first_half["index"]]


def _interleave_by_share(
    items_by_kind: Mapping[TextKind | None, Sequence[T]], weight: Callable[[T], float]
) -> list[T]:
    """Order the items such that each beginning has the kinds by their shares, until one runs
    out."""
    queues = {kind: deque(items) for kind, items in items_by_kind.items()}
    taken = dict.fromkeys(queues, 0.0)
    ordered: list[T] = []
    while queues:
        # The kind with the smallest weight so far, over its share; of equals, the first.
        kind = min(queues, key=taken.__getitem__)
        item = queues[kind].popleft()
        ordered.append(item)
        taken[kind] += weight(item) / (kind.share if kind else 1)
        if not queues[kind]:
            del queues[kind]
    return ordered


def _text_weight(text: str) -> float:
    """A text too short for a row counts as a tenth: half of an encyclopaedia may be bare titles."""
    scored_characters = len(text) - (response_start(text) or 0)
    # A token is about four characters.
    return 1.0 if scored_characters >= 4 * MIN_SCORED else 0.1


def _note_exhausted(
    kinds: Iterable[TextKind | None],
    remaining_kinds: Collection[TextKind | None],
    key: str,
    note: Note,
) -> None:
    """Report the kinds of a mix that are used up while other kinds have texts left."""
    if not remaining_kinds:
        return
    exhausted = [kind.name for kind in kinds if kind and kind not in remaining_kinds]
    if exhausted:
        note(
            f"{key}: all texts of {', '.join(exhausted)} are drawn; the others make up for what is"
            " missing"
        )


def without_evaluated(
    texts: Sequence[str], evaluated: Iterable[str], purpose: str, note: Note
) -> list[str]:
    """The texts that share no paragraph with an evaluated text (`sharing`); a note counts the
    others."""
    overlapping = sharing(texts, evaluated)
    pool = [text for text in texts if text not in overlapping]
    if len(pool) < len(texts):
        note(
            f"{len(texts) - len(pool)} of {len(texts)} {purpose} texts are evaluated too: they are"
            " not drawn"
        )
    return pool


def sharing(texts: Collection[str], references: Iterable[str]) -> set[str]:
    """The texts that share a paragraph with one of the references. A paragraph is a line of at
    least 50 characters, or a text without such a line. A line of the Alpaca template or of many
    texts is no paragraph. White space and upper case make no difference."""
    ignored = {
        _normalized(line)
        for template in (ALPACA_WITH_INPUT, ALPACA_WITHOUT_INPUT)
        for line in template.splitlines()
    }
    counts = Counter[str]()
    for text in texts:
        counts.update(_paragraphs(text, ignored))
    min_number, min_share = COMMON_LINES
    limit = max(min_number, min_share * len(texts))
    ignored |= {line for line, count in counts.items() if count > limit}
    reference_paragraphs: set[str] = set()
    for text in references:
        reference_paragraphs |= _paragraphs(text, ignored)
    return {
        text for text in texts if not reference_paragraphs.isdisjoint(_paragraphs(text, ignored))
    }


def _paragraphs(text: str, ignored: AbstractSet[str]) -> AbstractSet[str]:
    lines = {_normalized(line) for line in text.splitlines()}
    long_lines = {line for line in lines if len(line) >= MIN_PARAGRAPH} - ignored
    return long_lines or {_normalized(text)}


def _normalized(text: str) -> str:
    return " ".join(text.split()).casefold()


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
            a response are scored, not the instruction and the template around it. A text without
            the template is scored as a whole.
    """
    prefix_length = len(beginning(tokenizer)) if packing == "joined" and bos == "row" else 0
    min_length = max(2, prefix_length + 1)
    if seq_len < min_length:
        raise InputError(
            f"seq_len {seq_len} leaves no token to predict; give at least {min_length}"
        )
    tokenize = _tokenize_responses if score == "response" else _tokenize
    if packing == "joined":
        (ids,) = tokenize([samples], tokenizer)
        candidates = cut(ids, seq_len, prefix_length)
        if not candidates:
            enough_samples = -(-seq_len * len(samples) // max(len(ids), 1))
            raise InputError(
                f"calibration has no row: {len(samples)} samples are {len(ids)} tokens, fewer than"
                f" one row of seq_len {seq_len}; about {enough_samples} samples would do: raise"
                " calibration.num_samples, or lower seq_len"
            )
    else:
        ids_by_sample = tokenize([[sample] for sample in samples], tokenizer)
        candidates = [tuple(ids[:seq_len]) for ids in ids_by_sample]
    min_scored = min(MIN_SCORED, max(1, seq_len // 4))
    rows = tuple(row for row in candidates if _scored_tokens(row) >= min_scored)
    if not rows:
        raise InputError(
            f"calibration has no row: in none of {len(candidates)} rows of at most {seq_len} tokens"
            f" are {min_scored} or more scored (calibration.score: {score}); raise"
            " calibration.seq_len, choose longer texts, or set score: all"
        )
    return CalibrationSet(rows, len(candidates) - len(rows))


def beginning(tokenizer: Any) -> list[int]:
    """What the tokenizer puts before a text: the BOS of Llama and Gemma, and nothing for most
    others."""
    plain_ids = tokenizer("a", add_special_tokens=False)["input_ids"]
    ids = tokenizer("a", add_special_tokens=True)["input_ids"]
    for start in range(len(ids)):
        if ids[start : start + len(plain_ids)] == plain_ids:
            return list(ids[:start])
    return []


def _tokenize(groups: Sequence[Sequence[str]], tokenizer: Any) -> list[list[int]]:
    """Token ids of each group of samples, joined with blank lines."""
    return list(tokenizer(["\n\n".join(group) for group in groups])["input_ids"])


def _tokenize_responses(groups: Sequence[Sequence[str]], tokenizer: Any) -> list[list[int]]:
    """As `_tokenize`, with the complement of each token that does not end in a response."""
    if not tokenizer.is_fast:
        raise InputError(
            "calibration.score: response needs to know which characters a token is, and"
            f" {type(tokenizer).__name__} does not tell; set calibration.score: all"
        )
    encoded = tokenizer(["\n\n".join(group) for group in groups], return_offsets_mapping=True)
    ids_by_group, offsets_by_group = encoded["input_ids"], encoded["offset_mapping"]
    marked = []
    for group, ids, offsets in zip(groups, ids_by_group, offsets_by_group, strict=True):
        token_ends = [end for _, end in offsets]
        is_scored = _ends_in_response(group, token_ends)
        marked.append(
            [token if scored else ~token for token, scored in zip(ids, is_scored, strict=True)]
        )
    return marked


def _ends_in_response(samples: Sequence[str], token_ends: Iterable[int]) -> list[bool]:
    """Whether each token ends in a response of the samples, joined with blank lines."""
    response_starts, response_ends = [], []
    offset = 0
    for sample in samples:
        response_starts.append(offset + (response_start(sample) or 0))
        response_ends.append(offset + len(sample))
        offset += len(sample) + len("\n\n")
    flags = []
    for end in token_ends:
        # The last response that begins before the token's end.
        number = bisect_left(response_starts, end) - 1
        flags.append(number >= 0 and end <= response_ends[number])
    return flags


def _scored_tokens(row: Sequence[int]) -> int:
    return sum(token >= 0 for token in row[1:])


def draw_rows(
    texts: Sequence[str],
    tokenizer: Any,
    settings: Calibration,
    evaluated: Iterable[str],
    note: Note,
    at_most: bool = False,
    reserved: AbstractSet[str] = frozenset(),
) -> CalibrationSet:
    """Draw the samples of a run file's settings, and pack them into rows. Raises InputError if
    responses are to be scored and no text has one, and as `pack_rows` and `fill_rows` do.

    Args:
        evaluated: texts on which models are evaluated; samples that share a paragraph with one are
            not drawn.
        at_most: fewer than `settings.num_rows` will do.
    """
    pool = without_evaluated(texts, evaluated, "calibration", note)
    has_response = any(response_start(text) is not None for text in pool)
    if settings.score == "response" and pool and not has_response:
        raise InputError(
            "calibration.score: response is for instructions with responses (format: alpaca), and"
            f" {pool[0][:40]!r}... has none; set calibration.score: all, or choose other data"
        )
    if settings.num_rows is not None:
        rows = fill_rows(
            pool,
            tokenizer,
            settings,
            settings.num_rows,
            note=note,
            at_most=at_most,
            reserved=reserved,
        )
    else:
        rows = _draw_samples(texts, pool, tokenizer, settings, reserved, note)
    if rows.dropped:
        note(
            f"{rows.dropped} of {rows.dropped + len(rows.rows)} rows are dropped: too few of their"
            " tokens are scored"
        )
    return rows


def _draw_samples(
    texts: Sequence[str],
    pool: Sequence[str],
    tokenizer: Any,
    settings: Calibration,
    reserved: AbstractSet[str],
    note: Note,
) -> CalibrationSet:
    """The rows of `settings.num_samples` samples of the pool: the texts that are not evaluated."""
    num_samples, seed = settings.num_samples, settings.seed
    if settings.split == "paper":
        # Positions in the list are drawn: with one text less in it, all samples would be others.
        allowed = {*pool} - reserved
        samples = [text for text in draw(texts, num_samples, "paper", seed) if text in allowed]
        bos = "first"
    else:
        samples = draw(pool, num_samples, settings.split, seed, reserved=reserved, note=note)
        bos = "row"
    rows = pack_rows(samples, tokenizer, settings.seq_len, settings.packing, settings.score, bos)
    if bos == "first" and settings.packing == "joined" and beginning(tokenizer):
        note(
            "warning: of these joined rows only the first begins with the tokenizer's BOS, as"
            " in the paper's code. Gemma cannot read the others; set calibration.split: all,"
            " and each row begins with it"
        )
    return rows


def fill_rows(
    pool: Sequence[str],
    tokenizer: Any,
    settings: Calibration,
    num_rows: int,
    key: str = "calibration.num_rows",
    at_most: bool = False,
    reserved: AbstractSet[str] = frozenset(),
    note: Note = lambda message: None,
) -> CalibrationSet:
    """The first `num_rows` rows of all texts joined, in the order in which they are drawn; raises
    InputError if the texts are fewer rows, unless that will do (`at_most`).

    The texts of each kind of a mix are joined by themselves, and each beginning of the rows has the
    kinds by their shares.
    """
    samples_by_kind = by_kind(draw(pool, None, settings.split, settings.seed, reserved=reserved))
    rows_by_kind: dict[TextKind | None, Sequence[tuple[int, ...]]] = {}
    dropped = 0
    for kind, samples in samples_by_kind.items():
        try:
            filled = _first_rows(samples, tokenizer, settings, num_rows)
        except InputError:
            # A kind too small for one row is no error while other kinds fill rows.
            if len(samples_by_kind) == 1:
                raise
            continue
        rows_by_kind[kind] = filled.rows
        dropped += filled.dropped
    rows = _interleave_by_share(rows_by_kind, lambda row: 1.0)
    if len(rows) < num_rows and not at_most:
        text_count = sum(len(samples) for samples in samples_by_kind.values())
        raise InputError(
            f"{key} {num_rows} is more than the {len(rows)} rows of {settings.seq_len} tokens that"
            f" the {text_count} texts of the source fill; lower it to at most {len(rows)}, or"
            " choose a larger source"
        )
    unused = set(rows[num_rows:])
    remaining = [
        kind for kind, kind_rows in rows_by_kind.items() if not unused.isdisjoint(kind_rows)
    ]
    _note_exhausted(samples_by_kind, remaining, key, note)
    return CalibrationSet(tuple(rows[:num_rows]), dropped)


def _first_rows(
    samples: Sequence[str], tokenizer: Any, settings: Calibration, num_rows: int
) -> CalibrationSet:
    """At least `num_rows` joined rows of the first samples, or all that they fill."""
    # Eight characters a token are more than any text has; to tokenize a large pool takes minutes.
    max_characters = 8 * num_rows * settings.seq_len
    total_characters = accumulate(len(sample) for sample in samples)
    count = 1 + sum(total < max_characters for total in total_characters)
    # The rows end far before twice as many characters: the rest of a text that long is left out,
    # and no row changes.
    beginnings = [sample[: 2 * max_characters] for sample in samples[:count]]

    def pack(texts: Sequence[str]) -> CalibrationSet:
        return pack_rows(texts, tokenizer, settings.seq_len, settings.packing, settings.score)

    packed = pack(beginnings)
    if len(packed.rows) < num_rows and beginnings != samples:
        packed = pack(samples)
    return packed


def cut(ids: Sequence[int], seq_len: int, repeated: int = 0) -> list[tuple[int, ...]]:
    """Cut tokens into rows of `seq_len`, and drop the tail. The first `repeated` tokens stand
    before each row."""
    prefix, ids = tuple(ids[:repeated]), ids[repeated:]
    size = seq_len - repeated
    starts = range(0, len(ids) - size + 1, size)
    return [(*prefix, *ids[start : start + size]) for start in starts]


def require_embedded(
    rows: Iterable[Sequence[int]], tokenizer: Any, config: Mapping[str, Any]
) -> None:
    """Refuse rows with a token that the model of this config has no embedding of; on a GPU it would
    end the process."""
    tokens = (max(token, ~token) for row in rows for token in row)
    largest = max(tokens, default=0)
    size = config["vocab_size"]
    if largest >= size:
        raise InputError(
            f"the tokenizer ({type(tokenizer).__name__} of {tokenizer.name_or_path or 'no file'})"
            f" gives token {largest}, and the model"
            f" {config.get('_name_or_path') or config['model_type']} has embeddings of the tokens 0"
            f" to {size - 1}; give the tokenizer that the model was trained with",
            rule="token-without-embedding",
            value=largest,
        )


def check_context(seq_len: int, config: dict[str, Any], key: str) -> None:
    context = config.get("max_position_embeddings")
    if context is not None and seq_len > context:
        message = (
            f"{key} {seq_len} is longer than the model's context of {context} tokens; lower it"
        )
        raise InputError(message, rule="longer-than-context", key=key, value=seq_len)
