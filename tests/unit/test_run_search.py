"""What a search run reuses and what it computes: every input of the fingerprints, and budgets out of reach."""

import json
import os
import shutil
import socket
import threading
from types import SimpleNamespace

import pytest

from blockpruner.core.errors import InputError
from blockpruner.core.progress import SilentObserver
from blockpruner.inputs.calibration import CalibrationSet
from blockpruner.methods import score as run
from blockpruner.scoring.work import ScoredRows
from blockpruner.search import search_settings, trace

CONFIG = {
    "model_type": "llama", "hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 2,
    "num_attention_heads": 2, "vocab_size": 16,
}  # fmt: skip
SCORE = {"method": "greedy", "unit": "block", "candidates": "all", "metric": "perplexity", "acceleration": "none"}
ROWS = CalibrationSet(((1, 2, 3), (4, 5, 6)))


class CountingEngine:
    """Scores a mask by its text, two row batches; counts what it is asked for."""

    def __init__(self):
        self.asked = []

    def row_batches(self, rows, span):
        return [range(row, row + 1) for row in span]

    def run(self, tasks, rows):
        for task in tasks:
            for mask in task.masks:
                self.asked.append((mask, task.span.start))
                value = sum(map(ord, str(sorted(map(str, mask))))) / 1000
                yield ScoredRows(mask, task.span.start, tuple(value for _ in task.span))

    def close(self):
        pass


def score_run(folder, budgets=("2blocks",), **changes):
    engine = CountingEngine()
    values = {
        "calibration": ROWS, "model_identity": "m", "dtype": "float32", "config": CONFIG, "score": SCORE,
    } | changes  # fmt: skip
    run.score_run(
        folder / "scores", folder / "trials", budgets=budgets, scorer=engine, make_bench=lambda: None,
        observer=SilentObserver(), metrics=folder / "score.json", **values,
    )  # fmt: skip
    found = json.loads((folder / "score.json").read_text())
    assert found["units_computed"] == len(engine.asked) == len(set(engine.asked))
    found["search"] = json.loads((folder / "scores" / "current.json").read_text())["search"]
    return SimpleNamespace(**found)


def test_second_time_everything_is_reused(tmp_path):
    first = score_run(tmp_path)
    assert (first.trials_computed, first.units_computed) == (5 + 3, 2 * (5 + 3))
    again = score_run(tmp_path)
    assert (again.trials_computed, again.units_computed) == (0, 0)
    assert (again.trials_reused, again.units_reused) == (first.trials_computed, first.units_computed)
    assert again.search == first.search


@pytest.mark.parametrize(
    "change",
    [
        {"calibration": CalibrationSet(((1, 2, 3), (4, 5, 7)))},
        {"model_identity": "other"},
        {"dtype": "bfloat16"},
        {"score": SCORE | {"metric": "kl"}},
    ],
    ids=["calibration", "model", "dtype", "metric"],
)
def test_what_changes_a_trial_is_computed_anew(tmp_path, change):
    first = score_run(tmp_path)
    other = score_run(tmp_path, **change)
    own = 3 if "score" in change else 0  # the perplexity of what it chose, for people, is that of the first search
    assert other.trials_computed == first.trials_computed and other.trials_reused == own
    assert other.search != first.search
    assert score_run(tmp_path).trials_computed == 0


@pytest.mark.parametrize(
    ("change", "computed"),
    [({"candidates": "mha"}, 0), ({"unit": "layer"}, 1), ({"acceleration": "race"}, 0)],
    ids=["candidates", "unit", "acceleration"],
)
def test_another_search_reuses_trials_but_not_tables(tmp_path, change, computed):
    """Of the two layers, the block search (mha.0 first) has seen layer 0 as a pair, so only layer 1 is new."""
    first = score_run(tmp_path)
    other = score_run(tmp_path, score=SCORE | change)
    assert other.search != first.search
    assert other.trials_computed == computed


def test_an_accelerated_search_is_one_of_its_own_and_its_tables_seed_a_store(tmp_path):
    """Settings left out are those of the defaults; without the trial store, its tables hold all that it computed."""
    rows = CalibrationSet(tuple((i, i + 1) for i in range(8)))
    fast = {"calibration": rows, "score": SCORE | {"acceleration": "lazy+race"}}
    first, exact = score_run(tmp_path, **fast), score_run(tmp_path / "exact", calibration=rows)
    assert first.units_computed < exact.units_computed
    assert first.search != exact.search
    defaults = search_settings(fast["score"])
    assert score_run(tmp_path, calibration=rows, score=defaults).search == first.search
    assert score_run(tmp_path, calibration=rows, score=defaults | {"floor": 3}).search != first.search
    shutil.rmtree(tmp_path / "trials")
    again = score_run(tmp_path, **fast)
    assert (again.units_computed, again.trials_computed) == (0, 0)


@pytest.mark.parametrize("module", [run.store_fingerprint.__globals__, vars(trace)], ids=["trials", "search"])
def test_versions_separate(tmp_path, monkeypatch, module):
    first = score_run(tmp_path)
    name = "SCORE_VERSION" if "SCORE_VERSION" in module else "SEARCH_VERSION"
    monkeypatch.setitem(module, name, 99)
    assert score_run(tmp_path).search != first.search


@pytest.mark.parametrize(("budget", "score"), [("0.99", {}), ("5blocks", {}), ("3blocks", {"unit": "layer"})])
def test_a_budget_out_of_reach_is_refused_before_anything_is_computed(tmp_path, budget, score):
    engine = CountingEngine()
    with pytest.raises(InputError, match=r"cannot be reached; the largest reachable is 4blocks|nearest: 2blocks, 4bl"):
        run.score_run(
            tmp_path / "scores", tmp_path / "trials", calibration=ROWS, model_identity="m", dtype="float32",
            config=CONFIG, score=SCORE | score, budgets=["1blocks" if not score else "2blocks", budget],
            scorer=engine, make_bench=lambda: None, observer=SilentObserver(),
            metrics=tmp_path / "score.json",
        )  # fmt: skip
    assert engine.asked == []


def test_unknown_method_names_the_valid_ones(tmp_path):
    with pytest.raises(InputError, match=r"score\.method 'gredy' is unknown; valid: beam, evolution, given, greedy"):
        score_run(tmp_path, score=SCORE | {"method": "gredy"})


class Notes(SilentObserver):
    def __init__(self):
        self.notes, self.told = [], threading.Event()

    def note(self, message):
        self.notes.append(message)
        self.told.set()


def test_who_waits_for_the_same_trials_says_for_which_process_on_which_host(tmp_path):
    first, second = Notes(), Notes()

    def wait():
        with run.exclusive(tmp_path / "trials" / "s.lock", second):
            second.note("goes on")

    waiting = threading.Thread(target=wait)
    with run.exclusive(tmp_path / "trials" / "s.lock", first):
        waiting.start()
        assert second.told.wait(20)
        assert len(second.notes) == 1
    waiting.join(20)
    holder = f"process {os.getpid()} on {socket.gethostname()}"
    assert second.notes == [f"{holder} computes the same trials; waiting for it, then reusing them", "goes on"]
    assert first.notes == []
