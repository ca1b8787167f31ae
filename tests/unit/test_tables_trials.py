"""What is on disk is whole or absent, and a fact is reused only where its fingerprint matches."""

import errno
import math
import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from blockpruner.checkpoints.hf import save_pruned
from blockpruner.checkpoints.verification import write_verified
from blockpruner.core.blocks import all_blocks, parse_mask
from blockpruner.core.errors import InputError, StorageError
from blockpruner.inputs.calibration import CalibrationSet
from blockpruner.inputs.texts import TEXTS
from blockpruner.scoring.engine import Engine
from blockpruner.scoring.objectives import MaskScore, Objective
from blockpruner.search.iteration import Iteration
from blockpruner.search.trace import read_iteration, read_trace, seed_stores, table_path, write_iteration
from blockpruner.store import files
from blockpruner.store.files import (
    ABANDONED,
    HOST,
    MACHINE,
    is_orphan,
    read_table,
    replace_directory,
    write_atomic,
    write_json,
    write_sealed_json,
    write_table,
    write_text,
)
from blockpruner.store.journal import Journal
from blockpruner.store.plans import load_plan
from blockpruner.store.trials import TrialStore, store_fields
from tests.builders import FakeScorer, short_rows
from tests.tiny import tiny_model

FIELDS = {"calibration": "c", "model": "m", "dtype": "float32", "metric": "perplexity"}
KEY = "mha.1,mlp.0"
MASK = parse_mask(KEY)


def store(root, rows="abcd", **changes):
    return TrialStore(store_fields(**FIELDS | changes), rows, root)


def test_facts_survive_the_process(tmp_path):
    first, also = store(tmp_path), store(tmp_path)
    first.put(KEY, [2, 1], [1 / 3, 0.1])  # as rows are batched: by length
    assert not first.known(KEY, 0, 4)
    also.put(KEY, [0], [2.5])
    first.put("mlp.2", range(4), [0.0] * 4)
    also.put(KEY, [3], [math.pi])
    second = store(tmp_path)
    assert second.get(KEY) == [2.5, 0.1, 1 / 3, math.pi] and second.units(KEY) == 3
    assert second.known(KEY, 0, 4) and second.problems == []


@pytest.mark.parametrize(("dtype", "place"), [("float32", ""), ("bfloat16", "an unknown environment")])
def test_facts_of_tables_have_one_origin_before_and_after_a_restart(tmp_path, dtype, place):
    """They are put before the scorer has said where it computes."""
    first = store(tmp_path, dtype=dtype)
    first.put(KEY, range(4), [1.0] * 4)
    for found in (first, store(tmp_path, dtype=dtype)):
        assert found.origins([KEY], 4) == {place: 4}


def test_every_field_of_the_fingerprint_separates_stores_and_there_is_no_other(tmp_path):
    fields = store_fields(**FIELDS)
    assert set(fields) == {"calibration", "model", "dtype", "metric", "score_version"}
    store(tmp_path).put(KEY, range(4), [1.0] * 4)
    for field in fields:
        found = TrialStore(fields | {field: "other"}, "abcd", tmp_path).get(KEY)
        assert found is None if field != "calibration" else found == [1.0] * 4, "rows are known by content"
        assert field == "score_version" or store_fields(**FIELDS | {field: "other"}) != fields
    assert store(tmp_path).get(KEY) == [1.0] * 4


def test_logs_of_before_rows_had_keys_are_read_by_number(tmp_path):
    """Two lines as an older version wrote them, in the folder of all fields."""
    folder = tmp_path / "548f58d1c36c715b"
    folder.mkdir()
    (folder / "host-1-2.jsonl").write_text(
        'c5552f15 {"fingerprint":"548f58d1c36c715b","rows":2}\n'
        '9a9bbf27 {"trial":"mha.1","start":0,"loss":[0.1,0.3333333333333333]}\n'
    )
    found = TrialStore({"model": "m"}, "ab", tmp_path)
    assert found.problems == [] and found.get("mha.1") == [0.1, 1 / 3]


