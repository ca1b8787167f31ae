"""LaCo (layer collapse, arXiv 2402.11187): which layers are merged into which.

Decides the walk over a model's layers, and the thresholds that meet a budget of layers:

    l = H - C
    while l >= L:
        candidate: layers l+1 .. l+m merged into l, m = min(C - 1, depth - 1 - l), depth being that
            of the moment
        accepted if its similarity to the dense model > T, then l -= I; else l -= 1

Layers count from 0 (the paper counts from 1). The public notebook also sets l = depth - 1 - C where
l >= depth after a merge; that never happens, since l + m <= depth - 1 before it. Here a similarity
is a function that is asked: what a merge does to weights, and how similar a merged model is, are
decided in `merging`. No torch.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import chain

from blockpruner.core.errors import InputError, UnreachableError


@dataclass(frozen=True)
class Merge:
    """Layers layer+1 .. layer+count are merged into `layer` and dropped; numbers in the depth of
    that moment."""

    layer: int
    count: int

    def __str__(self) -> str:
        return f"{self.layer}+{self.count}"


Merges = tuple[Merge, ...]
"""Merges in the order in which they are done."""

Measure = Callable[[Merges], float]
"""Similarity of the model after these merges to the dense model: a mean of cosines, finite."""


def layers_after(merges: Sequence[Merge], depth: int) -> tuple[tuple[int, ...], ...]:
    """The layers that remain, each as the dense layers merged in it, in order; the first is the
    layer itself. Raises InputError for a merge beyond the layers that there are at that moment."""
    layers: list[tuple[int, ...]] = [(layer,) for layer in range(depth)]
    for number, merge in enumerate(merges, 1):
        if merge.layer < 0 or merge.count < 1 or merge.layer + merge.count >= len(layers):
            raise InputError(
                f"merge {number} ({merge}: {merge.count} layers into layer {merge.layer}) is not"
                f" possible among {len(layers)} layers; valid: layer 0 to {len(layers) - 2}, and 1"
                " or more of the layers above it"
            )
        group = slice(merge.layer, merge.layer + merge.count + 1)
        layers[group] = [tuple(chain.from_iterable(layers[group]))]
    return tuple(layers)


def dropped(merges: Sequence[Merge], depth: int) -> int:
    """How many of `depth` layers the merges remove."""
    return depth - len(layers_after(merges, depth))


@dataclass(frozen=True)
class Step:
    """A candidate of a walk: the merges accepted before and one more, its similarity, and whether
    it was accepted."""

    merges: Merges
    similarity: float
    accepted: bool


@dataclass(frozen=True)
class Walk:
    """LaCo's walk down a model of `depth` layers, without its threshold. Raises InputError for
    settings by which no layer would be visited, or one that does not exist.

    count: C, how many layers become one; lowest: L; highest: H, None is the last layer; interval:
        I.
    """

    depth: int
    count: int
    lowest: int
    highest: int | None
    interval: int

    def __post_init__(self) -> None:
        top = self._top
        if not 0 <= top < self.depth:
            raise InputError(
                f"highest layer H = {top} is not in a model of {self.depth} layers; valid: 0 to"
                f" {self.depth - 1} (the paper counts layers from 1), or null for the last"
            )
        if not 0 <= self.lowest <= top:
            raise InputError(f"lowest layer L = {self.lowest} is not valid; choose 0 to H = {top}")
        if not 2 <= self.count <= top - self.lowest:
            raise InputError(
                f"count C = {self.count} is not valid; choose 2 to H - L = {top - self.lowest},"
                " since C layers become one and the walk starts at layer H - C"
            )
        if self.interval < 1:
            raise InputError(f"interval I = {self.interval} is not valid; choose 1 or more layers")

    @property
    def _top(self) -> int:
        return self.depth - 1 if self.highest is None else self.highest

    def steps(self, similarity: Measure, threshold: float) -> Iterator[Step]:
        """The candidates that the walk tries, in order."""
        merges: Merges = ()
        layer, depth = self._top - self.count, self.depth
        while layer >= self.lowest:
            merge = self._merge(layer, depth)
            value = similarity((*merges, merge))
            step = Step((*merges, merge), value, value > threshold)
            yield step
            if step.accepted:
                merges, layer, depth = step.merges, layer - self.interval, depth - merge.count
            else:
                layer -= 1

    def results(self, similarity: Measure) -> Iterator[tuple[float, Merges]]:
        """Everything but no merge at all that a threshold can result in, from the largest threshold
        to the smallest.

        A walk goes the same way for every T in [largest similarity rejected, smallest accepted), so
        the next one is that of a T just below this interval. With each comes the middle of its
        interval, where rounding elsewhere does not turn a decision. No candidate is measured twice.
        """
        measure, threshold = cache(similarity), math.inf
        while True:
            steps = list(self.steps(measure, threshold))
            accepted = [step for step in steps if step.accepted]
            rejected = [step.similarity for step in steps if not step.accepted]
            low = max(rejected, default=-1.0)
            if accepted:
                high = min(step.similarity for step in accepted)
                yield min((low + high) / 2, math.nextafter(high, -math.inf)), accepted[-1].merges
            if not rejected:
                return
            threshold = math.nextafter(low, -math.inf)

    def removable(self) -> frozenset[int]:
        """The numbers of layers that walks could remove, whatever the similarities."""

        @cache
        def onwards(layer: int, depth: int) -> frozenset[int]:
            if layer < self.lowest:
                return frozenset({0})
            count = self._merge(layer, depth).count
            counts_after_merge = onwards(layer - self.interval, depth - count)
            # Either the layers are not similar enough, or they are merged.
            return onwards(layer - 1, depth) | {count + rest for rest in counts_after_merge}

        return onwards(self._top - self.count, self.depth)

    def require(self, layers: int) -> None:
        """Raise UnreachableError unless some walk, by whatever similarities, removes this number of
        layers."""
        removable = self.removable()
        if layers not in removable or layers < 1:
            raise _out_of_reach(layers, self, dict.fromkeys(removable, ""))

    def _merge(self, layer: int, depth: int) -> Merge:
        # without the limit the walk would leave the model after its first merge
        return Merge(layer, min(self.count - 1, depth - 1 - layer))


def search_threshold(similarity: Measure, walk: Walk, wanted_layers: int) -> tuple[float, Merges]:
    """The largest threshold at which LaCo removes exactly `wanted_layers` layers, and its merges.

    A lower threshold may remove fewer layers: one more merge near the top can make all later ones
    too dissimilar. So bisection may miss a budget that can be met, or meet it with less similar
    merges. This goes down from the largest threshold, one result after the other (`Walk.results`),
    and stops at the first that meets the budget. There are about as many results as layers that a
    walk visits (simulated), and no candidate is measured twice. What is returned is the middle of
    the thresholds that give these merges. Raises UnreachableError for a number of layers that no
    threshold removes, before anything is measured where similarities cannot matter.
    """
    walk.require(wanted_layers)
    remarks: dict[int, str] = {}
    for threshold, merges in walk.results(similarity):
        layers = dropped(merges, walk.depth)
        if layers == wanted_layers:
            return threshold, merges
        remarks.setdefault(layers, f" (at T = {threshold:.4f})")
    raise _out_of_reach(wanted_layers, walk, remarks)


def _out_of_reach(count: int, walk: Walk, removed: Mapping[int, str]) -> UnreachableError:
    """`removed`: the numbers of layers that can be removed, each with what else to say of it."""
    below = max((n for n in removed if 0 < n < count), default=None)
    above = min((n for n in removed if n > max(count, 0)), default=None)
    nearest = " and ".join(f"{n}{removed[n]}" for n in (below, above) if n is not None)
    return UnreachableError(
        f"LaCo with C = {walk.count} and I = {walk.interval} removes {count} of {walk.depth}"
        f" layers at no threshold; the nearest that it removes: {nearest}. Ask for one of these, or"
        " change C, I, L or H"
    )
