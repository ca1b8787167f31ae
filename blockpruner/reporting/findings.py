"""What the numbers mean: signs of failed pruning, and the verdict.

Decides the rules and their thresholds, each a named constant with its reason. They hold for healed
and unhealed models alike, for the targets of a run and for the budgets of the paper's methods.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from itertools import pairwise
from statistics import median

from blockpruner.core.blocks import parse_mask
from blockpruner.evaluation.kinds import uneven
from blockpruner.reporting.formats import listed, number, percent, times
from blockpruner.reporting.inputs import PrunedOption
from blockpruner.reporting.results import Model
from blockpruner.reporting.statistics import Mean, average, differences
from blockpruner.reporting.table import points

JUMP_FACTOR = 3.0
"""A removal is a jump if it costs this many times the median of the removals before it. Greedy
costs grow steadily, each seldom above twice the last median, so three times is a break in the curve
and not its slope."""

JUMP_NATS = 0.1
"""... and costs at least this much (perplexity times 1.11). Below it, three times next to nothing
is still nothing. Quality that is lost by less, with no score that is lower beyond noise, is little:
such a model is to be taken."""

COLLAPSE_NATS = math.log(1.5)
"""A removal that multiplies perplexity by 1.5 is a jump whatever came before it. The first two
removals can be such a jump as well, although no median precedes them. A model whose held-out
perplexity is 1.5 times the dense one's is broken alike."""

TASK_LOSS = 0.1
"""A model is broken, too, if accuracy or p of the right answer falls by more than a tenth of the
dense model's, and beyond noise. Noise alone would be the wrong bound: with enough items every loss
exceeds it."""

MISMATCH_FACTOR = 1.5
"""The search spared what its texts need and cut what others need, if perplexity rises (in nats) one
and a half times as much on held-out text, and by JUMP_NATS more than that: so much do two samples
of a few thousand tokens differ."""

UNLIKE = "One kind of text lost more than the others"


class Level(StrEnum):
    RESULT = "result"
    NOTE = "note"
    WARNING = "warning"
    ADVICE = "advice"


@dataclass(frozen=True)
class Finding:
    """A sentence for people, in plain text without markup."""

    level: Level
    rule: str
    """Its short name, stable for tests and machines."""
    title: str
    text: str


def warnings(options: Sequence[PrunedOption], traces: Sequence[PrunedOption]) -> list[Finding]:
    """Find the signs of failed pruning; `traces` are the models that are pruned the most, one a
    removal sequence."""
    jumps = [_jump(trace, options) for trace in traces]
    findings = [jump for jump in jumps if jump is not None]
    for has_sign, describe in (
        (is_broken, _broken),
        (is_mismatch, _mismatch),
        (_uneven_kind, _uneven),
        (is_slow, _slow),
    ):
        affected = [option for option in options if has_sign(option)]
        if affected:
            findings.append(describe(affected))
    return findings


def jump_at(option: PrunedOption) -> int | None:
    """Find the first removal that breaks the curve (JUMP_FACTOR, JUMP_NATS, COLLAPSE_NATS), by
    index, or None."""
    losses = [math.log(perplexity) for perplexity in option.curve]
    rises = [y - x for x, y in pairwise(losses)]
    for index, rise in enumerate(rises):
        # A collapse is a jump whatever came before it.
        if rise >= COLLAPSE_NATS:
            return index
        # A median of fewer than two removals is no slope.
        if index >= 2 and rise >= max(JUMP_NATS, JUMP_FACTOR * median(rises[:index])):
            return index
    return None


def has_lost(option: PrunedOption, nats: float, share: float) -> bool:
    """Check held-out text and tasks: perplexity against `nats`, accuracy and p of the right answer
    against a `share` of the dense model's. Both are measured of the model itself, whether it was
    healed or not."""
    dense, model = option.dense, option.model
    if option.heldout_rise >= nats or _has_fallen(dense.average, paired(dense, model), share):
        return True
    if dense.confidence is None or model.confidence is None:
        return False
    return _has_fallen(dense.confidence, paired_confidence(dense, model), share)


def _has_fallen(dense: Mean, change: Mean, share: float) -> bool:
    return change.differs and change.value < -share * dense.value


def is_broken(option: PrunedOption) -> bool:
    return has_lost(option, COLLAPSE_NATS, TASK_LOSS)


def is_mismatch(option: PrunedOption) -> bool:
    """Check whether held-out text suffers far more than the texts by which the model was made
    (MISMATCH_FACTOR)."""
    rise = option.own_rise
    return rise is not None and option.heldout_rise > MISMATCH_FACTOR * max(rise, 0.0) + JUMP_NATS


def _uneven_kind(option: PrunedOption) -> str:
    """A sentence on the kind of text that lost too much; "" where none has."""
    losses = {kind: effect.value for kind, (_, effect) in option.by_kind.items()}
    return uneven(losses)


def is_slow(option: PrunedOption) -> bool:
    return option.timed is not None and option.race.speedups["generation"].interval.low <= 1


