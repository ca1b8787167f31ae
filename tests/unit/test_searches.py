"""Floating, beam and genetic search against brute force over all masks of small models; losses from
a table."""

import math
import random
from collections import Counter
from functools import cache
from itertools import combinations, groupby, islice

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
NOT_NESTED = pytest.mark.parametrize("method", ["floating", "beam"])


class Table(FakeScorer):
    """Losses of masks without any structure beyond a cost of each block, or (interaction=0) with
    that one alone."""

    def __init__(self, seed, layers=4, size=3.0, interaction=1.0, noise=0.02):
        super().__init__(lambda loss, base, mask, row: self.rows_of(mask)[row])
        self.seed, self.interaction, self.noise = seed, interaction, noise
        self.units = removable_units(layers, "block", "all")
        self.blocks = all_blocks(layers)
        sizes = {"mha": 1000, "mlp": round(1000 * size)}
        total = round(1000 * layers * (1.5 + size))
        self.counts = self.costs(total, sizes)
        # MHA blocks alone hold the KV cache; in time an MHA block is worth 1.4 MLP blocks.
        self.resources = {
            "parameters": self.counts,
            "kv": self.costs(layers, {"mha": 1, "mlp": 0}),
            "latency": self.costs(48 * layers, {"mha": 14, "mlp": 10}),
        }
        chance = random.Random(seed)
        self.cost = {block: chance.uniform(0.1, 1.0) for block in self.blocks}
        self.rows_of = cache(self.draw)

    def costs(self, total, by_kind):
        return Costs(total, {block: by_kind[block.kind] for block in self.blocks})

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
        sizes = range(1, len(self.blocks) + 1)
        return [frozenset(mask) for n in sizes for mask in combinations(self.blocks, n)]

    def goal(self, text):
        budget = parse_budget(text, self.counts)
        return goal_of(budget, self.units, self.resources[budget.resource])

    def search(self, method, budget, acceleration="none", unit="block", **options):
        """The trace; nothing was computed twice, or is missing in it."""
        self.asked = []
        score = {"method": method, "acceleration": acceleration, "unit": unit, "options": options}
        trace = searched(self, short_rows(ROWS), [budget], self.resources, **score).of(budget)
        computed = {(mask, row) for _, _, mask, row in self.asked}
        assert len(self.asked) == len(computed)
        shown = set()
        for step in trace:
            for score in (*step.scores, *filter(None, step.nll)):
                shown |= {(score.mask, row) for row in range(score.rows_used)}
            assert len({score.mask for score in step.scores}) == len(step.scores) == len(step.added)
            assert step.scores[step.chosen].is_complete
        assert computed == shown
        assert [step.index for step in trace] == list(range(len(trace)))
        assert trace[0].scores[0].mask == DENSE
        assert trace[0].added[0] is None
        return trace

    def greedy(self):
        """Masks of a greedy search to the end of the model."""
        removed, path = DENSE, []
        while len(removed) < len(self.blocks):
            candidates = [removed | {block} for block in self.blocks if block not in removed]
            removed = min(candidates, key=self.rank)
            path.append(removed)
        return path

    def within(self, ratio):
        """Masks that are as far from a ratio as half of an MHA block at most."""
        half = 500 / self.counts.total + 1e-12
        return [mask for mask in self.masks() if abs(self.counts.ratio(mask) - ratio) <= half]

    def neighbours(self, mask, ratio):
        """Masks within the tolerance that have one unit for another of its kind, or for some of the
        other kind."""
        return [other for other in self.within(ratio) if self.is_exchange(mask, other)]

    def is_exchange(self, mask, other):
        sizes_back = [self.counts.blocks[block] for block in mask - other]
        sizes_out = [self.counts.blocks[block] for block in other - mask]
        if len(set(sizes_back)) != 1 or len(set(sizes_out)) != 1:
            return False
        fewer, more = sorted((len(sizes_back), len(sizes_out)))
        return fewer == 1 and (more == 1 or sizes_back[0] != sizes_out[0])


