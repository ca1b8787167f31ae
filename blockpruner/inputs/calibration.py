"""The calibration set: which samples are drawn, and how they become token rows.

Decides sampling, packing, which tokens are scored and the set's digest. Where texts come from is decided in `texts`.
How a benchmark item reads, and which items are not evaluated, is decided in `evaluation`.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from blockpruner.core.errors import InputError
from blockpruner.core.settings import Calibration
from blockpruner.store.files import read_table, write_table

CALIBRATION = pa.schema([pa.field("input_ids", pa.list_(pa.int32()), nullable=False)])

Answer = tuple[str, str]
"""The prompt of a benchmark item, and its right answer, which continues the prompt."""


@dataclass(frozen=True)
class CalibrationSet:
    """Token rows, each with at least two tokens."""

    rows: tuple[tuple[int, ...], ...]
    """Token ids. A row's first token is not scored. Neither are tokens that are only given to the model, such as the
    question before an answer: they are stored as `~id`, a negative number. All other tokens are scored."""

    @property
    def tokens(self) -> int:
        return sum(len(row) for row in self.rows)

    @property
    def digest(self) -> str:
        """SHA-256 of the rows' lengths and token ids."""
        digest = hashlib.sha256()
        for row in self.rows:
            digest.update(np.array([len(row), *row], dtype="<i4").tobytes())
        return digest.hexdigest()

    def save(self, path: Path, source: str) -> None:
        table = pa.table({"input_ids": [list(row) for row in self.rows]}, schema=CALIBRATION)
        facts = {"rows": str(len(self.rows)), "tokens": str(self.tokens), "digest": self.digest, "source": source}
        write_table(path, table, facts)

    @classmethod
    def load(cls, path: Path) -> CalibrationSet:
        table, facts = read_table(path, CALIBRATION)
        loaded = cls(tuple(tuple(row) for row in table.column("input_ids").to_pylist()))
        if facts.get("digest") != loaded.digest:
            raise InputError(f"{path} does not match its own digest; delete it and run `dvc repro`")
        return loaded


def draw(texts: Sequence[str], num_samples: int, split: str, seed: int, section: str = "calibration") -> list[str]:
    """Draw samples without replacement.

    Args:
        split: "paper": as in the paper's public code, 20 % of the data are set aside for testing and split in half,
            both with `seed` (`datasets.train_test_split`); the samples are a `random.sample` of the first half. "all":
            they are a `random.sample` of everything.
        section: the section of the run file that asks for samples, for the message.

    Raises:
        InputError: there are fewer texts than `num_samples`.
    """
    pool = list(texts)
    if split == "paper":
        import datasets

        whole = datasets.Dataset.from_dict({"index": list(range(len(pool)))})
        if len(pool) < 10:
            raise InputError(f"calibration.split: paper needs at least 10 texts to split, found {len(pool)}")
        held_out = whole.train_test_split(test_size=0.2, seed=seed)["test"]
        half = held_out.train_test_split(test_size=0.5, seed=seed)["train"]
        pool = [pool[i] for i in half["index"]]
    if num_samples > len(pool):
        raise InputError(
            f"{section}.num_samples {num_samples} is more than the {len(pool)} texts that the source holds (split: "
            f"{split}); lower it to at most {len(pool)}"
        )
    return [pool[i] for i in random.Random(seed).sample(range(len(pool)), num_samples)]


