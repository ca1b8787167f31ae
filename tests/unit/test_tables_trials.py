"""What is on disk is whole or absent, and a fact is reused only where its fingerprint says so."""

import errno
import math
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from blockpruner.checkpoints.hf import save_pruned
from blockpruner.checkpoints.verification import reference_beside
from blockpruner.core.blocks import parse_mask
from blockpruner.core.errors import InputError, StorageError
from blockpruner.inputs.texts import TEXTS
from blockpruner.scoring.objectives import Score
from blockpruner.search.iteration import Iteration
from blockpruner.search.trace import read_iteration, read_trace, seed_stores, table_path, write_iteration
from blockpruner.store.files import HOST, is_orphan, read_table, replace_directory, write_table, write_text
from blockpruner.store.trials import TrialStore, store_fingerprint
from tests.tiny import tiny_model

FIELDS = {"calibration": "c", "model": "m", "dtype": "float32", "metric": "perplexity"}
KEY = "mha.1,mlp.0"
MASK = parse_mask(KEY)


def store(root, rows=4, **changes):
    return TrialStore(store_fingerprint(**FIELDS | changes), rows, root)


def test_facts_survive_the_process(tmp_path):
    first = store(tmp_path)
    first.put(KEY, 1, [0.1, 1 / 3])
    assert not first.known(KEY, 0, 4)
    first.put(KEY, 0, [2.5])
    first.put(KEY, 3, [math.pi])
    second = store(tmp_path)
    assert second.get(KEY) == [2.5, 0.1, 1 / 3, math.pi]
    assert second.known(KEY, 0, 4)
    assert second.problems == []


@pytest.mark.parametrize("field", [*FIELDS, "score_version"])
def test_every_field_of_the_fingerprint_separates_stores(tmp_path, field):
    store(tmp_path).put(KEY, 0, [1.0] * 4)
    fields = store_fingerprint(**FIELDS)
    other = TrialStore(fields | {field: "other"}, 4, tmp_path)
    assert other.get(KEY) is None
    assert store(tmp_path).get(KEY) == [1.0] * 4


def test_fingerprint_holds_what_a_trial_depends_on_and_nothing_else():
    assert set(store_fingerprint(**FIELDS)) == {"calibration", "model", "dtype", "metric", "score_version"}
    for field in FIELDS:
        assert store_fingerprint(**FIELDS | {field: "other"}) != store_fingerprint(**FIELDS)


def test_two_writers_at_once(tmp_path):
    a, b = store(tmp_path), store(tmp_path)
    a.put(KEY, 0, [1.0, 2.0])
    b.put(KEY, 2, [3.0, 4.0])
    a.put("mlp.2", 0, [0.0] * 4)
    assert store(tmp_path).get(KEY) == [1.0, 2.0, 3.0, 4.0]


def test_a_torn_last_line_loses_that_unit_only(tmp_path):
    first = store(tmp_path)
    first.put(KEY, 0, [1.0, 2.0])
    first.put(KEY, 2, [3.0, 4.0])
    first.close()
    (log,) = (tmp_path / first.fingerprint).glob("*.jsonl")
    log.write_bytes(log.read_bytes()[:-9])
    again = store(tmp_path)
    assert again.known(KEY, 0, 2)
    assert not again.known(KEY, 2, 4)
    assert again.problems == []


def test_a_damaged_line_is_named_and_not_trusted(tmp_path):
    first = store(tmp_path)
    first.put(KEY, 0, [1.0, 2.0])
    first.put(KEY, 2, [3.0, 4.0])
    first.close()
    (log,) = (tmp_path / first.fingerprint).glob("*.jsonl")
    log.write_text(log.read_text().replace("[1.0,2.0]", "[1.0,9.0]"))
    again = store(tmp_path)
    assert not again.known(KEY, 0, 2)
    assert again.known(KEY, 2, 4)
    assert len(again.problems) == 1
    assert f"{log}, line 2" in again.problems[0]


