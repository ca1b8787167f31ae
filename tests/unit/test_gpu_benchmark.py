"""`benchmarks.gpu`: its parts rehearsed at tiny shapes on the CPU."""

import pytest
import torch

from benchmarks import gpu
from blockpruner.store.files import read_json

CPU = torch.device("cpu")
CHECKS = {"sweep": 1, "generation": 3}
"""How many checks a part of the rehearsal has."""


@pytest.mark.slow
def test_the_rehearsal_answers_every_part(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu, "resolve_device", lambda name: CPU)
    assert gpu.main(["--out", str(tmp_path / "gpu.json")]) == 0
    found = read_json(tmp_path / "gpu.json")
    assert found["where"]["device"] == gpu.NO_DEVICE
    assert {name: len(record["checks"]) for name, record in found["parts"].items()} == CHECKS
    assert all(check["holds"] for record in found["parts"].values() for check in record["checks"])
