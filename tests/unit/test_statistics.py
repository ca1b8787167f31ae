"""Statistics against arithmetic by hand, enumerations of all resamples, definitions written out,
and libraries."""

import itertools
import math
from statistics import median

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from scipy import stats
from statsmodels.stats.multitest import multipletests

from blockpruner.core.errors import InputError
from blockpruner.reporting.statistics import (
    Effect,
    Interval,
    Mean,
    average,
    differences,
    holm,
    holm_levels,
    paired_bootstrap,
    paired_t,
    perplexity_ratio,
    ratio_of_medians,
    stratified_t,
)

PAIRS = st.lists(st.tuples(st.integers(-50, 50), st.integers(-50, 50)), min_size=2, max_size=12)


def assert_quantiles(interval, population, level, resamples):
    """The interval's ends are quantiles of a sample of `resamples` from `population`, within 5
    standard errors."""
    population = np.asarray(population)
    for end, q in ((interval.low, (1 - level) / 2), (interval.high, (1 + level) / 2)):
        slack = 5 * math.sqrt(q * (1 - q) / resamples)
        assert np.mean(population < end - 1e-9) <= q + slack
        assert np.mean(population <= end + 1e-9) >= q - slack


# Averages and their errors


def test_average_and_its_error_by_hand():
    scores = {"x": [1, 1, 0, 1], "y": [0, 1, 0.5]}
    # x: mean 3/4, sd^2 = (3 * 1/16 + 9/16) / 3 = 1/4, SE^2 = 1/16
    # y: mean 1/2, sd^2 = (1/4 + 1/4 + 0) / 2 = 1/4, SE^2 = 1/12
    assert average(scores) == Mean(
        pytest.approx((3 / 4 + 1 / 2) / 2), pytest.approx(math.sqrt(1 / 16 + 1 / 12) / 2)
    )
    assert average({"x": scores["x"]}).stderr == pytest.approx(1 / 4)
    assert average({"x": [1], "y": [0, 1, 1]}).stderr == math.inf  # a single item


def test_differences_are_b_minus_a_by_task():
    result = differences({"y": [1, 0], "x": [0.25]}, {"x": [1], "y": [True, True]})
    assert {task: items.tolist() for task, items in result.items()} == {"x": [0.75], "y": [0, 1]}
    assert list(result) == ["x", "y"]


# Bootstrap over items


@pytest.mark.parametrize("level", [0.5, 0.8, 0.95])
def test_bootstrap_against_all_resamples(level):
    a = {"x": [0, 0], "y": [1, 0, 0, 0.5]}
    b = {"x": [0, 1], "y": [0, 0, 1, 1]}
    d = {"x": [0, 1], "y": [-1, 0, 1, 0.5]}  # 2^2 * 4^4 resamples, each as likely as any other
    every = [
        (sum(x) / 2 + sum(y) / 4) / 2
        for x in itertools.product(d["x"], repeat=2)
        for y in itertools.product(d["y"], repeat=4)
    ]
    result = paired_bootstrap(a, b, resamples=20_000, level=level)
    assert result.value == pytest.approx((1 / 2 + 0.5 / 4) / 2)
    assert_quantiles(result.interval, every, level, 20_000)
    tails = [
        sum(m <= 1e-9 for m in every) / len(every),
        sum(m >= -1e-9 for m in every) / len(every),
    ]
    assert result.p == pytest.approx(2 * min(tails), abs=2 * 5 * math.sqrt(0.25 / 20_000))


def test_bootstrap_of_items_that_do_not_vary():
    same = {"x": [1, 0, 1], "y": [0.3, 0.6]}
    assert paired_bootstrap(same, same) == Effect(0, Interval(0, 0), 1)
    wrong, right = {"x": [0, 0, 0]}, {"x": [1, 1, 1]}
    assert paired_bootstrap(wrong, right, resamples=99) == Effect(1, Interval(1, 1), 2 / 100)


