"""Narrower MLPs as a kind of method: the widths that lose least for a budget. Nothing is searched.

Each MLP may lose channels step by step (`levels`). The step that costs least for each parameter is
taken next, in any MLP; several of one MLP count as one where that is cheaper.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, closing, nullcontext
from dataclasses import asdict
from functools import cache
from typing import TYPE_CHECKING, Any

from pydantic import Field

from blockpruner.core.blocks import parse_block
from blockpruner.core.budgets import Budget
from blockpruner.core.errors import InputError, UnreachableError
from blockpruner.core.families import FAMILIES, Config, count_parameters
from blockpruner.core.options import Options
from blockpruner.core.plan import Plan
from blockpruner.methods.kind import Job
from blockpruner.methods.weights import Details, Removed, WeightsKind, share_of
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
    """The channels that leave an MLP at once."""
    if options.step is not None:
        return options.step
    eighth = max(1, width // 8)
    for multiple in (256, 64):
        if eighth >= multiple:
            return eighth - eighth % multiple
    return eighth


def plan_widths(options: NarrowOptions, job: Job) -> Callable[[Budget], Details]:
    """Plans MLPs' widths for budgets; levels that are not known are measured for the first of them.
    The details are `channels`, the kept ones of each narrowed MLP, and `cost`, what the levels cost
    in all."""
    config = job.material.config
    step = step_of(options, int(config["intermediate_size"]))
    measured_widths = cache(lambda: known_widths(step, job))

    def plan(budget: Budget) -> Details:
        channels = require_widths(budget, options, config)
        return choose(measured_widths(), config, channels)

    return plan


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
    name = f"levels-{fingerprint(facts)}"
    table = job.folder / f"{name}.json"
    table_entries = (read_kept_json(table, observer.note) or {"levels": []})["levels"]
    log = Journal(material.trials / f"{name}.jsonl", facts) if material.trials else None
    problems = list[str]()
    log_entries = log.read(problems) if log else ()
    levels_by_block = dict[str, Levels]()
    for entry in (*table_entries, *log_entries):
        widths = [Width(**width) for width in entry["widths"]]
        levels_by_block[entry["block"]] = Levels(entry["block"], widths, entry["rise"])
    for problem in problems:
        observer.note(problem)
    if len(levels_by_block) < int(material.config["num_hidden_layers"]):
        # The scorer may hold the model, too. It loads the model again when it is used.
        material.scorer.close()
        with closing(log) if log else nullcontext():
            for levels in measure_levels(material.dense(), rows, step, levels_by_block, observer):
                levels_by_block[levels.block] = levels
                if log is not None:
                    log.append(asdict(levels))
    ordered = sorted(levels_by_block.values(), key=lambda levels: parse_block(levels.block).layer)
    if len(table_entries) < len(ordered):
        write_sealed_json(table, {"levels": [asdict(levels) for levels in ordered]})
    return by_cost(ordered)


def require_widths(budget: Budget, options: NarrowOptions, config: Config) -> int:
    """The number of channels, of all MLPs, whose removal is nearest to a budget; raises
    UnreachableError for one out of reach, or a family whose MLPs are mixtures."""
    share = share_of(budget, "narrow")
    family = FAMILIES[str(config["model_type"])]
    if not family.has_one_mlp:
        raise UnreachableError(
            f"narrow is for families with one MLP in a layer, not for {family.model_type}"
        )
    width, layers = int(config["intermediate_size"]), int(config["num_hidden_layers"])
    step = step_of(options, width)
    channel_share = channel_parameters(config) / count_parameters(config).total
    most_channels = layers * ((width - 1) // step * step)
    channels = round(share / channel_share)
    if not step <= 2 * channels <= 2 * most_channels:
        raise UnreachableError(
            f"budget {budget.text!r} is out of reach: narrow removes {step * channel_share:.2%} to"
            f" {most_channels * channel_share:.1%} of the parameters"
        )
    return channels


def channel_parameters(config: Config) -> int:
    """The parameters of one channel of an MLP."""
    count = FAMILIES[str(config["model_type"])].mlp_parameters
    of_one = count({**config, "intermediate_size": 1}, 0)
    of_two = count({**config, "intermediate_size": 2}, 0)
    return of_two - of_one


def choose(widths_by_block: Mapping[str, list[Width]], config: Config, channels: int) -> Details:
    """The channels that MLPs keep if about `channels` are removed, at the least cost; see
    `plan_widths`."""
    full_width = int(config["intermediate_size"])
    width_by_block = dict.fromkeys(widths_by_block, full_width)
    cost_by_block = dict.fromkeys(widths_by_block, 0.0)
    chosen = dict[str, "Width"]()
    remaining = channels
    while remaining > 0:
        best_step: tuple[str, Width] | None = None
        least_price = math.inf
        for block, widths in widths_by_block.items():
            for width in widths:
                removed = width_by_block[block] - width.channels
                # A step that removes more than twice the rest ends farther from it than none.
                if not 0 < removed <= 2 * remaining:
                    continue
                price = (width.cost - cost_by_block[block]) / removed
                if best_step is None or price < least_price:
                    best_step, least_price = (block, width), price
        if best_step is None:
            break
        block, width = best_step
        remaining -= width_by_block[block] - width.channels
        width_by_block[block] = width.channels
        cost_by_block[block] = width.cost
        chosen[block] = width
    return {
        "channels": {block: chosen[block].kept for block in widths_by_block if block in chosen},
        "cost": sum(cost_by_block.values()),
    }


class Narrow(WeightsKind):
    name = "narrow"
    title = "narrower MLPs"
    options = NarrowOptions
    keeps_weights = True
    is_reversible = True
    uses_fit_rows = True
    version = PLAN_VERSION

    def planner(self, options: NarrowOptions, job: Job) -> Callable[[Budget], Details]:
        return plan_widths(options, job)

    def require(self, budget: Budget, options: NarrowOptions, config: Config) -> None:
        require_widths(budget, options, config)

    def removed(self, details: Details, config: Config) -> Removed:
        width = int(config["intermediate_size"])
        # The channels of an MLP that stay are the set bits of a hexadecimal number.
        widths = [int(text, 16).bit_count() for text in details["channels"].values()]
        removed_channels = len(widths) * width - sum(widths)
        removed_parameters = removed_channels * channel_parameters(config)
        return Removed(pruned=count_parameters(config).total - removed_parameters)

    def apply_(self, model: PreTrainedModel, plan: Plan, rows: Rows) -> PreTrainedModel:
        from blockpruner.model.narrow import narrow_

        return narrow_(model, plan.cut.channels)

    def temporarily_pruned(
        self, model: PreTrainedModel, plan: Plan
    ) -> AbstractContextManager[PreTrainedModel]:
        from blockpruner.model.narrow import narrowed

        return narrowed(model, plan.cut.channels)

    def facts(self, plan: Plan, rows: str) -> dict[str, Any]:
        return {"channels": plan.details["channels"]}

    def method_words(self, plan: Plan, unit: str) -> str:
        return "narrower MLPs, by measured cost"

    def removed_words(self, plan: Plan) -> str:
        return f"channels of {len(plan.gone)} MLPs"

    def card_words(self, plan: Plan) -> str:
        return (
            f"with {len(plan.gone)} of its {plan.layers} MLPs narrowed, to the channels that matter"
            " most"
        )


NARROW = Narrow()
