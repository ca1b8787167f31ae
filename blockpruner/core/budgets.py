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

from blockpruner.core.blocks import DENSE, Mask
from blockpruner.core.errors import InputError, UnreachableError
from blockpruner.core.families import Config, Costs, count_kv_cache, count_parameters

WRITTEN = re.compile(r"(?=.{,32}$)(?P<number>\d*\.?\d+)(?P<unit>blocks|layers|kv|x|)", re.ASCII)
"""A budget of a run file."""

REMAINING_SIZE = re.compile(r"(?P<number>\d*\.?\d+)(?P<unit>[MB])", re.ASCII)
"""The parameters that remain, as a command takes them: "7B", "120M"."""


def share_for(text: str, config: Config) -> str:
    """A budget as it is; for the size that remains ("7B", "120M" parameters) the share to remove.
    Raises InputError for a size that the model does not exceed."""
    match = REMAINING_SIZE.fullmatch(text)
    if match is None:
        read_budget(text)
        return text
    total = count_parameters(config).total
    scale = {"M": 1e6, "B": 1e9}[match["unit"]]
    share = 1 - float(match["number"]) * scale / total
    if not 0 < round(share, 4) < 1:
        raise InputError(
            f"budget {text!r} is what is left; give less than the model's {total / 1e6:,.1f}M"
            " parameters, and more than nothing"
        )
    return f"{share:.4f}"


def read_budget(text: str) -> tuple[float, str]:
    """Number and unit ("" is a share of all parameters); raises InputError that names the valid
    forms."""
    match = WRITTEN.fullmatch(text)
    if match and _is_valid(match["number"], match["unit"]):
        return float(match["number"]), match["unit"]
    raise InputError(
        f'budget {text!r} is not valid; give a share of all parameters between 0 and 1 ("0.22"), a'
        ' number of blocks ("17blocks") or of whole layers ("7layers"), a share of the KV cache'
        ' ("0.30kv"), a speed-up of generation above 1 ("1.25x"), or in a command what is left'
        ' ("7B", "120M" parameters)'
    )


def _is_valid(digits: str, unit: str) -> bool:
    number = float(digits)
    if unit in ("blocks", "layers"):
        return number >= 1 and digits.isdigit()
    if unit == "x":
        # A speed-up barely above 1 rounds to a share of 0.
        return number > 1 and 0 < 1 - 1 / number < 1
    return 0 < number < 1


Resources = Mapping[str, Costs]
"""By name: "parameters" and "kv" (the KV cache), counted from the config; "latency" (time of
generation) where it was measured."""


@dataclass(frozen=True)
class Budget:
    """How far to prune. Either `ratio` or `blocks` is a number, and the other is None."""

    text: str
    """As in params.yaml."""
    ratio: float | None = None
    """Share of the resource."""
    blocks: int | None = None
    """A number of blocks."""
    resource: str = "parameters"

    def amount(self, mask: Mask, costs: Costs) -> str:
        """How much a mask removes, in words of this budget."""
        ratio = costs.ratio(mask)
        if self.resource == "latency":
            share = f"{speedup(ratio):.4f}x"
        elif self.resource == "kv":
            share = f"{ratio:.4f}kv"
        else:
            share = f"ratio {ratio:.4f}"
        return f"{len(mask)}blocks, {share}"


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
        in_layers = sum(counts.blocks.values())
        return Budget(text, ratio=number / depth * in_layers / counts.total)
    if unit == "x":
        return Budget(text, ratio=1 - 1 / number, resource="latency")
    return Budget(text, ratio=number, resource=unit or "parameters")


def speedup(share: float) -> float:
    """How many times as fast a model is that saves a share of the time."""
    return 1 / (1 - share) if share < 1 else math.inf


def distance(share: float, target: float) -> float:
    """The distance between two shares; 0 where only rounding separates them."""
    return round(abs(share - target), 12)


def resources_of(config: Config, latency: Mapping[str, int] | None = None) -> dict[str, Costs]:
    """What a model and each of its blocks cost of each resource; `latency` is in nanoseconds of
    generation: "total", and of one block "mha" and "mlp"; None where it was not measured."""
    resources = {"parameters": count_parameters(config), "kv": count_kv_cache(config)}
    if latency is not None:
        blocks = {block: latency[block.kind] for block in resources["kv"].blocks}
        resources["latency"] = Costs(total=latency["total"], blocks=blocks)
    return resources