def test_a_foreign_log_is_set_aside(tmp_path):
    foreign, own = store(tmp_path, model="other"), store(tmp_path)
    foreign.put(KEY, 0, [1.0] * 4)
    foreign.close()
    (log,) = (tmp_path / foreign.fingerprint).glob("*.jsonl")
    moved = tmp_path / own.fingerprint / log.name
    log.rename(moved)
    again = store(tmp_path)
    assert again.get(KEY) is None
    assert "set aside" in again.problems[0]
    assert moved.with_name(moved.name + ".bad").exists()


def iteration(index=0):
    rows = ((1.0, 2.0), (0.5, 1 / 3))
    scores = tuple(Score(mask, nll, 2) for mask, nll in zip((MASK, parse_mask("mlp.1")), rows, strict=True))
    return Iteration(index, scores, (None, parse_mask("mlp.1")), 1, nll=(None, Score(scores[1].mask, (7.0, 0.1), 2)))


def test_iteration_tables_come_back_to_the_bit(tmp_path):
    write_iteration(tmp_path, iteration(), "s")
    assert read_iteration(tmp_path, 0, "s") == iteration()
    assert iteration().scores[1].perplexity == math.exp((0.5 + 1 / 3) / 2)


def damage(path, how):
    if how == "truncated":
        path.write_bytes(path.read_bytes()[:-20])
    elif how == "not parquet":
        path.write_text("hello")
    elif how == "foreign":
        write_iteration(path.parent, iteration(), "other search")
    elif how == "other iteration":
        write_iteration(path.parent, replace(iteration(), index=5), "s")
        table_path(path.parent, 5).rename(path)
    elif how == "incomplete":
        table = pq.read_table(path)
        pq.write_table(table.replace_schema_metadata({"search": "s", "iteration": "0"}), path)
    else:
        pq.write_table(pa.table({"x": [1]}), path)


@pytest.mark.parametrize(
    "how", ["truncated", "not parquet", "foreign", "other iteration", "incomplete", "other columns"]
)
def test_a_table_that_cannot_be_trusted_is_named_and_set_aside(tmp_path, how):
    write_iteration(tmp_path, iteration(), "s")
    path = table_path(tmp_path, 0)
    damage(path, how)
    with pytest.raises(InputError, match="iteration_000"):
        read_trace(tmp_path, "s")
    trials = TrialStore(store_fingerprint(**FIELDS), 2)
    problems = seed_stores(tmp_path, "s", trials, TrialStore({}, 2), influence=False)
    assert trials.get(KEY) is None
    assert len(problems) == 1
    assert "set aside" in problems[0]
    assert not path.exists()
    assert path.with_name(path.name + ".bad").exists()


def test_tables_seed_the_stores_of_the_metric_and_of_the_nll(tmp_path):
    write_iteration(tmp_path / "17blocks", iteration(), "s")
    trials, nll = TrialStore(store_fingerprint(**FIELDS), 2), TrialStore({}, 2)
    assert seed_stores(tmp_path, "s", trials, nll, influence=False) == []
    assert trials.get(KEY) == [1.0, 2.0]
    assert trials.get("mlp.1") == [0.5, 1 / 3]
    assert nll.get("mlp.1") == [7.0, 0.1] and nll.get(KEY) is None


def test_an_influence_is_of_a_unit_within_a_base(tmp_path):
    scores = (Score(MASK, (1.0, 2.0), 2), Score(MASK | parse_mask("mlp.2"), (), 2))
    write_iteration(
        tmp_path, Iteration(0, scores, (parse_mask("mha.1"), parse_mask("mlp.2")), 0, nll=(None, None)), "s"
    )
    trials = TrialStore({}, 2)
    assert seed_stores(tmp_path, "s", trials, trials, influence=True) == []
    assert trials.get("mlp.0|mha.1") == [1.0, 2.0]
    assert trials.get("mlp.0,mha.1|mlp.2") is None and trials.get(KEY) is None


def test_a_failed_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "a.txt"
    write_text(path, "old")

    def full(temporary):
        temporary.write_text("half")
        raise OSError(errno.ENOSPC, "No space left on device")

    from blockpruner.store.files import write_atomic

    with pytest.raises(StorageError, match=r"a\.txt: no space left.*kept"):
        write_atomic(path, full)
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["a.txt"]


