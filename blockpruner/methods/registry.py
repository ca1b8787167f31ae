"""Kinds of methods: KINDS, one row each, from the folder of each kind."""

from typing import Any

from blockpruner.core.budgets import parse_budget, resources_of
from blockpruner.core.errors import InputError
from blockpruner.core.families import Config
from blockpruner.core.options import Options, read_options
from blockpruner.core.plan import Plan
from blockpruner.core.registry import Registry
from blockpruner.methods.blocks.kind import BLOCKS
from blockpruner.methods.kind import Kind
from blockpruner.methods.laco.kind import LACO
from blockpruner.methods.narrow.kind import NARROW
from blockpruner.methods.slicegpt.kind import SLICEGPT
from blockpruner.scoring.settings import Score
from blockpruner.search.registry import SEARCHES, Search, request
from blockpruner.search.run import require_searchable


def kind_of_method(method: str) -> Kind:
    """The kind of plan that a method ends in; raises InputError that names the valid methods."""
    if method in SEARCHES:
        return BLOCKS
    if method in KINDS and method != BLOCKS.name:
        return KINDS[method]
    raise InputError(f"score.method {method!r} is unknown; valid: {', '.join(method_names())}")


def method_names() -> list[str]:
    return sorted({*SEARCHES, *KINDS} - {BLOCKS.name})


def row_of(method: str) -> Search | Kind:
    """The row of a plain method, with its title and its type of options."""
    kind = kind_of_method(method)
    return SEARCHES[method] if kind.removes_blocks else kind


def options_of(score: Score) -> Options:
    """The options of a `score` section, typed by its method; raises InputError."""
    return read_options(score.method, row_of(score.method).options, score.options)


def check_score(score: Score) -> Kind:
    """The kind of method that a `score` section names; raises InputError for an unknown method,
    metric or option, or settings that do not fit together."""
    kind = kind_of_method(score.method)
    if kind.removes_blocks:
        request(score)
    else:
        for key in ("unit", "candidates", "metric", "acceleration"):
            if (value := getattr(score, key)) != Score.model_fields[key].default:
                raise InputError(
                    f"score.{key}: {value} does nothing with method: {kind.name}, which searches no"
                    " mask; remove it"
                )
        options_of(score)
    return kind


def require_budgets(score: Score, config: Config, budgets: tuple[str, ...]) -> None:
    """Refuse, before anything is computed, budgets that the method cannot meet on any model of this
    shape; raises UnreachableError that names the largest or nearest budget that can be reached."""
    kind, resources = kind_of_method(score.method), resources_of(config)
    if kind.removes_blocks:
        require_searchable(request(score), resources, budgets)
        return
    options = options_of(score)
    for text in budgets:
        kind.require(parse_budget(text, resources["parameters"]), options, config)


def model_facts(plan: Plan, rows: str) -> dict[str, Any]:
    """All that a pruned model depends on, apart from the dense one. rows: digest of its calibration
    set."""
    return {"kind": plan.kind, **KINDS[plan.kind].identity(plan, rows)}


KINDS = Registry[Kind]("plan kind", Kind, [BLOCKS, LACO, NARROW, SLICEGPT])  # type: ignore[type-abstract]
