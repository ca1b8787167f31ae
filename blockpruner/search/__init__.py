"""Every method that ends in a mask: SEARCHES, one function each."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from blockpruner.blocks import Mask
from blockpruner.errors import InputError
from blockpruner.scoring.accelerate import Select
from blockpruner.search.greedy import greedy
from blockpruner.search.iteration import Iteration

Search = Callable[[Select, Sequence[Mask]], Iterator[Iteration]]


def search_of(method: str) -> Search:
    if method not in SEARCHES:
        raise InputError(f"score.method {method!r} is unknown; valid: {', '.join(sorted(SEARCHES))}")
    return SEARCHES[method]


SEARCHES: dict[str, Search] = {"greedy": greedy}