def test_bootstrap_counts_zero_as_both_sides_despite_rounding():
    """0.1 + 0.2 - 0.3 is 6e-17 as floats."""
    zero, sums = (
        {"x": [0, 0], "y": [0, 0], "z": [0, 0]},
        {"x": [0.1, 0.1], "y": [0.2, 0.2], "z": [-0.3, -0.3]},
    )
    assert paired_bootstrap(zero, sums).p == paired_bootstrap(sums, zero).p == 1


# Rows


def test_paired_t_by_hand():
    # d = 0, 1, 3: mean 4/3, sd^2 = 7/3, SE^2 = 7/9, t^2 = (16/9) / (7/9) = 16/7. With 2 degrees of
    # freedom P(T <= t) = 1/2 + t / (2 sqrt(2 + t^2)), so p = 1 - t / sqrt(2 + t^2) = 1 -
    # sqrt(16/30), and the quantile of 0.975 solves 0.95 = t / sqrt(2 + t^2): t = 0.95 sqrt(2 / (1 -
    # 0.95^2)).
    half = 0.95 * math.sqrt(2 / (1 - 0.95**2)) * math.sqrt(7 / 9)
    result = paired_t([1, 1, 1], [1, 2, 4])
    assert (result.value, result.p) == (pytest.approx(4 / 3), pytest.approx(1 - math.sqrt(16 / 30)))
    assert result.interval == Interval(pytest.approx(4 / 3 - half), pytest.approx(4 / 3 + half))


def test_a_ratio_of_perplexities_is_the_exponential_of_paired_t():
    a, b = [2.0, 2.0, 2.0], [2.0, 3.0, 5.0]
    result, nats = perplexity_ratio(a, b, level=0.8), stats.ttest_rel(b, a)
    ends = nats.confidence_interval(0.8)
    assert (result.value, result.p) == (
        pytest.approx(math.exp(10 / 3 - 2)),
        pytest.approx(nats.pvalue),
    )
    assert result.interval == Interval(
        pytest.approx(math.exp(ends.low)), pytest.approx(math.exp(ends.high))
    )


@given(PAIRS)
def test_paired_t_is_a_t_test_of_the_differences_and_turns_round(pairs):
    a, b = map(np.array, zip(*pairs, strict=True))
    assume(np.ptp(b - a) > 0)
    result, back, reference = paired_t(a, b, 0.9), paired_t(b, a, 0.9), stats.ttest_1samp(b - a, 0)
    assert result.p == pytest.approx(reference.pvalue)
    assert [result.interval.low, result.interval.high] == pytest.approx(
        list(reference.confidence_interval(0.9))
    )
    assert [back.value, back.interval.low, back.interval.high, back.p] == pytest.approx(
        [-result.value, -result.interval.high, -result.interval.low, result.p]
    )


@pytest.mark.filterwarnings("error")
def test_paired_t_of_differences_that_do_not_vary():
    assert paired_t([1, 5], [1, 5]) == Effect(0, Interval(0, 0), 1)
    assert paired_t([1, 5], [3, 7]) == Effect(2, Interval(2, 2), 0)
    result = paired_t([0.2, 0.3, 0.6], [0.3, 0.4, 0.7])  # 0.1 up to rounding
    assert (result.p, result.interval.low, result.interval.high) == (
        0,
        pytest.approx(0.1),
        pytest.approx(0.1),
    )
    assert paired_t([0.3, 0.3], [0.1 + 0.2, 0.3]).p == 1
    # small, but no rounding: t = 1
    assert paired_t([1e-14, 2e-14], [1e-14, 3e-14]).p == pytest.approx(0.5)


# Many tests


@settings(max_examples=10)  # statsmodels collects garbage in every call
@given(
    st.lists(
        st.sampled_from([0, 1e-9, 0.01, 0.02, 0.3, 1]) | st.floats(0, 1), min_size=6, max_size=12
    )
)
def test_holm_is_its_definition(p_values):
    result = holm(p_values)
    for p, adjusted in zip(p_values, result, strict=True):
        below = [q for q in p_values if q <= p]
        # all that are still open, times q
        steps = [sum(r >= q for r in p_values) * q for q in below]
        assert adjusted == pytest.approx(min(1, max(steps)))
        assert adjusted >= p
    assert result == pytest.approx(multipletests(p_values, method="holm")[1])
    assert [a for _, a in sorted(zip(p_values, result, strict=True))] == sorted(result)


