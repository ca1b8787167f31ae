"""The calibration set: which samples are drawn, and how they become token rows.

Decides sampling, packing, which tokens are scored and the set's digest. Where the texts come from is decided by
`sources`; how a benchmark item reads, and which are not evaluated, by `evaluation`.
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
from blockpruner.store.files import read_table, write_table

CALIBRATION = pa.schema([pa.field("input_ids", pa.list_(pa.int32()), nullable=False)])


Answer = tuple[str, str]
"""The prompt of a benchmark item and its right answer, which goes on where the prompt ends."""


@dataclass(frozen=True)
class CalibrationSet:
    """Token rows, each at least two tokens; `joined` rows all have the same length, `per_sample` rows differ.

    A token that is given to the model but not scored (the question before an answer) is stored as the complement
    `~id` of its id, a negative number; every other one but a row's first is scored."""

    rows: tuple[tuple[int, ...], ...]

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
    """Draw samples; `section` is that of the run file, for the message.

    split "paper": as the paper's public code does: 20 % of the data as test, that split in half, both with `seed`
    (`datasets.train_test_split`), then `random.sample` of the first half after seeding. "all": `random.sample` of
    everything.

    Raises:
        InputError: fewer texts than `num_samples`.
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


def pack(samples: Sequence[str], tokenizer: Any, seq_len: int, packing: str) -> CalibrationSet:
    """Tokenize samples into rows.

    joined: all samples joined with a blank line, tokenized once, cut into rows of `seq_len`, the tail dropped
    (what the paper's code does: "256 samples" are then about 15 rows of 2,048). per_sample: each sample is its
    own row, truncated to `seq_len`; batches pad it on the right and leave pads out of attention and loss.

    Raises:
        InputError: no row comes out; says how many samples would do.
    """
    if packing not in ("joined", "per_sample"):
        raise InputError(f"packing {packing!r} is unknown; valid: joined, per_sample")
    if seq_len < 2:
        raise InputError(f"seq_len {seq_len} leaves no token to predict; give at least 2")
    if packing == "joined":
        ids = tokenizer("\n\n".join(samples))["input_ids"]
        rows = [tuple(ids[i : i + seq_len]) for i in range(0, len(ids) - seq_len + 1, seq_len)]
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


def draw_in_turn(pools: Mapping[str, Sequence[Answer]], num_samples: int, seed: int) -> list[Answer]:
    """Draw `num_samples` answers evenly over tasks.

    The tasks give one each in turn, in their order, so that the first of k tasks give one more where k does not
    divide `num_samples`, and the first rows of the set, on which a race decides, are of all tasks. What a task gives is
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
    """Tokenize (prompt, answer) pairs into one row each: the prompt's tokens given, the answer's scored.

    Where the one ends and the other begins is lm-eval's rule (`TemplateLM._encode_pair`): spaces that end the prompt
    belong to the answer, and the answer's tokens are those of both texts together, less as many as the prompt alone
    has. A row longer than `seq_len` loses the beginning of its prompt.

    Args:
        answers: with prompts that are not empty.

    Raises:
        InputError: an answer does not fit into `seq_len` with one token before it, or has no token.
    """
    rows, longest = [], 0
    for prompt, answer in answers:
        given = tokenizer.encode(prompt.rstrip())
        scored = tokenizer.encode(prompt + answer)[len(given) :]
        if not scored:
            raise InputError(
                f"the answer {answer!r} to {prompt!r} has no token of its own in this tokenizer, so that nothing of it "
                "can be scored; leave its task out of calibration.data.tasks"
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