def test_a_store_is_named_by_the_identity_of_now_and_reads_the_one_of_before(tmp_path):
    """Two machines whose configs differ in the version of transformers share trials; older ones are not lost."""
    (tmp_path / "548f58d1c36c715b").mkdir()
    (tmp_path / "548f58d1c36c715b/host-1-2.jsonl").write_text(
        'c5552f15 {"fingerprint":"548f58d1c36c715b","rows":2}\n9a9bbf27 {"trial":"mha.1","start":0,"loss":[0.1,'
        "0.3333333333333333]}\n"
    )
    TrialStore({"model": "m"}, "ab", tmp_path).put("mha.2", [0, 1], [2.0, 3.0])
    here, there = (TrialStore({"model": before}, "ab", tmp_path, "now") for before in "mn")
    assert here.get("mha.1") == [0.1, 1 / 3] and here.get("mha.2") == [2.0, 3.0]
    assert there.get("mha.1") is None and here.fingerprint == there.fingerprint
    here.put("mha.3", [0, 1], [4.0, 5.0])
    assert TrialStore({"model": "n"}, "ab", tmp_path, "now").get("mha.3") == [4.0, 5.0]
    assert TrialStore({"model": "m"}, "ab", tmp_path, "another").get("mha.3") is None


def test_rows_are_known_by_content_across_calibration_sets(tmp_path):
    small = store(tmp_path, "ab", calibration="small")
    small.put(KEY, [0, 1], [1.0, 2.0])
    large = store(tmp_path, "bcab", calibration="large")
    assert large.fingerprint == small.fingerprint
    assert [large.known(KEY, row, row + 1) for row in range(4)] == [True, False, True, True]
    assert not large.known(KEY, 0, 4) and large.get(KEY)[2:] == [1.0, 2.0] and large.get(KEY)[0] == 2.0
    large.put(KEY, [1], [3.0])
    assert store(tmp_path, "cb", calibration="other").get(KEY) == [3.0, 2.0]
    assert store(tmp_path, "xy", calibration="foreign").get(KEY) is None


def test_of_two_facts_of_a_row_the_later_log_wins(tmp_path):
    for number, value in ((10, 1.0), (9, 2.0)):  # by name, the second comes last
        journal = Journal(tmp_path / store(tmp_path).fingerprint / f"host-1-{number}.jsonl", {
            "fingerprint": store(tmp_path).fingerprint, "rows": list("abcd")})  # fmt: skip
        journal.append({"trial": KEY, "start": 0, "loss": [value]})
        journal.close()
    assert store(tmp_path).get(KEY)[0] == 1.0


class Elsewhere(FakeScorer):
    """A fake on another machine: every loss is a little larger."""

    def __init__(self, machine, **facts):
        super().__init__(lambda loss, base, mask, row: 1 + row + machine / 1000)
        self.facts = {"device": "cpu", "attention": "sdpa", "batch": "8 tokens"} | facts

    def placement(self):
        return self.facts


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    "other",
    [
        {"attention": "eager"},
        {"batch": "16 tokens"},
        {"device": "cuda", "device_name": "H100"},
        {"processor": "2 x B"},
        {},
    ],
)
def test_16_bit_facts_of_another_environment_are_said_and_not_mixed(tmp_path, dtype, other, monkeypatch):
    rows, notes = short_rows(3), []
    observer = SimpleNamespace(note=notes.append, advance=lambda *step: None)
    first, second, third = (parse_mask(text) for text in ("mha.0", "mha.1", "mha.2"))

    def ask(machine, masks, **facts):
        kept = TrialStore(store_fields(rows.digest, "m", dtype, "perplexity"), rows.row_keys, tmp_path)
        scorer = Elsewhere(machine, **facts)
        found = [score.row_loss[0] for score in Objective(rows, kept, scorer, observer)(masks)]
        kept.close()
        return [round(1000 * (loss - 1)) for loss in found], len(scorer.asked)

    assert ask(1, [first, second]) == ([1, 1], 6)
    if not other:  # the same kernel of another version
        versions = {"torch": "9.9.1", "transformers": "5.24.0"}
        monkeypatch.setattr("blockpruner.store.trials.environment", lambda **facts: versions | facts)
    assert ask(2, [first, second], **other) == ([1, 1], 0), "what needs no computing is read as it is"
    mixed = ask(2, [first, third], **other)
    if dtype == "float32":
        assert mixed == ([1, 2], 3) and not notes
        return
    assert mixed == ([2, 2], 6) and "3 losses in 16 bits were computed elsewhere" in notes[-1]
    assert ask(3, [first, third], **other) == ([2, 2], 0), "the later facts stand"
    assert ask(2, [first, second], **other) == ([2, 2], 3), "the stored ones disagree, so one is computed again"


