"""How a plan was made and what it takes out of a model, in words."""

from __future__ import annotations

from collections.abc import Mapping

from blockpruner.core.blocks import BlockKind
from blockpruner.core.plan import Plan
from blockpruner.scoring.metrics import metric_of

SEARCH_WORDS: Mapping[str, str] = {
    "greedy": "greedy",
    "one_shot": "one-shot",
    "beam": "beam search",
    "evolution": "evolutionary search",
    "swap": "swap search",
    "random": "random order",
    "given": "given order",
}

UNSCORED = ("random", "given")
"""Searches that no number decides, so that neither metric nor calibration text has a part in what they remove."""

METRIC_WORDS: Mapping[str, str] = {
    "perplexity": "perplexity",
    "answer_likelihood": "likelihood of the right answers",
    "kl": "KL divergence",
    "js": "JS divergence",
    "block_influence": "Block Influence",
    "relative_magnitude": "relative magnitude",
    "relative_magnitude_frobenius": "relative magnitude (Frobenius)",
}


PRICE_WORDS: Mapping[str, str] = {
    "parameters": " per parameter saved",
    "kv": " per KV cache saved",
    "latency": " per time saved",
}


def method_words(plan: Plan, unit: str) -> str:
    """For instance "one-shot, whole layers, by Block Influence". `unit`: what was removed at once, in words."""
    if plan.kind == "laco":
        return f"LaCo ({plan.details['variant']}), layers merged, by cosine similarity"
    if plan.kind == "slicegpt":
        return "SliceGPT, hidden width sliced"
    words = f"{SEARCH_WORDS[plan.method]}, {unit}"
    price = PRICE_WORDS.get(plan.options.get("per", "none"), "")
    return words if plan.method in UNSCORED else f"{words}, by {METRIC_WORDS[plan.metric]}{price}"


def taken_out(plan: Plan) -> str:
    """For instance "3 MHA + 4 MLP"."""
    if plan.kind == "slicegpt":
        return f"width {plan.details['hidden']:,} → {plan.details['width']:,}"
    if plan.kind == "laco":
        return f"{plan.blocks[BlockKind.MHA]} layers by merging"
    return " + ".join(f"{plan.blocks[kind]} {kind.upper()}" for kind in BlockKind)


def cost_words(plan: Plan) -> tuple[str, str]:
    """What the search compared candidates by, and its unit: for instance ("NLL rise", "nats per token")."""
    metric = metric_of(plan.metric)
    if metric.influence:
        return METRIC_WORDS[metric.name], metric.unit
    name = {"kl": "KL divergence rise", "js": "JS divergence rise"}.get(metric.loss, "NLL rise")
    return name, metric.unit
