"""Lazy evaluation and racing: what they leave out, that the choice stands, that a store's content
changes nothing."""

import math
from functools import cache
from itertools import combinations

import numpy as np
import pytest
from scipy import stats

import blockpruner
from blockpruner.core.blocks import DENSE, all_blocks, format_mask, removable_units
from blockpruner.core.families import Costs
from blockpruner.inputs.calibration import CalibrationSet
from blockpruner.model.models import masked
from blockpruner.scoring.objectives import MaskScore, Objective
from blockpruner.scoring.settings import Score
from blockpruner.search import racing
from blockpruner.search.greedy import GreedyOptions, greedy
from blockpruner.search.problem import Problem
from blockpruner.search.racing import (
    Runner,
    lower_bounds,
    make_select,
    race,
    slices,
    standard_error,
)
from blockpruner.store.trials import TrialStore
from tests.builders import FakeScorer, removed_in, searched, short_rows
from tests.tiny import full_nll, tiny_model, tiny_tokenizer

LAYERS, ROWS = 6, 12
UNITS = removable_units(LAYERS, "block", "all")
COSTS = Costs(6 * LAYERS, {block: 1 if block.kind == "mha" else 3 for block in all_blocks(LAYERS)})
PRICED = pytest.mark.parametrize("per", ["none", "parameters"])


class World(FakeScorer):
    """Losses by formula: each block adds a cost of its own and, with the other block of its layer,
    an interaction."""

    def __init__(self, seed, noise=0.02, interaction=0.05):
        super().__init__(lambda loss, base, mask, row: self.rows_of(mask)[row])
        random = np.random.default_rng(seed)
        self.cost = dict(
            zip(UNITS, random.permutation(np.geomspace(0.01, 3.0, len(UNITS))), strict=True)
        )
        self.noise = {unit: random.normal(0, noise, ROWS) for unit in UNITS}
        self.interaction = interaction
        self.rows_of = cache(self.draw)

    def draw(self, mask):
        layers = [block.layer for block in mask]
        both = sum(layers.count(layer) == 2 for layer in set(layers))
        losses = np.full(ROWS, 2.0 + self.interaction * both)
        for block in mask:
            losses += self.cost[frozenset({block})] + self.noise[frozenset({block})]
        return losses

    def objective(self, store=None):
        return Objective(short_rows(ROWS), store or TrialStore({}, short_rows(ROWS).row_keys), self)


def sequence(world, steps=8, objective=None, per="none", acceleration="none", **lazy):
    """A greedy search, by settings of the lazy rule that may differ from the library's."""
    objective = objective or world.objective()
    with pytest.MonkeyPatch.context() as patch:
        for name, value in lazy.items():
            patch.setattr(racing, name.upper(), value)
        select = make_select(
            objective, Score(acceleration=acceleration), COSTS if per == "parameters" else None
        )
        problem = Problem(UNITS, objective, select, ROWS, resources={"parameters": COSTS})
        search = greedy(problem, GreedyOptions(per=per))
        return [next(search) for _ in range(steps)]


def brute_force(world, steps=8, per="none"):
    removed, result = DENSE, []
    for _ in range(steps):
        remaining = [unit for unit in UNITS if not unit <= removed]
        rise = {
            unit: world.rows_of(removed | unit).mean() - world.rows_of(removed).mean()
            for unit in remaining
        }
        size = {unit: COSTS.ratio(unit) if per == "parameters" else 1 for unit in remaining}
        best = min(
            remaining,
            key=lambda unit: rise[unit] / size[unit] if rise[unit] > 0 else rise[unit] * size[unit],
        )
        result.append(format_mask(best))
        removed |= best
    return result


def bounds(differences, total, confidence):
    """Without a past; the leader's own rises are zero."""
    runners = [Runner(np.array(d), np.empty(0)) for d in differences]
    leader = Runner(np.zeros(len(differences[0])), np.empty(0))
    return lower_bounds(runners, leader, total, confidence)


