"""Budgets: how far to prune, and which prefix of a removal sequence meets one.

A budget is a share of one resource of the dense model: of its parameters ("0.22", or "7layers", the
parameters of that many layers), of its KV cache ("0.30kv"), or of the time in which it generates
("1.25x", a speed-up); or it is a number of blocks ("17blocks"). A share is met by the prefix whose
share is nearest, a tie going to the larger, as the rows of arXiv 2406.10594 are.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from blockpruner.core.blocks import BlockId, Mask
from blockpruner.core.errors import InputError, UnreachableError
from blockpruner.core.families import Config, Costs, count_kv_cache, count_parameters

WRITTEN = re.compile(r"(?=.{,32}$)(?P<number>\d*\.?\d+)(?P<unit>blocks|layers|kv|x|)", re.ASCII)

LEFT = re.compile(r"(?P<number>\d*\.?\d+)(?P<unit>[MB])", re.ASCII)


def share_for(text: str, config: Config) -> str:
    """A budget as it is, or in place of the size that is left ("7B", "120M" parameters) the share
    that goes; raises InputError for a size that the model does not exceed."""
    match, total = LEFT.fullmatch(text), count_parameters(config).total
    if match is None:
        read_budget(text)
        return text
    share = 1 - float(match["number"]) * {"M": 1e6, "B": 1e9}[match["unit"]] / total
    if not 0 < round(share, 4) < 1:
        limit = f"less than the model's {total / 1e6:,.1f}M parameters, and more than nothing"
        raise InputError(f"budget {text!r} is what is left; give {limit}")
    return f"{share:.4f}"


def read_budget(text: str) -> tuple[float, str]:
    """Number and unit ("" is a share of all parameters); raises InputError that names the valid
    forms."""
    match = WRITTEN.fullmatch(text)
    if match:
        number, unit = float(match["number"]), match["unit"]
        if unit in ("blocks", "layers"):
            valid = number >= 1 and match["number"].isdigit()
        else:
            share = 1 - 1 / number if unit == "x" and number > 1 else number
            valid = 0 < share < 1 and (unit != "x" or number > 1)
        if valid and math.isfinite(number):
            return number, unit
    raise InputError(
        f'budget {text!r} is not valid; give a share of all parameters between 0 and 1 ("0.22"), a'
        ' number of blocks ("17blocks") or of whole layers ("7layers"), a share of the KV cache'
        ' ("0.30kv"), a speed-up of generation above 1 ("1.25x"), or in a command what is left'
        ' ("7B", "120M" parameters)'
    )


Resources = Mapping[str, Costs]
"""By name: "parameters" and "kv" (the KV cache), counted from the config; "latency" (time of
generation) where it was measured."""


@dataclass(frozen=True)
class Budget:
    """How far to prune. Exactly one of `ratio` and `blocks` is given."""

    text: str
    """As in params.yaml."""
    ratio: float | None = None
    """Share of the resource."""
    blocks: int | None = None
    """A number of blocks."""
    resource: str = "parameters"

    def amount(self, mask: Mask, costs: Costs) -> str:
        """How much a mask removes, in words of this budget."""
        ratio, blocks = costs.ratio(mask), f"{len(mask)}blocks"
        if self.resource == "latency":
            return f"{blocks}, {speedup(ratio):.4f}x"
        return (
            f"{blocks}, {ratio:.4f}kv" if self.resource == "kv" else f"{blocks}, ratio {ratio:.4f}"
        )


def parse_budget(text: str, counts: Costs) -> Budget:
    """Read a budget for one model of these parameters; raises InputError that names the valid
    forms."""
    number, unit = read_budget(text)
    if unit == "blocks":
        return Budget(text, blocks=int(number))
    if unit == "layers":
        depth = len(counts.blocks) // 2
        if number >= depth:
            raise InputError(
                f"budget {text!r} removes every layer of {depth}; the largest is {depth - 1}layers"
            )
        return Budget(text, ratio=number / depth * sum(counts.blocks.values()) / counts.total)
    if unit == "x":
        return Budget(text, ratio=1 - 1 / number, resource="latency")
    return Budget(text, ratio=number, resource=unit or "parameters")


def speedup(share: float) -> float:
    """How many times as fast a model is that saves a share of the time."""
    return 1 / (1 - share) if share < 1 else math.inf


def distance(share: float, wanted: float) -> float:
    """The distance between two shares; 0 where only rounding separates them."""
    return round(abs(share - wanted), 12)


def resources_of(config: Config, latency: Mapping[str, int] | None = None) -> dict[str, Costs]:
    """What a model and each of its blocks cost of each resource; `latency` is in nanoseconds of
    generation: "total", and of one block "mha" and "mlp"; None where it was not measured."""
    found = {"parameters": count_parameters(config), "kv": count_kv_cache(config)}
    if latency is not None:
        blocks = {block: latency[block.kind] for block in found["kv"].blocks}
        found["latency"] = Costs(total=latency["total"], blocks=blocks)
    return found


def require_reachable(budget: Budget, units: Sequence[Mask], costs: Costs) -> None:
    """Refuse, before anything is computed, a budget that no sequence over `units` meets; `costs`
    are of its resource. Raises UnreachableError that names the largest or nearest budget that can
    be reached."""
    everything = frozenset[BlockId]().union(*units)
    size = len(units[0])
    beyond = (
        f"budget {budget.text!r} cannot be reached; the largest reachable is"
        f" {budget.amount(everything, costs)}"
    )
    if budget.blocks is not None:
        if budget.blocks > len(everything):
            raise UnreachableError(beyond)
        if budget.blocks % size:
            low = budget.blocks - budget.blocks % size
            near = ", ".join(f"{n}blocks" for n in (low, low + size) if 0 < n <= len(everything))
            raise UnreachableError(
                f"budget {budget.text!r} is not reached by whole units; nearest: {near}"
            )
    elif budget.ratio is not None:
        sizes = [costs.ratio(unit) for unit in that_cost(units, costs)]
        if not sizes or budget.ratio > costs.ratio(everything) + max(sizes) / 2:
            raise UnreachableError(beyond)
        if budget.ratio < min(sizes) / 2:
            raise _removes_nothing(budget, min(that_cost(units, costs), key=costs.ratio), costs)


def that_cost(masks: Sequence[Mask], costs: Costs) -> list[Mask]:
    """The masks that take something of a resource. An MLP block, for instance, takes nothing of the
    KV cache."""
    return [mask for mask in masks if costs.ratio(mask) > 0]


def _removes_nothing(budget: Budget, smallest: Mask, costs: Costs) -> UnreachableError:
    return UnreachableError(
        f"budget {budget.text!r} is nearest to removing nothing; the smallest that removes a block"
        f" here is {budget.amount(smallest, costs)}"
    )


def is_settled(
    budget: Budget, prefixes: Sequence[Mask], costs: Costs, remaining: Sequence[Mask]
) -> bool:
    """Whether longer sequences cannot change which prefix meets `budget`, to whose resource the
    costs belong. The prefixes are cumulative masks of the sequence so far, shortest first (without
    the dense one); `remaining` are the units that may still be removed."""
    mask = prefixes[-1] if prefixes else frozenset[BlockId]()
    if budget.blocks is not None:
        return not remaining or len(mask) >= budget.blocks
    assert budget.ratio is not None
    ratio = budget.ratio
    larger = [costs.ratio(mask | unit) for unit in that_cost(remaining, costs)]
    reached = costs.ratio(mask)
    return not larger or reached >= ratio or distance(min(larger), ratio) > distance(reached, ratio)


@dataclass(frozen=True)
class Goal:
    """A budget as a test of single masks, for searches that do not remove one unit after the
    other."""

    budget: Budget
    share: Callable[[Mask], float]
    """How much a mask removes, counted as the budget counts."""
    wanted: float
    """How much a mask should remove."""
    tolerance: float
    """How far off still meets the budget: half of the smallest unit. No mask comes nearer by one
    unit more or less."""

    def distance(self, mask: Mask) -> float:
        return distance(self.share(mask), self.wanted)

    def is_met(self, mask: Mask) -> bool:
        return self.distance(mask) <= self.tolerance + 1e-12

    def around(self, mask: Mask) -> Goal:
        """The same goal, moved to what a mask achieves, so that two masks that meet it can be
        compared."""
        return replace(self, wanted=self.share(mask))


def goal_of(budget: Budget, units: Sequence[Mask], costs: Costs) -> Goal:
    """The goal of a search over `units`, each of which takes something of the budget's resource."""
    if budget.blocks is not None:
        return Goal(budget, len, budget.blocks, 0.0)
    assert budget.ratio is not None
    return Goal(budget, costs.ratio, budget.ratio, min(costs.ratio(unit) for unit in units) / 2)


def choose_prefix(budget: Budget, prefixes: Sequence[Mask], costs: Costs) -> int:
    """Number of removals (1 or more) of the sequence that meet `budget`, whose resource `costs` are
    of; of prefixes with one share the shortest. Raises InputError if nothing in the sequence meets
    it; what is out of reach is refused by `require_reachable` before."""
    if budget.blocks is not None:
        sizes = [len(prefix) for prefix in prefixes]
        if budget.blocks not in sizes:
            wanted = budget.blocks
            around = [
                max(n for n in [0, *sizes] if n < wanted),
                min((n for n in sizes if n > wanted), default=0),
            ]
            near = ", ".join(f"{size}blocks" for size in around if size)
            raise InputError(f"budget {budget.text!r} is not in this sequence; nearest: {near}")
        return sizes.index(budget.blocks) + 1
    assert budget.ratio is not None
    share = budget.ratio
    ratios = [0.0, *(costs.ratio(prefix) for prefix in prefixes)]
    best = min(range(len(ratios)), key=lambda k: (distance(ratios[k], share), -ratios[k]))
    if best == 0:
        raise _removes_nothing(budget, next(iter(that_cost(prefixes, costs)), prefixes[0]), costs)
    return best
