"""Floating, beam and genetic search against brute force over all masks of small models; losses from
a table."""

import math
import random
from collections import Counter
from functools import cache
from itertools import chain, combinations, islice, pairwise, product

import pytest

from blockpruner.core.blocks import DENSE, all_blocks, format_mask, removable_units
from blockpruner.core.budgets import goal_of, parse_budget, resources_of
from blockpruner.core.errors import InputError
from blockpruner.core.families import Costs
from blockpruner.inputs.calibration import CalibrationSet
from blockpruner.model.models import masked
from blockpruner.scoring.objectives import MaskScore
from blockpruner.search import run
from blockpruner.search.iteration import stabilities
from blockpruner.search.problem import Problem
from blockpruner.search.racing import Select
from blockpruner.search.registry import SEARCHES
from blockpruner.search.space import Space, by_prediction, cheapest
from blockpruner.search.surrogate import fit
from tests.builders import FakeScorer, searched, short_rows
from tests.tiny import full_nll, tiny_model

ROWS = 8
SIZES = pytest.mark.parametrize("size", [1.0, 2.016, 3.0])
"""Of an MLP block, an MHA block being 1: any two alike, Llama-2, SmolLM2."""
NOT_NESTED = pytest.mark.parametrize("method", ["floating", "beam"])


class Table(FakeScorer):
    """Losses of masks without any structure beyond a cost of each block, or (interaction=0) with
    that one alone."""

    def __init__(self, seed, layers=4, size=3.0, interaction=1.0, noise=0.02):
        super().__init__(lambda loss, base, mask, row: self.rows_of(mask)[row])
        self.seed, self.interaction, self.noise = seed, interaction, noise
        self.units = removable_units(layers, "block", "all")
        self.counts = Costs(
            total=round(1000 * layers * (1.5 + size)),
            blocks={
                block: 1000 if block.kind == "mha" else round(1000 * size)
                for block in all_blocks(layers)
            },
        )
        chance = random.Random(seed)
        self.cost = {block: chance.uniform(0.1, 1.0) for block in all_blocks(layers)}
        self.rows_of = cache(self.draw)

    def draw(self, mask):
        chance = random.Random(f"{self.seed} {format_mask(mask)}")
        loss = sum(self.cost[block] for block in mask) + self.interaction * chance.random()
        return [loss + self.noise * chance.random() for _ in range(ROWS)]

    def loss(self, mask):
        return math.fsum(self.rows_of(mask)) / ROWS

    def rank(self, mask):
        """Loss, then the tie-break: all MHA by layer, then all MLP by layer."""
        return self.loss(mask), sorted(block.order for block in mask)

    def masks(self):
        """All but the dense one."""
        blocks = list(self.counts.blocks)
        return [
            frozenset(m)
            for m in chain.from_iterable(combinations(blocks, n) for n in range(1, len(blocks) + 1))
        ]

    @property
    def resources(self):
        """MHA blocks alone hold the KV cache; in time an MHA block is worth 1.4 MLP blocks."""
        kv = Costs(
            len(self.units) // 2, {block: int(block.kind == "mha") for block in self.counts.blocks}
        )
        times = {block: 14 if block.kind == "mha" else 10 for block in self.counts.blocks}
        return {
            "parameters": self.counts,
            "kv": kv,
            "latency": Costs(2 * sum(times.values()), times),
        }

    def goal(self, budget):
        budget = parse_budget(budget, self.counts)
        return goal_of(budget, self.units, self.resources[budget.resource])

    def search(self, method, budget, acceleration="none", unit="block", **options):
        """The trace; nothing was computed twice, or is missing in it."""
        self.asked = []
        score = {"method": method, "acceleration": acceleration, "unit": unit, "options": options}
        trace = searched(self, short_rows(ROWS), [budget], self.resources, **score).of(budget)
        asked = {(mask, row) for _, _, mask, row in self.asked}
        assert len(self.asked) == len(asked)
        shown = [score for step in trace for score in step.scores]
        shown += [score for step in trace for score in step.nll if score is not None]
        assert asked == {(score.mask, row) for score in shown for row in range(score.rows_used)}
        assert [step.index for step in trace] == list(range(len(trace)))
        assert trace[0].scores[0].mask == DENSE and trace[0].added[0] is None
        assert all(step.scores[step.chosen].is_complete for step in trace)
        for step in trace:
            assert len({score.mask for score in step.scores}) == len(step.scores) == len(step.added)
        return trace

    def greedy(self):
        """Masks of a greedy search to the end of the model."""
        removed, path = DENSE, []
        while len(removed) < len(self.cost):
            removed = min(
                (removed | {block} for block in self.cost if block not in removed), key=self.rank
            )
            path.append(removed)
        return path

    def within(self, centre):
        """Masks that are as far from a ratio as half of an MHA block at most."""
        half = 500 / self.counts.total
        return [m for m in self.masks() if abs(self.counts.ratio(m) - centre) <= half + 1e-12]

    def neighbours(self, mask, centre):
        """Masks within the tolerance that have one unit for another of its kind, or for some of the
        other kind."""
        found = []
        for other in self.within(centre):
            kinds = [
                Counter(self.counts.blocks[block] for block in part)
                for part in (mask - other, other - mask)
            ]
            if not all(len(kind) == 1 for kind in kinds):
                continue
            (back,), (out,) = kinds
            few, many = sorted((kinds[0][back], kinds[1][out]))
            if few == 1 and (many == 1 or back != out):
                found.append(other)
        return found


