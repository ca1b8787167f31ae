import random
import re
from copy import deepcopy

import datasets
import pytest
from tokenizers import processors

from blockpruner.api import evaluate, prune
from blockpruner.core.blocks import DENSE
from blockpruner.core.errors import InputError
from blockpruner.inputs.calibration import (
    CalibrationSet,
    beginning,
    draw,
    draw_rows,
    fill_rows,
    pack_rows,
    require_embedded,
    sharing,
)
from blockpruner.inputs.settings import Calibration
from blockpruner.inputs.texts import ALPACA_WITHOUT_INPUT, MixedText, TextKind, kind_of
from blockpruner.scoring.engine import Engine
from blockpruner.scoring.work import Task
from tests.errors import refused
from tests.tiny import full_nll, tiny_model, tiny_tokenizer

DATA = {"source": "path", "path": "nowhere"}
TEXTS = [f"text number {i}, with some words" for i in range(100)]


def test_split_all_is_the_beginning_of_one_seeded_permutation():
    complete = draw(TEXTS, 100, "all", 42)
    assert sorted(complete) == sorted(TEXTS) != complete
    assert all(draw(TEXTS, count, "all", 42) == complete[:count] for count in (1, 5, 64))
    assert draw(TEXTS, 5, "all", 43) != complete[:5]
    rows = [pack_rows(complete[:count], tiny_tokenizer(), 20, "joined").rows for count in (10, 40)]
    assert len(rows[0]) > 5 and rows[1][: len(rows[0])] == rows[0], "and so do the rows"


def test_every_beginning_of_a_mix_has_the_kinds_by_their_shares_until_one_runs_out():
    long = [f"{text}, and so many more that it is a row of its own" for text in TEXTS]
    parts = {
        TextKind("a", 1.0): long[:40],
        TextKind("b", 2.0): long[40:80],
        TextKind("c", 0.5): ["long " * 20] * 3,
    }
    mix, notes = [MixedText(text, kind) for kind, own in parts.items() for text in own], []
    complete = draw(mix, None, "all", 42)
    assert sorted(complete) == sorted(mix)
    assert draw(mix, 7, "all", 42) == complete[:7]
    names = [kind_of(text).name for text in complete]
    assert "".join(names[:7]) == "abcbabb"
    for count in range(1, 21):
        drawn = [names[:count].count(kind.name) / kind.share for kind in parts]
        assert max(drawn) - min(drawn) <= 2
    assert [text for text in complete if kind_of(text).name == "a"] == [
        text for text in draw(mix, None, "all", 42, reserved=frozenset(long[40:])) if text in long
    ]
    draw(mix, 12, "all", 42, key="k", note=notes.append)
    assert not notes
    draw(mix, 50, "all", 42, key="k", note=notes.append)
    assert notes == ["k: all texts of c are drawn; the others make up for what is missing"]
    titles = [MixedText("Short", TextKind("a", 1.0))] * 50 + [
        MixedText(text, TextKind("b", 1.0)) for text in long
    ]
    names = [kind_of(text).name for text in draw(titles, 28, "all", 42)]
    assert names.count("a") > 20, "a text that is no row counts as a tenth"
    plain = [MixedText(text, TextKind("a", 3.0)) for text in TEXTS]
    assert draw(plain, None, "all", 42) == draw(TEXTS, None, "all", 42), (
        "one kind is drawn as texts without one"
    )


