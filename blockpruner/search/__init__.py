"""Every method that ends in a mask: SEARCHES, one row each. Those that change weights are in `transforms`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from blockpruner.core.errors import InputError
from blockpruner.core.options import fill_options, require_one_of
from blockpruner.methods.transforms import TRANSFORMS
from blockpruner.scoring.accelerate import settings_of
from blockpruner.scoring.metrics import METRICS, metric_of
from blockpruner.search.beam import beam
from blockpruner.search.evolution import evolution
from blockpruner.search.given import given
from blockpruner.search.greedy import PRICES, greedy
from blockpruner.search.iteration import Iteration
from blockpruner.search.one_shot import one_shot
from blockpruner.search.random_order import random_order
from blockpruner.search.swap import swap


@dataclass(frozen=True)
class Method:
    """A search and how it may be run.

    search: called with a problem and the options as keywords; options: their defaults, a type where one must be given;
    nested: the first removals of one trace meet every smaller budget; otherwise each budget has a trace of its own,
    whose last choice is the answer; scores: it asks for scores of masks ("masks"), also of units ("units"), or for
    none (""); accelerated: it takes steps in which only the best candidate matters.
    """

    search: Callable[..., Iterator[Iteration]]
    nested: bool = True
    options: Mapping[str, Any] = field(default_factory=dict)
    scores: str = "masks"
    accelerated: bool = False


UNUSED = {"unit": "block", "candidates": "all", "metric": "perplexity", "acceleration": "none"}
"""Keys of a `score` section that mean nothing to a transformation, and their defaults."""


def method_of(name: str) -> Method:
    """The row of a method; raises InputError that names the valid ones."""
    if name not in SEARCHES:
        raise InputError(f"score.method {name!r} is unknown; valid: {', '.join(sorted({*SEARCHES, *TRANSFORMS}))}")
    return SEARCHES[name]


def search_settings(score: Mapping[str, Any]) -> dict[str, Any]:
    """A `score` section with every default filled in: all that a search depends on beside its trials.

    Raises:
        InputError: an unknown method, metric or option, or two settings that do not fit together.
    """
    name, metric, given = score["method"], metric_of(score["metric"]), score.get("options") or {}
    if name in TRANSFORMS:
        idle = next((key for key, value in UNUSED.items() if score.get(key, value) != value), None)
        if idle is not None:
            raise InputError(f"score.{idle}: {score[idle]} does nothing with method: {name}, which removes no block; "
                             "remove it")  # fmt: skip
        return {"method": name, "metric": metric.name, "options": fill_options(name, TRANSFORMS[name], given)}
    method = method_of(name)
    if not method.scores and metric.name != "perplexity":
        raise InputError(
            f"score.metric {metric.name} does nothing with method: {name}, which asks for no score; remove it"
        )
    if metric.influence and method.scores != "units":
        able = ", ".join(sorted(other for other, row in SEARCHES.items() if row.scores == "units"))
        losses = ", ".join(row.name for row in METRICS.values() if not row.influence)
        raise InputError(
            f"score.metric {metric.name} is of single units, and method: {name} compares whole masks; choose a metric "
            f"of masks ({losses}), or one of the methods {able}"
        )
    options = fill_options(name, method.options, given)
    greedy_steps = method.accelerated and options.get("start") != "random"
    if score["acceleration"] != "none" and (metric.influence or not greedy_steps):
        raise InputError(
            f"score.acceleration {score['acceleration']} does not fit method: {name} with metric: {metric.name}: there "
            f"is nothing to leave out; set acceleration: none"
        )
    require_one_of("per", options.get("per", "none"), PRICES)
    if options.get("per", "none") != "none" and (metric.influence or score["acceleration"] != "none"):
        raise InputError(
            f"score.options.per {options['per']} prices the rise of a loss of every candidate; set metric to one of "
            f"{', '.join(row.name for row in METRICS.values() if not row.influence)}, and acceleration: none"
        )
    return {**score, **settings_of(score), "options": options}


SEARCHES: dict[str, Method] = {
    "greedy": Method(greedy, options={"per": "none"}, scores="units", accelerated=True),
    "one_shot": Method(one_shot, scores="units"),
    "beam": Method(beam, nested=False, options={"width": 3}),
    "evolution": Method(
        evolution,
        nested=False,
        options={
            "generations": 50,
            "offspring": 32,
            "survivors": (8, 2),
            "patience": 20,
            "start": "random",
            "seed": 42,
        },
        accelerated=True,
    ),
    "swap": Method(swap, nested=False, options={"start": "greedy", "tries": 64, "seed": 42}, accelerated=True),
    "random": Method(random_order, options={"seed": 42}, scores=""),
    "given": Method(given, options={"order": tuple}, scores=""),
}
