"""Errors, intervals and tests of measured numbers.

Decides which test answers which question. scipy computes what it offers; Holm's correction and what
is stratified by task are ours. Tasks weigh the same in an average and in its test. The caller
decides what is compared.

Differences are b - a. Intervals have two sides and hold the truth with probability `level`. A
spread or an interval is infinite where there are too few measurements to tell it; nothing then
differs from anything. Tests and intervals of two raise InputError where these are no pairs, or
fewer than two pairs (of each task).
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import stats

from blockpruner.core.errors import InputError
from blockpruner.evaluation.kinds import rows_by_kind

Scores = Mapping[str, ArrayLike]
"""By task, one score per item [items], 0/1 or a fraction; of models to be compared, the same items
in one order."""

Floats = NDArray[np.float64]

RESAMPLES = 10_000
SEED = 0
COUNTS = 1 << 21
"""The bootstrap holds this many counts at once: 16 MiB."""

ROUNDING = 1e-12
"""Equal sums of fractions may differ by less than this."""


@dataclass(frozen=True)
class Interval:
    low: float
    high: float


EVERYTHING = Interval(-math.inf, math.inf)


@dataclass(frozen=True)
class Mean:
    """A mean with its standard error, which is infinite for a single item."""

    value: float
    stderr: float

    @property
    def differs(self) -> bool:
        """Whether 0 is outside the interval."""
        return not self.interval.low <= 0 <= self.interval.high

    @property
    def interval(self) -> Interval:
        """2 standard errors to each side, about 95 % for a normal error."""
        return Interval(self.value - 2 * self.stderr, self.value + 2 * self.stderr)


@dataclass(frozen=True)
class Effect:
    """A difference or a ratio of two measured things."""

    value: float
    interval: Interval
    p: float
    """Two-sided, for the hypothesis that the two are equal."""


def average(scores: Scores) -> Mean:
    """Mean over tasks of the mean over a task's items: every task weighs the same, whatever its
    size.

    Its standard error is sqrt(sum_t SE_t^2) / T over T tasks, with SE_t = sd_t / sqrt(n_t) and n_t
    - 1 degrees of freedom. The average of `differences` has the paired error (Miller, arXiv
    2411.00640, section 4). The error is that of drawing items; the tasks themselves are given.
    """
    tasks = [np.asarray(items, float) for items in scores.values()]
    errors = [stats.sem(items) if len(items) > 1 else math.inf for items in tasks]
    mean = np.mean([items.mean() for items in tasks])
    return Mean(float(mean), math.hypot(*errors) / len(tasks))


def differences(a: Scores, b: Scores, minimum: int = 1) -> dict[str, Floats]:
    """b - a by task and item, the tasks in alphabetical order; raises InputError if the two have
    different tasks or numbers of items, or nothing is there to compare, or fewer items of a task
    than `minimum`."""
    if a.keys() != b.keys() or not a:
        message = f"models of tasks {sorted(a)} and {sorted(b)} cannot be compared"
        raise InputError(f"{message}; evaluate both on the same, one or more")
    return {task: _difference(a[task], b[task], f"task {task}", minimum) for task in sorted(a)}


def paired_bootstrap(
    a: Scores, b: Scores, resamples: int = RESAMPLES, level: float = 0.95
) -> Effect:
    """Difference of averages over tasks; percentile interval over resamples of the items within
    each task.

    An item is drawn with its scores of both models, so its difference d is what is resampled.
    Instead of drawing n items, we draw how often each distinct d comes up: Multinomial(n, share of
    each d), which is the same distribution. d of 0/1 scores has three values: HellaSwag's 10,042
    items and 10,000 resamples take 3 ms, where indices take 500; 10,042 different values would take
    5 s. The tests compare with scipy.stats.bootstrap, which draws indices. BCa is left out: it
    corrects for a skew that a mean of so many items does not have.

    p = 2 min(#{d* <= 0} + 1, #{d* >= 0} + 1) / (resamples + 1), at most 1, where d* are the
    resampled differences: the level at which the interval begins to hold 0. It is never below 2 /
    (resamples + 1).
    """
    rng = np.random.default_rng(SEED)
    paired = differences(a, b, minimum=2)
    by_task = [_resampled_means(items, resamples, rng) for items in paired.values()]
    draws = np.mean(by_task, axis=0)
    value = average(paired).value
    return Effect(value, percentiles(draws, level), two_sided(draws, 0.0))


def stratified_t(a: Scores, b: Scores, level: float = 0.95) -> Effect:
    """Difference of averages over tasks, t interval and t test, for scores that are fractions.

    It is `t_effect` of the differences d of each task's items over the number of tasks T: the
    samples are d / T. Of one task it is `paired_t`. The bootstrap would take seconds here:
    fractions have as many distinct differences as items.
    """
    paired = differences(a, b, minimum=2)
    samples = [items / len(paired) for items in paired.values()]
    return t_effect(average(paired).value, samples, level)


def t_effect(value: float, samples: Sequence[Floats], level: float = 0.95) -> Effect:
    """t interval and t test of a sum of means of independent samples, which is `value`, against 0.

    With v_s = var(x) / n_s of the sample s: value ± t[f, (1 + level) / 2] sqrt(sum_s v_s), with
    degrees of freedom f = (sum_s v_s)^2 / sum_s (v_s^2 / (n_s - 1)) (Welch, Satterthwaite). The
    interval is infinite if a sample has a single item. Where nothing varies, it is one value, and p
    is 1 if that is 0 and 0 otherwise.
    """
    sizes = np.array([len(sample) for sample in samples])
    # One item tells nothing of the spread.
    if sizes.min() < 2:
        return Effect(value, EVERYTHING, 1.0)
    variances = np.array([sample.var(ddof=1) for sample in samples]) / sizes
    error = math.sqrt(variances.sum())
    if error <= ROUNDING:
        return _certain(value, ROUNDING)
    # Welch and Satterthwaite, as in the docstring.
    freedom = variances.sum() ** 2 / np.sum(variances**2 / (sizes - 1))
    quantile = stats.t.ppf((1 + level) / 2, freedom)
    half = float(quantile) * error
    p = 2 * stats.t.sf(abs(value) / error, freedom)
    interval = Interval(value - half, value + half)
    return Effect(value, interval, float(p))


def _certain(value: float, rounding: float) -> Effect:
    """The effect where nothing varies: it is there or not."""
    p = 1.0 if abs(value) <= rounding else 0.0
    return Effect(value, Interval(value, value), p)


def paired_t(a: ArrayLike, b: ArrayLike, level: float = 0.95) -> Effect:
    """Difference of means, t interval and paired t test of the same seeds, rows or items in one
    order.

    With d = b - a over n pairs: mean(d) ± t[n-1, (1 + level) / 2] sd(d) / sqrt(n). Where all d are
    equal (up to rounding) nothing varies: the interval is that one value, and p is 1 if it is 0 and
    0 otherwise.
    """
    a, b = np.asarray(a, float), np.asarray(b, float)
    d = _difference(a, b, "a paired t test", minimum=2)
    value = float(d.mean())
    largest = np.abs([a, b]).max()
    # d is a difference of numbers of this size, and has their rounding.
    rounding = ROUNDING * float(largest)
    # scipy warns and gives NaN where nothing varies.
    if np.ptp(d) <= rounding:
        return _certain(value, rounding)
    test = stats.ttest_rel(b, a)
    low, high = test.confidence_interval(level)
    interval = Interval(float(low), float(high))
    return Effect(value, interval, float(test.pvalue))


def perplexity_ratio(a: ArrayLike, b: ArrayLike, level: float = 0.95) -> Effect:
    """PPL of b over PPL of a on the same rows: exp of `paired_t` of the rows' mean NLL (a, b:
    [rows], nats per token).

    PPL = exp(mean over rows of the row's mean NLL), hence PPL_b / PPL_a = exp(mean(b - a)). exp is
    monotone, so the interval and p are those of the difference. The unit is the row, since tokens
    of a row are not independent. Nor are neighbouring rows of one text quite so, which the interval
    leaves out.
    """
    return exponential(paired_t(a, b, level))


def exponential(nats: Effect) -> Effect:
    """A ratio of perplexities from a difference of losses in nats; the test is the same."""
    ends = [nats.interval.low, nats.interval.high]
    interval = Interval(*np.exp(ends).tolist())
    return Effect(math.exp(nats.value), interval, nats.p)


def loss(a: Sequence[float], b: Sequence[float]) -> Effect:
    """As `perplexity_ratio`; of a single row with an infinite interval."""
    if len(b) > 1:
        return perplexity_ratio(a, b)
    ratio = math.exp(b[0] - a[0])
    return Effect(ratio, Interval(0, math.inf), 1.0)


def losses_by_kind(
    a: Sequence[float], b: Sequence[float], kinds: Sequence[str]
) -> dict[str, tuple[float, Effect]]:
    """PPL of b on the rows of each kind, and its `loss`."""
    losses = {}
    rows_of_a, rows_of_b = rows_by_kind(a, kinds), rows_by_kind(b, kinds)
    for kind, rows in rows_of_b.items():
        perplexity = math.exp(math.fsum(rows) / len(rows))
        losses[kind] = perplexity, loss(rows_of_a[kind], rows)
    return losses


def holm(p_values: Sequence[float]) -> tuple[float, ...]:
    """p values, in their order, adjusted for their number (Holm 1979).

    At most a share alpha of all families of tests has a wrong one among those with an adjusted p <=
    alpha. The k-th smallest of m becomes max over j <= k of min(1, (m - j + 1) p_(j)).
    """
    order = np.argsort(p_values)
    steps = np.arange(len(order), 0, -1)
    # min(1, (m - j + 1) p_(j)), then the maximum over j <= k.
    raised = np.sort(p_values) * steps
    adjusted = np.minimum(np.maximum.accumulate(raised), 1)
    ranks = np.argsort(order)
    return tuple(adjusted[ranks].tolist())


def holm_levels(p_values: Sequence[float], alpha: float = 0.05) -> tuple[float, ...]:
    """Levels, in the order of the p values, of intervals that decide as Holm's correction does.

    Holm tests the k-th smallest of m at alpha / (m - k + 1), and stops at the first that is larger:
    that one's step is also that of all after it. Hence an interval of this level leaves out "no
    difference" if, and only if, the adjusted p is at most alpha; where p is of a bootstrap, up to
    the resolution of its resamples.
    """
    rejected = sum(p <= alpha for p in holm(p_values))
    order = np.argsort(p_values, kind="stable")
    ranks = np.argsort(order, kind="stable")
    # All after the first that is not rejected are tested at its step.
    steps = np.minimum(ranks, rejected)
    return tuple((1 - alpha / (len(p_values) - steps)).tolist())


def ratio_of_medians(dense: ArrayLike, pruned: ArrayLike, level: float = 0.95) -> Effect:
    """Speed-up median(dense) / median(pruned) of times taken in turns; percentile interval over
    resampled pairs.

    dense and pruned hold the seconds of each repeat, in order. A repeat is drawn with both times,
    since a drift of the machine falls on both. p is that of `paired_bootstrap`, with 1 in the place
    of 0.
    """
    dense, pruned = np.asarray(dense, float), np.asarray(pruned, float)
    _difference(dense, pruned, "a ratio of medians", minimum=2)

    def ratio(dense: Floats, pruned: Floats, axis: int) -> Any:
        return np.median(dense, axis=axis) / np.median(pruned, axis=axis)

    result = stats.bootstrap(
        (dense, pruned),
        ratio,
        n_resamples=RESAMPLES,
        batch=max(1, COUNTS // len(dense)),
        vectorized=True,
        paired=True,
        method="percentile",
        rng=np.random.default_rng(SEED),
    )
    draws = result.bootstrap_distribution
    value = float(ratio(dense, pruned, axis=0))
    return Effect(value, percentiles(draws, level), two_sided(draws, 1.0))


def _difference(a: ArrayLike, b: ArrayLike, name: str, minimum: int) -> Floats:
    """b - a [n]; raises InputError where a and b are no pairs, or fewer than `minimum`."""
    a, b = np.asarray(a, float), np.asarray(b, float)
    if a.shape != b.shape or a.ndim != 1 or not len(a):
        message = f"{name}: a has shape {a.shape} and b {b.shape}"
        raise InputError(f"{message}; both must have one value for each of the same n >= 1")
    if len(a) < minimum:
        raise InputError(
            f"{name} needs at least {minimum} pairs, not {len(a)}; measure more of them"
        )
    difference: Floats = b - a
    return difference


def _resampled_means(items: Floats, resamples: int, rng: np.random.Generator) -> Floats:
    """Means [resamples] of as many items, drawn with replacement."""
    # Multinomial counts of the distinct values in place of indices: see `paired_bootstrap`.
    values, counts = np.unique(items, return_counts=True)
    n = len(items)
    batch = max(1, COUNTS // len(values))
    sums = []
    for start in range(0, resamples, batch):
        size = min(batch, resamples - start)
        sums.append(rng.multinomial(n, counts / n, size) @ values)
    means: Floats = np.concatenate(sums) / n
    return means


def percentiles(draws: Floats, level: float) -> Interval:
    """The interval that holds this share of the draws, as much left out on either side."""
    shares = [(1 - level) / 2, (1 + level) / 2]
    low, high = np.quantile(draws, shares).tolist()
    return Interval(low, high)


def two_sided(draws: Floats, null: float) -> float:
    """Twice the smaller tail beyond `null`, which counts as both; the measured sample counts as a
    draw."""
    # Both tails hold the draws that equal the null, up to rounding.
    low_tail = np.sum(draws <= null + ROUNDING)
    high_tail = np.sum(draws >= null - ROUNDING)
    p = 2 * (min(low_tail, high_tail) + 1) / (len(draws) + 1)
    return float(min(1.0, p))
