"""Held-out perplexity against plain full-logits forwards."""

import math

import pytest
import torch

from blockpruner.core.blocks import parse_mask
from blockpruner.core.errors import InputError, NonFiniteLossError
from blockpruner.evaluation.perplexity import SHORT, held_out, measure_perplexity
from blockpruner.evaluation.settings import Evaluate, Perplexity
from blockpruner.evaluation.suite import EvaluationPlan
from blockpruner.inputs.texts import MixedText, TextKind, write_texts
from blockpruner.model.models import masked, prune_
from blockpruner.scoring import work
from tests.tiny import (
    VARIANTS,
    VARIANTS_DAILY,
    bos_tokenizer,
    full_nll,
    tiny_model,
    tiny_tokenizer,
    tolerance,
)

TEXTS = [
    "The quick brown fox jumps over the lazy dog.",
    "Pack my box with five dozen jugs.",
    "Sphinx of quartz.",
]
MASK = parse_mask("mha.1,mlp.2,mha.3,mlp.3")


def held_out_rows(tokenizer, texts, seq_len, max_rows=None):
    return held_out(tokenizer, texts, Perplexity(seq_len=seq_len, max_rows=max_rows)).rows


def test_rows_are_the_joined_texts_cut_and_the_tail_dropped():
    rows = held_out_rows(tiny_tokenizer(), TEXTS, 20)
    assert [len(row) for row in rows] == [20] * (len("\n\n".join(TEXTS)) // 20)
    assert (
        tiny_tokenizer().decode([i for row in rows for i in row])
        == "\n\n".join(TEXTS)[: 20 * len(rows)]
    )
    assert held_out_rows(tiny_tokenizer(), TEXTS, 20, max_rows=2) == rows[:2]


def test_a_tokenizer_that_adds_bos_adds_one():
    rows = held_out_rows(bos_tokenizer(), TEXTS, 20)
    assert rows[0][0] == 257
    assert sum(row.count(257) for row in rows) == 1


@pytest.mark.parametrize("packing", ["joined_bos", "documents"])
def test_every_row_may_begin_as_the_tokenizer_begins_a_text(packing):
    """Gemma 3 has perplexity 109 in place of 12 on rows without."""
    text = "\n\n".join(TEXTS)
    result = held_out(bos_tokenizer(), [text], Perplexity(seq_len=20, packing=packing))
    assert {row[0] for row in result.rows} == {257}
    assert result.documents == (text,)
    read = tiny_tokenizer().decode([token for row in result.rows for token in row[1:]])
    assert read == text[: 19 * len(result.rows)]
    assert len(result.rows) == len(text) // 19
    expected = Perplexity(seq_len=20, packing="joined")
    assert held_out(
        tiny_tokenizer(), [text], expected.model_copy(update={"packing": packing})
    ) == held_out(tiny_tokenizer(), [text], expected)
    cut = held_out(bos_tokenizer(), TEXTS, Perplexity(seq_len=20, max_rows=3, packing="joined_bos"))
    assert cut.documents == tuple(TEXTS[:2]), "57 characters reach into the second text"


@pytest.mark.parametrize("max_rows", [1, 2, 3, None])
def test_joined_rows_name_their_texts(max_rows):
    """The tokenizer makes a token of every character, so the texts of a row are those that its
    characters touch."""
    result = held_out(tiny_tokenizer(), TEXTS, Perplexity(seq_len=20, max_rows=max_rows))
    starts = [0, len(TEXTS[0]) + 2, len(TEXTS[0]) + len(TEXTS[1]) + 4]
    touched = [
        text for text, start in zip(TEXTS, starts, strict=True) if start < 20 * len(result.rows)
    ]
    assert list(result.documents) == (touched if max_rows else TEXTS)


def test_rows_of_documents_begin_with_a_document_and_share_none():
    texts = [f"{number}: " + "abcdefg " * (3 + number % 7 * 4) for number in range(60)]
    titles = [f"Title {number}" for number in range(40)]
    expected = Perplexity(seq_len=100, packing="documents")
    result = held_out(tiny_tokenizer(), [*titles, *texts], expected)
    long_enough = [text for text in texts if len(text) >= SHORT]
    rest = list(result.documents)
    assert len(set(rest)) == len(rest)
    assert set(rest) <= set(long_enough)
    for row in result.rows:  # a token is a character
        held = [rest.pop(0)]
        while len("\n\n".join(held)) < 100:
            held.append(rest.pop(0))
        assert tiny_tokenizer().decode(row) == "\n\n".join(held)[:100]
    assert not rest
    remaining = set(long_enough) - set(result.documents)
    assert len("\n\n".join(remaining)) < 100, "they do not fill another row"
    order = [texts.index(text) for text in result.documents]
    assert order != sorted(order), "documents are drawn over the whole file"
    few = held_out(tiny_tokenizer(), [*titles, *texts], expected.model_copy(update={"max_rows": 3}))
    assert few.rows == result.rows[:3]
    assert few.documents == result.documents[: len(few.documents)]


def test_a_mix_has_as_many_rows_of_each_kind():
    parts = {"a": ["a text of kind a, " * 9] * 5, "b": ["the other kind, b: " * 9] * 5}
    mix = [MixedText(text, TextKind(name, 1.0)) for name, own in parts.items() for text in own]
    expected = Perplexity(seq_len=20, max_rows=3, packing="documents")
    result, alone = (
        held_out(tiny_tokenizer(), mix, expected),
        [held_out(tiny_tokenizer(), own, expected) for own in parts.values()],
    )
    assert result.rows == alone[0].rows + alone[1].rows
    assert result.documents == alone[0].documents + alone[1].documents
    assert result.kinds == ("a",) * 3 + ("b",) * 3
    assert not alone[0].kinds
    with pytest.raises(InputError, match="^c: held-out perplexity has no row"):
        held_out(tiny_tokenizer(), [*mix, MixedText("short", TextKind("c", 1.0))], expected)


def test_no_row_says_how_long_a_row_may_be():
    with pytest.raises(
        InputError, match=r"3 texts are 98 tokens.*seq_len 512; lower seq_len to at most 98"
    ):
        held_out_rows(tiny_tokenizer(), TEXTS, 512)


@pytest.mark.parametrize(
    "family",
    [
        item if item in VARIANTS_DAILY else pytest.param(item, marks=pytest.mark.slow)
        for item in VARIANTS
    ],
)
@pytest.mark.parametrize("state", ["dense", "masked", "pruned"])
def test_equals_full_forwards(family, state, monkeypatch):
    # chunks of 7 tokens: 19 targets are not whole chunks
    monkeypatch.setattr(work, "LOGITS_BYTES", 7 * 260 * 4)
    rows = held_out_rows(tiny_tokenizer(), TEXTS, 20)
    model = tiny_model(family)
    with masked(tiny_model(family), MASK if state != "dense" else frozenset()) as reference:
        expected = [full_nll(reference, row) for row in rows]
    seen = []
    if state == "masked":
        with masked(model, MASK):
            result = measure_perplexity(model, rows)
    else:
        result = measure_perplexity(
            model if state == "dense" else prune_(model, MASK), rows, lambda *s: seen.append(s)
        )
        assert seen == [(i + 1, len(rows)) for i in range(len(rows))]
    rel = tolerance(family)
    assert result.row_nll == pytest.approx(expected, rel=rel)
    assert result.perplexity == pytest.approx(math.exp(sum(expected) / len(expected)), rel=10 * rel)
    assert (result.rows, result.tokens) == (len(rows), 20 * len(rows))


def test_nan_names_the_row():
    model = tiny_model()
    model.get_input_embeddings().weight[250] = torch.nan
    with pytest.raises(NonFiniteLossError, match="row 1 is nan"):
        measure_perplexity(model, [[1, 2, 3], [1, 250, 3]])


def test_rows_at_once_are_rows_one_by_one():
    model, rows = tiny_model(), torch.randint(1, 200, (7, 12)).tolist()
    item, several = (measure_perplexity(model, rows, batch=batch).row_nll for batch in (1, 3))
    assert several == pytest.approx(item, abs=1e-12)


def test_texts_that_others_look_at_are_passed_over():
    texts = [f"{word} " * 12 for word in ("one", "two", "three", "four", "five", "six")]
    expected = Perplexity(seq_len=40, packing="documents")
    every = held_out(tiny_tokenizer(), texts, expected)
    assert len(every.rows) == 6
    later = held_out(
        tiny_tokenizer(), texts, expected.model_copy(update={"skip": 2, "max_rows": 3})
    )
    assert later.rows == every.rows[2:5]
    assert later.documents == every.documents[2:5]


def test_the_largest_share_has_all_rows():
    shares = {"a": 3.0, "b": 1.0}
    texts = [
        MixedText(f"{kind}{n} " * 20, TextKind(kind, share))
        for kind, share in shares.items()
        for n in range(6)
    ]
    result = held_out(
        tiny_tokenizer(), texts, Perplexity(seq_len=40, max_rows=5, packing="documents")
    )
    assert result.kinds == ("a",) * 5 + ("b",) * 2


def test_a_result_is_of_its_shares_and_of_what_was_passed_over(tmp_path):
    def key(share=1.0, **settings):
        texts = [
            MixedText(f"text {n}", TextKind("ab"[n % 2], (share, 1.0)[n % 2])) for n in range(4)
        ]
        write_texts(tmp_path / "perplexity.parquet", texts)
        evaluate = Evaluate(perplexity=settings)
        return EvaluationPlan(None, tmp_path, evaluate, {}).perplexity().key

    assert key() == key(skip=0)
    assert "shares" not in key()
    assert key(skip=2) != key() != key(share=3.0)
