"""Pruned SmolLM2 in llama.cpp, quantized to 4 bits by llama.cpp's own program, if it is on PATH."""

import json
import shutil

import pytest

from blockpruner.checkpoints.gguf import QUANTIZER, export_gguf
from tests.plans import pruning

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(shutil.which(QUANTIZER) is None, reason=f"no {QUANTIZER} on PATH"),
]


def test_quantized_by_llama_cpp(tmp_path, smollm2, plans):
    """A pruned model loses no more by it than the dense one, half more allowed; errors are
    printed."""
    errors = {}
    for name, plan in plans.items():
        export_gguf(pruning(smollm2, plan), tmp_path / name, ("Q4_K_M",))
        report = json.loads((tmp_path / name / "verification.json").read_text())
        print(name, found := report["files"]["Q4_K_M"])
        assert report["ok"] and found["cache_layers"] == plan.layers - plan.blocks["mha"]
        errors[name] = found["rms_logprob_difference"]
    assert max(errors.values()) <= 1.5 * errors["dense"]