def test_joined_rows_are_of_one_kind_each_and_every_part_of_them_has_the_shares():
    kinds, notes = [TextKind("a", 1.0), TextKind("b", 2.0), TextKind("c", 1.0)], []
    # one document of many rows; one kind that runs out
    sizes = {
        "a": [900, 30],
        "b": [200] * 20,
        "c": [100, 20],
    }
    mix = [MixedText(kind.name * size, kind) for kind in kinds for size in sizes[kind.name]]
    expected = Calibration(data=DATA, split="all", seq_len=20)
    rows = fill_rows(mix, tiny_tokenizer(), expected, 40, key="k", note=notes.append).rows
    names = [set(tiny_tokenizer().decode(row).strip()) & {*"abc"} for row in rows]
    assert all(len(name) == 1 for name in names)
    names = "".join(name for (name,) in names)
    for part in (names[:4], names[:8], names[12:20]):
        assert part.count("b") == 2 * part.count("a") == 2 * part.count("c"), names
    assert len(rows) == 40
    assert set(names[-9:]) == {"a", "b"}
    assert notes == ["k: all texts of c are drawn; the others make up for what is missing"]


def test_a_text_without_a_long_line_is_known_by_all_of_it():
    short = "if x:\n    y()\nelse:\n    z()"
    assert sharing([short, "if x:\n    y()"], [f"\n{short.upper()}\n"]) == {short}


def test_a_line_that_many_texts_have_is_no_paragraph():
    """A system prompt or a licence says nothing about where a text is from; eight texts may be of
    one document."""
    prompt, page = (
        "You are a helpful assistant, " * 3,
        "a page of a document, one of its many long lines " * 2,
    )
    chats = [f"{prompt}\nsay {i}" for i in range(20)]
    assert sharing(chats, chats[:2]) == set(chats[:2])
    assert sharing([f"{prompt}\n{page}", *chats], [page]) == {f"{prompt}\n{page}"}
    pages = [f"{page}\npart {i}" for i in range(8)]
    assert sharing(pages, pages[:1]) == set(pages)


def test_response_scoring_gives_the_same_tokens_and_scores_what_ends_in_a_response():
    """Held against the characters, which the tiny tokenizer keeps: a decoded run of scored tokens
    is the response."""
    samples = [
        ALPACA_WITHOUT_INPUT.format(instruction=f"Say it {i} times", output=f"answer {i} " * 9)
        for i in range(6)
    ]
    tokenizer = tiny_tokenizer()
    for packing, seq_len in (("joined", 40), ("per_sample", 400)):
        plain = pack_rows(samples, tokenizer, seq_len, packing)
        marked = pack_rows(samples, tokenizer, seq_len, packing, "response")
        unmarked = [tuple(max(token, ~token) for token in row) for row in marked.rows]
        assert set(unmarked) <= set(plain.rows)
        assert len(plain.rows) == len(unmarked) + marked.dropped
        scored = tokenizer.decode([token for row in marked.rows for token in row if token >= 0])
        assert "### " not in scored and "Below" not in scored and "times" not in scored
        assert "answer 3" in scored
        assert 0 < marked.scored < plain.scored
    plain = "Of a text without the template all is scored. " * 4
    (row,) = pack_rows(
        [plain, samples[0]], tokenizer, 8 * len(plain), "per_sample", "response"
    ).rows[:1]
    assert min(row) >= 0
    assert len(row) == len(tokenizer(plain).input_ids)
    with pytest.raises(InputError, match=r"score: response is for instructions.*'text number 0"):
        draw_rows(
            TEXTS[:1],
            tokenizer,
            Calibration(num_samples=1, seq_len=20, score="response"),
            [],
            print,
        )


def test_a_token_without_an_embedding_is_refused_with_its_tokenizer_and_model():
    """On a GPU it ends the process. A given token is stored as its complement."""
    last = max(max(tiny_tokenizer()(text).input_ids) for text in TEXTS)
    model = tiny_model(vocab_size=last)
    words = (
        rf" gives token {last}, and the model llama has embeddings of the tokens 0 to {last - 1};"
    )
    with refused("token-without-embedding") as caught:
        evaluate(model, tiny_tokenizer(), TEXTS, seq_len=20, packing="joined")
    assert re.search(words, str(caught.value))
    rows = CalibrationSet(((1, 2, 3), (~last, 5, 6)))
    with refused("token-without-embedding"):
        require_embedded(rows.rows, tiny_tokenizer(), model.config.to_dict())
    with refused("token-without-embedding"):
        prune(model, tiny_tokenizer(), TEXTS, "1blocks", seq_len=20, method="greedy")