class Shrinking(Elsewhere):
    """Its device's memory runs out at the third mask. From then on its batches are smaller and its losses others."""

    def run(self, tasks, rows):
        for scored in super().run(tasks, rows):
            if len(self.asked) == 3 * len(rows):
                self.facts["batch"] = "4 tokens"
            small = self.facts["batch"] == "4 tokens"
            yield replace(scored, loss=tuple(loss + small / 1000 for loss in scored.loss))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_batch_that_is_halved_has_16_bit_candidates_scored_again(tmp_path, dtype):
    """All masks that are compared were computed in batches of one size; those of 32 bits are facts either way."""
    rows, notes = short_rows(3), []
    observer = SimpleNamespace(note=notes.append, advance=lambda *step: None)
    masks = [parse_mask(f"mha.{n}") for n in range(4)]
    kept = TrialStore(store_fields(rows.digest, "m", dtype, "perplexity"), rows.row_keys, tmp_path)
    scorer = Shrinking(0)
    found = [round(1000 * (s.row_loss[0] - 1)) for s in Objective(rows, kept, scorer, observer)(masks)]
    kept.close()
    if dtype == "float32":
        assert found == [0, 0, 1, 1] and len(scorer.asked) == 12 and not notes
    else:
        assert found == [1, 1, 1, 1] and len(scorer.asked) == 18 and "6 losses in 16 bits" in notes[0]


@pytest.mark.parametrize(
    ("dtype", "device", "most"), [("bfloat16", "cpu", 4), ("bfloat16", "cuda", None), ("float32", "cpu", None)]
)
def test_a_resumed_run_is_told_the_batches_of_before(tmp_path, dtype, device, most):
    """Those after memory ran out; another kind of device chooses its own. Logs that tell nothing limit nothing."""
    rows, observer = short_rows(3), SimpleNamespace(note=lambda line: None, advance=lambda *step: None)

    def ask(scorer, count):
        kept = TrialStore(store_fields(rows.digest, "m", dtype, "perplexity"), rows.row_keys, tmp_path)
        Objective(rows, kept, scorer, observer)([parse_mask(f"mha.{n}") for n in range(count)])
        kept.close()
        return scorer.most

    kept = TrialStore(store_fields(rows.digest, "m", dtype, "perplexity"), rows.row_keys, tmp_path)
    kept.put("mha.9", [0, 1, 2], [1.0, 2.0, 3.0])
    kept.close()
    assert ask(Shrinking(0), 4) is None
    assert ask(Elsewhere(0, device=device), 5) == most


@pytest.mark.parametrize("batch_tokens", ["auto", 1024])
def test_a_resumed_run_takes_the_batches_of_before(tmp_path, batch_tokens):
    """In bfloat16 a search that goes on computes what is left, and no candidate anew; a number that is set stands."""
    model, rows = tiny_model(layers=2, dtype=torch.bfloat16), CalibrationSet(tuple((n, 5, n + 7, 9) for n in range(8)))
    masks = [frozenset({block}) for block in all_blocks(2)]

    def ask(engine, count):
        kept = TrialStore(store_fields(rows.digest, "m", "bfloat16", "perplexity"), rows.row_keys, tmp_path)
        objective = Objective(rows, kept, engine)
        found = objective(masks[:count])
        kept.close()
        return objective.counts.rows_computed, found

    small = Engine(model)
    small._batch_tokens = 8  # its memory had run out
    ask(small, 3)
    again = Engine(model, batch_tokens)
    computed, found = ask(again, 4)
    is_auto = batch_tokens == "auto"
    assert computed == 8 * (1 if is_auto else 4)
    assert again.placement()["batch"] == f"{8 if is_auto else 1024} tokens to a batch"
    if is_auto:
        undisturbed = Objective(rows, TrialStore({"dtype": "bfloat16"}, rows.row_keys), small)(masks)
        assert [score.row_loss for score in found] == [score.row_loss for score in undisturbed]


