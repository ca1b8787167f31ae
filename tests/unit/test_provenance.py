"""Records of where numbers come from."""

from __future__ import annotations

import subprocess
from importlib.metadata import version
from pathlib import Path

import pytest
import torch

from blockpruner.model.models import placement
from blockpruner.store.provenance import commit, environment
from tests.tiny import tiny_model


def test_an_environment_names_versions_and_the_kernel_that_ran() -> None:
    model = tiny_model("llama")
    found = environment(**placement(model))
    assert found["torch"] == torch.__version__ and found["lm-eval"] == version("lm-eval")
    assert found["device"] == found["device_name"] == "cpu" and found["attention"] == "sdpa"
    model.set_attn_implementation("eager")
    assert environment(**placement(model)) == found | {"attention": "eager"}


def test_only_code_and_settings_make_a_clone_dirty(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def git(*arguments: str) -> str:
        command = ["git", "-c", "user.name=a", "-c", "user.email=a@b.c", *arguments]
        return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True).stdout.strip()

    (tmp_path / "blockpruner").mkdir()
    (tmp_path / "runs").mkdir()
    files = ["blockpruner/a.py", "runs/a.yaml", "runs/dvc.lock", "runs/pins.json", "dvc.lock", "README.md"]
    for name in files:
        (tmp_path / name).write_text("before")
    git("init", "--quiet")
    git("add", ".")
    git("commit", "--quiet", "--message", "all")
    head = git("rev-parse", "HEAD")
    monkeypatch.chdir(tmp_path / "runs")
    for name in files[2:]:
        (tmp_path / name).write_text("written by a run")
    assert commit() == head
    for name in [*files[:2], "runs/new.yaml", "blockpruner/new.py"]:
        (tmp_path / name).write_text("changed")
        assert commit() == f"{head}+"
        git("stash", "--quiet", "--include-untracked")
