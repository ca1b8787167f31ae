"""The plan: all that a search hands on. One frozen value, one JSON file.

Decides how a budget turns what was scored into what is removed. `materialize`, `benchmark` and `report` read
plans and do not know which method made them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any

import pyarrow as pa

from blockpruner.blocks import BlockKind, Mask, format_mask, parse_mask, sorted_blocks
from blockpruner.budgets import choose_prefix, parse_budget
from blockpruner.families import Config, ParameterCounts, count_parameters
from blockpruner.search.iteration import removals
from blockpruner.search.trace import read_current, read_trace, table_path, trace_directory
from blockpruner.tables import ITERATION, read_json, read_table, write_json, write_table
from blockpruner.transforms.laco import Merge, layers_after
from blockpruner.transforms.widths import sliced_parameters


@dataclass(frozen=True)
class Plan:
    """kind: "mask" (blocks are removed), "laco" (layers are merged) or "slicegpt" (the residual stream is sliced);
    removed: all blocks, sorted; order: what each removal took, in order, or LaCo's merges; ratio: share of all
    parameters removed; ratios: the cumulative ratio after each removal; blocks: counts by kind; parameters: dense and
    pruned; calibration: rows, tokens and the perplexity on them of the dense and of the pruned model (null where it
    is only known once the model is made); recover: whether the pruned model is trained before it is evaluated;
    nested: whether `order` is a sequence whose beginnings meet smaller budgets; details: of a transformation."""

    kind: str
    target: str
    run: str
    budget: str
    method: str
    metric: str
    search: str
    layers: int
    removed: tuple[str, ...]
    order: tuple[str, ...]
    ratio: float
    ratios: tuple[float, ...]
    blocks: Mapping[str, int]
    parameters: Mapping[str, int]
    calibration: Mapping[str, Any]
    recover: bool = False
    nested: bool = True
    details: Mapping[str, Any] = field(default_factory=dict)

    @property
    def mask(self) -> Mask:
        return parse_mask(",".join(self.removed))

    def save(self, path: Path) -> None:
        write_json(path, asdict(self))

    @classmethod
    def load(cls, path: Path) -> Plan:
        fields = read_json(path)
        for name in ("removed", "order", "ratios"):
            fields[name] = tuple(fields[name])
        return cls(**fields)


def commit(
    order: Sequence[Mask], perplexities: Sequence[float], counts: ParameterCounts, budget: str, facts: Mapping[str, Any]
) -> Plan:
    """Choose the prefix of a removal sequence that meets `budget`.

    Args:
        order: the units removed, in order; of a search that is not nested all at once.
        perplexities: on the calibration set, of the dense model and after each removal (one more than `order`).
        facts: target, run, search, nested, score (its method and metric), and the calibration's rows and tokens.

    Raises:
        InputError: the budget cannot be met; names the largest or nearest that can.
    """
    prefixes = [Mask().union(*order[: k + 1]) for k in range(len(order))]
    steps = choose_prefix(parse_budget(budget, counts), prefixes, counts)
    mask = prefixes[steps - 1]
    return _plan(
        facts,
        budget,
        counts,
        removed=tuple(str(block) for block in sorted_blocks(mask)),
        order=tuple(format_mask(unit) for unit in order[:steps]),
        ratios=tuple(counts.ratio(prefix) for prefix in prefixes[:steps]),
        blocks={kind.value: sum(block.kind is kind for block in mask) for kind in BlockKind},
        pruned=counts.total - sum(counts.blocks[block] for block in mask),
        perplexities=(perplexities[0], perplexities[steps]),
    )


def _plan(
    facts: Mapping[str, Any],
    budget: str,
    counts: ParameterCounts,
    *,
    pruned: int,
    perplexities: tuple[float, float | None],
    removed: tuple[str, ...] = (),
    order: tuple[str, ...] = (),
    ratios: tuple[float, ...] = (),
    blocks: Mapping[str, int] | None = None,
    details: Mapping[str, Any] | None = None,
) -> Plan:
    dense, after = perplexities
    return Plan(
        kind=facts["kind"],
        target=facts["target"],
        run=facts["run"],
        budget=budget,
        method=facts["score"]["method"],
        metric=facts["score"]["metric"],
        search=facts["search"],
        layers=len(counts.blocks) // 2,
        removed=removed,
        order=order,
        ratio=(counts.total - pruned) / counts.total,
        ratios=ratios,
        blocks=blocks or {kind.value: 0 for kind in BlockKind},
        parameters={"dense": counts.total, "pruned": pruned},
        calibration={**facts["calibration"], "dense_perplexity": dense, "perplexity": after},
        nested=facts["nested"],
        details=details or {},
    )


def _commit_mask(scores: Path, config: Config, budget: str, facts: Mapping[str, Any]) -> tuple[Plan, list[Path]]:
    directory = trace_directory(scores, facts, budget)
    trace = read_trace(directory, facts["search"])
    plan = commit(*removals(trace, facts["nested"]), count_parameters(config), budget, facts)
    used = len(plan.order) if plan.nested else len(trace)
    return plan, [table_path(directory, index) for index in range(used)]


def _commit_merges(scores: Path, config: Config, budget: str, facts: Mapping[str, Any]) -> tuple[Plan, list[Path]]:
    details = read_json(trace_directory(scores, facts, budget) / "details.json")
    merges, counts = [Merge(*pair) for pair in details["merges"]], count_parameters(config)
    depth = len(counts.blocks) // 2
    gone = frozenset(chain.from_iterable(layer[1:] for layer in layers_after(merges, depth)))
    nll = details.pop("nll")
    plan = _plan(
        facts,
        budget,
        counts,
        order=tuple(map(str, merges)),
        blocks={kind.value: len(gone) for kind in BlockKind},
        pruned=counts.total - sum(n for block, n in counts.blocks.items() if block.layer in gone),
        perplexities=(math.exp(facts["dense_nll"]), math.exp(math.fsum(nll) / len(nll))),
        details=details,
    )
    return plan, []


def _commit_width(scores: Path, config: Config, budget: str, facts: Mapping[str, Any]) -> tuple[Plan, list[Path]]:
    details = read_json(trace_directory(scores, facts, budget) / "details.json")
    _, pruned = sliced_parameters(config, details["width"])
    perplexities = (math.exp(facts["dense_nll"]), None)
    return _plan(facts, budget, count_parameters(config), pruned=pruned, perplexities=perplexities, details=details), []


def commit_run(scores: Path, config: Config, budget: str, target: Mapping[str, Any]) -> tuple[Plan, list[Path]]:
    """The plan that meets a budget by what a run has scored, and the iteration tables that it used, in order.

    Args:
        scores: the run's folder, as `search.run.score_run` left it.
        target: its name and run.

    Raises:
        InputError: the budget cannot be met, or a file of the search is missing or damaged.
    """
    facts = read_current(scores) | dict(target)
    return KINDS[facts["kind"]](scores, config, budget, facts)


KINDS: dict[str, Callable[[Path, Config, str, Mapping[str, Any]], tuple[Plan, list[Path]]]] = {
    "mask": _commit_mask,
    "laco": _commit_merges,
    "slicegpt": _commit_width,
}


def save_iterations(tables: Sequence[Path], path: Path) -> None:
    """The iteration tables that a plan used, as one table with the iteration's number in front."""
    parts = []
    for index, source in enumerate(tables):
        table, _ = read_table(source, ITERATION)
        number = pa.array([index] * table.num_rows, pa.int32())
        parts.append(table.add_column(0, pa.field("iteration", pa.int32(), nullable=False), number))
    write_table(path, pa.concat_tables(parts))
