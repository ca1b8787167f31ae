"""`calibration.num_samples: auto`: few rows where the choice is clear, all where it is not, and the claim held."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest

from blockpruner.core.blocks import all_blocks, removable_units
from blockpruner.core.errors import InputError
from blockpruner.core.families import Costs
from blockpruner.core.settings import read_settings
from blockpruner.inputs.calibration import CalibrationSet, draw_rows
from blockpruner.inputs.settings import Calibration
from blockpruner.scoring.accelerate import accelerate
from blockpruner.scoring.objectives import Objective
from blockpruner.scoring.settings import Score
from blockpruner.scoring.stability import REGRET, differences, is_decided
from blockpruner.search.greedy import GreedyOptions, greedy
from blockpruner.search.problem import Problem
from blockpruner.search.trace import read_trace
from blockpruner.settings import Run
from blockpruner.store.trials import TrialStore
from tests.builders import FakeScorer, scored, short_rows, small_config
from tests.tiny import tiny_tokenizer

ROWS, UNITS = short_rows(64), removable_units(6, "block", "all")
COSTS = Costs(24, {block: 1 if block.kind == "mha" else 3 for block in all_blocks(6)})
AUTO = {"num_samples": "auto"}
EASY, CLOSE, TIED = (0.2, 0.02), (0.02, 0.2), (0.0, 0.5)
"""How far the blocks' costs lie apart, and how much rows differ about each."""


class World(FakeScorer):
    """Each block adds a cost of its own, which rows see with a skewed noise."""

    def __init__(self, apart: float, noise: float, seed: int = 0) -> None:
        super().__init__(lambda loss, base, mask, row: float(self.rows_of(mask)[row]))
        random = np.random.default_rng(seed)
        costs = random.permutation(len(UNITS)) * apart
        drawn = random.gamma(0.5, noise, len(ROWS.rows))
        if apart:
            self.cost = {u: c + random.gamma(0.5, noise, len(ROWS.rows)) for u, c in zip(UNITS, costs, strict=True)}
        else:  # the same mean over all rows
            self.cost = {unit: random.permutation(drawn) for unit in UNITS}

    def rows_of(self, mask):
        return 2.0 + sum((self.cost[frozenset({block})] for block in mask), np.zeros(len(ROWS.rows)))


def sequence(world, steps=6, store=None, per="none", **score):
    objective = Objective(ROWS, store or TrialStore({}, ROWS.row_keys), world)
    select = accelerate(objective, Score(**score), adaptive=True, costs=None if per == "none" else COSTS)
    problem = Problem(UNITS, objective, select, objective.rows, resources={"parameters": COSTS})
    search = greedy(problem, GreedyOptions(per=per))
    return [next(search) for _ in range(steps)]


def seen(step):
    """On how many rows the others were scored, and whether the choice has all."""
    chosen = step.scores[step.chosen]
    others = {score.rows_used for score in step.scores if score is not chosen and score.mask}
    return others, chosen.is_complete


@pytest.mark.parametrize("seed", range(3))
def test_criterion_is_that_of_all_resamples(seed):
    """On 5 rows: d is drawn in all 5^5 ways, and its spread about the mean widened by sqrt(5 / 4)."""
    random = np.random.default_rng(seed)
    base = random.normal(0, 1, 5)
    for gap in (-0.02, 0.05, 0.1, 0.2, 0.4):
        d = differences([base, base + gap + random.normal(0, 0.1, 5)], 0)
        draws = np.array([d[1, list(draw)].mean() for draw in itertools.product(range(5), repeat=5)])
        wide = d[1].mean() + (draws - d[1].mean()) * np.sqrt(5 / 4)
        share = (wide >= -REGRET).mean()
        if abs(share - 0.95) > 0.02:
            assert is_decided(d) == (share > 0.95), (gap, share)


def test_a_clear_choice_needs_eight_rows_and_a_tie_all_of_them():
    assert all(seen(step) == ({8}, True) for step in sequence(World(*EASY)))
    assert all(seen(step) == ({64}, True) for step in sequence(World(*TIED)))
    equal = sequence(World(0.0, 0.0))  # whichever is taken, nothing is lost
    assert all(seen(step) == ({8}, True) for step in equal)


@pytest.mark.parametrize(
    "score",
    [{}, {"acceleration": "race"}, {"acceleration": "lazy", "floor": 4}, {"acceleration": "lazy+race", "floor": 4}],
)
def test_the_choice_is_as_good_as_claimed(score):
    """Against all rows: in at least 95 of 100 steps no candidate is better by more than 0.01."""
    good, used = [], []
    for seed in range(10):
        world = World(*CLOSE, seed)
        for step in sequence(world, **score):
            base = step.removed - step.added[step.chosen]
            losses = {unit: world.rows_of(base | unit).mean() for unit in UNITS if not unit <= base}
            good.append(losses[step.added[step.chosen]] <= min(losses.values()) + REGRET)
            used.append(max(seen(step)[0]))
    assert np.mean(good) >= 0.95 and np.mean(used) < 60


