"""What is on disk is whole or absent, and a fact is reused only where its fingerprint matches."""

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
import torch
from safetensors import SafetensorError

from blockpruner.core.blocks import DENSE, parse_mask
from blockpruner.core.budgets import resources_of
from blockpruner.core.errors import InputError, StorageError
from blockpruner.core.progress import SilentObserver
from blockpruner.core.settings import read_settings
from blockpruner.scoring.objectives import MaskScore
from blockpruner.scoring.settings import Score
from blockpruner.search.iteration import Iteration
from blockpruner.search.registry import request
from blockpruner.search.run import search
from blockpruner.search.trace import (
    read_iteration,
    read_trace,
    seed_stores,
    table_path,
    write_iteration,
)
from blockpruner.store.files import (
    link_or_copy,
    replace_directory,
    sync,
    write_atomic,
    write_text,
)
from blockpruner.store.journal import Journal
from blockpruner.store.trials import TrialStore, store_fields
from tests.builders import FakeScorer, by_text, scored, short_rows, small_config

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
    assert second.get(KEY) == [2.5, 0.1, 1 / 3, math.pi]
    assert second.known(KEY, 0, 4)
    assert second.problems == []


def test_every_field_of_the_fingerprint_separates_stores_and_there_is_no_other(tmp_path):
    fields = store_fields(**FIELDS)
    assert set(fields) == {"calibration", "model", "dtype", "metric", "score_version"}
    store(tmp_path).put(KEY, range(4), [1.0] * 4)
    for field in fields:
        result = TrialStore(fields | {field: "other"}, "abcd", tmp_path).get(KEY)
        assert result is None if field != "calibration" else result == [1.0] * 4, (
            "rows are known by content"
        )
        assert field == "score_version" or store_fields(**FIELDS | {field: "other"}) != fields
    assert store(tmp_path).get(KEY) == [1.0] * 4


def test_rows_are_known_by_content_across_calibration_sets(tmp_path):
    small = store(tmp_path, "ab", calibration="small")
    small.put(KEY, [0, 1], [1.0, 2.0])
    large = store(tmp_path, "bcab", calibration="large")
    assert large.fingerprint == small.fingerprint
    assert [large.known(KEY, row, row + 1) for row in range(4)] == [True, False, True, True]
    assert not large.known(KEY, 0, 4)
    assert large.get(KEY)[2:] == [1.0, 2.0]
    assert large.get(KEY)[0] == 2.0
    large.put(KEY, [1], [3.0])
    assert store(tmp_path, "cb", calibration="other").get(KEY) == [3.0, 2.0]
    assert store(tmp_path, "xy", calibration="foreign").get(KEY) is None


def test_of_two_facts_of_a_row_the_later_log_wins(tmp_path):
    for number, value in ((11, 1.0), (10, 2.0)):
        journal = Journal(
            tmp_path / store(tmp_path).fingerprint / f"{number}-host.jsonl",
            {"fingerprint": store(tmp_path).fingerprint, "rows": list("abcd")},
        )
        journal.append({"trial": KEY, "start": 0, "loss": [value]})
        journal.close()
    assert store(tmp_path).get(KEY)[0] == 1.0


# --- where 16-bit losses come from

ROWS = short_rows(6)


class Card(FakeScorer):
    """A fake on a card of its own: the third digit after the point of each loss is the card's
    number, or that number and one more in batches of half as many tokens."""

    def __init__(self, number, killed=None, halved=None, **facts):
        """Args: after how many losses it is killed, or its memory runs out."""
        super().__init__(
            lambda loss, base, mask, row: by_text(loss, base, mask, row) + self.place / 1000
        )
        self.place, self.killed, self.halved = number, killed, halved
        self.facts = {
            "torch": "2.9",
            "device": f"card {number}",
            "attention": "sdpa",
            "batch_tokens": 8,
        } | facts

    def origin(self):
        return self.facts

    def run(self, tasks, rows):
        for unit in super().run(tasks, rows):
            if self.killed is not None and len(self.asked) > self.killed:
                raise KeyboardInterrupt
            if (
                self.halved is not None
                and len(self.asked) > self.halved
                and self.facts["batch_tokens"] == 8
            ):
                self.place, self.facts = self.place + 1, self.facts | {"batch_tokens": 4}
                unit = replace(unit, loss=tuple(loss + 0.001 for loss in unit.loss))
            yield unit


def card_of(score):
    return round(1000 * (score.row_loss[0] - by_text("", DENSE, score.mask, 0)))


