"""`benchmarks.gpu`: its parts rehearsed at tiny shapes on the CPU, and what a part that fails
leaves behind."""

import pytest
import torch

from benchmarks import gpu
from blockpruner.store.files import read_json

CPU = torch.device("cpu")
CHECKS = {"iteration": 0, "refit": 1, "generation": 3}
"""How many checks a part of the rehearsal has."""


@pytest.mark.slow
def test_the_rehearsal_answers_every_part(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu, "resolve_device", lambda name: CPU)
    assert gpu.main(["--out", str(tmp_path / "gpu.json")]) == 0
    result = read_json(tmp_path / "gpu.json")
    assert result["where"]["device"] == gpu.NO_DEVICE
    checks = {
        name: sum("; at most 1" in fact for fact in record["facts"])
        for name, record in result["parts"].items()
    }
    assert checks == CHECKS


def test_a_part_that_fails_does_not_stop_the_others(tmp_path, monkeypatch, capsys):
    def broken(s):
        yield {"so far": 1}
        raise RuntimeError("a kernel is missing")

    parts = {"broken": broken, "wrong": lambda s: iter([gpu.at_most("one is none", 1.0, 0)])}
    monkeypatch.setattr(
        gpu, "PARTS", parts | {"good": lambda s: iter([gpu.at_most("none", 0.0, 0)])}
    )
    monkeypatch.setattr(gpu, "resolve_device", lambda name: CPU)
    out = str(tmp_path / "gpu.json")
    assert gpu.main(["--out", out]) == 1
    records = read_json(tmp_path / "gpu.json")["parts"]
    assert records["broken"]["ended"] == "failed: RuntimeError: a kernel is missing"
    assert records["broken"]["facts"] == {"so far": 1}
    assert "failed: ValueError: one is none is 1, and at most 0 is right" in capsys.readouterr().out
    assert gpu.main(["good", "--out", out]) == 0
    assert gpu.main(["wrong", "--out", out]) == 1