@pytest.mark.parametrize("per", ["parameters", "latency"])
@pytest.mark.parametrize("seed", range(4))
def test_greedy_at_a_price(seed, per):
    """Against a walk that divides each rise by what is saved, written anew."""
    table = Table(seed)
    saved = {
        block: n / table.resources[per].total for block, n in table.resources[per].blocks.items()
    }
    trace = table.search("greedy", "8blocks", per=per)
    removed = DENSE
    for step in trace:
        rises = {
            block: table.loss(removed | {block}) - table.loss(removed)
            for block in saved
            if block not in removed
        }
        worth = {
            block: rise / saved[block] if rise > 0 else rise * saved[block]
            for block, rise in rises.items()
        }
        removed |= {min(worth, key=worth.get)}
        assert step.removed == removed
    assert removed == frozenset(saved)


@pytest.mark.parametrize(
    ("method", "acceleration"),
    product(["greedy", "floating"], ["none", "lazy", "race", "lazy+race"]),
)
def test_a_candidate_that_overflows_is_as_if_it_were_none(method, acceleration, monkeypatch):
    """Its losses are infinite wherever it is removed."""
    found, lost, units_of = {}, removable_units(5, "block", "all")[3], run.units_of
    for is_there in (True, False):
        table = Table(2, layers=5)
        if is_there:
            draw = table.rows_of
            table.rows_of = lambda mask, draw=draw: (
                [math.inf] * ROWS if lost <= mask else draw(mask)
            )
        else:
            monkeypatch.setattr(
                run, "units_of", lambda *asked: [unit for unit in units_of(*asked) if unit != lost]
            )
        trace = table.search(method, "4blocks", acceleration)
        found[is_there] = [step.removed for step in trace], trace[-1].perplexity
        is_known = (
            [one and (one.kept, one.rivals) for one in stabilities(trace)]
            if method == "greedy"
            else []
        )
        found[is_there] += (is_known,)
        if is_there and method == "floating":  # which proposes masks of any units
            assert {mask for _, _, mask, _ in table.asked if lost <= mask} == {lost}
    assert found[True] == found[False]


@pytest.mark.parametrize(("budget", "wanted"), [("0.5kv", 0.5), ("1.2x", 1 - 1 / 1.2)])
@NOT_NESTED
def test_a_search_for_another_resource(method, budget, wanted):
    """The answer removes the wanted share, as near as half a unit, and no block that saves
    nothing."""
    table = Table(3)
    costs = table.resources[parse_budget(budget, table.counts).resource]
    answer = table.search(method, budget)[-1].removed
    half = min(n for n in costs.blocks.values() if n) / 2 / costs.total
    assert abs(costs.ratio(answer) - wanted) <= half + 1e-12
    if budget == "0.5kv":
        mha = [block for block in costs.blocks if block.kind == "mha"]
        assert answer == min(map(frozenset, combinations(mha, 2)), key=table.rank)


def ratios(seed, count):
    chance = random.Random(seed)
    return [f"{chance.uniform(0.1, 0.7):.6f}" for _ in range(count)]