def cards(steps):
    return [{card_of(score) for score in step.scores if score.row_loss} for step in steps]


SEARCHES = {
    "greedy": {"method": "greedy"},
    "lazy and race": {"method": "greedy", "acceleration": "lazy+race"},
    "floating": {"method": "floating", "acceleration": "lazy+race"},
    "by another loss": {"method": "greedy", "metric": "kl"},
}


def searched_on(card, folder, dtype="bfloat16", name="greedy", notes=None):
    """The steps of a search with its stores at `folder`."""
    asked = request(read_settings(Score, SEARCHES[name]))
    stores = {
        loss: TrialStore(store_fields(ROWS.digest, "m", dtype, loss), ROWS.row_keys, folder)
        for loss in asked.losses
    }
    observer = SilentObserver()
    if notes is not None:
        observer.note = notes.append
    try:
        traces, _ = search(
            asked, ROWS, stores, card, resources_of(small_config(6)), ["0.3"], observer
        )
        return next(iter(traces.values()))
    finally:
        for store in stores.values():
            store.close()


@pytest.mark.parametrize("name", SEARCHES)
def test_a_16_bit_search_that_another_card_resumes_begins_again_there(tmp_path, name):
    """Each card goes its own way from the first step to the last, and finds its own facts again."""
    killed = 60
    with pytest.raises(KeyboardInterrupt):
        searched_on(Card(1, killed=killed), tmp_path, name=name)
    assert set().union(*cards(searched_on(Card(2), tmp_path, name=name))) == {2}
    resumed, undisturbed = Card(1), Card(1)
    steps = searched_on(resumed, tmp_path, name=name)
    assert steps == searched_on(undisturbed, tmp_path / "new", name=name)
    assert set().union(*cards(steps)) == {1}
    assert (
        len(undisturbed.asked) - killed - 6
        <= len(resumed.asked)
        <= len(undisturbed.asked) - killed + 6
    )
    again = Card(2)
    assert set().union(*cards(searched_on(again, tmp_path, name=name))) == {2}
    assert not again.asked


@pytest.mark.parametrize("name", SEARCHES)
def test_a_16_bit_search_whose_batches_are_halved_begins_again(tmp_path, name):
    notes, card = [], Card(1, halved=100)
    steps = searched_on(card, tmp_path, name=name, notes=notes)
    assert set().union(*cards(steps)) == {2}
    assert {step.origin["batch_tokens"] for step in steps} == {4}
    (note,) = notes
    assert "batch_tokens 4, before 8" in note
    assert "begins again" in note


@pytest.mark.parametrize("name", SEARCHES)
def test_facts_of_32_bits_are_of_no_origin(tmp_path, name):
    """Whatever the device, its batches and their halving, nothing is computed twice and no scorer
    is asked."""
    with pytest.raises(KeyboardInterrupt):
        searched_on(Card(1, killed=60), tmp_path, "float32", name)
    other, notes = Card(1, halved=10, device="another", attention="eager"), []
    other.origin = None
    steps = searched_on(other, tmp_path, "float32", name, notes)
    undisturbed = Card(1)
    assert [step.removed for step in steps] == [
        step.removed for step in searched_on(undisturbed, tmp_path / "new", "float32", name)
    ]
    assert len(other.asked) <= len(undisturbed.asked) - 60 + 6
    assert not notes
    assert all(step.origin == {} for step in steps)


@pytest.mark.parametrize("dtype", ["float64", "float32", "float16", "bfloat16"])
def test_a_32_bit_store_is_that_of_every_origin(tmp_path, dtype):
    own = TrialStore(store_fields(ROWS.digest, "m", dtype, "perplexity"), ROWS.row_keys, tmp_path)
    assert (own.of({"device": "card 9"}) is own) is (torch.finfo(getattr(torch, dtype)).bits >= 32)