@pytest.mark.parametrize("per", ["parameters", "latency"])
@pytest.mark.parametrize("seed", range(4))
def test_greedy_at_a_price(seed, per):
    """Against a walk that divides each rise by what is saved, written anew."""
    table = Table(seed)
    costs = table.resources[per]
    removed = DENSE

    def worth(block):
        rise = table.loss(removed | {block}) - table.loss(removed)
        share = costs.blocks[block] / costs.total
        return rise / share if rise > 0 else rise * share

    for step in table.search("greedy", "8blocks", per=per):
        removed |= {min((b for b in table.blocks if b not in removed), key=worth)}
        assert step.removed == removed
    assert len(removed) == 8


@pytest.mark.parametrize("acceleration", ["none", "lazy", "race", "lazy+race"])
@pytest.mark.parametrize("method", ["greedy", "floating"])
def test_a_candidate_that_overflows_is_as_if_it_were_none(method, acceleration, monkeypatch):
    """Its losses are infinite wherever it is removed."""
    lost = removable_units(5, "block", "all")[3]
    table = Table(2, layers=5)
    draw = table.rows_of
    table.rows_of = lambda mask: [math.inf] * ROWS if lost <= mask else draw(mask)
    trace = table.search(method, "4blocks", acceleration)
    if method == "floating":  # which proposes masks of any units
        assert {mask for _, _, mask, _ in table.asked if lost <= mask} == {lost}
    units_of = run.units_of
    monkeypatch.setattr(run, "units_of", lambda *args: [u for u in units_of(*args) if u != lost])
    trace_without = Table(2, layers=5).search(method, "4blocks", acceleration)
    assert [step.removed for step in trace] == [step.removed for step in trace_without]
    assert trace[-1].perplexity == trace_without[-1].perplexity
    if method == "greedy":
        for item, other in zip(stabilities(trace), stabilities(trace_without), strict=True):
            assert (item and (item.kept, item.rivals)) == (other and (other.kept, other.rivals))


@pytest.mark.parametrize(("budget", "share"), [("0.5kv", 0.5), ("1.2x", 1 - 1 / 1.2)])
@NOT_NESTED
def test_a_search_for_another_resource(method, budget, share):
    """The answer removes the share of the budget, as near as half a unit, and no block that saves
    nothing."""
    table = Table(3)
    costs = table.resources[parse_budget(budget, table.counts).resource]
    answer = table.search(method, budget)[-1].removed
    half = min(filter(None, costs.blocks.values())) / 2 / costs.total
    assert abs(costs.ratio(answer) - share) <= half + 1e-12
    if budget == "0.5kv":
        mha = [block for block in table.blocks if block.kind == "mha"]
        assert answer == min(map(frozenset, combinations(mha, 2)), key=table.rank)


@pytest.mark.parametrize(("share", "mha_of_four"), [(0.0, 0), (0.25, 1), (0.5, 2), (1.0, 4)])
def test_greedy_with_a_share_of_mha_blocks(share, mha_of_four):
    """Against a walk that takes, of the kind that is behind its share, the block that costs least;
    at ties any."""
    table = Table(3)
    removed = DENSE
    kinds = []
    for step in table.search("greedy", "8blocks", mha_share=share):
        distance = {}
        for block in table.blocks:
            if block not in removed:
                mha = kinds.count("mha") + (block.kind == "mha")
                distance[block] = abs(mha - share * (len(kinds) + 1))
        least = min(distance.values()) + 1e-9
        candidates = [removed | {block} for block in distance if distance[block] < least]
        removed = min(candidates, key=table.rank)
        kinds.append(next(iter(step.added[step.chosen])).kind)
        assert step.removed == removed
    assert kinds[:4].count("mha") == mha_of_four


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
    options = {"generations": 12, "children": 8, "initial": 10, "share": 4}
    trace = Table(1, layers=6).search("genetic", budget, **options)
    again = Table(1, layers=6).search("genetic", budget, **options)
    assert len(trace) == 13
    assert [step.removed for step in trace] == [step.removed for step in again]
    initial = trace[0].scores[1:]
    parent = trace[0].scores[trace[0].chosen]
    assert len(initial) == 10
    assert parent.loss == min(score.loss for score in initial)
    for step in trace[1:]:
        first, *children = step.scores
        assert first == parent
        assert len(children) == 8
        for child in children:
            removed = Counter(block.kind for block in child.mask - first.mask)
            returned = Counter(block.kind for block in first.mask - child.mask)
            assert removed == returned
            assert 1 <= removed.total() <= 3
        assert [score.rows_used for score in children] == [8] * 2 + [2] * 6
        first_losses = [math.fsum(score.row_loss[:2]) for score in children]
        assert max(first_losses[:2]) <= min(first_losses[2:])
        parent = min([first, *children[:2]], key=lambda score: score.loss)
        assert step.scores[step.chosen] == parent