def recommended(options: Sequence[PrunedOption]) -> PrunedOption | None:
    """Find the fastest model that is faster than dense beyond noise and not broken, or None: keep
    the dense model."""
    faster = [option for option in options if option.timed and not is_slow(option)]
    safe = [option for option in faster if not is_broken(option)]
    return max(safe, key=lambda option: option.speedup, default=None)


def paired_confidence(base: Model, other: Model) -> Mean:
    """Subtract averages of p of the right answer, other minus base, with the error of paired
    items."""
    return average(differences(base.p_gold, other.p_gold))


def paired(base: Model, other: Model, task: str | None = None) -> Mean:
    """Subtract accuracies, other minus base, with the error of paired items; without a task, the
    averages."""
    tasks = base.scores if task is None else (task,)
    base_scores = {name: base.scores[name] for name in tasks}
    other_scores = {name: other.scores[name] for name in tasks}
    return average(differences(base_scores, other_scores))


def _names(options: Sequence[PrunedOption]) -> str:
    return listed([option.name for option in options])


def _jump(trace: PrunedOption, options: Sequence[PrunedOption]) -> Finding | None:
    index = jump_at(trace)
    if index is None:
        return None
    order, ratios = trace.plan.order[: index + 1], trace.plan.ratios
    # All models whose removals begin with those up to the jump.
    beyond = [option for option in options if option.plan.order[: index + 1] == order]
    # What healed all of them is no warning any more.
    is_healed = bool(beyond) and all(option.healing for option in beyond)
    safe = "It is the first removal."
    if index:
        blocks = sum(len(parse_mask(unit)) for unit in order[:-1])
        share = ""
        if index <= len(ratios):
            share = f" ({percent(ratios[index - 1], 2)} of the parameters)"
        safe = f"The last budget before it is {blocks} blocks{share}."
    return Finding(
        Level.NOTE if is_healed else Level.WARNING,
        "jump",
        f"{trace.method}: removal {index + 1} ({order[-1]}) breaks the model before healing",
        f"Calibration perplexity jumps from {number(trace.curve[index])} to"
        f" {number(trace.curve[index + 1])}. {safe} Models beyond it: {_names(beyond)}.",
    )


def _losses(option: PrunedOption) -> str:
    return (
        f"{option.name} has {times(math.exp(option.heldout_rise))} the dense model's held-out"
        " perplexity, and its average accuracy differs by"
        f" {points(paired(option.dense, option.model))} points"
    )


def _broken(options: Sequence[PrunedOption]) -> Finding:
    losses = ". ".join(_losses(option) for option in options)
    text = f"{losses}. Prune less, or heal more."
    return Finding(Level.WARNING, "broken", f"Broken: {_names(options)}", text)


def _mismatch(options: Sequence[PrunedOption]) -> Finding:
    rises = []
    for option in options:
        heldout, calibration = math.exp(option.heldout_rise), math.exp(option.own_rise or 0)
        rises.append(f"{times(heldout)} against {times(calibration)} at {option.name}")
    text = (
        "Perplexity over the dense model's, on held-out text against its own texts: "
        f"{listed(rises)}. Calibrate on more text, or on text nearer to its use."
    )
    title = "Held-out text suffers more than the model's own texts"
    return Finding(Level.WARNING, "mismatch", title, text)


def _uneven(options: Sequence[PrunedOption]) -> Finding:
    sentences = [f"{option.name}: {_uneven_kind(option)}" for option in options]
    return Finding(Level.WARNING, "uneven", UNLIKE, " ".join(sentences))


def _slow(options: Sequence[PrunedOption]) -> Finding:
    sentences = []
    for option in options:
        text = f"{option.name}: {times(option.speedup)} with {option.taken_out} removed"
        if option.plan.blocks["mlp"] > option.plan.blocks["mha"]:
            text += ", more MLP than MHA, and only MHA shrinks the KV cache"
        sentences.append(f"{text}.")
    title = f"Not faster than dense beyond noise: {_names(options)}"
    return Finding(Level.WARNING, "slow", title, " ".join(sentences))


def stop(options: Sequence[PrunedOption]) -> Finding:
    """Write the verdict on pruned models, which come the least pruned first."""
    if not any(option.timed for option in options):
        title = "No verdict without times"
        return Finding(Level.NOTE, "stop", title, "A verdict weighs loss against speed.")
    best = recommended(options)
    if best is not None:
        faster = 100 * (best.speedup - 1)
        lost = 100 * (math.exp(best.heldout_rise) - 1)
        text = (
            f"{percent(best.ratio)} of the parameters removed ({best.taken_out}): {faster:+.1f} %"
            f" speed of generation for {lost:+.1f} % held-out perplexity. It is the fastest model"
            " that is faster than dense beyond noise and not broken."
        )
        advice = "Fastest that holds up:" if has_lost(best, JUMP_NATS, 0) else "Take"
        return Finding(Level.ADVICE, "stop", f"{advice} {best.name}", text)
    text = "No pruned model is both faster than dense beyond noise and not broken."
    if options:
        mildest = options[0]
        text += f" {_losses(mildest)}"
        if mildest.timed:
            text += f", at {times(mildest.speedup)} the speed of generation"
        text += "."
    return Finding(Level.ADVICE, "stop", "Keep the dense model", text)