def test_rows_that_say_too_little_are_dropped_with_their_number():
    texts = ["word " * 40, "a title", "word " * 10, "another title"]
    rows = pack_rows(texts, tiny_tokenizer(), 64, "per_sample")
    lengths = [len(ids) - 1 for ids in tiny_tokenizer()(texts)["input_ids"]]
    assert rows.dropped == sum(length < 16 for length in lengths) > 0
    assert [len(row) - 1 for row in rows.rows] == [
        min(length, 63) for length in lengths if length >= 16
    ]


def test_evaluated_texts_are_not_drawn():
    samples = [
        ALPACA_WITHOUT_INPUT.format(instruction="Do it", output=f"an answer {i}") for i in range(20)
    ]
    notes, settings = (
        [],
        {"num_samples": 8, "seq_len": 60, "packing": "per_sample", "split": "all", "score": "all"},
    )
    document = f"A heading\n\n{'A long   PARAGRAPH of a held-out document, ' * 3}\nshort"
    calibration = ["before\n" + document.replace("   ", " ").lower(), *samples]
    rows = draw_rows(
        calibration, tiny_tokenizer(), Calibration(**settings), [document], notes.append
    )
    assert "1 of 21 calibration texts are evaluated too" in notes[0]
    assert rows == pack_rows(draw(samples, 8, "all", 42), tiny_tokenizer(), 60, "per_sample")


def test_evaluated_texts_leave_the_papers_draw_and_the_others_stay_in_it():
    """One text less before the split would make all samples others."""
    expected = Calibration(num_samples=8, seq_len=60, packing="per_sample", split="paper")
    texts = [f"Text {i} of these is long enough to be a paragraph of its own." for i in range(200)]
    samples = draw(texts, 8, "paper", 42)
    rows = draw_rows(texts, tiny_tokenizer(), expected, [samples[3], texts[0]], lambda _: None)
    assert rows == pack_rows([*samples[:3], *samples[4:]], tiny_tokenizer(), 60, "per_sample")
    judging = frozenset([samples[3], texts[0]])
    assert (
        draw_rows(texts, tiny_tokenizer(), expected, [], lambda _: None, reserved=judging) == rows
    )


def test_split_paper_is_what_the_public_code_does():
    complete = datasets.Dataset.from_dict({"text": TEXTS}).train_test_split(test_size=0.2, seed=42)
    half = complete["test"].train_test_split(test_size=0.5, seed=42)["train"]
    random.seed(42)
    expected = half.select(random.sample(range(len(half)), 4))["text"]
    assert draw(TEXTS, 4, "paper", 42) == list(expected)


def test_joined_is_one_tokenization_cut_with_the_tail_dropped():
    tokenizer = tiny_tokenizer()
    ids = tokenizer("\n\n".join(TEXTS[:3]))["input_ids"]
    rows = pack_rows(TEXTS[:3], tokenizer, 20, "joined").rows
    assert len(rows) == len(ids) // 20
    assert [token for row in rows for token in row] == ids[: 20 * len(rows)]


