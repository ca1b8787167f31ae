"""Speed: the decoding that is timed against transformers' own, memory against formulas."""

import pytest
import torch

from blockpruner.core.blocks import parse_mask
from blockpruner.evaluation import speed
from blockpruner.evaluation.settings import Speed
from blockpruner.evaluation.speed import generate, measure_speed
from blockpruner.model.models import prune_
from tests.tiny import tiny_model

MASK = parse_mask("mha.0,mlp.2,mha.3,mlp.3")  # the first attention, an MLP and a whole layer


def model_of(state, family="llama"):
    model = tiny_model(family)
    return prune_(model, MASK) if state == "pruned" else model


@pytest.mark.parametrize("family", ["llama", "qwen3"])
@pytest.mark.parametrize("state", ["dense", "pruned"])
def test_decodes_greedily_without_stop(state, family):
    model = model_of(state, family)
    prompt = torch.randint(260, (2, 7), generator=torch.Generator().manual_seed(1))
    result = generate(model, prompt, 12).tokens
    tokens = prompt
    for _ in range(12):  # the oracle: no cache, the whole sequence every time
        tokens = torch.cat(
            [tokens, model(tokens, use_cache=False).logits[:, -1:].argmax(-1)], dim=1
        )
    assert result.tolist() == tokens[:, 7:].tolist()


@pytest.mark.parametrize(("state", "attentions", "mlps"), [("dense", 4, 4), ("pruned", 2, 2)])
def test_memory_follows_from_shapes(state, attentions, mlps):
    model = model_of(state)
    result = measure_speed(
        {"only": model}, Speed(prompt_tokens=9, new_tokens=5, repeats=1, batch=3)
    )["only"]
    # layers, k+v, batch, heads, T, d, fp64
    assert result.kv_cache_bytes == attentions * 2 * 3 * 2 * (9 + 5 - 1) * 8 * 8
    block = {"mha": 2 * 32 * 32 + 2 * 32 * 16 + 32, "mlp": 3 * 32 * 48 + 32}
    weights = 8 * (2 * 260 * 32 + 32 + attentions * block["mha"] + mlps * block["mlp"])
    assert result.peak_memory_bytes == weights + result.kv_cache_bytes
    assert result.peak_memory == "weights + KV cache"


def test_models_take_turns_and_the_warm_up_does_not_count(monkeypatch):
    turns = []
    # warm-up of b, a; then a, b; b, a; a, b
    seconds = iter([9.0, 9.0, 1.0, 10.0, 30.0, 3.0, 2.0, 20.0])
    models = {"a": tiny_model(layers=1), "b": tiny_model(layers=2)}
    names = {id(model): name for name, model in models.items()}

    def fake(model, prompt, new_tokens):
        turns.append(names[id(model)])
        elapsed = next(seconds)
        return speed.Generation(torch.zeros(4, new_tokens), elapsed, 2 * elapsed, 0)

    monkeypatch.setattr(speed, "generate", fake)
    steps = []
    settings = Speed(prompt_tokens=10, new_tokens=5, repeats=3, batch=4)
    result = measure_speed(models, settings, lambda *step: steps.append(step))
    assert turns == ["b", "a", "a", "b", "b", "a", "a", "b"]
    assert steps == [(i + 1, 8) for i in range(8)]
    assert result["a"].prefill_seconds == speed.Timing(median=2.0, samples=[1.0, 3.0, 2.0])
    assert result["b"].generation_seconds == speed.Timing(median=60.0, samples=[30.0, 90.0, 60.0])
    assert result["a"].prefill_tokens_per_second == 4 * 10 / 2.0
    assert result["b"].decode_tokens_per_second == 4 * 4 / 40.0
    assert (result["a"].repeats, result["a"].batch, result["a"].device, result["a"].dtype) == (
        3,
        4,
        "cpu",
        "float64",
    )
