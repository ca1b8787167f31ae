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

RESAMPLES, SEED = 10_000, 0
COUNTS = 1 << 21
"""The bootstrap holds this many counts at once: 16 MiB."""

ROUNDING = 1e-12
"""Equal sums of fractions may differ by less than this."""


@dataclass(frozen=True)
class Interval:
    low: float
    high: float


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
    return Mean(float(np.mean([items.mean() for items in tasks])), math.hypot(*errors) / len(tasks))


def differences(a: Scores, b: Scores, least: int = 1) -> dict[str, Floats]:
    """b - a by task and item, the tasks in alphabetical order; raises InputError if the two have
    different tasks or numbers of items, or nothing is there to compare, or fewer items of a task
    than `least`."""
    if a.keys() != b.keys() or not a:
        message = f"models of tasks {sorted(a)} and {sorted(b)} cannot be compared"
        raise InputError(f"{message}; evaluate both on the same, one or more")
    return {task: _difference(a[task], b[task], f"task {task}", least) for task in sorted(a)}


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
    paired = differences(a, b, least=2)
    draws = np.mean([_resampled_means(items, resamples, rng) for items in paired.values()], axis=0)
    return Effect(average(paired).value, percentiles(draws, level), two_sided(draws, 0.0))


def stratified_t(a: Scores, b: Scores, level: float = 0.95) -> Effect:
    """Difference of averages over tasks, t interval and t test, for scores that are fractions.

    It is `t_effect` of the differences d of each task's items over the number of tasks T: the
    samples are d / T. Of one task it is `paired_t`. The bootstrap would take seconds here:
    fractions have as many distinct differences as items.
    """
    paired = differences(a, b, least=2)
    return t_effect(
        average(paired).value, [items / len(paired) for items in paired.values()], level
    )


def t_effect(value: float, samples: Sequence[Floats], level: float = 0.95) -> Effect:
    """t interval and t test of a sum of means of independent samples, which is `value`, against 0.

    With v_s = var(x) / n_s of the sample s: value ± t[f, (1 + level) / 2] sqrt(sum_s v_s), with
    degrees of freedom f = (sum_s v_s)^2 / sum_s (v_s^2 / (n_s - 1)) (Welch, Satterthwaite). The
    interval is infinite if a sample has a single item. Where nothing varies, it is one value, and p
    is 1 if that is 0 and 0 otherwise.
    """
    if min(map(len, samples)) < 2:
        return Effect(value, Interval(-math.inf, math.inf), 1.0)
    parts = np.array([sample.var(ddof=1) / len(sample) for sample in samples])
    error = math.sqrt(parts.sum())
    if error <= ROUNDING:
        return Effect(value, Interval(value, value), float(abs(value) <= ROUNDING))
    freedom = parts.sum() ** 2 / np.sum(parts**2 / [len(sample) - 1 for sample in samples])
    half = float(stats.t.ppf((1 + level) / 2, freedom)) * error
    p = float(2 * stats.t.sf(abs(value) / error, freedom))
    return Effect(value, Interval(value - half, value + half), p)


def paired_t(a: ArrayLike, b: ArrayLike, level: float = 0.95) -> Effect:
    """Difference of means, t interval and paired t test of the same seeds, rows or items in one
    order.

    With d = b - a over n pairs: mean(d) ± t[n-1, (1 + level) / 2] sd(d) / sqrt(n). Where all d are
    equal (up to rounding) nothing varies: the interval is that one value, and p is 1 if it is 0 and
    0 otherwise.
    """
    a, b = np.asarray(a, float), np.asarray(b, float)
    d = _difference(a, b, "a paired t test", least=2)
    value, rounding = float(d.mean()), ROUNDING * float(max(np.abs(a).max(), np.abs(b).max()))
    if np.ptp(d) <= rounding:
        return Effect(value, Interval(value, value), float(abs(value) <= rounding))
    test = stats.ttest_rel(b, a)
    return Effect(value, Interval(*map(float, test.confidence_interval(level))), float(test.pvalue))


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
    low, high = np.exp([nats.interval.low, nats.interval.high]).tolist()
    return Effect(math.exp(nats.value), Interval(low, high), nats.p)


def loss(a: Sequence[float], b: Sequence[float]) -> Effect:
    """As `perplexity_ratio`; of a single row with an infinite interval."""
    return (
        perplexity_ratio(a, b)
        if len(b) > 1
        else Effect(math.exp(b[0] - a[0]), Interval(0, math.inf), 1.0)
    )