def test_a_priced_choice_is_as_good_as_claimed():
    """No candidate rises by less for what the choice saves, by more than 0.01, in at least 95 of 100 steps."""
    good, used = [], []
    for seed in range(10):
        world = World(*CLOSE, seed)
        for step in sequence(world, per="parameters"):
            unit = step.added[step.chosen]
            base = step.removed - unit
            rises = {each: (world.rows_of(base | each) - world.rows_of(base)).mean() for each in UNITS}
            least = min(rises[each] / COSTS.ratio(each) for each in UNITS if not each <= base)
            good.append(rises[unit] <= least * COSTS.ratio(unit) + REGRET)
            used.append(max(seen(step)[0]))
    assert np.mean(good) >= 0.95 and np.mean(used) < 60


def test_no_fact_is_computed_twice_and_a_store_changes_nothing():
    store, first = TrialStore({}, ROWS.row_keys), World(0.05, 0.1)
    steps = sequence(first, store=store)
    assert len(first.asked) == len(set(first.asked))
    again = World(0.05, 0.1)
    assert sequence(again, store=store) == steps and not again.asked
    whole = TrialStore({}, ROWS.row_keys)
    exact = Objective(ROWS, whole, World(0.05, 0.1))
    exact([step.removed for step in steps] + list(UNITS))
    assert sequence(World(0.05, 0.1), store=whole) == steps


class Lines:
    def __init__(self) -> None:
        self.ends: list[str] = []

    def note(self, message): ...
    def begin(self, phase, overall=None): ...
    def advance(self, done, total, detail): ...
    def end(self, summary, table=(), cached=False):
        self.ends.append(summary)


def test_run(tmp_path):
    """Tables hold the rows used, the log the tokens; a search that ranks once sees all rows."""
    rows, config, lines = replace(ROWS, adaptive=True), small_config(6), Lines()
    found = scored(tmp_path, World(*EASY), config, ["2blocks"], rows, observer=lines)
    trace = read_trace(tmp_path / "scores" / found.current.search, found.current.search)
    assert all(seen(step) == ({8}, True) for step in trace)
    first = 2 * 64 * (1 + 1) + 2 * 8 * 11  # two tokens a row: dense and chosen on 64, the others on 8
    lowest, second = sorted(score.loss for score in trace[0].scores if score.mask)[:2]
    assert f"{first:,} tokens; next by {second - lowest:.2g}; stable in 100% of resamples of 8 rows" in lines.ends[0]
    fixed = scored(tmp_path, World(*EASY), config, ["2blocks"], ROWS)
    assert fixed.current.search != found.current.search
    once = [scored(tmp_path, World(*EASY), config, ["2blocks"], each, method="one_shot") for each in (rows, ROWS)]
    assert once[0].current.search == once[1].current.search


def test_rows_are_those_of_the_cap_and_marked(tmp_path):
    texts = [f"Text {number} is of a few words that say nothing much at all." for number in range(20)]
    data = {"source": "path", "path": "t"}
    values = {"data": data, "num_samples": "auto", "seq_len": 16, "split": "all", "packing": "per_sample"}
    sets = {}
    for name, change in {"few": {"cap": 5}, "fixed": {"num_samples": 5}, "all": {}}.items():
        wanted = read_settings(Calibration, values | change)
        sets[name] = draw_rows(texts, tiny_tokenizer(), wanted, (), lambda message: None)
    assert [sets[name].adaptive for name in sets] == [True, False, True]
    assert sets["few"].rows == sets["fixed"].rows and len(sets["all"].rows) == 20
    assert sets["all"].rows[:5] == sets["few"].rows
    sets["few"].save(tmp_path / "rows.parquet", "path")
    assert CalibrationSet.load(tmp_path / "rows.parquet").adaptive


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"calibration": {"num_samples": "many"}}, "num_samples"),
        ({"calibration": AUTO | {"cap": 0}}, "cap"),
        ({"calibration": AUTO, "study": {"main": {"block": "0.1", "layer": "0.1"}}}, "study.*number"),
        ({"calibration": AUTO | {"data": {"source": "tasks", "tasks": ["piqa"]}}}, "num_samples: auto is for texts"),
    ],
)
def test_what_auto_does_not_fit(changes, words):
    with pytest.raises(InputError, match=words):
        read_settings(Run, {"model": {"source": "path", "path": "m"}} | changes)