@pytest.mark.parametrize("score", ["all", "response"])
def test_joined_rows_begin_as_the_tokenizer_begins_a_text(score):
    """Llama and Gemma put a BOS before it; the paper's code has it before the first row alone."""
    tokenizer = deepcopy(tiny_tokenizer())
    around = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 257), ("</s>", 258)]
    )
    plain = tokenizer("\n\n".join(TEXTS[:3]))["input_ids"]
    tokenizer.backend_tokenizer.post_processor = around
    assert beginning(tokenizer) == [257]
    assert beginning(tiny_tokenizer()) == []
    rows = pack_rows(TEXTS[:3], tokenizer, 20, "joined", score).rows
    assert {max(row[0], ~row[0]) for row in rows} == {257}
    assert {len(row) for row in rows} == {20}
    kept = [max(token, ~token) for row in rows for token in row[1:]]
    assert kept == [*plain, 258][: 19 * len(rows)], "and no token is lost"
    expected = Calibration(data=DATA, num_samples=5, seq_len=20, split="paper", score="all")
    said: list[str] = []
    (first, *others) = draw_rows(TEXTS, tokenizer, expected, (), said.append).rows
    assert first[0] == 257
    assert 257 not in {row[0] for row in others}
    assert "cannot read the others" in said[-1]
    (*_, last) = draw_rows(
        TEXTS, tokenizer, expected.model_copy(update={"split": "all"}), (), said.append
    ).rows
    assert last[0] == 257
    assert len(said) == 1
    twice = processors.TemplateProcessing(single="<s> <s> $A", special_tokens=[("<s>", 257)])
    tokenizer.backend_tokenizer.post_processor = twice
    with pytest.raises(InputError, match="seq_len 2 leaves no token to predict; give at least 3"):
        pack_rows(TEXTS, tokenizer, 2, "joined")


def test_per_sample_rows_are_scored_without_their_pads():
    """Rows of other lengths in the same batch change nothing: each equals the row alone (full
    forward, fp64)."""
    texts = ["a long sentence with many words in it", "a short one", "of middle length"]
    rows = pack_rows(texts, tiny_tokenizer(), 24, "per_sample").rows
    assert [len(row) for row in rows] == [24, 11, 16]
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


def test_num_rows_are_the_first_rows_of_all_texts_joined():
    texts = [f"text {i} " * (1 + i % 7) for i in range(60)]
    expected = Calibration(data=DATA, num_rows=5, seq_len=16, split="all", score="all", seed=3)
    result = draw_rows(texts, tiny_tokenizer(), expected, (), print)
    order = list(texts)
    random.Random(3).shuffle(order)
    ids = tiny_tokenizer()("\n\n".join(order))["input_ids"]
    assert result.rows == tuple(tuple(ids[16 * k : 16 * k + 16]) for k in range(5))
    with pytest.raises(
        InputError, match=f"num_rows 9999 is more than the {len(ids) // 16} rows of 16 tokens"
    ):
        draw_rows(
            texts, tiny_tokenizer(), expected.model_copy(update={"num_rows": 9999}), (), print
        )
    with pytest.raises(ValueError, match="num_rows is for joined rows of all texts"):
        Calibration(data=DATA, num_rows=5)


def test_of_a_huge_text_only_the_beginning_is_tokenized():
    """Tokenizing 27 MB for 16 rows of 32 tokens took more than a minute."""
    text, sizes = " ".join(f"word {i}" for i in range(10_000)), []
    expected = Calibration(data=DATA, num_rows=5, seq_len=16, split="all", score="all")

    def tokenize(texts, **options):
        sizes.append(len(texts[0]))
        return tiny_tokenizer()(texts, **options)

    def sparse(texts, **options):
        """A token is 40 characters, so that the beginning is too few of them."""
        rows = [
            [1 + i % 200 for i in range(len(text) // 40)]
            for text in ([texts] if texts == "a" else texts)
        ]
        return {"input_ids": rows[0] if texts == "a" else rows}

    ids = tiny_tokenizer()(text)["input_ids"]
    assert fill_rows([text], tokenize, expected, 5).rows == tuple(
        tuple(ids[16 * k : 16 * k + 16]) for k in range(5)
    )
    assert max(sizes) < 2000
    ids = sparse([text])["input_ids"][0]
    assert fill_rows([text], sparse, expected, 5).rows == tuple(
        tuple(ids[16 * k : 16 * k + 16]) for k in range(5)
    )


def test_the_alpaca_template_makes_no_text_share_a_paragraph():
    texts = [
        ALPACA_WITHOUT_INPUT.format(instruction=f"Say {i}.", output=f"{i} " * 40) for i in range(5)
    ]
    assert sharing(texts, texts[:2]) == set(texts[:2])
