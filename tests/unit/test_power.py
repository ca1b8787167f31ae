"""Stores that lose power before any of their writes: what had returned is on disk, and nothing is
half there."""

from __future__ import annotations

import signal
from functools import partial
from pathlib import Path

import pytest

from blockpruner.store.files import read_json, replace_directory, sync, write_sealed_json
from blockpruner.store.locks import hold
from blockpruner.store.trials import TrialStore
from tests.power import MODES, forked

ROWS = ("first", "second")


def work(done: Path) -> None:
    """Some of each kind of write; `done` gets a name when a write has returned."""

    def returned(name: str) -> None:
        with open(done, "a") as file:
            file.write(f"{name}\n")

    def build(folder: Path) -> None:
        (folder / "below").mkdir()
        (folder / "below/weights").write_bytes(bytes(100))
        (folder / "config").write_text("config")

    with hold(Path("new/trials/a.lock"), "a stage", print):  # makes the folder
        store = TrialStore({"model": "m"}, ROWS, Path("new/trials"))
    for number in range(2):
        store.put(f"mha.{number}", [0, 1], [1.0, 2.0])
        returned(f"mha.{number}")
    store.close()
    returned("closed")
    for number in range(2):
        write_sealed_json(Path("new/plan.json"), {"number": number, "text": "x" * 50})
        returned(f"plan {number}")
        replace_directory(Path("model"), build)
        returned(f"model {number}")


def check(folder: Path, done: set[str], mode: str = "killed") -> None:
    """A cut of power may lose trials of the last second: all but the first one until the store is
    closed."""
    store = TrialStore({"model": "m"}, ROWS, folder / "new/trials")
    for number in range(2):
        is_promised = f"mha.{number}" in done and (
            mode == "killed" or number == 0 or "closed" in done
        )
        assert store.get(f"mha.{number}") in ([[1.0, 2.0]] if is_promised else [[1.0, 2.0], None])
    assert store.problems == [], "a cut leaves no log that has to be set aside"
    plan, model = folder / "new/plan.json", folder / "model"
    if plan.exists():
        assert read_json(plan)["number"] >= int("plan 1" in done)
    else:
        assert "plan 0" not in done
    if model.exists():
        assert (model / "below/weights").read_bytes() == bytes(100)
        assert (model / "config").read_text() == "config"
    else:  # while it is replaced there is neither
        assert "model 0" not in done or ("plan 1" in done and "model 1" not in done)


@pytest.mark.parametrize("mode", MODES)
def test_what_had_returned_is_on_disk(mode: str, tmp_path: Path) -> None:
    done, folder = tmp_path / "done", tmp_path / "disk"
    folder.mkdir()
    code, writes = forked(folder, partial(work, done), tmp_path / "log")
    assert code == 0 and writes > 30, (tmp_path / "log").read_text()
    for cut in range(1, writes + 1):
        folder, done = tmp_path / f"disk{cut}", tmp_path / f"done{cut}"
        folder.mkdir()
        assert forked(folder, partial(work, done), tmp_path / "log", cut, mode) == (
            -signal.SIGKILL,
            cut,
        )
        finished = set(done.read_text().splitlines()) if done.exists() else set()
        check(folder, finished, mode)
        if cut % 4 == 1:  # and what is left is no obstacle
            assert forked(folder, partial(work, done), tmp_path / "log")[0] == 0, (
                tmp_path / "log"
            ).read_text()
            check(folder, {"mha.0", "mha.1", "closed", "plan 0", "plan 1", "model 0", "model 1"})


def careless(is_synced: bool) -> None:
    """A new file in the place of an old one, without any sync, or without that of the folder."""
    Path("new").write_text("new")
    if is_synced:
        sync(Path("new"))
    Path("new").replace("file")
    Path("end").mkdir()


@pytest.mark.parametrize(
    ("is_synced", "kept"),
    [
        (False, {"killed": "new", "lost": "old", "reordered": "n"}),
        (True, {"killed": "new", "lost": "old", "reordered": "new"}),
    ],
)
def test_a_careless_writer_is_caught(is_synced: bool, kept: dict[str, str], tmp_path: Path) -> None:
    """So the cuts above would show a sync that is missing."""
    result = {}
    for mode in MODES:
        folder = tmp_path / mode
        folder.mkdir()
        (folder / "file").write_text("old")
        cut = 3 if is_synced else 2  # the new folder comes last
        assert (
            forked(folder, partial(careless, is_synced), tmp_path / "log", cut, mode)[0]
            == -signal.SIGKILL
        )
        result[mode] = (folder / "file").read_text()
    assert result == kept