def test_floating_goes_back():
    """Two blocks that are cheap together only, and another that is cheap once both are gone:
    greedy's third removal completes the pair, its first is given back, and the way on from there is
    better."""
    table = Table(0, interaction=0.0, noise=0.0)
    a, b, c, *others = table.blocks
    dear = max(others, key=table.cost.get)
    losses = {
        (c,): 0.01,
        (a,): 0.9,
        (b,): 0.9,
        (a, c): 0.02,
        (a, b): 0.015,
        (a, b, c): 0.03,
        (a, b, dear): 0.025,
    }
    losses = {frozenset(blocks): loss for blocks, loss in losses.items()}
    table.rows_of = lambda mask: [losses[mask]] * ROWS if mask in losses else table.draw(mask)
    trace = table.search("floating", "3blocks", per="none", tries=1)
    path = [mask for mask, _ in groupby(step.removed for step in trace)]
    assert path == [{c}, {a, c}, {a, b, c}, {a, b}, {a, b, dear}]


class Polynomial(Table):
    """Losses that are a quadratic function of the removed blocks, or a cubic one. An MLP block
    weighs three times."""

    def __init__(self, seed, cubic=0.0, **table):
        super().__init__(seed, interaction=0.0, noise=0.0, **table)
        chance = random.Random(seed)
        self.terms = {}
        for block in self.blocks:
            self.terms[frozenset({block})] = self.cost[block] * self.counts.blocks[block] / 1000
        for pair in combinations(self.blocks, 2):
            self.terms[frozenset(pair)] = chance.gauss(0, 0.25)
        for triple in combinations(self.blocks, 3):
            if chance.random() < 0.15:
                self.terms[frozenset(triple)] = chance.gauss(0, cubic)

    def draw(self, mask):
        loss = sum(term for blocks, term in self.terms.items() if blocks <= mask)
        return [5.0 + row / 7 + loss for row in range(ROWS)]

    def ask(self, masks, rows=ROWS, base=DENSE):
        return [MaskScore(mask, tuple(self.rows_of(mask)[:rows]), ROWS) for mask in masks]


@pytest.mark.parametrize("cubic", [0.0, 0.15, 0.4])
def test_regret(cubic):
    """Of floating at several budgets, against all masks that meet them, and against greedy by
    parameters, which may meet none."""
    regret = {"floating": {}, "greedy": {}}
    for seed in range(4):
        table = Polynomial(seed, cubic)
        losses = {mask: table.loss(mask) for mask in table.masks()}
        for budget in ("0.1", "0.2", "0.35", "0.5", "0.6", "4blocks", "1.2x"):
            goal = Space(table.units, table.goal(budget)).goal
            least = min(loss for mask, loss in losses.items() if goal.is_met(mask))
            for method, options in {"floating": {}, "greedy": {"per": "parameters"}}.items():
                row = SEARCHES[method]
                select = Select(table.ask)
                problem = Problem(
                    table.units, table.ask, select, ROWS, table.goal(budget), table.resources
                )
                answers = [step.removed for step in row.run(problem, row.options(**options))]
                answer = min(answers, key=goal.distance) if row.nested else answers[-1]
                if goal.is_met(answer):
                    regret[method][seed, budget] = losses[answer] - least
    floating = regret["floating"]
    assert len(floating) == 28
    assert sum(floating.values()) / 28 < 0.03
    for case, greedy_regret in regret["greedy"].items():
        assert floating[case] <= greedy_regret + 1e-12


def test_surrogate_of_a_quadratic_function_is_that_function():
    table = Polynomial(0)
    masks = table.masks()
    rises = [table.loss(mask) - table.loss(DENSE) for mask in masks]
    known = table.ask([DENSE, *table.units])
    pairs = [a | b for a, b in combinations(table.units, 2)]
    assert fit(table.units, [*known, *table.ask(pairs, 3)])(masks) == pytest.approx(rises, abs=1e-9)
    sample = table.ask(random.Random(0).sample(masks, 90))
    assert fit(table.units, [*known, *sample])(masks) == pytest.approx(rises, abs=0.05)


