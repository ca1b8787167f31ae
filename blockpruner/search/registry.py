"""Every search that ends in a mask: SEARCHES, one row each; and what one is asked to do."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

from blockpruner.core.errors import InputError
from blockpruner.core.options import Options, read_options
from blockpruner.core.registry import Registry
from blockpruner.scoring.metrics import METRICS, NLL, Metric
from blockpruner.scoring.settings import Score
from blockpruner.search.beam import BeamOptions, beam
from blockpruner.search.floating import FloatingOptions, floating
from blockpruner.search.genetic import GeneticOptions, genetic
from blockpruner.search.given import GivenOptions, RandomOptions, given, random_order
from blockpruner.search.greedy import GreedyOptions, greedy
from blockpruner.search.iteration import Iteration
from blockpruner.search.one_shot import one_shot
from blockpruner.search.problem import Problem


@dataclass(frozen=True)
class Search:
    """A search, and how it may be run."""

    name: str
    """As in `score.method` of a run file."""
    title: str
    """As in reports, for instance "beam search"."""
    run: Callable[[Problem, Any], Iterator[Iteration]]
    """Called with a problem and the search's own options."""
    options: type[Options] = Options
    nested: bool = True
    """The first removals of one trace meet every smaller budget. Otherwise each budget has a trace
    of its own, whose last choice is the answer."""
    asks: Literal["units", "masks", "nothing"] = "masks"
    """What it asks scores of. One that asks for single units, or runs of them, can use an influence
    as its metric."""
    accelerated: bool = False
    """It takes steps in which only the best candidate matters."""


@dataclass(frozen=True)
class Request:
    """A checked `score` section: everything that a search depends on, apart from its trials."""

    search: Search
    options: Options
    metric: Metric
    score: Score

    @property
    def losses(self) -> tuple[str, ...]:
        """What is stored, each in a trial store of its own. Every choice is also reported in
        perplexity."""
        return tuple(sorted({self.metric.name, NLL.name}))

    @property
    def fields(self) -> dict[str, Any]:
        """The section as JSON with every default filled in. Its fingerprint is part of the
        search's."""
        return {
            "method": self.search.name,
            "unit": self.score.unit,
            "candidates": self.score.candidates,
            "metric": self.metric.name,
            "acceleration": self.score.acceleration or "none",
            "options": self.options.model_dump(),
        }


def request(score: Score) -> Request:
    """Check a `score` section; raises InputError for an unknown search, metric or option, or
    settings that do not fit together."""
    search = SEARCHES[score.method]
    metric = METRICS[score.metric]
    # A setting without effect would pass for one that was compared.
    if search.asks == "nothing" and metric.name != NLL.name:
        raise InputError(
            f"score.metric {metric.name} does nothing with method: {search.name}, which asks for no"
            " score; remove it"
        )
    losses = ", ".join(row.name for row in METRICS.values() if not row.influence)
    # An influence is a number of a unit, not of a mask.
    if metric.influence and search.asks != "units":
        able = ", ".join(sorted(row.name for row in SEARCHES.values() if row.asks == "units"))
        raise InputError(
            f"score.metric {metric.name} is of single units, and method: {search.name} compares"
            f" whole masks; choose a metric of masks ({losses}), or one of the methods {able}"
        )
    options = read_options(search.name, search.options, score.options)
    # One pass computes the influence of every unit: there is nothing to leave out.
    if score.acceleration not in (None, "none") and (metric.influence or not search.accelerated):
        raise InputError(
            f"score.acceleration {score.acceleration} does not fit method: {search.name} with"
            f" metric: {metric.name}: there is nothing to leave out; set acceleration: none"
        )
    if options.price != "none" and metric.influence:
        raise InputError(
            f"score.options.per {options.price} prices the rise of a loss; set metric to one"
            f" of {losses}"
        )
    return Request(search, options, metric, score)


SEARCHES = Registry(
    "score.method",
    Search,
    [
        Search("greedy", "greedy", greedy, GreedyOptions, asks="units", accelerated=True),
        Search("one_shot", "one-shot", one_shot, asks="units"),
        Search(
            "floating", "floating search", floating, FloatingOptions, nested=False, accelerated=True
        ),
        Search("beam", "beam search", beam, BeamOptions, nested=False),
        Search("genetic", "evolutionary search", genetic, GeneticOptions, nested=False),
        Search("random", "random order", random_order, RandomOptions, asks="nothing"),
        Search("given", "given order", given, GivenOptions, asks="nothing"),
    ],
)
