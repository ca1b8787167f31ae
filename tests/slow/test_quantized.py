"""Pruned checkpoints quantized by llm-compressor, torchao and bitsandbytes: `make test-slow`."""

import json
import os
import subprocess
from pathlib import Path

import pytest

from blockpruner.checkpoints.hf import export_hf
from tests.plans import fetch_tiny, plan_of, pruning
from tests.slow.quantize import ROWS
from tests.slow.test_vllm import ask

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_a_pruned_model_is_quantized_and_served(tmp_path, family):
    """Every quantizer leaves the loss of the rows about as it was, and vLLM says what the quantized
    model says."""
    sizes = {
        "hidden_size": 128,
        "intermediate_size": 256,
        "head_dim": 32,
        "initializer_range": 0.05,
    }
    dense = fetch_tiny(tmp_path, family, 6, **sizes)
    export_hf(pruning(dense, plan_of(dense, ["mha.2", "mlp.3", "mha.5"])), tmp_path / "pruned")
    command = [
        Path(os.environ["BLOCKPRUNER_QUANTIZERS"]) / "python",
        "-I",
        Path(__file__).with_name("quantize.py"),
    ]
    given, answer = [tmp_path / "pruned", tmp_path / "quantized"], tmp_path / "answer.json"
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | {
        "HF_HUB_OFFLINE": "1"
    }
    result = subprocess.run(
        [*command, *given, answer],
        capture_output=True,
        text=True,
        env=environment,
        cwd=tmp_path,
        check=False,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    losses = json.loads(answer.read_text())
    print(family, losses)
    assert losses.keys() == {
        "none",
        "torchao int8",
        "bitsandbytes int8",
        "bitsandbytes nf4",
        "FP8",
        "W8A8",
        "W4A16",
        "AWQ",
    }
    assert all(abs(loss - losses["none"]) < 0.1 for loss in losses.values())
    reference = tmp_path / "rows.json"
    reference.write_text(json.dumps(ROWS.tolist()))
    for path in sorted((tmp_path / "quantized").iterdir()):
        served = ask("losses", path, reference)
        assert abs(served["nll"] - losses[path.name]) < 0.02, path.name
