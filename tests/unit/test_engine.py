"""The engine against full forward passes of the masked model, one row and one mask at a time."""

import math
from contextlib import suppress

import pytest
import torch

from blockpruner.core.blocks import DENSE, parse_mask
from blockpruner.core.errors import NonFiniteLossError
from blockpruner.inputs.calibration import CalibrationSet
from blockpruner.model import models
from blockpruner.model.models import masked
from blockpruner.reporting.formats import number
from blockpruner.scoring import engine as engine_module
from blockpruner.scoring.engine import Engine, late
from blockpruner.scoring.metrics import METRICS, perplexity
from blockpruner.scoring.objectives import MaskScore, Objective
from blockpruner.scoring.work import LOGITS_BYTES, Task, live_numbers, logits_bytes
from blockpruner.search.iteration import Iteration
from blockpruner.search.trace import read_iteration, write_iteration
from blockpruner.store.files import read_json, write_sealed_json
from blockpruner.store.trials import TrialStore, store_fields
from tests.oracles import LAYERS, LiveBytes, divergence, make_rows, row, score_all, sweep
from tests.tiny import full_nll, tiny_model


def test_model_is_left_as_it_was():
    model, rows = tiny_model("qwen2"), make_rows([8])
    before = {name: value.clone() for name, value in model.state_dict().items()}
    logits = model(torch.tensor(rows)).logits
    score_all(Engine(model), sweep(), rows)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert torch.equal(model(torch.tensor(rows)).logits, logits)


def test_row_batches_keep_to_the_token_budget():
    engine = Engine(tiny_model(), batch_tokens=20)
    rows = make_rows([5, 5, 9, 9, 30, 2])
    batches = engine.row_batches(rows, range(len(rows)))
    assert [i for batch in batches for i in batch] == list(range(6))
    for batch in batches:
        assert len(batch) == 1 or max(len(rows[i]) for i in batch) * len(batch) <= 20
    assert batches == [range(0, 2), range(2, 4), range(4, 5), range(5, 6)]


def test_a_searchs_rows_are_batched_by_length(tmp_path):
    """Each row has the value of its own forward pass, in this process and in the next one, which
    computes nothing."""
    model, rows = tiny_model(), make_rows([16, 3, 9, 12, 2, 7, 3, 16])
    calibration, mask = CalibrationSet(tuple(map(tuple, rows))), parse_mask("mha.1")
    fields = store_fields(calibration.digest, "m", "float64", "perplexity")
    batches, expected = [], [pytest.approx(full_nll(model, row), abs=1e-10) for row in rows]
    with masked(model, mask):
        lower = [pytest.approx(full_nll(model, row), abs=1e-10) for row in rows]

    first = [(1, 2), (0,)]
    expected_batches = [*first, (4, 1, 6), (5, 2), (3,), (0,), (7,), (4, 6), (5,)]

    class Spied(Engine):
        def score(self, task, rows):
            batches.append(task.span)
            return super().score(task, rows)

    for fresh in (True, False):
        batches.clear()
        store = TrialStore(fields, calibration.row_keys, tmp_path)
        objective = Objective(calibration, store, Spied(model, 20))
        some = objective([mask], rows=3)
        assert list(some[0].row_loss) == lower[:3]
        assert [list(score.row_loss) for score in objective([DENSE, mask])] == [expected, lower]
        assert store.problems == []
        store.close()
        assert batches == (expected_batches if fresh else [])


def test_nan_of_a_candidate_is_infinite_and_of_the_dense_model_names_the_row():
    model, rows = (
        tiny_model(),
        [[1, 2, 3, 4, 5, 6], [7, 8, 9, 10, 11, 12], [200, 13, 14, 15, 16, 17]],
    )
    model.model.embed_tokens.weight[rows[2][0]] = float("nan")
    engine = Engine(model, batch_tokens=6)
    spans = engine.row_batches(rows, range(3))
    result = [
        scored.loss[0]
        for scored in engine.run([Task(span, (parse_mask("mlp.1"),)) for span in spans], rows)
    ]
    assert [math.isfinite(loss) for loss in result] == [True, True, False]
    assert result[2] == math.inf
    with pytest.raises(NonFiniteLossError, match=r"row 2 is nan in the dense model.*float32"):
        list(engine.run([Task(span, (DENSE,)) for span in spans], rows))