def require_reachable(budget: Budget, units: Sequence[Mask], costs: Costs) -> None:
    """Refuse, before anything is computed, a budget that no sequence over `units` meets; `costs`
    are of its resource. Raises UnreachableError that names the largest or nearest budget that can
    be reached."""
    everything = DENSE.union(*units)
    if budget.blocks is not None:
        unit_size = len(units[0])
        is_beyond = budget.blocks > len(everything)
        is_between = budget.blocks % unit_size != 0
        if is_between and not is_beyond:
            lower = budget.blocks - budget.blocks % unit_size
            sizes = [size for size in (lower, lower + unit_size) if 0 < size <= len(everything)]
            raise UnreachableError(
                f"budget {budget.text!r} is not reached by whole units; nearest:"
                f" {_format_sizes(sizes)}"
            )
    else:
        assert budget.ratio is not None
        shares = [costs.ratio(unit) for unit in that_cost(units, costs)]
        # The nearest prefix meets a share: half a unit more than everything is met by everything.
        is_beyond = not shares or budget.ratio > costs.ratio(everything) + max(shares) / 2
        if not is_beyond and budget.ratio < min(shares) / 2:
            smallest = min(that_cost(units, costs), key=costs.ratio)
            raise _removes_nothing(budget, smallest, costs)
    if is_beyond:
        raise UnreachableError(
            f"budget {budget.text!r} cannot be reached; the largest reachable is"
            f" {budget.amount(everything, costs)}"
        )


def that_cost(masks: Sequence[Mask], costs: Costs) -> list[Mask]:
    """The masks that take something of a resource. An MLP block, for instance, takes nothing of the
    KV cache."""
    return [mask for mask in masks if costs.ratio(mask) > 0]


def _format_sizes(sizes: Sequence[int]) -> str:
    return ", ".join(f"{size}blocks" for size in sizes)


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
    mask = prefixes[-1] if prefixes else DENSE
    if budget.blocks is not None:
        return not remaining or len(mask) >= budget.blocks
    assert budget.ratio is not None
    reached = costs.ratio(mask)
    if reached >= budget.ratio:
        return True
    larger = [costs.ratio(mask | unit) for unit in that_cost(remaining, costs)]
    if not larger:
        return True
    return distance(min(larger), budget.ratio) > distance(reached, budget.ratio)


@dataclass(frozen=True)
class Goal:
    """A budget as a test of single masks, for searches that do not remove one unit after the
    other."""

    budget: Budget
    share: Callable[[Mask], float]
    """How much a mask removes, counted as the budget counts."""
    target: float
    """How much a mask should remove."""
    tolerance: float
    """How far off still meets the budget: half of the smallest unit. No mask comes nearer by one
    unit more or less."""

    def distance(self, mask: Mask) -> float:
        return distance(self.share(mask), self.target)

    def is_met(self, mask: Mask) -> bool:
        return self.distance(mask) <= self.tolerance + 1e-12

    def around(self, mask: Mask) -> Goal:
        """The same goal, moved to what a mask achieves, so that two masks that meet it can be
        compared."""
        return replace(self, target=self.share(mask))


def goal_of(budget: Budget, units: Sequence[Mask], costs: Costs) -> Goal:
    """The goal of a search over `units`, each of which takes something of the budget's resource."""
    if budget.blocks is not None:
        return Goal(budget, len, budget.blocks, 0.0)
    assert budget.ratio is not None
    smallest_share = min(costs.ratio(unit) for unit in units)
    return Goal(budget, costs.ratio, budget.ratio, smallest_share / 2)


def choose_prefix(budget: Budget, prefixes: Sequence[Mask], costs: Costs) -> int:
    """Number of removals (1 or more) of the sequence that meet `budget`; `costs` are of its
    resource. Of prefixes with one share it is the shortest. Raises InputError if nothing in the
    sequence meets it; `require_reachable` refuses earlier what is out of reach."""
    # A number of blocks is met exactly or not at all.
    if budget.blocks is not None:
        sizes = [len(prefix) for prefix in prefixes]
        if budget.blocks in sizes:
            return sizes.index(budget.blocks) + 1
        smaller = [size for size in sizes if size < budget.blocks]
        larger = [size for size in sizes if size > budget.blocks]
        nearest = [*smaller[-1:], *larger[:1]]
        raise InputError(
            f"budget {budget.text!r} is not in this sequence; nearest: {_format_sizes(nearest)}"
        )
    target = budget.ratio
    assert target is not None
    shares = [0.0, *(costs.ratio(prefix) for prefix in prefixes)]
    # A tie goes to the larger share, as in the paper's tables.
    best = min(
        range(len(shares)), key=lambda steps: (distance(shares[steps], target), -shares[steps])
    )
    if best == 0:
        costly = that_cost(prefixes, costs) or prefixes
        raise _removes_nothing(budget, costly[0], costs)
    return best
