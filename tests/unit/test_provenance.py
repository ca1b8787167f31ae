"""Records of where numbers come from."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import stages
from blockpruner.store import provenance
from blockpruner.store.files import read_json
from blockpruner.store.provenance import commit, file_sha256


def test_only_code_and_settings_make_a_clone_dirty(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def git(*arguments: str) -> str:
        command = ["git", "-c", "user.name=a", "-c", "user.email=a@b.c", *arguments]
        return subprocess.run(
            command, cwd=tmp_path, capture_output=True, text=True, check=True
        ).stdout.strip()

    (tmp_path / "blockpruner").mkdir()
    (tmp_path / "runs").mkdir()
    files = [
        "blockpruner/a.py",
        "runs/a.yaml",
        "runs/dvc.lock",
        "runs/pins.json",
        "dvc.lock",
        "README.md",
    ]
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


def test_a_record_is_of_the_commit_and_the_files_that_a_stage_began_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file that the stage does not depend on may change while it runs, and is committed then."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["report"])
    commits, params = ["before"], Path("params.yaml")
    monkeypatch.setattr(provenance, "commit", lambda: commits[-1])
    params.write_text("before")
    monkeypatch.setattr(stages, "require_current", lambda: None)
    digest = file_sha256(params)
    stages.run("report", lambda item: (params.write_text("after"), commits.append("after")))
    result = read_json(Path("data/provenance/report.json"))
    assert (result["commit"], result["inputs"]["sha256"]) == ("before", {"params.yaml": digest})


def test_a_fault_of_a_stage_is_one_line_and_a_log_beside_its_record(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["stages.score", "tiny"])
    monkeypatch.setattr(stages, "require_current", lambda: None)
    (tmp_path / "data/provenance").mkdir(parents=True)

    def main(item: str) -> None:
        raise KeyError(item)

    with pytest.raises(SystemExit) as end:
        stages.run("score", main)
    (log,) = (tmp_path / "data/provenance").glob("*.log")
    (line,) = capsys.readouterr().err.splitlines()
    assert end.value.code == 1
    assert line.startswith("error in stage score tiny: KeyError: 'tiny'")
    assert log.name in line
    assert "in main" in log.read_text()
    assert not (tmp_path / "data/evidence").exists()