def test_each_place_of_a_computation_is_part_of_its_origin():
    """In 16 bits a loss depends on the attention kernel and on the shape of a batch."""
    plain, *others = [
        Engine(tiny_model(attn_implementation=kernel), tokens).origin()
        for kernel, tokens in [("sdpa", 24), ("eager", 24), ("sdpa", 48)]
    ]
    assert plain.keys() == {"torch", "transformers", "device", "attention", "batch_tokens"}
    changed = [{fact for fact in plain if other[fact] != plain[fact]} for other in others]
    assert changed == [{"attention"}, {"batch_tokens"}]


def test_a_batch_of_which_some_rows_are_known_compares_with_all_of_them():
    """The dense model's states of the first row are there, those of the second are not."""
    rows, mask = [row(9, seed) for seed in (1, 2)], parse_mask("mha.1,mlp.0")
    engine = Engine(tiny_model(layers=LAYERS), 1000)
    result = [
        unit
        for span in (range(1), range(2))
        for unit in engine.run([Task(span, (mask,), METRICS["kl"])], rows)
    ]
    expected = [divergence("kl", "llama", mask, tokens) for tokens in rows]
    assert [list(unit.loss) for unit in result] == [
        pytest.approx(expected[:1]),
        pytest.approx(expected),
    ]


def test_an_infinite_loss_is_kept_and_read_again(tmp_path):
    """In logs, tables and JSON. A mean NLL above 709 has no finite perplexity."""
    store = TrialStore({"model": "m"}, ["a", "b"], tmp_path)
    store.put("mha.1", [0, 1], [math.inf, 2.0])
    store.close()
    again = TrialStore({"model": "m"}, ["a", "b"], tmp_path)
    assert again.get("mha.1") == [math.inf, 2.0]
    assert again.problems == []
    scores = MaskScore(DENSE, (1.0, 2.0), 2), MaskScore(parse_mask("mha.1"), (710.0, math.inf), 2)
    assert (
        scores[1].perplexity
        == MaskScore(DENSE, (710.0,), 1).perplexity
        == perplexity(710.0)
        == math.inf
    )
    step = Iteration(0, scores, (None, parse_mask("mha.1")), 1, nll=scores)
    write_iteration(tmp_path, step, "search")
    assert read_iteration(tmp_path, 0, "search") == step
    write_sealed_json(tmp_path / "facts.json", {"perplexity": math.inf})
    assert read_json(tmp_path / "facts.json", sealed=True) == {"perplexity": math.inf}
    assert number(math.inf) == "inf"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_lower_precision_stays_near(dtype):
    rows = make_rows([12, 12])
    exact = score_all(Engine(tiny_model()), sweep(), rows)
    model = tiny_model().to(dtype)
    result = score_all(Engine(model), sweep(), rows)
    tolerance = 1e-4 if dtype is torch.float32 else 0.35
    assert result == pytest.approx(exact, abs=tolerance)


# --- what only CUDA does, on a CPU


def test_16_bit_products_are_added_up_in_32_bits():
    kinds = torch.backends.cuda.matmul
    kinds.allow_bf16_reduced_precision_reduction = kinds.allow_fp16_reduced_precision_reduction = (
        True
    )
    Engine(tiny_model())
    assert not (
        kinds.allow_bf16_reduced_precision_reduction or kinds.allow_fp16_reduced_precision_reduction
    )


@pytest.mark.parametrize("family", ["llama", "gemma2"])
@pytest.mark.skipif(
    "dtype" not in torch.ops.aten.mm.overloads(), reason="torch has this product from 2.8 on"
)
def test_logits_of_16_bit_models_are_not_rounded(monkeypatch, family):
    """The product that only CUDA has is taken in float64 here. A bfloat16 of 8 bits is off by up to
    1/512 of itself."""
    model = tiny_model(family, dtype=torch.bfloat16)
    states = torch.randn(5, 32, generator=torch.Generator().manual_seed(1)).bfloat16()
    exact = states.double() @ model.lm_head.weight.T.double()
    if family == "gemma2":
        exact = 20 * torch.tanh(exact / 20)
    engine = Engine(model)
    rounded = engine.logits(states)
    monkeypatch.setattr(
        torch, "mm", lambda a, b, out_dtype: (a.double() @ b.double()).to(out_dtype)
    )
    monkeypatch.setattr(models, "widens", lambda head: True)
    result = engine.logits(states)
    assert rounded.dtype == torch.bfloat16
    assert result.dtype == torch.float32
    assert (rounded - exact).abs().max() > 1e-3
    assert (result - exact).abs().max() < 1e-5


