"""Narrower MLPs as a kind of method: the widths that lose least for a budget. Nothing is searched.

Each MLP may lose channels step by step (`levels`). The step that costs least for each parameter is
taken next, in any MLP; several of one MLP count as one where that is cheaper.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, closing, nullcontext
from dataclasses import asdict
from functools import cache
from typing import TYPE_CHECKING

from pydantic import Field

from blockpruner.core.blocks import parse_block
from blockpruner.core.budgets import Budget
from blockpruner.core.errors import InputError, UnreachableError
from blockpruner.core.families import FAMILIES, Config, count_parameters
from blockpruner.core.options import Options
from blockpruner.core.plan import Plan
from blockpruner.methods.kind import Job
from blockpruner.methods.weights import Details, Left, share_of, weights_kind
from blockpruner.scoring.metrics import NLL
from blockpruner.scoring.work import Rows
from blockpruner.store.files import read_kept_json, write_sealed_json
from blockpruner.store.journal import Journal
from blockpruner.store.provenance import fingerprint
from blockpruner.versions import PLAN_VERSION

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from blockpruner.methods.narrow.levels import Width


class NarrowOptions(Options):
    step: int | None = Field(default=None, ge=1)
    """Channels that leave an MLP at once; null: an eighth of its width, in multiples of 256 or 64
    if it has as many."""


def step_of(options: NarrowOptions, width: int) -> int:
    eighth = max(1, width // 8)
    return options.step or eighth - eighth % next(size for size in (256, 64, 1) if size <= eighth)


def plan_widths(options: NarrowOptions, job: Job) -> Callable[[Budget], Details]:
    """Plans MLPs' widths for budgets; levels that are not known are measured for the first of them.
    The details are `channels`, the kept ones of each narrowed MLP, and `cost`, what the levels cost
    in all."""
    config = job.material.config
    known = cache(lambda: known_widths(step_of(options, int(config["intermediate_size"])), job))
    return lambda budget: choose(
        wanted=require_widths(budget, options, config), known=known(), config=config
    )


def known_widths(step: int, job: Job) -> dict[str, list[Width]]:
    """What each width of each MLP costs. An MLP's are kept beside the trials once they are
    measured, and all together in the run's folder of scores: no budget measures them again."""
    from blockpruner.methods.narrow.levels import Levels, Width, by_cost, measure_levels

    material, rows, observer = job.material, job.calibration.rows, job.material.observer
    if len(rows) < 2:
        raise InputError(
            "narrow measures costs on some rows and sums the others: 1 row is too few; give more"
            " texts"
        )
    facts = {**job.store_fields(NLL.name), "step": step, "version": PLAN_VERSION}
    name, problems = f"levels-{fingerprint(facts)}", list[str]()
    log = Journal(material.trials / f"{name}.jsonl", facts) if material.trials else None
    table = job.folder / f"{name}.json"
    kept = (read_kept_json(table, observer.note) or {"levels": []})["levels"]
    units = (*kept, *(log.read(problems) if log else ()))
    found = {
        unit["block"]: Levels(
            unit["block"], [Width(**width) for width in unit["widths"]], unit["rise"]
        )
        for unit in units
    }
    for problem in problems:
        observer.note(problem)
    if len(found) < int(material.config["num_hidden_layers"]):
        material.scorer.close()  # it may hold the model, too; it is made anew when it is asked
        with closing(log) if log else nullcontext():
            for levels in measure_levels(material.dense(), rows, step, found, observer):
                found[levels.block] = levels
                if log is not None:
                    log.append(asdict(levels))
    ordered = [found[block] for block in sorted(found, key=lambda block: parse_block(block).layer)]
    if len(kept) < len(found):
        write_sealed_json(table, {"levels": [asdict(levels) for levels in ordered]})
    return by_cost(ordered)


def require_widths(budget: Budget, options: NarrowOptions, config: Config) -> int:
    """The number of channels, of all MLPs, whose removal is nearest to a budget; raises
    UnreachableError for one out of reach, or a family whose MLPs are mixtures."""
    share = share_of(budget, "narrow")
    family, counts = FAMILIES[str(config["model_type"])], count_parameters(config)
    if not family.has_one_mlp:
        raise UnreachableError(
            f"narrow is for families with one MLP in a layer, not for {family.model_type}"
        )
    width, layers = int(config["intermediate_size"]), int(config["num_hidden_layers"])
    step, one = step_of(options, width), channel_parameters(config) / counts.total
    most, wanted = layers * ((width - 1) // step * step), round(share / one)
    if not step <= 2 * wanted <= 2 * most:
        reach = f"{step * one:.2%} to {most * one:.1%} of the parameters"
        raise UnreachableError(f"budget {budget.text!r} is out of reach: narrow removes {reach}")
    return wanted


def channel_parameters(config: Config) -> int:
    """The parameters of one channel of an MLP."""
    count = FAMILIES[str(config["model_type"])].mlp_parameters
    return count({**config, "intermediate_size": 2}, 0) - count(
        {**config, "intermediate_size": 1}, 0
    )


def choose(known: Mapping[str, list[Width]], config: Config, wanted: int) -> Details:
    """The channels that MLPs keep so that about `wanted` are gone, at the least cost; see
    `plan_widths`."""
    width = int(config["intermediate_size"])
    gone, cost = dict.fromkeys(known, 0), dict.fromkeys(known, 0.0)
    taken = dict[str, "Width"]()
    while (left := wanted - sum(gone.values())) > 0:
        steps = (
            (
                (level.cost - cost[block]) / (more := width - level.channels - gone[block]),
                more,
                block,
                level,
            )
            for block, levels in known.items()
            for level in levels
            if 0
            < width - level.channels - gone[block]
            <= 2 * left  # no step that goes farther than none
        )
        best = min(steps, key=lambda step: step[0], default=None)
        if best is None:
            break
        _, more, block, level = best
        gone[block], cost[block], taken[block] = gone[block] + more, level.cost, level
    return {
        "channels": {block: taken[block].kept for block in known if block in taken},
        "cost": sum(cost.values()),
    }


def _left(details: Details, config: Config) -> Left:
    width = int(config["intermediate_size"])
    kept = [int(text, 16).bit_count() for text in details["channels"].values()]
    gone = len(kept) * width - sum(kept)
    return Left(pruned=count_parameters(config).total - gone * channel_parameters(config))


def _apply(model: PreTrainedModel, plan: Plan, rows: Rows) -> PreTrainedModel:
    from blockpruner.model.narrow import narrow_

    return narrow_(model, plan.cut.channels)


def _lend(model: PreTrainedModel, plan: Plan) -> AbstractContextManager[PreTrainedModel]:
    from blockpruner.model.narrow import narrowed

    return narrowed(model, plan.cut.channels)


NARROW = weights_kind(
    "narrow",
    "narrower MLPs",
    plan=plan_widths,
    left=_left,
    apply_=_apply,
    lend=_lend,
    identity=lambda plan, rows: {"channels": plan.details["channels"]},
    words=lambda plan, unit: "narrower MLPs, by measured cost",
    taken_out=lambda plan: f"channels of {len(plan.gone)} MLPs",
    card=lambda plan: (
        f"with {len(plan.gone)} of its {plan.layers} MLPs narrowed, to the channels that matter"
        " most"
    ),
    is_part=True,
    of_fit=True,
    options=NarrowOptions,
    require=require_widths,
    version=PLAN_VERSION,
)
