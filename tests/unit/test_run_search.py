"""What a scored run reuses and what it computes: every input of the fingerprints, and budgets out
of reach."""

import shutil
from dataclasses import replace

import pytest

from blockpruner.config.sections import Run, resolve
from blockpruner.core.blocks import format_mask
from blockpruner.core.errors import InputError
from blockpruner.inputs.calibration import CalibrationSet
from blockpruner.methods.registry import require_budgets
from blockpruner.scoring.metrics import METRICS
from blockpruner.scoring.settings import Score
from blockpruner.search.trace import (
    read_trace,
    search_cost,
    table_path,
    trace_directory,
    write_iteration,
)
from tests.builders import FakeScorer, scored, short_rows, small_config

CONFIG = small_config(2)
ROWS = CalibrationSet(((1, 2, 3), (4, 5, 6)))


def run(folder, rows=ROWS, budgets=("2blocks",), **changes):
    """What was computed; no unit is computed twice."""
    scorer = FakeScorer(
        lambda loss, base, mask, row: sum(map(ord, format_mask(mask))) / 1000, one_row=True
    )
    result = scored(folder, scorer, CONFIG, budgets, rows, **changes)
    assert result.units_computed == len(scorer.asked) == len(set(scorer.asked))
    return result


def test_tables_of_a_search_that_went_another_way_are_dropped(tmp_path):
    """As after a search in 16 bits on another device: what does not continue a trace is no part of
    it."""

    def traced(budget, **score):
        scorer = FakeScorer(lambda loss, base, mask, row: sum(map(ord, format_mask(mask))) / 1000)
        result = scored(tmp_path, scorer, small_config(4), [budget], ROWS, **score)
        directory = trace_directory(tmp_path / "scores", result.current, budget)
        return directory, result.current.search, read_trace(directory, result.current.search)

    directory, search, trace = traced("4blocks")
    assert len(trace) == 4 and traced("2blocks")[2] == trace, (
        "a longer trace serves a smaller budget"
    )
    write_iteration(directory, replace(trace[3], index=4), search)
    assert traced("2blocks")[2] == trace
    write_iteration(directory, replace(trace[3], index=2), search)
    assert traced("2blocks")[2] == trace[:2]
    assert traced("4blocks")[2] == trace

    directory, search, trace = traced("4blocks", method="floating")
    write_iteration(directory, replace(trace[-1], index=len(trace)), search)
    assert traced("4blocks", method="floating")[2] == trace


def test_second_time_everything_is_reused(tmp_path):
    first, again = run(tmp_path), run(tmp_path)
    assert (first.trials_computed, first.units_computed) == (5 + 3, 2 * (5 + 3))
    assert (again.trials_computed, again.units_computed) == (0, 0)
    assert again.trials_reused == first.trials_computed
    assert again.current == first.current


def costs(folder, current, steps):
    """What the tables of the first steps took."""
    directory = trace_directory(folder / "scores", current, "")
    return search_cost([table_path(directory, number) for number in range(steps)], directory)


def test_what_a_search_took_is_kept_beside_its_tables_and_is_never_0(tmp_path):
    """Also of a search that was interrupted, that finds all cached, whose tables or whose trials
    were deleted."""
    part = run(tmp_path, budgets=("1blocks",))
    assert costs(tmp_path, part.current, 1)["trials_asked"] == 5
    complete = run(tmp_path, budgets=("1blocks", "3blocks"))
    first, last = (costs(tmp_path, complete.current, steps) for steps in (1, 3))
    assert (first["trials_computed"], last["trials_computed"], last["trials_asked"]) == (5, 10, 10)
    assert first == costs(tmp_path, part.current, 1)
    assert 0 <= first["seconds"] <= last["seconds"]
    paths = sorted((tmp_path / "scores").rglob("*.parquet"))
    before = [path.read_bytes() for path in paths]
    run(tmp_path, budgets=("3blocks",))
    shutil.rmtree(tmp_path / "trials")
    run(tmp_path, budgets=("3blocks",))
    assert [path.read_bytes() for path in paths] == before
    fresh = run(tmp_path / "fresh", budgets=("3blocks",))
    shutil.rmtree(tmp_path / "fresh/scores")
    run(tmp_path / "fresh", budgets=("3blocks",))
    assert costs(tmp_path / "fresh", fresh.current, 3)["trials_computed"] == 10


