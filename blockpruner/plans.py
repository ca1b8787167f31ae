"""The plan: all that a search hands on. One frozen value, one JSON file.

Decides how a budget turns a trace into a set of removed blocks. `materialize`, `benchmark` and `report` read
plans and do not know which method made them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa

from blockpruner.blocks import BlockKind, Mask, format_mask, parse_mask, sorted_blocks
from blockpruner.budgets import choose_prefix, parse_budget
from blockpruner.families import ParameterCounts
from blockpruner.tables import ITERATION, read_json, read_table, write_json, write_table


@dataclass(frozen=True)
class Plan:
    """removed: all blocks, sorted; order: what each removal took, in order; ratio: share of all parameters removed;
    ratios: the cumulative ratio after each removal; blocks: counts by kind; parameters: dense and pruned;
    calibration: rows, tokens and the perplexity on them of the dense and of the pruned model; recover: whether the
    pruned model is trained before it is evaluated."""

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
        order: the units removed, in order.
        perplexities: on the calibration set, of the dense model and after each removal (one more than `order`).
        facts: target, run, score (its method and metric), search, and the calibration's rows and tokens.

    Raises:
        InputError: the budget cannot be met; names the largest or nearest that can.
    """
    prefixes = [Mask().union(*order[: k + 1]) for k in range(len(order))]
    steps = choose_prefix(parse_budget(budget, counts), prefixes, counts)
    mask = prefixes[steps - 1]
    removed_parameters = sum(counts.blocks[block] for block in mask)
    calibration = dict(facts["calibration"])
    calibration |= {"dense_perplexity": perplexities[0], "perplexity": perplexities[steps]}
    return Plan(
        kind="mask",
        target=facts["target"],
        run=facts["run"],
        budget=budget,
        method=facts["score"]["method"],
        metric=facts["score"]["metric"],
        search=facts["search"],
        layers=len(counts.blocks) // 2,
        removed=tuple(str(block) for block in sorted_blocks(mask)),
        order=tuple(format_mask(unit) for unit in order[:steps]),
        ratio=counts.ratio(mask),
        ratios=tuple(counts.ratio(prefix) for prefix in prefixes[:steps]),
        blocks={kind.value: sum(block.kind is kind for block in mask) for kind in BlockKind},
        parameters={"dense": counts.total, "pruned": counts.total - removed_parameters},
        calibration=calibration,
    )


def save_iterations(tables: Sequence[Path], path: Path) -> None:
    """The iteration tables that a plan used, as one table with the iteration's number in front."""
    parts = []
    for index, source in enumerate(tables):
        table, _ = read_table(source, ITERATION)
        number = pa.array([index] * table.num_rows, pa.int32())
        parts.append(table.add_column(0, pa.field("iteration", pa.int32(), nullable=False), number))
    write_table(path, pa.concat_tables(parts))