def test_bound_is_scipys_interval(monkeypatch):
    """Without prior and past, and with rows that are few among very many: the one-sided interval of
    a paired t-test."""
    monkeypatch.setattr(racing, "PRIOR_ROWS", 0)
    random = np.random.default_rng(0)
    leader, others = random.normal(2, 0.3, 5), random.normal(2.2, 0.4, (3, 5))
    expected = [
        stats.ttest_rel(other, leader, alternative="greater").confidence_interval(0.95).low
        for other in others
    ]
    result = lower_bounds(
        [Runner(o, np.empty(0)) for o in others], Runner(leader, np.empty(0)), 10**9, 0.95
    )
    assert result == pytest.approx(expected, abs=1e-6)
    assert bounds(others - leader, 10**9, 0.95) == pytest.approx(expected, abs=1e-6)


def test_bound_with_a_past_covers_as_often_as_it_says(monkeypatch):
    """Rows of a past step, a change since with a small spread, k of them seen: the true mean over
    all rows is above the bound in 95 of 100 cases, and the bound is nearer than that without the
    past."""
    monkeypatch.setattr(racing, "PRIOR_ROWS", 0)
    random, covered, nearer, cases = np.random.default_rng(2), 0, 0, 4000
    for _ in range(cases):
        past = random.normal(0.1, 0.3, 24)
        now = past + 0.05 + random.normal(0, 0.02, 24)
        zero = np.zeros(24)
        (bound,) = lower_bounds([Runner(now[:6], past)], Runner(zero[:6], zero), 24, 0.95)
        covered += bound <= now.mean()
        nearer += bound > bounds([now[:6]], 24, 0.95)[0]
    assert 0.94 < covered / cases < 0.96
    assert nearer / cases > 0.9


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("acceleration", ["race", "lazy", "lazy+race"])
@PRICED
def test_same_sequence_for_less_where_candidates_differ(seed, acceleration, per):
    world = World(seed)
    options = {"per": per, **({} if acceleration == "race" else {"floor": 3})}
    trace = sequence(world, acceleration=acceleration, **options)
    assert removed_in(trace) == brute_force(world, per=per)
    exact = sum(len(UNITS) - step for step in range(8)) * ROWS
    assert len(world.asked) < exact * {"race": 0.75, "lazy": 0.9, "lazy+race": 0.65}[acceleration]
    assert len(world.asked) == len(set(world.asked))


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("acceleration", ["race", "lazy+race"])
def test_removals_that_lower_the_loss_are_priced_alike(seed, acceleration):
    """Half of the blocks harm: of those the one that saves most times what it gains goes first."""
    world = World(seed)
    for number, unit in enumerate(sorted(UNITS, key=world.cost.get)):
        world.cost[unit] = 0.3 * number - 1.4
    trace = sequence(world, per="parameters", acceleration=acceleration, floor=3)
    assert removed_in(trace) == brute_force(world, per="parameters")
    assert len(world.asked) < 0.75 * sum(len(UNITS) - step for step in range(8)) * ROWS


def test_the_choice_has_all_rows_and_losers_say_how_few_they_have():
    trace = sequence(World(1), acceleration="lazy+race")
    partial = [score for iteration in trace for score in iteration.scores if score.rows_used < ROWS]
    assert partial
    assert all(score.rows_used in slices(ROWS) for score in partial)
    for iteration in trace:
        assert iteration.scores[iteration.chosen].rows_used == ROWS
    assert trace[0].added[0] is None
    assert trace[0].scores[0].rows_used == ROWS


def test_a_standing_mask_that_overflows_drops_no_finite_rival():
    """Two rivals that are level on average stay in the race to its last row."""
    base, standing, *rivals = [DENSE.union(unit) for unit in removable_units(2, "block", "all")]
    losses = {
        base: (1.0,) * 16,
        standing: (math.inf,) * 16,
        rivals[0]: (1.1, 1.3) * 8,
        rivals[1]: (1.3, 1.1) * 8,
    }

    class Table:
        rows = 16

        def __call__(self, masks, rows=16):
            return [MaskScore(mask, losses[mask][:rows], 16) for mask in masks]

    (overflowing,) = Table()([standing])
    scores = race(Table(), base, rivals, 0.95, standing=overflowing)
    assert {mask: score.rows_used for mask, score in scores.items()} == dict.fromkeys(rivals, 16)