def test_every_fact_of_an_origin_separates_16_bit_stores(tmp_path):
    first, same = Card(1), Card(1)
    searched_on(first, tmp_path)
    searched_on(same, tmp_path)
    assert not same.asked
    for change in (
        {"torch": "2.10"},
        {"device": "card 9"},
        {"attention": "eager"},
        {"batch_tokens": 16},
    ):
        other = Card(1, **change)
        searched_on(other, tmp_path)
        assert len(other.asked) == len(first.asked), change


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("here", [1, 2])
def test_a_clone_with_pulled_tables_reuses_those_of_its_own_origin(tmp_path, dtype, here):
    """Tables bring their origin along, and those of another one are kept for it."""
    first = searched_on(Card(1), tmp_path / "first", dtype)
    for step in first:
        write_iteration(tmp_path / "tables", step, "s")
    fields = store_fields(ROWS.digest, "m", dtype, "perplexity")
    clone = TrialStore(fields, ROWS.row_keys, tmp_path / "clone")
    assert seed_stores(tmp_path / "tables", "s", clone, clone, influence=False) == []
    clone.close()
    card = Card(here)
    steps = searched_on(card, tmp_path / "clone", dtype)
    if dtype == "float32" or here == 1:
        assert not card.asked
        assert steps == first
    else:
        assert card.asked
        assert set().union(*cards(steps)) == {2}
        assert not (same := Card(1)).asked
        assert searched_on(same, tmp_path / "clone", dtype) == first
        assert not same.asked


# --- the journal


def entries_of(path, **header):
    problems = []
    return [
        entry["n"] for entry in Journal(path, {"of": "tests"} | header).read(problems)
    ], problems


@pytest.fixture
def log(tmp_path):
    path = tmp_path / "new" / "log.jsonl"
    journal = Journal(path, {"of": "tests"})
    for n in (1, 2, 3):
        journal.append({"n": n})
        assert entries_of(path)[0][-1] == n, "on disk before the log is closed"
    journal.close()
    return path


def test_a_torn_last_line_loses_that_entry_only(log):
    log.write_bytes(log.read_bytes()[:-5])
    assert entries_of(log) == ([1, 2], [])
    again = Journal(log, {"of": "tests"})
    again.append({"n": 4})
    again.close()
    assert entries_of(log) == ([1, 2, 4], [])


def test_a_damaged_line_is_named_and_not_trusted(log):
    log.write_text(log.read_text().replace('"n":2', '"n":9'))
    result, problems = entries_of(log)
    assert result == [1, 3]
    assert len(problems) == 1
    assert f"{log}, line 3" in problems[0]


def test_a_foreign_log_is_set_aside(log):
    result, (problem,) = entries_of(log, of="others")
    assert result == []
    assert "set aside as log.jsonl.bad" in problem
    assert "tests" in problem
    assert "others" in problem
    assert log.with_name("log.jsonl.bad").exists()
    assert not log.exists()


# --- iteration tables


def iteration(index=0):
    rows = ((1.0, 2.0), (0.5, 1 / 3))
    scores = tuple(
        MaskScore(mask, nll, 2) for mask, nll in zip((MASK, parse_mask("mlp.1")), rows, strict=True)
    )
    return Iteration(
        index,
        scores,
        (None, parse_mask("mlp.1")),
        1,
        nll=(None, MaskScore(scores[1].mask, (7.0, 0.1), 2)),
    )


def test_iteration_tables_come_back_to_the_bit(tmp_path):
    write_iteration(tmp_path, iteration(), "s")
    assert read_iteration(tmp_path, 0, "s") == iteration()
    assert iteration().scores[1].perplexity == math.exp((0.5 + 1 / 3) / 2)


def other_iteration(path):
    write_iteration(path.parent, replace(iteration(), index=5), "s")
    table_path(path.parent, 5).rename(path)


DAMAGE = {
    "truncated": lambda path: path.write_bytes(path.read_bytes()[:-20]),
    "not parquet": lambda path: path.write_text("hello"),
    "foreign": lambda path: write_iteration(path.parent, iteration(), "other search"),
    "other iteration": other_iteration,
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
    assert trials.get(KEY) is None
    assert "set aside" in problem
    assert not path.exists()
    assert path.with_name(path.name + ".bad").exists()


def test_tables_seed_the_stores_of_the_metric_and_of_the_nll(tmp_path):
    write_iteration(tmp_path / "17blocks", iteration(), "s")
    trials, nll = TrialStore(store_fields(**FIELDS), "ab"), TrialStore({}, "ab")
    assert seed_stores(tmp_path, "s", trials, nll, influence=False) == []
    assert trials.get(KEY) == [1.0, 2.0]
    assert trials.get("mlp.1") == [0.5, 1 / 3]
    assert nll.get("mlp.1") == [7.0, 0.1]
    assert nll.get(KEY) is None


def test_an_influence_is_of_a_unit_within_a_base(tmp_path):
    scores = (MaskScore(MASK, (1.0, 2.0), 2), MaskScore(MASK | parse_mask("mlp.2"), (), 2))
    added = (parse_mask("mha.1"), parse_mask("mlp.2"))
    write_iteration(tmp_path, Iteration(0, scores, added, 0, nll=(None, None)), "s")
    trials = TrialStore({}, "ab")
    assert seed_stores(tmp_path, "s", trials, trials, influence=True) == []
    assert trials.get("mlp.0|mha.1") == [1.0, 2.0]
    assert trials.get("mlp.0,mha.1|mlp.2") is None
    assert trials.get(KEY) is None


# --- files and directories


def names_in(folder):
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*"))


@pytest.mark.parametrize("write", [write_atomic, replace_directory])
@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        SafetensorError("I/O error: No space left on device (os error 28)"),
        SafetensorError('IoError(Os { code: 28, kind: StorageFull, message: "..." })'),
        RuntimeError("[enforce fail at inline_container.cc:664] . unexpected pos 64 vs 0"),
    ],
    ids=["system", "safetensors", "safetensors 0.5", "torch"],
)
def test_a_full_disk_is_named_and_leaves_the_old_file(tmp_path, write, error):
    """Each library has its own words for it."""
    write(tmp_path / "a", lambda path: path.touch() if write is write_atomic else None)

    def full(temporary):
        raise error

    with pytest.raises(StorageError, match=r"cannot write .*/a: no space left.*kept"):
        write(tmp_path / "a", full)
    assert names_in(tmp_path) == ["a"]


