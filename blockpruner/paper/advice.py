"""Where to stop, and what speaks against a budget: the rules of `reporting.findings` for the searches of a study."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache
from itertools import pairwise, takewhile

from blockpruner.paper.evidence import Entry, Evidence
from blockpruner.paper.experiments import BLOCKPRUNER
from blockpruner.reporting.findings import Finding, Level, brings_little, jump_of, knee, parts
from blockpruner.reporting.formats import listed, number, percent, times
from blockpruner.reporting.methods import UNSCORED

JUMP, MISMATCH, SLOW = "jump", "held-out parts", "little speed-up"


@dataclass(frozen=True, eq=False)
class Advice:
    """best: the budget of BlockPruner to stop at, below the first with a warning; None: there is none."""

    best: Entry | None
    findings: tuple[Finding, ...]


def jump_at(evidence: Evidence, variant: str) -> int | None:
    """Index of the first removal of a search that breaks its curve of calibration perplexity."""
    losses = [math.log(value) for value in evidence.searches[variant].perplexities]
    return jump_of([after - before for before, after in pairwise(losses)])


def rises(evidence: Evidence, entry: Entry) -> tuple[float, float | None]:
    """NLL rise on held-out text and, where known, on the calibration rows, nats per token."""
    known = entry.plan.calibration
    own = known["perplexity"]
    calibration = None if own is None else math.log(own / known["dense_perplexity"])
    return math.log(entry.model.perplexity / evidence.dense.perplexity), calibration


def warnings_of(evidence: Evidence, entry: Entry) -> tuple[str, ...]:
    """Short names of the signs of failed pruning that a budget shows."""
    found = []
    jump = jump_at(evidence, entry.variant.name)
    if jump is not None and len(entry.plan.order) > jump:
        found.append(JUMP)
    heldout, calibration = rises(evidence, entry)
    if calibration is not None and entry.plan.method not in UNSCORED and parts(heldout, calibration):
        found.append(MISMATCH)
    if "timed" in entry.model.races and brings_little(entry.ratio, _speedup(entry)):
        found.append(SLOW)
    return tuple(found)


def _speedup(entry: Entry) -> float:
    return entry.model.races["timed"].speedups["generation"].value


@cache
def advice(evidence: Evidence) -> Advice:
    """The stopping point of BlockPruner and the warnings of every method timed at all budgets."""
    timed = evidence.timed("timed")
    findings = [_jump(evidence, method) for method in dict.fromkeys(entry.method for entry in timed)]
    findings += [_signs(evidence, timed)]
    ours = sorted((entry for entry in timed if entry.method == BLOCKPRUNER), key=lambda entry: entry.ratio)
    before = takewhile(lambda entry: not {JUMP, MISMATCH} & set(warnings_of(evidence, entry)), ours)
    safe = [entry for entry in before if _speedup(entry) > 1]
    if not safe:
        text = (
            "No budget of BlockPruner is faster than the dense model and smaller than the first that shows a jump or "
            "a mismatch."
        )
        if ours:
            signs = listed(list(warnings_of(evidence, ours[0]))) or "no sign of failed pruning, and no speed-up"
            text += (
                f" Already at {percent(ours[0].ratio)} held-out perplexity goes from "
                f"{number(evidence.dense.perplexity)} to {number(ours[0].model.perplexity)} ({signs})."
            )
        stop = Finding(Level.ADVICE, "stop", "No budget is worth stopping at", text)
        return Advice(None, (stop, *(f for f in findings if f is not None)))
    best = safe[knee([(_speedup(entry), rises(evidence, entry)[0]) for entry in safe])]
    gain = best.model.races["timed"].speedups["generation"]
    noise = ", within noise (the interval holds 1)" if gain.interval.low <= 1 <= gain.interval.high else ""
    stop = Finding(
        Level.ADVICE,
        "stop",
        f"Recommended stopping point: BlockPruner at {percent(best.ratio)} ({best.plan.blocks['mha']} MHA + "
        f"{best.plan.blocks['mlp']} MLP)",
        f"Generation {times(gain.value)} as fast (95 % interval {gain.interval.low:.2f} to "
        f"{gain.interval.high:.2f}{noise}), held-out perplexity {number(evidence.dense.perplexity)} → "
        f"{number(best.model.perplexity)}, average {percent(evidence.dense.average)} → {percent(best.model.average)}: "
        f"the knee of held-out loss against speed-up among the {len(safe)} budgets below the first warning.",
    )
    return Advice(best, (stop, *(f for f in findings if f is not None)))


def _jump(evidence: Evidence, method: str) -> Finding | None:
    index = jump_at(evidence, method)
    if index is None:
        return None
    search, entries = evidence.searches[method], evidence.of(method)
    ratios = entries[-1].plan.ratios
    before, after = search.perplexities[index : index + 2]
    past = [percent(entry.ratio) for entry in entries if len(entry.plan.order) > index]
    if index == 0:
        safe = "It is the first removal, so no budget of this sequence is safe."
    elif index <= len(ratios):
        safe = f"The last safe budget is {index} removals ({percent(ratios[index - 1], 2)} of the parameters)."
    else:
        safe = f"The last safe budget is {index} removals, beyond all budgets measured."
    return Finding(
        Level.WARNING if past else Level.NOTE,
        "jump",
        f"{method}: removing {search.order[index]} (removal {index + 1}) breaks the curve",
        f"Calibration perplexity goes from {number(before)} to {number(after)} at this one removal. {safe} "
        f"Budgets beyond it: {listed(past)}.",
    )


def _signs(evidence: Evidence, timed: tuple[Entry, ...]) -> Finding | None:
    texts = []
    for sign, meaning in (
        (MISMATCH, "Held-out perplexity rises well beyond calibration perplexity (calibrate on more or nearer text)"),
        (SLOW, "A high ratio brings little speed-up"),
    ):
        names = [f"{e.method} at {percent(e.ratio)}" for e in timed if sign in warnings_of(evidence, e)]
        if names:
            texts.append(f"{meaning}: {listed(names)}.")
    if not texts:
        return None
    return Finding(Level.WARNING, "signs", "Other signs of failed pruning", " ".join(texts))
