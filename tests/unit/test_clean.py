"""What `stages.clean` keeps and deletes, against lists written by hand; outputs are files of a few bytes."""

import os
import time
from pathlib import Path

import pytest
import yaml

from blockpruner.store.locks import WORKSPACE, hold
from stages import clean
from tests.errors import refused

ROOT = Path(__file__).parents[2]
PARAMS = {
    "runs": ["tiny"],
    "targets": {
        "small": {"run": "tiny", "budget": "2blocks"},
        "x-bad": {"run": "tiny", "budget": "3blocks"},
        "lora-bad": {"run": "tiny", "budget": "4blocks", "train": True},
    },
    "studies": ["ours"],
}
TARGETS = ("small", "x-bad", "lora-bad")
OF_RUNS = ("settings", "models", "sources", "calibration", "scores")
OF_TARGETS = ("plans", "compensated", "trained", "checkpoints")
KEPT = {
    **{f"{kind}/tiny": True for kind in OF_RUNS},
    **{f"{kind}/{name}": False for kind in OF_RUNS for name in ("old", "small")},
    **{f"{kind}/{name}": True for kind in OF_TARGETS for name in TARGETS},
    **{f"{kind}/{name}": False for kind in OF_TARGETS for name in ("old.bad", "tiny")},
    "tables/ours": True, "tables/others": False,
}  # fmt: skip
"""Folders of outputs: whether params.yaml names them."""

LEFT_OVER = (
    "scores/tiny/s/iteration_001.parquet.bad", "trials/latency-1.json.bad.12", "trials/run/host-1-2.jsonl.bad",
    "cache/models/.3333333333333333.0123abcd.tmp/file", "cache/models/4444444444444444.bad.1/file",
    "checkpoints/.small.0123abcd.tmp/a/file", "trials/.latency-1.json.0123abcd.tmp",
)  # fmt: skip
"""Set aside, or left by a process of this machine that does not run."""

OTHERS = (
    "scores/tiny/s/a.bad.txt", "scores/tiny/s/a.badly", "scores/tiny/s/a.bad.x", "scores/.tiny.another.tmp/x",
    "scores/.tiny.fedcba98.tmp/x", "metrics/old.json", "report/index.html", "trials/run/host-1-2.jsonl",
    "evaluations/1.json", "adapters/1.safetensors", "cache/packages/1/a.whl", "provenance/score@old.json",
    "evidence/old/results.json", "metrics/old/score.json",
)  # fmt: skip
"""The stores, what Git keeps, outputs without a name, and files of processes that run or may run."""


def write(path, text=""):
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


@pytest.fixture(autouse=True)
def project(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write("params.yaml", yaml.safe_dump(PARAMS))
    write("dvc.yaml", (ROOT / "dvc.yaml").read_text())
    write("runs/tiny.yaml", (ROOT / "runs/smollm2.yaml").read_text() + "train: {}\n")
    write("runs/sources.yaml", (ROOT / "runs/sources.yaml").read_text())
    for name in KEPT:
        write(f"data/{name}/file")
    for name in (*LEFT_OVER, *OTHERS):
        write(f"data/{name}")
    for name in LEFT_OVER:  # of what a kill left only the age tells
        for path in (Path("data", name), *Path("data", name).parents):
            if path.suffix == ".tmp":
                os.utime(path, (0, time.time() - clean.ABANDONED - 9))


def files():
    return {path.relative_to("data").as_posix() for path in Path("data").rglob("*") if path.is_file()}


def test_exactly_what_nothing_names_is_listed_and_deleted(capsys):
    before = files()
    goes = {f"{name}/file" for name, kept in KEPT.items() if not kept} | set(LEFT_OVER)
    clean.main("")
    listed = capsys.readouterr().out
    assert files() == before and f"outputs: {len(KEPT)} entries" in listed and "left over: 7 entries" in listed
    clean.main("delete")
    assert capsys.readouterr().out == listed.replace("  unused:", "  deleted:")
    assert before - files() == goes
    assert not any(Path("data", name).exists() for name, kept in KEPT.items() if not kept), "an empty folder"
    unused = [line.split(": ", 1)[1] for line in listed.splitlines() if line.startswith("  unused: ")]
    assert len(unused) == len(set(unused)) == len(goes)
    clean.main("delete")
    assert before - files() == goes


def test_every_output_of_the_stages_is_looked_at():
    """The folders, written by hand above, are those of the pipeline; Git keeps the others."""
    outs = []
    for stage in yaml.safe_load(Path("dvc.yaml").read_text())["stages"].values():
        outs += [out for out in stage.get("do", stage)["outs"] if "False" not in str(out)]
    folders = {str(next(iter(out)) if isinstance(out, dict) else out).split("/")[1] for out in outs if "${" in str(out)}
    assert folders == {name.partition("/")[0] for name in KEPT}


def test_nothing_is_deleted_beside_a_flow(capsys):
    before = files()
    with (
        hold(WORKSPACE, "flow run nickel-auk", lambda holder: None),
        refused("workspace-busy"),
    ):
        clean.main("delete")
    assert files() == before
    clean.main("")
    assert "unused: data/models/old" in capsys.readouterr().out


def test_another_word_is_refused():
    with refused("unknown-word"):
        clean.main("all")
