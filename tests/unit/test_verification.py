"""The fresh process that verifies an export: which packages it finds, and which it must not."""

from __future__ import annotations

import os
import subprocess
import sys
import venv
import weakref
from pathlib import Path
from types import SimpleNamespace

import pytest

from blockpruner.checkpoints import verification
from blockpruner.checkpoints.registry import EXPORTS
from blockpruner.checkpoints.verification import verify_checkpoint
from blockpruner.methods.apply import Pruning
from blockpruner.store.files import read_json
from tests.plans import fetch_tiny, plan_of, pruning

SCRIPT = """import json, sys
import engine_of_test
try:
    import left_here
except ImportError:
    left_here = None
print(json.dumps({"ok": True, "engine": engine_of_test.__file__, "working_folder": left_here is not None}))
"""


def user_site(python: str) -> Path:
    command = [python, "-c", "import site; print(site.getusersitepackages())"]
    return Path(subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip())


@pytest.mark.parametrize("way", ["PYTHONPATH", "PYTHONUSERBASE"])
def test_packages_of_the_environment_are_found_and_those_of_the_working_folder_are_not(
    tmp_path, monkeypatch, way
):
    """As after `module load`, and as after `pip install --user`."""
    monkeypatch.delenv("BLOCKPRUNER_TESTS_FORK", raising=False)
    monkeypatch.delenv("PYTHONNOUSERSITE", raising=False)
    monkeypatch.setenv("PYTHONPATH", "")
    if way == "PYTHONPATH":
        venv.create(tmp_path / "venv")
        python, place = str(tmp_path / "venv/bin/python"), tmp_path / "modules"
        monkeypatch.setenv(
            "PYTHONPATH", os.pathsep.join(["", ".", str(tmp_path / "here"), str(place)])
        )
    else:
        monkeypatch.setenv(way, str(tmp_path / "user"))
        python = sys._base_executable
        place = user_site(python)
    for folder, name in (
        (place, "engine_of_test"),
        (tmp_path / "here", "left_here"),
        (tmp_path / "out", ""),
    ):
        folder.mkdir(parents=True)
        if name:
            (folder / f"{name}.py").touch()
    (tmp_path / "verify.py").write_text(SCRIPT)
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.syspath_prepend(place)
    monkeypatch.setattr(sys, "executable", python)
    script = SimpleNamespace(ENGINE="engine_of_test", __file__=str(tmp_path / "verify.py"))
    verify_checkpoint(tmp_path / "out", tmp_path / "reference", 1.0, script)
    report = read_json(tmp_path / "out/verification.json")
    assert report["engine"] == str(place / "engine_of_test.py")
    assert not report["working_folder"]


@pytest.mark.parametrize("form", ["hf", "nas"])
def test_no_model_is_in_memory_when_the_fresh_process_loads_its_own(tmp_path, monkeypatch, form):
    dense, load, alive = fetch_tiny(tmp_path / "dense"), Pruning.load_for_export, []

    def loaded(self):
        model = load(self)
        alive.append(weakref.ref(model))
        return model

    monkeypatch.setattr(Pruning, "load_for_export", loaded)
    monkeypatch.setattr(
        verification, "verify_checkpoint", lambda *_: alive.append([item() for item in alive])
    )
    EXPORTS[form].write(pruning(dense, plan_of(dense, ["mlp.1"])), tmp_path / "out")
    assert alive[1:] == [[None]]