@pytest.mark.parametrize("share", [0.0, 0.25, 0.5, 1.0])
def test_greedy_with_a_share_of_mha_blocks(share):
    """Against a walk that takes, of the kind that is behind its share, the block that costs least;
    at ties any."""
    table, removed, kinds = Table(3), DENSE, []
    for step in table.search("greedy", "8blocks", mha_share=share):
        left = [block for block in table.cost if block not in removed]
        after = {
            block: abs(kinds.count("mha") + (block.kind == "mha") - share * (len(kinds) + 1))
            for block in left
        }
        able = [block for block in left if after[block] < min(after.values()) + 1e-9]
        removed = min((removed | {block} for block in able), key=table.rank)
        kinds.append(next(iter(step.added[step.chosen])).kind)
        assert step.removed == removed
    wanted = {0.0: ["mlp"] * 4, 0.25: 1, 0.5: 2, 1.0: ["mha"] * 4}[share]
    assert kinds[:4] == wanted if isinstance(wanted, list) else kinds[:4].count("mha") == wanted


@pytest.mark.parametrize("budget", ["3blocks", "5blocks"])
def test_a_beam_of_one_is_greedy_and_a_wide_one_finds_the_best(budget):
    table, size = Table(2), int(budget[0])
    path = table.greedy()
    trace = table.search("beam", budget, width=1, per="none")
    assert [step.removed for step in trace] == [*path[:size], path[size - 1]]
    best = min((mask for mask in table.masks() if len(mask) == size), key=table.rank)
    assert table.search("beam", budget, width=100, per="none")[-1].removed == best
    between = table.search("beam", budget, width=3, per="none")[-1].removed
    assert table.loss(best) <= table.loss(between) <= table.loss(path[size - 1])


@pytest.mark.parametrize("budget", ["4blocks", "0.4"])
def test_children_are_one_to_three_swaps_within_a_kind_from_their_parent(budget):
    """The best of two that are best on the first rows, and of the parent, is the next one; it is
    never worse."""
    table, given = Table(1, layers=6), {"generations": 12, "children": 8, "initial": 10, "share": 4}
    trace = table.search("genetic", budget, **given)
    again = table.search("genetic", budget, **given)
    assert len(trace) == 13 and [step.removed for step in trace] == [step.removed for step in again]
    parent = trace[0].scores[trace[0].chosen]
    assert len(trace[0].scores) == 11 and parent.loss == min(
        score.loss for score in trace[0].scores[1:]
    )
    for step in trace[1:]:
        first, *children = step.scores
        assert first == parent and len(children) == 8
        for child in children:
            more, less = (
                Counter(b.kind for b in part)
                for part in (child.mask - first.mask, first.mask - child.mask)
            )
            assert more == less and 1 <= more.total() <= 3
        assert [score.rows_used for score in children] == [8] * 2 + [2] * 6
        started = [math.fsum(score.row_loss[:2]) for score in children]
        assert max(started[:2]) <= min(started[2:])
        parent = min([first, *children[:2]], key=lambda score: score.loss)
        assert step.scores[step.chosen] == parent


def test_floating_goes_back():
    """Two blocks that are cheap together only, and another that is cheap once both are gone:
    greedy's third removal completes the pair, its first is given back, and the way on from there is
    better."""
    table = Table(0, interaction=0.0, noise=0.0)
    a, b, c, *_ = all_blocks(4)
    dear = max(set(table.cost) - {a, b, c}, key=table.cost.get)
    special = {
        (c,): 0.01,
        (a,): 0.9,
        (b,): 0.9,
        (a, c): 0.02,
        (a, b): 0.015,
        (a, b, c): 0.03,
        (a, b, dear): 0.025,
    }
    special = {frozenset(mask): loss for mask, loss in special.items()}
    table.rows_of = lambda mask: [special[mask]] * ROWS if mask in special else table.draw(mask)
    trace = table.search("floating", "3blocks", per="none", tries=1)
    path = [
        after
        for before, after in pairwise([DENSE, *(step.removed for step in trace)])
        if before != after
    ]
    assert path == [{c}, {a, c}, {a, b, c}, {a, b}, {a, b, dear}]