def test_how_often_a_race_loses_the_best():
    """Two hundred races over rows drawn anew, noise above most differences: seldom, more seldom
    with more confidence.

    The confidence is of one comparison, and the leader is the luckiest of twelve, so it is not the
    race's own.
    """
    lost = dict.fromkeys((0.8, 0.99, 0.9999), 0)
    for seed in range(200):
        world = World(seed, noise=0.3, interaction=0.0)
        best = min(UNITS, key=lambda unit: world.rows_of(unit).mean())
        for confidence in lost:
            lost[confidence] += (
                race(world.objective(), DENSE, UNITS, confidence)[best].rows_used < ROWS
            )
    assert lost[0.8] > 40 > 20 >= lost[0.99] > lost[0.9999]
    assert lost[0.9999] <= 2


def test_an_audit_finds_what_lazy_evaluation_missed():
    """A block whose cost vanishes once another is gone: not monotone, so its old rise keeps it out
    until an audit."""
    world = World(3, noise=0.0, interaction=0.0)
    first, hidden = brute_force(world)[0], max(UNITS, key=world.cost.__getitem__)
    plain = world.rows_of

    def rows_of(mask):
        gone = {format_mask({block}) for block in mask}
        bonus = 0.0 if first not in gone or not hidden <= mask else world.cost[hidden] + 0.5
        return plain(mask) - bonus

    world.rows_of = rows_of
    trace = sequence(world, acceleration="lazy", floor=2, slack=0.0, audit=2)
    assert removed_in(trace)[:2] == [first, removed_in(trace)[1]]
    assert removed_in(trace)[1] != format_mask(hidden)
    assert removed_in(trace)[2] == format_mask(hidden)
    assert trace[1].lazy_choice is None
    assert trace[2].lazy_choice not in (None, trace[2].removed)
    assert trace[4].lazy_choice == trace[4].removed
    assert len(trace[2].scores) == len(UNITS) - 2 > len(trace[1].scores)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("noise", [0.1, 0.3])
def test_nothing_that_is_known_is_better_than_the_choice(seed, noise):
    """Candidates enter in several rounds; one that has all rows stays in, whatever its first rows
    say."""
    world = World(seed, noise=noise)
    store = TrialStore({}, short_rows(ROWS).row_keys)
    for step in sequence(
        world, 10, world.objective(store), acceleration="lazy+race", floor=3, audit=2
    ):
        asked = [
            unit for unit in UNITS if not unit <= step.removed or unit == step.added[step.chosen]
        ]
        base = step.removed - step.added[step.chosen]
        complete = [base | unit for unit in asked if store.known(format_mask(base | unit), 0, ROWS)]
        assert step.removed == min(complete, key=lambda mask: world.rows_of(mask).mean())
        assert {score.mask for score in step.scores if score.rows_used == ROWS} - {base} == set(
            complete
        )


@pytest.mark.parametrize("units", [1, 9, 20, 33, 60])
def test_stopped_anywhere_and_run_again(units):
    """A kill in the middle of a race or a lazy round: some rows of some masks are known. Nothing is
    computed twice."""
    complete, world = World(6), World(6)
    expected = sequence(complete, acceleration="lazy+race", floor=3, audit=3)
    store = TrialStore({}, short_rows(ROWS).row_keys)
    plain = world.run

    def stops(tasks, rows):
        for unit in plain(tasks, rows):
            if len(store_calls) == units:
                raise KeyboardInterrupt
            store_calls.append(unit)
            yield unit

    store_calls, world.run = [], stops
    with pytest.raises(KeyboardInterrupt):
        sequence(
            world, objective=world.objective(store), acceleration="lazy+race", floor=3, audit=3
        )
    world.asked.clear()
    world.run = plain
    assert (
        sequence(
            world, objective=world.objective(store), acceleration="lazy+race", floor=3, audit=3
        )
        == expected
    )
    assert len(world.asked) == len(complete.asked) - sum(len(unit.loss) for unit in store_calls)


