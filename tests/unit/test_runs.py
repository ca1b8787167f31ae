"""The shipped run files of hub models: one setting for all, and what is said where the hub cannot be reached."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from blockpruner.params import load_run

ROOT = Path(__file__).parents[2]

REPOSITORIES = {
    "llama2-7b": "meta-llama/Llama-2-7b-hf",
    "llama2-13b": "meta-llama/Llama-2-13b-hf",
    "llama2-70b": "meta-llama/Llama-2-70b-hf",
    "baichuan2-7b": "baichuan-inc/Baichuan2-7B-Base",
    "baichuan2-13b": "baichuan-inc/Baichuan2-13B-Base",
    "qwen1.5-7b": "Qwen/Qwen1.5-7B",
    "qwen1.5-14b": "Qwen/Qwen1.5-14B",
    "qwen1.5-32b": "Qwen/Qwen1.5-32B",
    "mistral-7b": "mistralai/Mistral-7B-v0.3",
    "llama3-8b": "meta-llama/Meta-Llama-3-8B",
}


@pytest.mark.parametrize("name", REPOSITORIES)
def test_runs_differ_in_model_and_study_alone(name):
    run = load_run(name, ROOT / "runs")
    assert (run.model.source, run.model.repo, run.model.dtype) == ("hub", REPOSITORIES[name], "bfloat16")
    assert not run.model.trust_remote_code
    own = {"model": None, "study": None}
    assert run.model_copy(update=own) == load_run("llama2-7b", ROOT / "runs").model_copy(update=own)


def test_a_hub_that_cannot_be_reached_is_one_line(tmp_path):
    shutil.copytree(ROOT / "runs", tmp_path / "runs", ignore=shutil.ignore_patterns("pins.json"))
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "stages.fetch", "qwen1.5-7b"]
    result = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 1
    assert result.stderr.count("\n") == 1
    assert result.stderr.startswith("error in stage fetch qwen1.5-7b: hub repository ")
    assert "HF_HUB_OFFLINE is set: unset it, or use another source" in result.stderr