def test_intervals_of_holm_levels_decide_as_statsmodels_does():
    rng = np.random.default_rng(0)
    for size in rng.integers(1, 9, 15):
        z = rng.uniform(-4, 4, size)
        p_values = 2 * stats.norm.sf(np.abs(z))
        rejected = multipletests(p_values, 0.05, "holm")[0]
        widths = stats.norm.ppf((1 + np.array(holm_levels(p_values.tolist()))) / 2)
        assert (np.abs(z) > widths).tolist() == rejected.tolist()


# Timing


@pytest.mark.parametrize("level", [0.6, 0.95])
def test_ratio_of_medians_against_all_resamples(level):
    dense, pruned = [2.0, 2.4, 2.1, 3.0], [1.9, 2.5, 1.6, 1.5]
    every = [
        median(dense[i] for i in drawn) / median(pruned[i] for i in drawn)
        for drawn in itertools.product(range(4), repeat=4)
    ]
    result = ratio_of_medians(dense, pruned, level=level)
    assert result.value == pytest.approx(2.25 / 1.75)
    assert_quantiles(result.interval, every, level, 10_000)
    below = sum(m <= 1 for m in every) / len(every)
    assert result.p == pytest.approx(2 * below, abs=10 * math.sqrt(below / 10_000))
    assert ratio_of_medians(dense, pruned, level=level) == result


# Fractions, by task


@given(PAIRS)
def test_stratified_t_of_one_task_is_scipys(pairs):
    a, b = (np.array(side, float) for side in zip(*pairs, strict=True))
    assume(np.ptp(b - a) > 0)
    result, test = stratified_t({"x": a}, {"x": b}), stats.ttest_rel(b, a)
    assert result.p == pytest.approx(test.pvalue)
    assert (result.interval.low, result.interval.high) == pytest.approx(
        tuple(test.confidence_interval(0.95))
    )


def test_stratified_t_of_two_tasks_is_welchs():
    """The average of two means, and half the difference of one and the other negated, have one
    distribution."""
    rng = np.random.default_rng(3)
    x, y = rng.normal(0.1, 1, 9), rng.normal(0.3, 3, 31)
    zeros = {"x": np.zeros(9), "y": np.zeros(31)}
    for level in (0.5, 0.99):
        result, welch = (
            stratified_t(zeros, {"x": x, "y": y}, level),
            stats.ttest_ind(x, -y, equal_var=False),
        )
        assert result.p == pytest.approx(welch.pvalue)
        interval = welch.confidence_interval(level)
        assert (2 * result.interval.low, 2 * result.interval.high) == pytest.approx(
            (interval.low, interval.high)
        )
        assert result.value == pytest.approx((x.mean() + y.mean()) / 2)


def test_stratified_t_of_differences_that_do_not_vary():
    same = {"x": [0.25, 0.5], "y": [0.5, 0.75]}
    assert stratified_t(same, same) == Effect(0.0, Interval(0.0, 0.0), 1.0)
    extra = {task: np.array(scores) + 0.25 for task, scores in same.items()}
    assert stratified_t(same, extra) == Effect(0.25, Interval(0.25, 0.25), 0.0)


# Refusals


@pytest.mark.parametrize(
    ("function", "arguments"),
    [
        (differences, ({"x": [1]}, {"y": [1]})),
        (differences, ({}, {})),
        (differences, ({"x": [1, 0]}, {"x": [1]})),
        (differences, ({"x": []}, {"x": []})),
        (paired_bootstrap, ({"x": [1, 0], "y": [1]}, {"x": [1, 0], "y": [0]})),
        (stratified_t, ({"x": [1, 0], "y": [1]}, {"x": [1, 0], "y": [0]})),
        (paired_t, ([1], [2])),
        (ratio_of_medians, ([1, 2], [1, 2, 3])),
    ],
)
def test_what_has_no_answer_is_refused(function, arguments):
    with pytest.raises(InputError):
        function(*arguments)