def on_card(monkeypatch, model, total, batch_tokens="auto"):
    """An engine that takes the CPU for a card of so many bytes."""
    monkeypatch.setattr(engine_module.accelerator, "total_memory", lambda device: total)
    engine = Engine(model)
    engine._on_gpu = True
    engine._set_batch_tokens(batch_tokens)
    return engine


def test_batches_and_logits_fill_a_card(monkeypatch):
    """What is free at the moment (nothing) has no part in it."""
    model = tiny_model(intermediate_size=400)
    weights = sum(weight.nbytes for weight in model.parameters())
    card = 1200 * 2**20
    engine = on_card(monkeypatch, model, card)
    token = live_numbers(32, 400) * 8
    assert logits_bytes(engine.room) == (card * 9 // 10 - weights) // 16
    assert 2048 < engine._batch_tokens < 65536
    fixed = (
        weights
        + (card * 9 // 10 - weights) // engine_module.DENSE_SHARE
        + 4 * logits_bytes(engine.room)
    )
    assert (
        fixed + engine._batch_tokens * token
        <= card * 9 // 10
        < fixed + (engine._batch_tokens + 2) * token
    )
    large = on_card(monkeypatch, model, 80 * 2**30)
    assert (large._batch_tokens, logits_bytes(large.room)) == (65536, 2**30)
    small = on_card(monkeypatch, model, 2**20)
    assert (small._batch_tokens, logits_bytes(small.room)) == (2048, LOGITS_BYTES)
    given = on_card(monkeypatch, model, 80 * 2**30, 100)
    assert (given._batch_tokens, logits_bytes(given.room)) == (100, 2**30)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_the_memory_of_a_walk_is_foreseen(monkeypatch, attention):
    """Eager attention keeps every head's map. A batch as large as allowed stays within what all its
    tokens may take, beside the logits; and one of the other attention's size would not."""
    model = tiny_model(dtype=torch.bfloat16, attn_implementation=attention)
    engine, token = on_card(monkeypatch, model, 2**30), live_numbers(32, 48) * 2
    engine._batch_tokens, engine._on_gpu = 1200, False
    rows = make_rows([120] * 10)
    (first, *_) = engine.row_batches(rows, range(10))
    assert len(first) == (10 if attention == "sdpa" else 2)
    monkeypatch.setattr("blockpruner.scoring.work.LOGITS_BYTES", 260 * 4)
    engine.room = None

    def most(span):
        with LiveBytes() as live:
            list(engine.run([Task(span, (DENSE, *sweep()[-2:]))], rows))
        return live.most

    assert most(first) <= 1200 * token
    assert attention == "sdpa" or most(range(10)) > 1200 * token


def test_once_memory_has_run_out_later_batches_are_cut_before_they_fail():
    class Small(Engine):
        failed = 0

        def score(self, task, rows):
            if len(task.span) > 2:
                self.failed += 1
                raise torch.OutOfMemoryError("out of memory")
            yield from super().score(task, rows)

    model, rows = tiny_model(layers=2), make_rows([40] * 12)
    engine, masks = Small(model, 160), sweep(layers=2)
    tasks = [Task(span, tuple(masks)) for span in engine.row_batches(rows, range(12))]
    pairs = (
        (unit.mask, zip(unit.span, unit.loss, strict=True)) for unit in engine.run(tasks, rows)
    )
    result = {(mask, row): loss for mask, values in pairs for row, loss in values}
    assert (len(tasks), engine.failed) == (3, 1)
    assert result == pytest.approx(score_all(Engine(model, 40), masks, rows), abs=1e-10)


@pytest.mark.parametrize("depth", [1, 2, 8])
def test_so_many_values_as_devices_are_under_way_and_none_is_lost(depth):
    seen = []

    def launched(count, broken=False):
        for n in range(count):
            seen.append(f"launch {n}")
            yield n
        if broken:
            raise RuntimeError("out of memory")

    for n in late(launched(4), depth):
        seen.append(f"read {n}")
    first = min(depth + 1, 4)
    assert seen[: first + 1] == [*(f"launch {n}" for n in range(first)), "read 0"]
    with pytest.raises(RuntimeError, match="out of memory"):
        list(late(launched(3, broken=True), depth))
    read = []
    with suppress(RuntimeError):
        for n in late(launched(3, broken=True), depth):
            read.append(n)
    assert read == [0, 1, 2]