def pack_rows(samples: Sequence[str], tokenizer: Any, seq_len: int, packing: str) -> CalibrationSet:
    """Tokenize samples into rows.

    Args:
        packing: "joined": all samples are joined with a blank line, tokenized once and cut into rows of `seq_len`; the
            tail is dropped. So does the paper's code: its 256 samples are about 15 rows of 2,048. "per_sample": each
            sample is a row, cut off at `seq_len`; batches pad rows on the right, outside attention and loss.

    Raises:
        InputError: no row comes out; the message names how many samples would do.
    """
    if packing not in ("joined", "per_sample"):
        raise InputError(f"packing {packing!r} is unknown; valid: joined, per_sample")
    if seq_len < 2:
        raise InputError(f"seq_len {seq_len} leaves no token to predict; give at least 2")
    if packing == "joined":
        ids = tokenizer("\n\n".join(samples))["input_ids"]
        rows = cut(ids, seq_len)
        if not rows:
            needed = -(-seq_len * len(samples) // max(len(ids), 1))
            raise InputError(
                f"calibration has no row: {len(samples)} samples are {len(ids)} tokens, fewer than one row of "
                f"seq_len {seq_len}; about {needed} samples would do: raise calibration.num_samples, or lower seq_len"
            )
    else:
        encoded = [tuple(ids[:seq_len]) for ids in tokenizer(list(samples))["input_ids"]]
        rows = [row for row in encoded if len(row) >= 2]
        if not rows:
            raise InputError(
                f"calibration has no row: none of the {len(samples)} samples has two tokens or more; choose other "
                "texts, one sample of two tokens would do"
            )
    return CalibrationSet(tuple(rows))


def draw_rows(texts: Sequence[str], tokenizer: Any, wanted: Calibration) -> CalibrationSet:
    """Draw the samples that a run file asks for, and pack them into rows."""
    samples = draw(texts, wanted.num_samples, wanted.split, wanted.seed)
    return pack_rows(samples, tokenizer, wanted.seq_len, wanted.packing)


def cut(ids: Sequence[int], seq_len: int) -> list[tuple[int, ...]]:
    """Cut tokens into rows of `seq_len`, and drop the tail."""
    return [tuple(ids[i : i + seq_len]) for i in range(0, len(ids) - seq_len + 1, seq_len)]


def draw_in_turn(pools: Mapping[str, Sequence[Answer]], num_samples: int, seed: int) -> list[Answer]:
    """Draw `num_samples` answers evenly over tasks.

    The tasks give one answer each in turn. The first of k tasks give one more where k does not divide `num_samples`.
    The first rows of the set, on which a race decides, then come from all tasks. A task gives a
    `random.Random(seed).sample` of its own answers.

    Raises:
        InputError: a task has fewer answers than its share.
    """
    drawn: dict[str, list[Answer]] = {}
    for number, (task, pool) in enumerate(pools.items()):
        share = len(range(number, num_samples, len(pools)))
        if share > len(pool):
            raise InputError(
                f"calibration.num_samples {num_samples} over {len(pools)} tasks asks for {share} items of {task}, "
                f"which has {len(pool)} that are not evaluated; lower it to at most {len(pools) * len(pool)}, or leave "
                f"{task} out of calibration.data.tasks"
            )
        drawn[task] = random.Random(seed).sample(list(pool), share)
    return [answer for turn in zip_longest(*drawn.values()) for answer in turn if answer is not None]


def pack_answers(answers: Sequence[Answer], tokenizer: Any, seq_len: int) -> CalibrationSet:
    """Tokenize (prompt, answer) pairs into one row each. The prompt's tokens are given, the answer's are scored.

    The border between them follows lm-eval's rule (`TemplateLM._encode_pair`): spaces that end the prompt belong to the
    answer, and both texts are tokenized together; the prompt alone shows how many of these tokens are the prompt's. A
    row longer than `seq_len` loses the beginning of its prompt. No prompt may be empty.

    Raises:
        InputError: an answer does not fit into `seq_len` with one token before it, or has no token.
    """
    rows, longest = [], 0
    for prompt, answer in answers:
        given = tokenizer.encode(prompt.rstrip())
        scored = tokenizer.encode(prompt + answer)[len(given) :]
        if not scored:
            raise InputError(
                f"the answer {answer!r} to {prompt!r} has no token of its own in this tokenizer, and nothing of it can "
                "be scored; leave its task out of calibration.data.tasks"
            )
        rows.append(tuple(~token for token in given) + tuple(scored))
        longest = max(longest, len(scored))
    if longest >= seq_len:
        raise InputError(
            f"calibration.seq_len {seq_len} is too short: the longest answer is {longest} tokens, and a row holds "
            f"at least one token of the prompt before it; give at least {longest + 1}, or choose other tasks"
        )
    return CalibrationSet(tuple(row[-seq_len:] for row in rows))


def check_context(seq_len: int, config: dict[str, Any], key: str) -> None:
    """Refuse rows longer than the model's context."""
    context = config.get("max_position_embeddings")
    if context is not None and seq_len > context:
        raise InputError(f"{key} {seq_len} is longer than the model's context of {context} tokens; lower it")