class Polynomial(Table):
    """Losses that are a quadratic function of the removed blocks, or a cubic one. An MLP block
    weighs three times."""

    def __init__(self, seed, cubic=0.0, **table):
        super().__init__(seed, interaction=0.0, noise=0.0, **table)
        chance = random.Random(seed)
        self.terms = {
            frozenset({b}): self.cost[b] * self.counts.blocks[b] / 1000 for b in self.cost
        }
        self.terms |= {
            frozenset(pair): chance.gauss(0, 0.25) for pair in combinations(self.cost, 2)
        }
        triples = [frozenset(triple) for triple in combinations(self.cost, 3)]
        self.terms |= {
            triple: chance.gauss(0, cubic) for triple in triples if chance.random() < 0.15
        }

    def draw(self, mask):
        return [
            5.0 + row / 7 + sum(term for part, term in self.terms.items() if part <= mask)
            for row in range(ROWS)
        ]


SEARCHED = {
    "greedy": ("greedy", {}),
    "greedy, priced": ("greedy", {"per": "parameters"}),
    "floating": ("floating", {}),
    "beam": ("beam", {}),
    "genetic": ("genetic", {}),
}


@pytest.mark.parametrize("cubic", [0.0, 0.15, 0.4])
def test_regret(cubic):
    """Of every search at several budgets, against all masks that meet them. Greedy ones may meet
    none."""
    regret = {name: {} for name in SEARCHED}
    for seed in range(4):
        table = Polynomial(seed, cubic)
        losses = {mask: table.loss(mask) for mask in table.masks()}

        def ask(masks, rows=ROWS, base=DENSE, table=table):
            return [MaskScore(mask, tuple(table.rows_of(mask)[:rows]), ROWS) for mask in masks]

        for budget in ("0.1", "0.2", "0.35", "0.5", "0.6", "4blocks", "1.2x"):
            goal = Space(table.units, table.goal(budget)).goal
            least = min(loss for mask, loss in losses.items() if goal.is_met(mask))
            for name, (method, options) in SEARCHED.items():
                row = SEARCHES[method]
                problem = Problem(
                    table.units, ask, Select(ask), ROWS, table.goal(budget), table.resources
                )
                answers = [step.removed for step in row.run(problem, row.options(**options))]
                answer = min(answers, key=goal.distance) if row.nested else answers[-1]
                if goal.is_met(answer):
                    regret[name][seed, budget] = losses[answer] - least
    print(
        {
            name: f"{sum(found.values()) / len(found):.4f} of {len(found)}"
            for name, found in regret.items()
        }
    )
    assert len(regret["floating"]) == 28
    assert all(
        regret["floating"][case] <= worse + 1e-12
        for case, worse in regret["greedy, priced"].items()
    )
    assert sum(regret["floating"].values()) / 28 < 0.03


def test_surrogate_of_a_quadratic_function_is_that_function():
    table = Polynomial(0)
    units, asked = (
        table.units,
        lambda masks, rows: [MaskScore(m, tuple(table.draw(m)[:rows]), ROWS) for m in masks],
    )
    pairs = [a | b for a, b in combinations(units, 2)]
    energy = fit(units, [*asked([DENSE, *units], ROWS), *asked(pairs, 3)])
    masks = table.masks()
    rises = [table.loss(mask) - table.loss(DENSE) for mask in masks]
    assert energy(masks) == pytest.approx(rises, abs=1e-9)
    some = fit(
        units, [*asked([DENSE, *units], ROWS), *asked(random.Random(0).sample(masks, 90), ROWS)]
    )
    assert some(masks) == pytest.approx(rises, abs=0.05)


def test_surrogate_goes_through_what_is_known():
    """A function that is not quadratic, with fewer facts than coefficients."""
    table = Polynomial(1, cubic=0.4, layers=6)
    masks = random.Random(1).sample([m for m in table.masks() if len(m) > 2], 40)
    scores = [
        MaskScore(mask, tuple(table.draw(mask)), ROWS) for mask in [DENSE, *table.units, *masks]
    ]
    rises = [table.loss(mask) - table.loss(DENSE) for mask in masks]
    assert fit(table.units, scores)(masks) == pytest.approx(rises, abs=1e-3)


def test_cheapest_choices_come_first():
    chance = random.Random(0)
    for sizes in [(1, 1), (1, 3), (3, 1), (2, 2), (4, 1)]:
        costs = [sorted(chance.uniform(-1, 1) for _ in range(n)) for n in (6, 4)]
        wanted = sorted(
            (sum(costs[0][i] for i in left) + sum(costs[1][i] for i in right), (left, right))
            for left in combinations(range(6), sizes[0])
            for right in combinations(range(4), sizes[1])
        )
        found = list(cheapest(costs, sizes))
        assert [choice for _, choice in found] == [choice for _, choice in wanted]
        assert [cost for cost, _ in found] == pytest.approx([cost for cost, _ in wanted])
    # of 5e11
    assert len(list(islice(cheapest([list(range(200)), list(range(200))], (5, 1)), 100))) == 100


