"""Metrics against plain numpy: KL and Jensen-Shannon from the logits of whole forward passes,
influences from the states that forward hooks record in the family's own model; every family, padded
rows, scored and given tokens."""

import pickle
from collections.abc import Iterator

import numpy as np
import pytest
import torch

from blockpruner.core.blocks import DENSE, all_blocks, format_mask, parse_mask, removable_units
from blockpruner.core.errors import InputError
from blockpruner.scoring import losses
from blockpruner.scoring.engine import KEEP_DENSE_STATES, Engine
from blockpruner.scoring.large.streaming import StreamingEngine
from blockpruner.scoring.losses import token_js, token_kl, token_nll
from blockpruner.scoring.metrics import METRICS, Metric
from blockpruner.scoring.work import Task
from tests.oracles import (
    LAYERS,
    MASKS,
    CrampedEngine,
    divergence,
    influence,
    log_probabilities,
    model_of,
    other_model,
    recorded,
    row,
    states_of,
    values_of,
)
from tests.tiny import GRID, VOCABULARY, tiny_model, tolerance

INFLUENCES = sorted(name for name, metric in METRICS.items() if metric.influence)
DIVERGENCES = sorted(name for name, metric in METRICS.items() if metric.reference)


ROWS = [
    row(12, 1),
    row(5, 2),
    row(12, 3, given=9),
    row(2, 4),
    row(9, 5, given=3),
    (7, 8, ~9, 10, ~11, ~12, 13),
]


# --- divergences


def assert_divergences(found, loss, variant, rows, masks=MASKS, **model):
    near = tolerance(variant)
    for mask in masks:
        for index, tokens in enumerate(rows):
            expected = divergence(loss, variant, mask, tokens, **model)
            assert found[mask, index] == pytest.approx(expected, rel=near, abs=near), format_mask(
                mask
            )


@pytest.mark.parametrize("batch_tokens", [1000, 24, 2], ids=["one batch", "batches", "rows"])
@pytest.mark.parametrize("loss", DIVERGENCES)
@pytest.mark.parametrize("variant", GRID)
def test_divergences_equal_whole_forward_passes(variant, loss, batch_tokens):
    result = values_of(Engine(model_of(variant, LAYERS), batch_tokens), ROWS, loss)
    assert_divergences(result, loss, variant, ROWS)
    assert all(abs(result[DENSE, index]) < 1e-14 for index in range(len(ROWS)))
    # what is compared is far from nothing
    assert min(value for (mask, _), value in result.items() if mask) > 1e-3


@pytest.mark.parametrize("loss", DIVERGENCES)
@pytest.mark.parametrize("variant", GRID)
def test_streamed_divergences(tmp_path, variant, loss):
    model_of(variant, LAYERS).save_pretrained(tmp_path)
    engine = StreamingEngine(tmp_path, "float64", device="cpu", batch_tokens=24)
    assert_divergences(values_of(engine, ROWS, loss), loss, variant, ROWS)
    engine.close()


def spy_on_references(engine):
    """Receives each row whose reference is kept."""
    rows_done, launched = [], engine._start_losses

    def spy(masks, hidden, batch, task, rows):
        result = launched(masks, hidden, batch, task, rows)
        if task.metric == KEEP_DENSE_STATES:
            rows_done.extend(task.span)
        return result

    engine._start_losses = spy
    return rows_done


@pytest.mark.parametrize(
    "luck", [[], [True] * 3 + [False], [True] * 15 + [False], [True] * 21 + [False, True, False]]
)
@pytest.mark.parametrize("fitting", [1, 2])
@pytest.mark.parametrize("loss", DIVERGENCES)
def test_out_of_memory_in_the_reference_and_after_it(loss, fitting, luck):
    """Halved where a batch does not fit, be it of the dense model or of the masks; each reference
    is computed once."""
    engine = CrampedEngine(model_of("llama", LAYERS), 1000, rows=fitting, luck=luck)
    referenced = spy_on_references(engine)
    result = values_of(engine, ROWS, loss)
    assert_divergences(result, loss, "llama", ROWS)
    assert sorted(referenced) == list(range(len(ROWS)))
    failed_in_reference = any(
        task.metric == KEEP_DENSE_STATES and len(task.span) > fitting for task, _ in engine.walks
    )
    assert failed_in_reference
    assert len(engine.walks) > 2