# --- the journal --------------------------------------------------------------------------------------------------


def entries_of(path, accept=lambda entry: "n" in entry, **header):
    problems = []
    return [entry["n"] for entry in Journal(path, {"of": "tests"} | header).read(accept, problems)], problems


@pytest.fixture
def log(tmp_path):
    path = tmp_path / "new" / "log.jsonl"
    journal = Journal(path, {"of": "tests"})
    for n in (1, 2, 3):
        journal.append({"n": n})
        assert entries_of(path)[0][-1] == n, "on disk before the log is closed"
    journal.close()
    return path


def test_syncs_are_grouped_by_time(tmp_path, monkeypatch):
    """The first entry is synced, then the first one after each second, and the rest when the log is closed."""
    now, synced = [0.0], []
    path = tmp_path / "log.jsonl"
    monkeypatch.setattr("blockpruner.store.journal.time.monotonic", lambda: now[0])
    monkeypatch.setattr(os, "fsync", lambda descriptor: synced.append(path.read_text().count('"n"')))
    journal = Journal(path, {"of": "tests"}, 1.0)
    for n, now[0] in enumerate((0.0, 0.4, 0.9, 1.0, 1.5, 2.5, 2.6), 1):
        journal.append({"n": n})
        assert entries_of(path)[0] == [*range(1, n + 1)], "what a kill leaves"
    assert synced == [1, 1, 4, 6], "the second one is of the folder"
    journal.close()
    assert synced[4:] == [7]


def test_a_torn_last_line_loses_that_entry_only(log):
    log.write_bytes(log.read_bytes()[:-5])
    assert entries_of(log) == ([1, 2], [])
    again = Journal(log, {"of": "tests"})
    again.append({"n": 4})
    again.close()
    assert entries_of(log) == ([1, 2, 4], [])


@pytest.mark.parametrize("length", [0, 9])
def test_a_log_cut_in_its_first_line_starts_anew(log, length):
    log.write_bytes(log.read_bytes()[:length])
    assert entries_of(log) == ([], [])
    again = Journal(log, {"of": "tests"})
    again.append({"n": 4})
    again.close()
    assert entries_of(log) == ([4], [])


def test_a_damaged_or_foreign_line_is_named_and_not_trusted(log):
    log.write_text(log.read_text().replace('"n":2', '"n":9'))
    found, problems = entries_of(log, lambda entry: entry["n"] != 3)
    assert found == [1]
    assert problems == [f"{log}, line {n}: damaged, or of something else; it is computed again" for n in (3, 4)]


def test_a_foreign_log_is_set_aside(log):
    found, (problem,) = entries_of(log, of="others")
    assert found == [] and "set aside as log.jsonl.bad" in problem and "tests" in problem and "others" in problem
    assert log.with_name("log.jsonl.bad").exists() and not log.exists()


