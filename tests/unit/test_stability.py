"""Selection stability: against scipy's paired t test, all resamples written out, and answers known
by hand."""

import itertools

import numpy as np
import pytest
from scipy import stats

from blockpruner.core.blocks import DENSE, parse_mask, removable_units
from blockpruner.scoring.objectives import MaskScore
from blockpruner.scoring.stability import stability
from blockpruner.search.iteration import Iteration, stabilities

A, B, C, D = map(parse_mask, ("mha.0", "mha.1", "mha.2", "mlp.0"))


def shares(losses, chosen):
    """The share of all n^n resamples in which the chosen one is the first of the lowest."""
    rows = np.array(losses)
    n = rows.shape[1]
    drawn = [rows[:, list(draw)].sum(axis=1) for draw in itertools.product(range(n), repeat=n)]
    return np.mean([sums.argmin() == chosen for sums in np.round(drawn, 9)])


@pytest.mark.parametrize("seed", range(5))
def test_rivals_and_share_are_those_of_scipy_and_of_all_resamples(seed):
    random = np.random.default_rng(seed)
    units = removable_units(6, "block", "all")
    rows = (
        random.normal(3, 1, 5)
        + random.normal(0, 0.1, (len(units), 5))
        + random.gamma(1, 0.1, (len(units), 1))
    )
    chosen = int(rows.mean(axis=1).argmin())
    result = stability(dict(zip(units, map(tuple, rows), strict=True)), units[chosen])
    p = [
        stats.ttest_rel(row, rows[chosen]).pvalue if i != chosen else 0
        for i, row in enumerate(rows)
    ]
    assert result.rivals == tuple(
        unit for unit, value in zip(units, p, strict=True) if value > 0.05
    )
    # 3.5 standard errors of 2,000 resamples
    assert result.kept == pytest.approx(shares(rows, chosen), abs=0.04)


@pytest.mark.parametrize(
    "losses",
    [{}, {A: (1, 2)}, {A: (1,), B: (2,)}, {A: (), B: (1, 2)}, {B: (1, 2)}, {A: (2, 2), B: (1, 1)}],
    ids=["nothing", "alone", "one row", "not scored", "of another step", "not the lowest"],
)
def test_unknown(losses):
    assert stability(losses, A) is None


def test_steps_of_a_one_shot_search_rest_on_its_first():
    first = (
        MaskScore(DENSE, (0, 0), 2),
        MaskScore(A, (1, 1), 2),
        MaskScore(B, (1, 1.5), 2),
        MaskScore(C, (1, 2), 2),
    )
    trace = [
        Iteration(0, first, (None, A, B, C), 1),
        Iteration(1, (MaskScore(A | B, (), 2),), (B,), 0),
        Iteration(2, (MaskScore(A | B | C, (), 2),), (C,), 0),
    ]
    item, two, three = stabilities(trace)
    assert item.rivals == (B, C)
    assert two.rivals == (C,)
    assert three is None
    assert stabilities(trace, "parameters") == (None,) * 3
