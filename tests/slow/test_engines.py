"""Every family in transformers, without our package: tiny random models that lack blocks,
exported."""

import json

import pytest

from blockpruner.checkpoints.hf import export_hf
from blockpruner.core.families import FAMILIES
from tests.cells import seen
from tests.plans import fetch_tiny, plan_of, pruning

HOLES = ["mha.0", "mlp.1", "mha.3", "mlp.3", "mlp.4", "mha.5"]
"""Of six layers: the first has no MHA, and the fourth is gone."""


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_transformers_computes_what_the_model_in_memory_does(tmp_path, family):
    # at the usual 0.5, near-ties fall either way
    dense = fetch_tiny(tmp_path, family, 6, initializer_range=0.2)
    export_hf(pruning(dense, plan_of(dense, HOLES)), tmp_path / "out")
    report = json.loads((tmp_path / "out" / "verification.json").read_text())
    assert report["ok"] and report["cache_layers"] == 3 and report["greedy_tokens_equal"]
    seen(
        "transformers",
        family,
        max(report["max_logit_difference"], report["max_logit_difference_cached"]),
    )
