"""Every family in transformers, without our package, and those of llama.cpp: tiny random models, exported."""

import json

import pytest

from blockpruner.checkpoints.registry import EXPORTS
from blockpruner.core.families import FAMILIES
from tests.cells import seen
from tests.plans import fetch_tiny, plan_of, pruning

pytestmark = pytest.mark.slow

HOLES = ["mha.0", "mlp.1", "mha.3", "mlp.3", "mlp.4", "mha.5"]
"""Of six layers: the first has no MHA, and the fourth is gone."""

LEFT = 3
"""Attentions that have a cache."""

TAKEN = {"qwen2": {"use_sliding_window": False}, "mistral": {"sliding_window": None}}
"""What llama.cpp takes of a family, dense or not."""


@pytest.mark.parametrize(
    ("engine", "form", "family"),
    [
        (engine, form, family)
        for engine, form in (("transformers", "hf"), ("llama.cpp", "gguf"))
        for family in EXPORTS[form].families or FAMILIES
    ],
)
def test_an_engine_computes_what_the_model_in_memory_does(tmp_path, engine, form, family):
    more = {"initializer_range": 0.2} | TAKEN.get(family, {}) if form == "gguf" else {}
    dense = fetch_tiny(tmp_path, family, 6, **more)
    EXPORTS[form].write(pruning(dense, plan_of(dense, HOLES)), tmp_path / "out")
    report = json.loads((tmp_path / "out" / "verification.json").read_text())
    found = report["files"]["F16"] if form == "gguf" else report
    assert report["ok"] and found["cache_layers"] == LEFT and found["greedy_tokens_equal"]
    key = "max_logprob_difference" if form == "gguf" else "max_logit_difference_cached"
    seen(engine, family, found[key])
