"""The recipes of docs/serving.md for training elsewhere run, and what they save is a pruned model
that has learned."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from blockpruner.checkpoints.hf import export_hf
from tests.plans import fetch_tiny, plan_of, pruning

PAGE = (Path(__file__).parents[2] / "docs" / "serving.md").read_text(encoding="utf-8")
DISTILLED, ADAPTED = re.findall(
    r"```python\n(.*?)```", PAGE.partition("## Train elsewhere")[2], re.DOTALL
)[:2]
ROWS = torch.randint(1, 257, (64, 32), generator=torch.Generator().manual_seed(1))

pytestmark = pytest.mark.slow


def run(folder, code, python):
    """Run code in a folder with `dense` and `pruned`."""
    dense = fetch_tiny(folder, "llama", 4, initializer_range=0.1)
    (folder / "dense").symlink_to(dense)
    export_hf(pruning(dense, plan_of(dense, ["mha.1", "mlp.2"])), folder / "pruned")
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | {
        "HF_HUB_OFFLINE": "1"
    }
    result = subprocess.run(
        [python, "-I", "-c", code],
        capture_output=True,
        text=True,
        env=environment,
        cwd=folder,
        check=False,
    )
    assert result.returncode == 0, result.stderr[-3000:]


def logits(folder):
    return AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)(ROWS).logits


def test_distillation_by_the_trainer(tmp_path):
    data = f"data = [{{'input_ids': row, 'labels': row}} for row in {ROWS.tolist()}]\n"
    run(tmp_path, data + DISTILLED, sys.executable)
    dense, before, after = (logits(tmp_path / name) for name in ("dense", "pruned", "trained"))
    assert (after - dense).norm() < 0.97 * (before - dense).norm()
    assert AutoModelForCausalLM.from_pretrained(
        tmp_path / "trained", trust_remote_code=True
    ).config.layers_without_mha == [1]


def test_adapters_by_trl(tmp_path):
    texts = (
        "from datasets import Dataset\ntexts = Dataset.from_dict({'text': ['the quick brown fox'] *"
        " 64})\n"
    )
    on_cpu = ADAPTED.replace('SFTConfig("states",', 'SFTConfig("states", use_cpu=True, bf16=False,')
    assert on_cpu != ADAPTED
    run(tmp_path, texts + on_cpu, Path(os.environ["BLOCKPRUNER_QUANTIZERS"]) / "python")
    assert (logits(tmp_path / "merged") - logits(tmp_path / "pruned")).abs().max() > 1e-3