def test_a_full_disk_is_an_error_for_users(log, monkeypatch):
    def full(descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(StorageError, match=r"log\.jsonl: no space left"):
        Journal(log, {"of": "tests"}).append({"n": 4})


# --- iteration tables ---------------------------------------------------------------------------------------------


def iteration(index=0):
    rows = ((1.0, 2.0), (0.5, 1 / 3))
    scores = tuple(MaskScore(mask, nll, 2) for mask, nll in zip((MASK, parse_mask("mlp.1")), rows, strict=True))
    return Iteration(
        index, scores, (None, parse_mask("mlp.1")), 1, nll=(None, MaskScore(scores[1].mask, (7.0, 0.1), 2))
    )


def test_iteration_tables_come_back_to_the_bit(tmp_path):
    write_iteration(tmp_path, iteration(), "s")
    assert read_iteration(tmp_path, 0, "s") == iteration()
    assert iteration().scores[1].perplexity == math.exp((0.5 + 1 / 3) / 2)


def other_iteration(path):
    write_iteration(path.parent, replace(iteration(), index=5), "s")
    table_path(path.parent, 5).rename(path)


def incomplete(path):
    table = pq.read_table(path)
    pq.write_table(table.replace_schema_metadata({"search": "s", "iteration": "0"}), path)


DAMAGE = {
    "truncated": lambda path: path.write_bytes(path.read_bytes()[:-20]),
    "not parquet": lambda path: path.write_text("hello"),
    "foreign": lambda path: write_iteration(path.parent, iteration(), "other search"),
    "other iteration": other_iteration,
    "incomplete": incomplete,
    "other columns": lambda path: pq.write_table(pa.table({"x": [1]}), path),
}


@pytest.mark.parametrize("how", DAMAGE)
def test_a_table_that_cannot_be_trusted_is_named_and_set_aside(tmp_path, how):
    write_iteration(tmp_path, iteration(), "s")
    path = table_path(tmp_path, 0)
    DAMAGE[how](path)
    with pytest.raises(InputError, match="iteration_000"):
        read_trace(tmp_path, "s")
    trials = TrialStore(store_fields(**FIELDS), "ab")
    (problem,) = seed_stores(tmp_path, "s", trials, TrialStore({}, "ab"), influence=False)
    assert trials.get(KEY) is None and "set aside" in problem
    assert not path.exists() and path.with_name(path.name + ".bad").exists()


def test_tables_seed_the_stores_of_the_metric_and_of_the_nll(tmp_path):
    write_iteration(tmp_path / "17blocks", iteration(), "s")
    trials, nll = TrialStore(store_fields(**FIELDS), "ab"), TrialStore({}, "ab")
    assert seed_stores(tmp_path, "s", trials, nll, influence=False) == []
    assert trials.get(KEY) == [1.0, 2.0] and trials.get("mlp.1") == [0.5, 1 / 3]
    assert nll.get("mlp.1") == [7.0, 0.1] and nll.get(KEY) is None


def test_an_influence_is_of_a_unit_within_a_base(tmp_path):
    scores = (MaskScore(MASK, (1.0, 2.0), 2), MaskScore(MASK | parse_mask("mlp.2"), (), 2))
    added = (parse_mask("mha.1"), parse_mask("mlp.2"))
    write_iteration(tmp_path, Iteration(0, scores, added, 0, nll=(None, None)), "s")
    trials = TrialStore({}, "ab")
    assert seed_stores(tmp_path, "s", trials, trials, influence=True) == []
    assert trials.get("mlp.0|mha.1") == [1.0, 2.0]
    assert trials.get("mlp.0,mha.1|mlp.2") is None and trials.get(KEY) is None


# --- files and directories ----------------------------------------------------------------------------------------


def names_in(folder):
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*"))


def test_a_failed_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "a.txt"
    write_text(path, "old")

    def full(temporary):
        temporary.write_text("half")
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(StorageError, match=r"a\.txt: no space left.*kept"):
        write_atomic(path, full)
    assert path.read_text() == "old" and names_in(tmp_path) == ["a.txt"]


def test_a_failed_build_leaves_the_old_directory(tmp_path):
    path = tmp_path / "d"
    replace_directory(path, lambda directory: (directory / "x").write_text("1"))

    def broken(directory):
        (directory / "x").write_text("2")
        raise InputError("no")

    with pytest.raises(InputError):
        replace_directory(path, broken)
    assert (path / "x").read_text() == "1" and names_in(tmp_path) == ["d", "d/x"]


def test_parquet_with_other_columns(tmp_path):
    write_table(tmp_path / "t.parquet", pa.table({"words": ["x"]}))
    with pytest.raises(InputError, match=r"words: string; expected text: string"):
        read_table(tmp_path / "t.parquet", TEXTS)


def test_what_a_killed_writer_left_is_removed_and_a_living_ones_is_not(tmp_path):
    """A container with this host's name has process ids of its own, and so had an earlier boot: only age tells."""
    elsewhere = [f".d.{HOST}-0123abcd-999999999.tmp", f".d.{HOST}-999999998.tmp"]
    living = [f".d.{MACHINE}-1.tmp", ".d.another-999999999.tmp", *elsewhere]
    killed = [f".d{part}.{MACHINE}-999999999.tmp" for part in ("", "-replaced", ".reference")]
    for name in (*living, *killed):
        (tmp_path / name).mkdir()
    assert [name for name in (*living, *killed, "d", ".d.tmp", ".d.x-y.tmp") if is_orphan(tmp_path / name)] == killed
    replace_directory(tmp_path / "d", lambda directory: None)
    assert names_in(tmp_path) == sorted([*living, "d"])
    for name in living:
        os.utime(tmp_path / name, (0, time.time() - ABANDONED - 9))
    assert [name for name in living if is_orphan(tmp_path / name)] == elsewhere


def test_on_windows_no_folder_is_opened_and_no_process_is_signalled(tmp_path, monkeypatch):
    """There os.kill(id, 0) sends Ctrl-C, a folder cannot be opened, and a file is synced by who may write it."""

    def open_file(path, flags, *args):
        assert not Path(path).is_dir() and flags & os.O_RDWR
        return real(path, flags, *args)

    real = os.open
    monkeypatch.setattr(files, "WINDOWS", True)
    monkeypatch.setattr(os, "open", open_file)
    monkeypatch.setattr(os, "kill", None)
    old, new = (tmp_path / f".d.{MACHINE}-{number}.tmp" for number in (999999999, 999999998))
    old.write_text("")
    new.write_text("")
    os.utime(old, (0, time.time() - ABANDONED - 9))
    replace_directory(tmp_path / "d", lambda directory: (directory / "x").write_text("1"))
    write_json(tmp_path / "a/b.json", {})
    assert names_in(tmp_path) == [new.name, "a", "a/b.json", "d", "d/x"]


def test_a_plan_of_another_version_is_named(tmp_path):
    path = tmp_path / "plan.json"
    write_sealed_json(path, {"kind": "mask", "removed": [], "order": [], "ratios": [], "of_tomorrow": 1})
    with pytest.raises(InputError, match=r"plan\.json is not a plan of this version.*; delete it and run `dvc repro`"):
        load_plan(path)


def test_the_reference_of_an_export_is_one_of_its_temporary_files(tmp_path):
    def write(directory, reference):
        reference.touch()
        assert is_orphan(reference.parent)  # this process counts as its own successor
        raise InputError("not written")

    with pytest.raises(InputError, match="not written"):
        write_verified(tmp_path / "d", write)
    assert names_in(tmp_path) == []


@pytest.mark.parametrize(("umask", "expected"), [(0o022, 0o644), (0o002, 0o664), (0o077, 0o600)])
def test_others_may_read_weights_as_the_umask_allows(tmp_path, umask, expected):
    before = os.umask(umask)
    try:
        save_pruned(tiny_model("llama"), tmp_path / "d")
    finally:
        os.umask(before)
    assert {path.stat().st_mode & 0o777 for path in (tmp_path / "d").iterdir()} == {expected}


@pytest.mark.parametrize("number", [errno.ENOTEMPTY, errno.EEXIST], ids=errno.errorcode.get)
def test_a_directory_that_another_process_has_put_there_meanwhile_is_replaced(tmp_path, monkeypatch, number):
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
            in_the_way = error.errno in (errno.ENOTEMPTY, errno.EEXIST)
            raise (OSError(number, "in the way") if in_the_way else error) from error

    monkeypatch.setattr(os, "replace", replace)
    replace_directory(path, lambda directory: (directory / "ours").touch())
    assert theirs and names_in(tmp_path) == ["d", "d/ours"]


def test_processes_that_replace_one_directory_at_once_leave_a_whole_one(tmp_path):
    script = (
        "import sys; from pathlib import Path; from blockpruner.store.files import replace_directory\n"
        "def build(d):\n    for n in 'ab': (d / n).write_text(sys.argv[1])\n"
        "for _ in range(200): replace_directory(Path('d'), build)"
    )
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    commands = [[sys.executable, "-c", script, name] for name in ("1", "2")]
    started = [subprocess.Popen(command, cwd=tmp_path, env=environment) for command in commands]
    assert [process.wait() for process in started] == [0, 0]
    assert names_in(tmp_path) == ["d", "d/a", "d/b"]
    assert (tmp_path / "d/a").read_text() == (tmp_path / "d/b").read_text()