@PRICED
def test_what_a_store_knows_changes_no_decision(per):
    exact, cold, warm = World(5), World(5), World(5)
    store = TrialStore({}, short_rows(ROWS).row_keys)
    sequence(exact, objective=exact.objective(store), per=per)
    assert sequence(
        warm, objective=warm.objective(store), per=per, acceleration="lazy+race"
    ) == sequence(cold, per=per, acceleration="lazy+race")
    assert warm.asked == []
    assert cold.asked


@pytest.mark.parametrize("known", [2, 3, 5])
def test_the_error_of_a_mean_is_that_over_all_choices_of_rows(known):
    """Its square, averaged over every choice of some of six rows, is the variance of their
    means."""
    rises = np.random.default_rng(known).normal(0.3, 0.2, 6)
    choices = [rises[list(chosen)] for chosen in combinations(range(6), known)]
    variance = np.var([chosen.mean() for chosen in choices])
    assert np.mean([standard_error(chosen, 6) ** 2 for chosen in choices]) == pytest.approx(
        variance
    )
    assert standard_error(rises, 6) == 0


def test_a_candidate_known_on_few_rows_enters_by_its_own_error():
    """It lost the first race on two bad rows. No rise has moved, so nothing but its own error lets
    it in again."""
    world = World(0, noise=0.0, interaction=0.0)
    first, second, unlucky = UNITS[:3]
    world.cost = dict.fromkeys(UNITS, 5.0) | {first: 0.1, second: 0.8, unlucky: 0.0}
    world.noise[unlucky] = np.array([1.0, 2.0, *[0.2] * (ROWS - 2)])
    trace = sequence(world, 2, acceleration="lazy+race", floor=1)
    assert [len(score.row_loss) for score in trace[0].scores if score.mask == unlucky] == [2]
    assert removed_in(trace) == [format_mask(first), format_mask(unlucky)] == brute_force(world, 2)


def test_acceleration_on_a_real_model_is_brute_force(monkeypatch):
    """Whole path with the engine: a tiny random model, three removals, against full forward
    passes."""
    monkeypatch.setattr(racing, "CONFIDENCE", 0.99999)
    monkeypatch.setattr(racing, "FLOOR", 6)
    model = tiny_model(layers=3)
    rows = CalibrationSet(
        tuple(tuple(np.random.default_rng(i).integers(1, 257, 12).tolist()) for i in range(8))
    )
    units = removable_units(3, "block", "all")
    removed, expected = DENSE, []
    for _ in range(3):
        losses = {}
        for unit in units:
            if not unit <= removed:
                with masked(model, removed | unit):
                    losses[unit] = math.fsum(full_nll(model, row) for row in rows.rows)
        expected.append(min(losses, key=losses.__getitem__))
        removed |= expected[-1]
    traces = searched(model, rows, ["3blocks"], acceleration="lazy+race")
    assert removed_in(traces.of("3blocks")) == [format_mask(unit) for unit in expected]


@pytest.mark.parametrize("share", [0.0, 0.25, 0.5, 1.0])
def test_a_quota_may_ask_for_other_units_than_before(share):
    """A lazy search knows no rise of an MHA block where only MLP blocks were asked for at first.
    With a share of 0.25 a later step asks for both kinds; with the others all units of such a step
    were asked for before."""
    texts = [
        f"sentence {number} of a small calibration set, with some words" for number in range(24)
    ]
    given = {
        "method": "greedy",
        "options": {"mha_share": share},
        "acceleration": "lazy+race",
        "seq_len": 32,
    }
    order = blockpruner.prune(
        tiny_model(layers=4), tiny_tokenizer(), texts, "4blocks", **given
    ).plan.order
    assert sum(unit.startswith("mha") for unit in order) == 4 * share
