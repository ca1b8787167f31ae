"""What the numbers mean: a sentence per target, signs of failed pruning, and where to stop.

Decides the rules and their thresholds, each a named constant with its reason. A finding is a value; how it is shown
is decided in `html` and `markdown`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from itertools import takewhile
from statistics import mean, median

from blockpruner.core.blocks import BlockKind, format_mask
from blockpruner.core.budgets import speedup
from blockpruner.reporting.formats import listed, number, percent, signed_points, times
from blockpruner.reporting.inputs import Removal, Study, Target, paired
from blockpruner.reporting.methods import UNSCORED, method_words, taken_out

JUMP_FACTOR = 3.0
"""A removal is a jump if it costs this many times the median of the removals before it. Greedy costs grow steadily,
each seldom above twice the last median, so three times is a break in the curve and not its slope."""

JUMP_NATS = 0.1
"""... and costs at least this much (perplexity times 1.11): below it, three times next to nothing is still nothing."""

COLLAPSE_NATS = math.log(1.5)
"""A removal that multiplies perplexity by 1.5 is a jump whatever came before it, the first two removals included,
which have no median to be held against."""

MISMATCH_FACTOR = 1.5
"""Held-out and calibration text differ, so their perplexities rise at different rates; a held-out rise (in nats) one
and a half times the calibration rise means that the search spared what the calibration text needs and cut what the
held-out text needs."""

MISMATCH_NATS = 0.1
"""... and the held-out rise must exceed that bound by this much (perplexity times 1.11), the size of the difference
between two held-out samples of a few thousand tokens."""

HIGH_RATIO = 0.1
"""Below a tenth of the parameters the expected gain (11 %) is about the spread of repeated timings."""

LOW_GAIN = 0.5
"""Time of generation is bound by reading weights, so removing the share r of them should give a speed-up of
1 / (1 - r); less than half of that gain is little. MLP blocks hold most parameters, MHA blocks much of the time and
all of the KV cache, so mostly-MLP pruning has this sign."""

KNEE_MARGIN = 0.05
"""A stop before the fastest safe target must keep at least this much more of the speed gain than of the loss: less
is the spread of timings."""


class Level(StrEnum):
    RESULT = "result"
    NOTE = "note"
    WARNING = "warning"
    ADVICE = "advice"


@dataclass(frozen=True)
class Finding:
    """rule: its short name, stable for tests and machines; title and text: plain text, no markup."""

    level: Level
    rule: str
    title: str
    text: str


def findings(study: Study) -> list[Finding]:
    mismatched = [target for target in study.targets if is_mismatch(study, target)]
    slow = [target for target in study.targets if is_slow(target)]
    return [
        *(_outcome(study, target) for target in study.targets),
        *(_jump_warning(study, target) for target in study.traces if first_jump(target.removals) is not None),
        *([_mismatch_warning(study, mismatched)] if mismatched else []),
        *([_slow_warning(slow)] if slow else []),
        _recommendation(study),
        _noise(study),
    ]


def first_jump(removals: tuple[Removal, ...]) -> int | None:
    """Index of the first removal whose NLL rise breaks the curve, or None."""
    return jump_of([removal.rise for removal in removals])


def jump_of(rises: Sequence[float]) -> int | None:
    """Index of the first NLL rise that breaks the curve (JUMP_FACTOR, JUMP_NATS, COLLAPSE_NATS), or None."""
    for i, rise in enumerate(rises):
        usual = i >= 2 and rise >= max(JUMP_NATS, JUMP_FACTOR * median(rises[:i]))
        if usual or rise >= COLLAPSE_NATS:
            return i
    return None


def is_mismatch(study: Study, target: Target) -> bool:
    """Whether held-out perplexity rises well beyond calibration perplexity (MISMATCH_FACTOR, MISMATCH_NATS).

    Where the calibration text has decided nothing, or its perplexity is unknown or of answers and not of a text, there
    is nothing to hold against each other.
    """
    rise = target.calibration_rise
    if rise is None or target.plan.method in UNSCORED or target.plan.metric == "answer_likelihood":
        return False
    return parts(study.heldout_rise(target), rise)


def parts(heldout: float, calibration: float) -> bool:
    """Whether the NLL rise on held-out text goes well beyond that on calibration text."""
    return heldout > MISMATCH_FACTOR * max(calibration, 0.0) + MISMATCH_NATS


def is_slow(target: Target) -> bool:
    """Whether a high ratio brought little speed-up in generation (HIGH_RATIO, LOW_GAIN)."""
    return brings_little(target.plan.ratio, target.speedups.generation)


def brings_little(ratio: float, speedup: float) -> bool:
    return ratio >= HIGH_RATIO and speedup - 1 < LOW_GAIN * (1 / (1 - ratio) - 1)


def recommended(study: Study) -> Target | None:
    """The target to stop at: the knee among the safe targets, or None.

    Safe is faster than dense, and smaller than the first with a jump or a calibration mismatch.
    """
    before = takewhile(lambda t: first_jump(t.removals) is None and not is_mismatch(study, t), study.targets)
    safe = [target for target in before if target.speedups.generation > 1]
    return safe[knee([(t.speedups.generation, study.heldout_rise(t)) for t in safe])] if safe else None


def knee(points: Sequence[tuple[float, float]]) -> int:
    """Index of the knee of loss against speed-up.

    With s = speed-up of generation - 1 and l = NLL rise on held-out text, both as shares of their values at the
    fastest, the knee maximises s - l (the height above the straight line from the dense model to it);
    the fastest itself has 0 and is kept unless another is higher by KNEE_MARGIN.

    Args:
        points: (speed-up, above 1; NLL rise) of models, at least one.
    """
    fastest = max(range(len(points)), key=lambda i: points[i][0])
    gain, loss = points[fastest][0] - 1, points[fastest][1]
    if loss <= 0:
        return fastest
    heights = [(speedup - 1) / gain - rise / loss for speedup, rise in points]
    best = max(range(len(points)), key=heights.__getitem__)
    return best if heights[best] >= KNEE_MARGIN else fastest


def within_chance(study: Study) -> dict[str, list[str]]:
    """Tasks whose score is within 2 standard errors of guessing, by model ("dense" or the target's name)."""
    models = {"dense": study.dense} | {target.name: target.result for target in study.targets}
    return {
        name: [task for task, score in result.tasks.items() if not score.differs_from(result.chance[task])]
        for name, result in models.items()
    }


def _outcome(study: Study, target: Target) -> Finding:
    difference = paired(study.dense, target.result)
    noise = "" if difference.differs_from(0) else ", within noise (less than 2 standard errors)"
    timed = target.plan.removes.get("latency")
    return Finding(
        Level.RESULT,
        "outcome",
        f"{target.name}: {percent(target.plan.ratio)} of the parameters removed ({taken_out(target)}; "
        f"{method_words(target)})" + (", then recovered with LoRA" if target.plan.recover else ""),
        f"Held-out perplexity {number(study.dense.perplexity)} → {number(target.result.perplexity)}. Average accuracy "
        f"{percent(study.dense.average.value)} → {percent(target.result.average.value)}, a paired difference of "
        f"{signed_points(difference.value, difference.stderr)} points{noise}. Generation "
        f"{times(target.speedups.generation)} as fast"
        + (", within noise (the timings of both overlap)" if target.speedups.is_noise else "")
        + (
            f"; by the times of its blocks, of which the budget was made, {times(speedup(timed))}."
            if timed is not None
            else "."
        ),
    )


def _jump_warning(study: Study, target: Target) -> Finding:
    index = first_jump(target.removals)
    assert index is not None
    removal = target.removals[index]
    past = [
        t.name
        for t in study.targets
        if len(t.removals) > index and t.plan.order[: index + 1] == target.plan.order[: index + 1]
    ]
    safe = sum(len(r.added) for r in target.removals[:index])
    advice = (
        f"The last safe budget is {safe}blocks (ratio {target.removals[index - 1].ratio:.4f})."
        if index
        else "It is the first removal, so no budget of this sequence is safe."
    )
    return Finding(
        Level.WARNING,
        "jump",
        f"Over-pruning: removing {format_mask(removal.added)} (removal {index + 1}) breaks the model",
        f"Calibration perplexity jumps from {number(removal.before)} to {number(removal.perplexity)} at this one "
        f"removal. {advice} Beyond it: {listed(past)}.",
    )


def _mismatch_warning(study: Study, targets: list[Target]) -> Finding:
    rises = [
        f"{times(math.exp(study.heldout_rise(t)))} against {times(math.exp(t.calibration_rise or 0.0))} at {t.name}"
        for t in targets
    ]
    return Finding(
        Level.WARNING,
        "mismatch",
        "Calibration mismatch: held-out text suffers more than the calibration text",
        f"Perplexity over the dense model's, on held-out text against the {targets[0].plan.calibration['tokens']:,} "
        f"calibration tokens: {listed(rises)}. Calibrate on more text, or on text nearer to its use.",
    )


def _slow_warning(targets: list[Target]) -> Finding:
    gains = [
        f"{t.name}: {percent(t.plan.ratio)} of the parameters removed ({taken_out(t)}), generation "
        f"{times(t.speedups.generation)} as fast; reading fewer weights alone would give "
        f"{times(1 / (1 - t.plan.ratio))}"
        for t in targets
    ]
    causes = [
        (
            any(t.plan.kind == "mask" and t.plan.blocks[BlockKind.MLP] > t.plan.blocks[BlockKind.MHA] for t in targets),
            "Mostly MLP blocks were removed: they hold parameters, while attention holds time and KV cache. Try "
            "candidates: mha, or a budget in blocks.",
        ),
        (
            any(t.plan.kind == "slicegpt" for t in targets),
            "Slicing makes every product smaller and their number larger, and leaves the KV cache as it is: it pays "
            "off where products are large (batch, prompt length, hidden size).",
        ),
    ]
    cause = " ".join(text for applies, text in causes if applies) or (
        "MLP blocks are not the majority of those removed, so look at what bounds this machine (batch, prompt length, "
        "threads)."
    )
    return Finding(Level.WARNING, "slow", "Little speed-up for the parameters removed", f"{'. '.join(gains)}. {cause}")


def _recommendation(study: Study) -> Finding:
    best = recommended(study)
    if best is None:
        return Finding(
            Level.ADVICE,
            "stop",
            "No target is worth stopping at",
            "None is faster than the dense model, before any jump in perplexity and free of calibration mismatch. "
            "Prune less, or add targets.",
        )
    gain, loss = best.speedups.generation - 1, math.exp(study.heldout_rise(best)) - 1
    noise = " (within the spread of the timings)" if best.speedups.is_noise else ""
    return Finding(
        Level.ADVICE,
        "stop",
        f"Recommended stopping point: {best.name}",
        f"Ratio {percent(best.plan.ratio)}: {100 * gain:+.1f} % speed of generation{noise} for {100 * loss:+.1f} % "
        "held-out perplexity, "
        + (
            "the best trade among the targets: the knee of held-out loss against speed-up, before any warning sign."
            if len(study.targets) > 1
            else "and no jump in perplexity. With one target there is no curve yet; add targets to compare."
        ),
    )


def _noise(study: Study) -> Finding:
    items, scores = study.dense.task_items, study.dense.tasks
    counts = sorted(set(items.values()))
    each = f"{counts[0]:,}" if len(counts) == 1 else f"{counts[0]:,} to {counts[-1]:,}"
    error = mean(s.stderr for s in scores.values())
    size = f"about {100 * error:.0f} points" if math.isfinite(error) else "unknown"
    average = f", and the average's {100 * study.dense.average.stderr:.1f}" if math.isfinite(error) else ""
    models = within_chance(study)
    at_chance = {task: [name for name, tasks in models.items() if task in tasks] for task in scores}
    near = ", ".join(
        f"{task} ({'every model' if len(names) == len(models) else ', '.join(names)})"
        for task, names in at_chance.items()
        if names
    )
    return Finding(
        Level.NOTE,
        "noise",
        "How much to trust the scores",
        f"With {each} items a task, a score's standard error is {size}{average}. Models are compared item by item; "
        "only differences beyond 2 standard errors are marked. "
        + f"Not distinguishable from guessing: {near or 'none'}.",
    )