def test_a_reference_is_computed_once_and_for_its_own_rows_only():
    """Other rows, the same tokens given instead of scored, and another model are other references;
    rows that come again, in other batches or another order, are not."""
    engine = Engine(model_of("llama", LAYERS), 24)
    referenced = spy_on_references(engine)
    values_of(engine, ROWS, "kl")
    assert sorted(referenced) == list(range(len(ROWS)))
    for batch_tokens in (1000, 2):
        engine._batch_tokens = batch_tokens
        backwards = ROWS[::-1]
        assert_divergences(values_of(engine, backwards, "js"), "js", "llama", backwards)
    assert len(referenced) == len(ROWS)
    others = [
        row(12, 9),
        *(tuple(~t for t in tokens[:-1]) + tokens[-1:] for tokens in ROWS[:2]),
        ROWS[0][:-1],
    ]
    assert_divergences(values_of(engine, others, "kl"), "kl", "llama", others)
    assert len(referenced) == len(ROWS) + len(others)
    assert_divergences(values_of(engine, ROWS, "kl"), "kl", "llama", ROWS)
    second = Engine(other_model("llama"), 24)
    assert_divergences(values_of(second, ROWS, "kl"), "kl", "llama", ROWS, seed=8)


@pytest.mark.parametrize("tokens", [1, 3, 7, 1000])
@pytest.mark.parametrize(
    "loss", sorted(name for name, metric in METRICS.items() if not metric.influence)
)
def test_losses_in_chunks(monkeypatch, loss, tokens):
    model = model_of("llama", LAYERS)
    complete = values_of(Engine(model), ROWS, loss)
    monkeypatch.setattr("blockpruner.scoring.work.LOGITS_BYTES", tokens * VOCABULARY * 4)
    assert values_of(Engine(model), ROWS, loss) == pytest.approx(complete, rel=1e-13, abs=1e-13)


def flipped(logits, targets, dense):
    """Whether the most likely token is another than the dense model's, [N]."""
    return (logits.argmax(dim=-1) != dense.argmax(dim=-1)).double()


@pytest.mark.parametrize("streamed", [False, True])
def test_a_metric_of_ones_own(tmp_path, streamed):
    model_of("llama", LAYERS).save_pretrained(tmp_path)
    engine = (
        StreamingEngine(tmp_path, "float64", device="cpu")
        if streamed
        else Engine(model_of("llama", LAYERS))
    )
    metric = pickle.loads(
        pickle.dumps(Metric("flips", flipped, "flips", "share of tokens", "", reference=True))
    )
    assert metric.name == "flips"
    assert metric.name not in METRICS
    result = values_of(engine, ROWS, metric)
    for (mask, index), value in result.items():
        best, remaining = (
            log_probabilities("llama", m, ROWS[index]).argmax(axis=1) for m in (DENSE, mask)
        )
        assert value == pytest.approx(np.mean(best != remaining))
    assert max(result.values()) > 0
    engine.close()


@pytest.mark.usefixtures("two_threads")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("loss", [token_nll, token_kl, token_js])
@pytest.mark.parametrize("tokens", [1, 5, 13])
def test_pieces_of_logits_keep_the_bits(loss, dtype, tokens, monkeypatch):
    """A CPU takes pieces of a few tokens, and never one token alone."""
    generator = torch.Generator().manual_seed(2)
    logits, dense = (torch.randn(tokens, 50257, generator=generator).to(dtype) for _ in range(2))
    given = (logits, torch.randint(50257, (tokens,), generator=generator), dense)
    monkeypatch.setattr(losses, "PIECE_BYTES", 1)
    sizes, wide = [], losses.wide
    monkeypatch.setattr(losses, "wide", lambda given: sizes.append(len(given)) or wide(given))
    result = loss(*given)
    assert max(sizes) <= losses.PIECE_TOKENS
    assert min(sizes) > 1 or tokens == 1
    assert torch.equal(result, loss.__wrapped__(*given))


