"""Baichuan's two kinds of positions in another engine: llama.cpp has an implementation of its own,
which takes 40 layers for the 13B form (ALiBi) and 32 for the 7B form (rotary), whatever their
width."""

from types import SimpleNamespace

import pytest
import torch

from blockpruner.checkpoints import gguf
from blockpruner.checkpoints.verification import reference_outputs
from blockpruner.checkpoints.verify_llama_cpp import ask
from blockpruner.checkpoints.vocabulary import vocabulary
from tests.engines import with_llama_cpp
from tests.tiny import tiny_model
from tests.unit.test_gguf import plain

pytestmark = with_llama_cpp


def error(path, monkeypatch, family, layers, architecture):
    """Root mean square error of llama.cpp's log probabilities, the file in 16 bits."""
    tokenizer = plain()
    sizes = {"vocab_size": 304, "num_key_value_heads": 4, "hidden_size": 64}
    model = tiny_model(family, layers, torch.float32, initializer_range=0.2, **sizes)
    config = model.config.to_dict()
    reference = reference_outputs(model, SimpleNamespace(layers=layers, blocks={"mha": 0}))
    monkeypatch.setattr(gguf, "WHOLE", {family: architecture})
    gguf.write(model, vocabulary(tokenizer, config), "F16", path)
    report = ask(path, reference | gguf.facts(tokenizer, config))
    assert report["cache_layers"] == layers
    return report["rms_logprob_difference"]


@pytest.mark.parametrize(
    ("family", "layers", "architecture", "lowest", "highest"),
    [
        ("baichuan", 40, "baichuan", 0, 0.05),
        ("llama", 32, "baichuan", 0, 0.05),
        ("baichuan", 40, "llama", 0.5, 99),
    ],
    ids=["13B", "7B", "13B taken for rotary"],
)
def test_llama_cpp_computes_the_same(
    tmp_path, monkeypatch, family, layers, architecture, lowest, highest
):
    """In 16 bits; measured were 0.026 and 0.028."""
    difference = error(tmp_path / "model.gguf", monkeypatch, family, layers, architecture)
    assert lowest <= difference <= highest