def test_a_failed_build_leaves_the_old_directory(tmp_path):
    path = tmp_path / "d"
    replace_directory(path, lambda directory: (directory / "x").write_text("1"))

    def broken(directory):
        (directory / "x").write_text("2")
        raise InputError("no")

    with pytest.raises(InputError):
        replace_directory(path, broken)
    assert (path / "x").read_text() == "1"
    assert names_in(tmp_path) == ["d", "d/x"]


def test_what_a_kill_left_in_the_tables_is_removed_before_a_search(tmp_path):
    scores = tmp_path / "scores"
    (scores / "0123").mkdir(parents=True)
    remaining, kept = scores / "0123/.iteration_000.parquet.0123abcd.tmp", scores / ".mine.tmp"
    remaining.touch()
    kept.touch()
    scored(tmp_path, FakeScorer(), small_config(2), ["1blocks"], short_rows(2))
    assert kept.exists()
    assert not remaining.exists()


def test_processes_that_replace_one_directory_at_once_leave_a_whole_one(tmp_path):
    script = (
        "import sys; from pathlib import Path; from blockpruner.store.files import"
        " replace_directory\ndef build(d):\n    for n in 'ab': (d / n).write_text(sys.argv[1])\nfor"
        " _ in range(200): replace_directory(Path('d'), build)"
    )
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    commands = [[sys.executable, "-c", script, name] for name in ("1", "2")]
    started = [subprocess.Popen(command, cwd=tmp_path, env=environment) for command in commands]
    assert [process.wait() for process in started] == [0, 0]
    assert names_in(tmp_path) == ["d", "d/a", "d/b"]
    assert (tmp_path / "d/a").read_text() == (tmp_path / "d/b").read_text()


@pytest.mark.parametrize("moment", ["append", "close"])
def test_a_log_that_cannot_be_synced_is_named_and_keeps_its_entries(tmp_path, monkeypatch, moment):
    journal = Journal(tmp_path / "log.jsonl", {"of": "a test"}, seconds=60.0)
    journal.append({"n": 1})
    monkeypatch.setattr("os.fsync", broken)
    monkeypatch.setattr(journal, "_synced", -math.inf)
    with pytest.raises(StorageError, match=r"log\.jsonl: no space left"):
        journal.append({"n": 2}) if moment == "append" else journal.close()
    monkeypatch.undo()
    journal.close()
    assert journal.read_header() is not None
    assert journal.read([])[0] == {"n": 1}


def broken(descriptor):
    raise OSError(errno.ENOSPC, "No space left on device")


def test_a_file_system_without_links_or_syncs_of_folders_is_enough(tmp_path, monkeypatch):
    """As some network mounts."""

    def refused(*arguments):
        raise OSError(errno.EINVAL, "Invalid argument")

    write_text(tmp_path / "a", "text")
    monkeypatch.setattr("os.link", refused)
    link_or_copy(tmp_path / "a", tmp_path / "b")
    monkeypatch.setattr("os.fsync", refused)
    sync(tmp_path)
    assert (tmp_path / "b").read_text() == "text"
    assert not (tmp_path / "b").samefile(tmp_path / "a")
    with pytest.raises(OSError, match="Invalid argument"):
        sync(tmp_path / "a")