@SIZES
def test_predictions_are_right_where_effects_add_up(size):
    table = Table(3, size=size, interaction=0.0, noise=0.0)
    chance = random.Random(1)
    for budget in ratios(2, 4):
        mask = chance.choice(table.within(float(budget)))
        goal = table.goal(budget).around(mask)
        change = {unit: table.loss(mask ^ unit) - table.loss(mask) for unit in table.units}
        found = list(by_prediction(mask, Space(table.units, goal).exchanges(mask), change))
        assert sorted(map(format_mask, found)) == sorted(
            map(format_mask, table.neighbours(mask, goal.wanted))
        )
        losses = list(map(table.loss, found))
        assert losses == pytest.approx(sorted(losses))


@NOT_NESTED
def test_of_equals_the_first_in_unit_order(method):
    """Greedy's own first choice stays where nothing is strictly better."""
    table = Table(0)
    table.rows_of = lambda mask: [1.0] * ROWS
    assert format_mask(table.search(method, "3blocks")[-1].removed) == "mha.0,mha.1,mha.2"


def test_a_goal_that_no_mask_meets():
    """An MHA block and an MLP block five times as large: of 1, 5 and 6 the nearest to 3.2 is 5."""
    table = Table(0, layers=1, size=5.0)
    budget = f"{3200 / table.counts.total:.9f}"
    assert format_mask(table.search("floating", budget)[-1].removed) == "mlp.0"


def test_an_accelerated_search():
    """What races and lazy steps left out is not missed, and nothing is computed twice."""
    table = Table(6, layers=10, interaction=0.1, noise=0.05)
    trace = table.search("floating", "0.3", "lazy+race", tries=8)
    asked = len(table.asked)
    exact = table.search("floating", "0.3", tries=8)
    assert trace[-1].removed == exact[-1].removed
    assert asked < len(table.asked)


@NOT_NESTED
def test_a_budget_that_is_nearest_to_nothing(method):
    """It is refused before anything is asked, by the search itself, too."""
    table = Table(0)
    with pytest.raises(
        InputError, match=r"'0\.02' is nearest to removing nothing; .* 1blocks, ratio 0\.0556"
    ):
        table.search(method, "0.02")
    assert table.asked == []
    row, problem = SEARCHES[method], Problem(table.units, None, None, ROWS, table.goal("0.02"))
    with pytest.raises(
        InputError,
        match=r"budget '0\.02' is nearest to removing nothing; the smallest .* is 0\.0556",
    ):
        next(row.run(problem, row.options()))


def test_whole_layers():
    """Units of two blocks: all of a kind, exchanged whole."""
    table = Table(3, layers=6)
    removed = table.search("floating", "6blocks", unit="layer")[-1].removed
    assert len(removed) == 6 and len({block.layer for block in removed}) == 3


def test_on_a_model_against_full_forwards():
    """By ratio and by blocks, with the exact engine."""
    model, chance = tiny_model(layers=3), random.Random(0)
    rows = CalibrationSet(
        tuple(tuple(chance.randrange(1, 257) for _ in range(10)) for _ in range(3))
    )
    counts = resources_of(model.config.to_dict())["parameters"]

    def loss(mask):
        with masked(model, mask):
            return sum(full_nll(model, row) for row in rows.rows) / len(rows.rows)

    masks = [frozenset(m) for n in range(1, 7) for m in combinations(all_blocks(3), n)]
    losses = {mask: loss(mask) for mask in masks}
    half = min(counts.blocks.values()) / 2 / counts.total
    found = searched(model, rows, ["0.3", "3blocks"], method="floating")
    for budget, allowed in (
        ("0.3", [m for m in masks if abs(counts.ratio(m) - 0.3) <= half]),
        ("3blocks", [m for m in masks if len(m) == 3]),
    ):
        last = found.of(budget)[-1]
        assert last.scores[last.chosen].loss == pytest.approx(losses[last.removed], abs=1e-10)
        assert last.nll[last.chosen].loss == pytest.approx(losses[last.removed], abs=1e-10)
        assert last.removed in allowed
