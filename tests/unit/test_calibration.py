import random

import datasets
import pytest

from blockpruner.core.blocks import DENSE
from blockpruner.core.errors import InputError
from blockpruner.inputs.calibration import CalibrationSet, check_context, draw, pack_rows
from blockpruner.scoring.engine import Engine
from blockpruner.scoring.work import Task
from tests.tiny import full_nll, tiny_model, tiny_tokenizer

TEXTS = [f"text number {i}, with some words" for i in range(100)]


def test_split_all_is_a_seeded_sample():
    random.seed(42)  # what transformers.set_seed does to this module
    assert draw(TEXTS, 5, "all", 42) == random.sample(TEXTS, 5)
    assert draw(TEXTS, 5, "all", 43) != draw(TEXTS, 5, "all", 42)


def test_split_paper_is_what_the_public_code_does():
    whole = datasets.Dataset.from_dict({"text": TEXTS}).train_test_split(test_size=0.2, seed=42)
    half = whole["test"].train_test_split(test_size=0.5, seed=42)["train"]
    random.seed(42)
    expected = half.select(random.sample(range(len(half)), 4))["text"]
    assert draw(TEXTS, 4, "paper", 42) == list(expected)


def test_too_many_samples_says_how_many_there_are():
    with pytest.raises(InputError, match=r"num_samples 11 is more than the 10 .*split: paper.*at most 10"):
        draw(TEXTS, 11, "paper", 42)


def test_joined_is_one_tokenization_cut_with_the_tail_dropped():
    tokenizer = tiny_tokenizer()
    ids = tokenizer("\n\n".join(TEXTS[:3]))["input_ids"]
    rows = pack_rows(TEXTS[:3], tokenizer, 20, "joined").rows
    assert len(rows) == len(ids) // 20
    assert [token for row in rows for token in row] == ids[: 20 * len(rows)]


def test_no_row_says_how_many_samples_would_do():
    tokens = len(tiny_tokenizer()(TEXTS[0])["input_ids"])
    message = rf"1 samples are {tokens} tokens.*seq_len 100; about {-(-100 // tokens)} samp"
    with pytest.raises(InputError, match=message):
        pack_rows(TEXTS[:1], tiny_tokenizer(), 100, "joined")
    with pytest.raises(InputError, match="no row"):
        pack_rows(["", "a"], tiny_tokenizer(), 100, "per_sample")


def test_per_sample_rows_are_scored_without_their_pads():
    """Rows of other lengths in the same batch change nothing: each equals the row alone (full forward, fp64)."""
    texts = ["a long sentence with many words in it", "short", "of middle length"]
    rows = pack_rows(texts, tiny_tokenizer(), 24, "per_sample").rows
    assert [len(row) for row in rows] == [24, 5, 16]
    model = tiny_model()
    engine = Engine(model, batch_tokens=1000)
    assert engine.row_batches(rows, range(3)) == [range(3)]
    (unit,) = engine.run([Task(range(3), (DENSE,))], rows)
    assert unit.loss == pytest.approx([full_nll(model, row) for row in rows], abs=1e-10)


def test_file_round_trip_and_digest(tmp_path):
    rows = CalibrationSet(((1, 2, 3), (4, 5)))
    rows.save(tmp_path / "rows.parquet", "path")
    assert CalibrationSet.load(tmp_path / "rows.parquet") == rows
    assert rows.tokens == 5
    assert rows.digest != CalibrationSet(((1, 2), (3, 4, 5))).digest


def test_context():
    check_context(128, {"max_position_embeddings": 128}, "calibration.seq_len")
    with pytest.raises(InputError, match=r"calibration.seq_len 129 is longer than the model's context of 128"):
        check_context(129, {"max_position_embeddings": 128}, "calibration.seq_len")