@pytest.mark.parametrize(
    ("change", "reused"),
    [
        ({"rows": CalibrationSet(((1, 2, 3), (4, 5, 7)))}, 0),
        ({"identity": "other"}, 0),
        ({"dtype": "bfloat16"}, 0),
        (
            {"metric": "kl"},
            3,
        ),  # the perplexity of what it chose, for people, is that of the first search
    ],
    ids=str,
)
def test_what_changes_a_trial_is_computed_anew(tmp_path, change, reused):
    first, other = run(tmp_path), run(tmp_path, **change)
    assert other.trials_computed == first.trials_computed
    assert other.trials_reused == reused
    assert other.current.search != first.current.search
    assert run(tmp_path).trials_computed == 0


@pytest.mark.parametrize(
    ("change", "computed"),
    [({"candidates": "mha"}, 0), ({"unit": "layer"}, 1), ({"acceleration": "race"}, 0)],
    ids=str,
)
def test_another_search_reuses_trials_but_not_tables(tmp_path, change, computed):
    """Of the two layers, the block search (mha.0 first) has seen layer 0 as a pair, so only layer 1
    is new."""
    first, other = run(tmp_path), run(tmp_path, **change)
    assert other.current.search != first.current.search
    assert other.trials_computed == computed


def test_an_accelerated_search_is_one_of_its_own_and_its_tables_seed_a_store(tmp_path):
    """Without the trial store, its tables hold all that it computed."""
    fast = {"rows": short_rows(8), "acceleration": "lazy+race"}
    first, exact = run(tmp_path, **fast), run(tmp_path / "exact", rows=short_rows(8))
    assert first.units_computed < exact.units_computed
    assert first.current.search != exact.current.search
    shutil.rmtree(tmp_path / "trials")
    again = run(tmp_path, **fast)
    assert (again.units_computed, again.trials_computed) == (0, 0)


def test_a_metric_with_another_version_computes_its_trials_anew(tmp_path, monkeypatch):
    """The settings that DVC compares name it, too; version 0 is in no fingerprint of before."""
    first = run(tmp_path)
    assert first.current.store["metric"] == "perplexity"
    settings = Run(model={"source": "path", "path": "m"}, score={"method": "greedy"})
    before = resolve(settings, []).texts()
    monkeypatch.setitem(METRICS._rows, "perplexity", replace(METRICS["perplexity"], version=1))
    other = run(tmp_path)
    assert other.trials_computed == first.trials_computed
    assert other.current.search != first.current.search
    after = resolve(settings, []).texts()
    assert {name for name in after if after[name] != before[name]} == {"score", "searches/greedy"}


@pytest.mark.parametrize("version", ["store.trials.SCORE_VERSION", "search.trace.SEARCH_VERSION"])
def test_versions_separate(tmp_path, monkeypatch, version):
    first = run(tmp_path)
    monkeypatch.setattr(f"blockpruner.{version}", 99)
    assert run(tmp_path).current.search != first.current.search


@pytest.mark.parametrize(
    ("budgets", "score", "reachable"),
    [
        (("1blocks", "0.99"), {}, "the largest reachable is 4blocks"),
        (("1blocks", "5blocks"), {}, "the largest reachable is 4blocks"),
        (("2blocks", "3blocks"), {"unit": "layer"}, "nearest: 2blocks, 4blocks"),
        (("0.5kv",), {"candidates": "mlp"}, "the largest reachable is 2blocks, 0.0000kv"),
        (
            ("1blocks",),
            {"options": {"per": "kv"}, "candidates": "mlp"},
            "no candidate takes anything of it",
        ),
    ],
)
def test_a_budget_out_of_reach_is_refused_before_anything_is_computed(
    tmp_path, budgets, score, reachable
):
    scorer = FakeScorer()
    with pytest.raises(InputError, match=reachable):
        scored(tmp_path, scorer, CONFIG, budgets, ROWS, **score)
    assert scorer.asked == []
    with pytest.raises(InputError, match=reachable):
        require_budgets(Score(**{"method": "greedy", **score}), CONFIG, budgets)


def test_a_budget_that_needs_a_measurement_is_not_refused_before():
    for score in (Score(method="greedy"), Score(method="laco", options={"count": 2})):
        require_budgets(score, CONFIG, ("1.5x",))


def test_a_speed_up_needs_a_measurement(tmp_path):
    for budget, options in (("1.5x", {}), ("1blocks", {"per": "latency"})):
        with pytest.raises(InputError, match="what blocks take of the time is not known here"):
            run(tmp_path, budgets=[budget], options=options)
