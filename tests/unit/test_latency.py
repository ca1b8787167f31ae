"""Latency of blocks: arithmetic against made-up times, and a real model that is left as it was."""

import pytest
import torch

from blockpruner.evaluation import latency, speed
from blockpruner.evaluation.latency import measure_latency
from blockpruner.scoring.settings import Latency
from tests.tiny import tiny_model


def holes(model):
    return tuple(
        tuple(getattr(model.config, f"layers_without_{kind}", ())) for kind in ("mha", "mlp")
    )


def test_a_block_takes_what_its_absence_saves(monkeypatch):
    """Of five layers three lose a block; medians, without the warm-up, and never less than
    nothing."""
    timed = iter([9.0, 9.0, 9.0, 10.0, 7.0, 11.0, 11.0, 6.0, 12.0, 13.0, 7.5, 10.0])
    turns = []

    def generate(model, prompt, new_tokens):
        turns.append(holes(model))
        assert (prompt.shape, new_tokens) == ((3, 4), 5)
        return speed.Generation(prompt, 1.0, next(timed) - 1.0, 0)

    monkeypatch.setattr(latency, "generate", generate)
    steps = []
    asked = Latency(prompt_tokens=4, new_tokens=5, batch=3, repeats=3)
    result = measure_latency(
        tiny_model(layers=5), asked, lambda done, total, detail: steps.append((done, total))
    )
    dense, mha, mlp = ((), ()), ((0, 2, 4), ()), ((), (0, 2, 4))
    assert turns == [mlp, mha, dense, dense, mha, mlp, mlp, mha, dense, dense, mha, mlp]
    assert steps == [(i + 1, 12) for i in range(12)]
    assert result["seconds"] == {"dense": 12.0, "mha": 7.0, "mlp": 11.0}
    assert result["total"] == 12_000_000_000
    assert result["mha"] == pytest.approx(5e9 / 3, abs=1)
    assert result["mlp"] == pytest.approx(1e9 / 3, abs=1)


def test_the_model_is_left_as_it_was():
    model = tiny_model("gpt_neox")
    ids = torch.arange(8)[None]
    before, fields = model(ids).logits, dict(model.config.__dict__)
    result = measure_latency(model, Latency(prompt_tokens=6, new_tokens=4, batch=2, repeats=1))
    assert torch.equal(model(ids).logits, before)
    assert model.config.__dict__ == fields
    assert result["total"] > 0