# --- influences


@pytest.mark.parametrize("batch_tokens", [1000, 24], ids=["one batch", "batches"])
@pytest.mark.parametrize("base", ["", "mha.1,mlp.2", "mha.0,mlp.0"])
@pytest.mark.parametrize("variant", GRID)
def test_influences_of_blocks_and_layers(variant, base, batch_tokens):
    """Of what a base leaves; pads do not count, given tokens do."""
    model, base = model_of(variant, LAYERS), parse_mask(base)
    oracle = [recorded(model, base, tokens) for tokens in ROWS]
    assert len(oracle[0]) == len(all_blocks(LAYERS)) + LAYERS - len(base) - len(
        {block.layer for block in base}
    )
    masks = [base | unit for unit in oracle[0]]
    for name in INFLUENCES:
        result = values_of(Engine(model, batch_tokens), ROWS, name, masks, base)
        for index, units in enumerate(oracle):
            for unit, (x, y) in units.items():
                expected, near = influence(name, x, y), tolerance(variant)
                assert result[base | unit, index] == pytest.approx(
                    expected, rel=near, abs=near / 100
                )


@pytest.mark.parametrize("variant", ["llama", "gpt_neox", "gemma2"])
def test_adjacent_layers_are_a_unit(variant):
    """From the state that the first one reads to the one that the last one leaves; what is removed
    already is not counted, and units of several lengths share one pass."""
    model, base = model_of(variant, 4), parse_mask("mha.1,mlp.2")
    layers = removable_units(4, "layer", "all")
    runs = [(first, last) for first in range(4) for last in range(first, 4)]
    for name in ("relative_magnitude", "block_influence"):
        for removed in (DENSE, base):
            asked = [removed | DENSE.union(*layers[first : last + 1]) for first, last in runs]
            result = values_of(Engine(model, 24), ROWS, name, asked, removed)
            for index, tokens in enumerate(ROWS):
                seen = states_of(model, removed, tokens)
                for (first, last), mask in zip(runs, asked, strict=True):
                    expected = influence(name, seen[first], seen[last + 1])
                    assert result[mask, index] == pytest.approx(expected, rel=tolerance(variant))


@pytest.mark.parametrize("variant", ["llama", "qwen2"])
@pytest.mark.parametrize("name", INFLUENCES)
def test_influences_in_bfloat16_are_taken_in_float32(name, variant):
    model = tiny_model(variant, LAYERS, torch.bfloat16)
    units = removable_units(LAYERS, "block", "all")
    result = values_of(Engine(model, 2), ROWS, name, units)
    rounded = []
    for index, tokens in enumerate(ROWS):
        oracle = recorded(model, DENSE, tokens)
        for unit in units:
            x, y = oracle[unit]
            assert result[unit, index] == pytest.approx(influence(name, x, y), rel=1e-5, abs=1e-6)
            narrow = (torch.tensor(state).bfloat16().float().numpy() for state in (x, y))
            rounded.append(abs(influence(name, *narrow) - result[unit, index]))
    assert max(rounded) > 1e-4  # the sum x + f in bfloat16 would have shown


@pytest.mark.parametrize("name", INFLUENCES)
def test_influences_are_not_streamed(tmp_path, name):
    model_of("llama", LAYERS).save_pretrained(tmp_path)
    engine = StreamingEngine(tmp_path, "float64", device="cpu")
    units: Iterator = engine.run([Task(range(1), (parse_mask("mha.0"),), METRICS[name])], ROWS)
    with pytest.raises(InputError, match=rf"score\.metric {name} .* set runtime\.streaming: false"):
        next(units)
    assert engine._weights.bytes_read == 0
    engine.close()