def test_surrogate_goes_through_what_is_known():
    """A function that is not quadratic, with fewer facts than coefficients."""
    table = Polynomial(1, cubic=0.4, layers=6)
    masks = random.Random(1).sample([mask for mask in table.masks() if len(mask) > 2], 40)
    scores = table.ask([DENSE, *table.units, *masks])
    rises = [table.loss(mask) - table.loss(DENSE) for mask in masks]
    assert fit(table.units, scores)(masks) == pytest.approx(rises, abs=1e-3)


@pytest.mark.parametrize("size", [1.0, 2.016, 3.0])
def test_predictions_are_right_where_effects_add_up(size):
    """Sizes of an MLP block, an MHA block being 1: any two alike, Llama-2, SmolLM2."""
    table = Table(3, size=size, interaction=0.0, noise=0.0)
    chance = random.Random(1)
    ratios = random.Random(2)
    for _ in range(4):
        ratio = round(ratios.uniform(0.1, 0.7), 6)
        mask = chance.choice(table.within(ratio))
        goal = table.goal(str(ratio)).around(mask)
        change = {unit: table.loss(mask ^ unit) - table.loss(mask) for unit in table.units}
        exchanges = Space(table.units, goal).exchanges(mask)
        predicted = list(by_prediction(mask, exchanges, change))
        neighbours = table.neighbours(mask, goal.target)
        assert sorted(map(format_mask, predicted)) == sorted(map(format_mask, neighbours))
        losses = list(map(table.loss, predicted))
        assert losses == pytest.approx(sorted(losses))


def test_the_cheapest_of_very_many_choices_come_first():
    costs = [[float(cost) for cost in range(200)]] * 2
    choices = list(islice(cheapest(costs, (5, 1)), 100))  # of 5e11
    totals = [total for total, _ in choices]
    assert totals[0] == 10
    assert totals == sorted(totals)
    assert len(choices) == 100


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
    fast = table.search("floating", "0.3", "lazy+race", tries=8)
    computed = len(table.asked)
    exact = table.search("floating", "0.3", tries=8)
    assert fast[-1].removed == exact[-1].removed
    assert computed < len(table.asked)


@NOT_NESTED
def test_a_budget_that_is_nearest_to_nothing(method):
    """It is refused before anything is computed, by the search itself, too."""
    table = Table(0)
    with pytest.raises(InputError, match=r"nearest to removing nothing; .* 1blocks, ratio 0\.0556"):
        table.search(method, "0.02")
    assert table.asked == []
    row = SEARCHES[method]
    problem = Problem(table.units, None, None, ROWS, table.goal("0.02"))
    with pytest.raises(InputError, match=r"nearest to removing nothing; the smallest .* 0\.0556"):
        next(row.run(problem, row.options()))


def test_whole_layers():
    """Units of two blocks: all of a kind, exchanged whole."""
    table = Table(3, layers=6)
    removed = table.search("floating", "6blocks", unit="layer")[-1].removed
    assert len(removed) == 6
    assert len({block.layer for block in removed}) == 3


@pytest.mark.parametrize("budget", ["0.3", "3blocks"])
def test_on_a_model_against_full_forwards(budget):
    """With the exact engine."""
    model = tiny_model(layers=3)
    chance = random.Random(0)
    rows = tuple(tuple(chance.randrange(1, 257) for _ in range(10)) for _ in range(3))
    counts = resources_of(model.config.to_dict())["parameters"]
    last = searched(model, CalibrationSet(rows), [budget], method="floating").of(budget)[-1]
    with masked(model, last.removed):
        loss = sum(full_nll(model, row) for row in rows) / len(rows)
    assert last.scores[last.chosen].loss == pytest.approx(loss, abs=1e-10)
    assert last.nll[last.chosen].loss == pytest.approx(loss, abs=1e-10)
    if budget == "3blocks":
        assert len(last.removed) == 3
    else:
        half = min(counts.blocks.values()) / 2 / counts.total
        assert abs(counts.ratio(last.removed) - 0.3) <= half