def losses_by_kind(
    a: Sequence[float], b: Sequence[float], kinds: Sequence[str]
) -> dict[str, tuple[float, Effect]]:
    """PPL of b on the rows of each kind, and its `loss`."""
    found, before = {}, rows_by_kind(a, kinds)
    for kind, rows in rows_by_kind(b, kinds).items():
        found[kind] = math.exp(math.fsum(rows) / len(rows)), loss(before[kind], rows)
    return found


def holm(p_values: Sequence[float]) -> tuple[float, ...]:
    """p values, in their order, adjusted for their number (Holm 1979).

    At most a share alpha of all families of tests has a wrong one among those with an adjusted p <=
    alpha. The k-th smallest of m becomes max over j <= k of min(1, (m - j + 1) p_(j)).
    """
    order = np.argsort(p_values)
    raised = np.asarray(p_values)[order] * np.arange(len(order), 0, -1)
    adjusted = np.minimum(np.maximum.accumulate(raised), 1)
    return tuple(adjusted[np.argsort(order)].tolist())


def holm_levels(p_values: Sequence[float], alpha: float = 0.05) -> tuple[float, ...]:
    """Levels, in the order of the p values, of intervals that decide as Holm's correction does.

    Holm tests the k-th smallest of m at alpha / (m - k + 1), and stops at the first that is larger:
    that one's step is also that of all after it. Hence an interval of this level leaves out "no
    difference" if, and only if, the adjusted p is at most alpha; where p is of a bootstrap, up to
    the resolution of its resamples.
    """
    rejected = sum(p <= alpha for p in holm(p_values))
    ranks = np.argsort(np.argsort(p_values, kind="stable"), kind="stable")
    return tuple(1 - alpha / (len(p_values) - min(int(rank), rejected)) for rank in ranks)


def ratio_of_medians(dense: ArrayLike, pruned: ArrayLike, level: float = 0.95) -> Effect:
    """Speed-up median(dense) / median(pruned) of times taken in turns; percentile interval over
    resampled pairs.

    dense and pruned hold the seconds of each repeat, in order. A repeat is drawn with both times,
    since a drift of the machine falls on both. p is that of `paired_bootstrap`, with 1 in the place
    of 0.
    """
    dense, pruned = np.asarray(dense, float), np.asarray(pruned, float)
    _difference(dense, pruned, "a ratio of medians", least=2)

    def ratio(dense: Floats, pruned: Floats, axis: int) -> Any:
        return np.median(dense, axis=axis) / np.median(pruned, axis=axis)

    how: dict[str, Any] = {
        "n_resamples": RESAMPLES,
        "batch": max(1, COUNTS // len(dense)),
        "vectorized": True,
    }
    how |= {"paired": True, "method": "percentile", "rng": np.random.default_rng(SEED)}
    draws = stats.bootstrap((dense, pruned), ratio, **how).bootstrap_distribution
    return Effect(
        float(ratio(dense, pruned, axis=0)), percentiles(draws, level), two_sided(draws, 1.0)
    )


def _difference(a: ArrayLike, b: ArrayLike, what: str, least: int) -> Floats:
    """b - a [n]; raises InputError where a and b are no pairs, or fewer than `least`."""
    a, b = np.asarray(a, float), np.asarray(b, float)
    if a.shape != b.shape or a.ndim != 1 or not len(a):
        message = f"{what}: a has shape {a.shape} and b {b.shape}"
        raise InputError(f"{message}; both must have one value for each of the same n >= 1")
    if len(a) < least:
        raise InputError(f"{what} needs at least {least} pairs, not {len(a)}; measure more of them")
    difference: Floats = b - a
    return difference


def _resampled_means(items: Floats, resamples: int, rng: np.random.Generator) -> Floats:
    """Means [resamples] of as many items, drawn with replacement."""
    values, counts = np.unique(items, return_counts=True)
    n, step = len(items), max(1, COUNTS // len(values))
    sizes = [min(step, resamples - start) for start in range(0, resamples, step)]
    means: Floats = (
        np.concatenate([rng.multinomial(n, counts / n, size) @ values for size in sizes]) / n
    )
    return means


def percentiles(draws: Floats, level: float) -> Interval:
    """The interval that holds this share of the draws, as much left out on either side."""
    return Interval(*np.quantile(draws, [(1 - level) / 2, (1 + level) / 2]).tolist())


def two_sided(draws: Floats, null: float) -> float:
    """Twice the smaller tail beyond `null`, which counts as both; the measured sample counts as a
    draw."""
    tails = np.sum(draws <= null + ROUNDING), np.sum(draws >= null - ROUNDING)
    return float(min(1.0, 2 * (min(tails) + 1) / (len(draws) + 1)))