def test_a_failed_build_leaves_the_old_directory(tmp_path):
    path = tmp_path / "d"
    replace_directory(path, lambda directory: (directory / "x").write_text("1"))

    def broken(directory):
        (directory / "x").write_text("2")
        raise InputError("no")

    with pytest.raises(InputError):
        replace_directory(path, broken)
    assert (path / "x").read_text() == "1"
    assert [p.name for p in tmp_path.iterdir()] == ["d"]


def test_parquet_with_other_columns(tmp_path):
    write_table(tmp_path / "t.parquet", pa.table({"words": ["x"]}))
    with pytest.raises(InputError, match=r"words: string; expected text: string"):
        read_table(tmp_path / "t.parquet", TEXTS)


def test_what_a_killed_writer_left_is_removed_and_a_living_ones_is_not(tmp_path):
    living = [f".d.{HOST}-1.tmp", ".d.another-999999999.tmp"]
    killed = [f".d{part}.{HOST}-999999999.tmp" for part in ("", "-replaced", ".reference")]
    for name in (*living, *killed):
        (tmp_path / name).mkdir()
    assert [name for name in (*living, *killed, "d", ".d.tmp", ".d.x-y.tmp") if is_orphan(tmp_path / name)] == killed
    replace_directory(tmp_path / "d", lambda directory: (directory / "x").write_text("1"))
    assert {path.name for path in tmp_path.iterdir()} == {*living, "d"}


def test_the_reference_of_an_export_is_one_of_its_temporary_files(tmp_path):
    def build(directory):
        with reference_beside(directory) as reference:
            assert is_orphan(reference.parent)  # this process counts as its own successor
            reference.touch()

    replace_directory(tmp_path / "d", build)
    assert [path.name for path in tmp_path.iterdir()] == ["d"]


@pytest.mark.parametrize(("umask", "expected"), [(0o022, 0o644), (0o002, 0o664), (0o077, 0o600)])
def test_others_may_read_weights_as_the_umask_says(tmp_path, umask, expected):
    before = os.umask(umask)
    try:
        save_pruned(tiny_model("llama"), tmp_path / "d")
    finally:
        os.umask(before)
    assert {path.stat().st_mode & 0o777 for path in (tmp_path / "d").iterdir()} == {expected}


@pytest.mark.parametrize("says", [errno.ENOTEMPTY, errno.EEXIST], ids=errno.errorcode.get)
def test_a_directory_that_another_process_has_put_there_meanwhile_is_replaced(tmp_path, monkeypatch, says):
    """Whichever of its two errors the file system has for one that is not empty: XFS has the second."""
    path, original, theirs = tmp_path / "d", os.replace, []

    def replace(source, target):
        if target == path and not theirs:
            path.mkdir()
            theirs.append(path / "theirs")
            theirs[0].touch()
        try:
            original(source, target)
        except OSError as error:
            raise (OSError(says, "in the way") if error.errno in (errno.ENOTEMPTY, errno.EEXIST) else error) from error

    monkeypatch.setattr(os, "replace", replace)
    replace_directory(path, lambda directory: (directory / "ours").touch())
    assert theirs and [file.relative_to(tmp_path).as_posix() for file in tmp_path.rglob("*")] == ["d", "d/ours"]


def test_processes_that_replace_one_directory_at_once_leave_a_whole_one(tmp_path):
    script = (
        "import sys; from pathlib import Path; from blockpruner.store.files import replace_directory\n"
        "def build(d):\n    for n in 'ab': (d / n).write_text(sys.argv[1])\n"
        "for _ in range(200): replace_directory(Path('d'), build)"
    )
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    started = [
        subprocess.Popen([sys.executable, "-c", script, name], cwd=tmp_path, env=environment) for name in ("1", "2")
    ]
    assert [process.wait() for process in started] == [0, 0]
    assert [path.name for path in tmp_path.iterdir()] == ["d"]
    assert (tmp_path / "d/a").read_text() == (tmp_path / "d/b").read_text()
