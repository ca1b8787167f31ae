"""What was measured of models: sizes, texts, tasks and speed, and how a pruned model stands against
its dense one.

Decides how the files of an evaluation become values, for the report of targets and for the paper's
tables alike. An `Option` is one model to choose. Signs of failed pruning are found in `findings`.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from statistics import median
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from blockpruner.core.errors import InputError
from blockpruner.core.plan import Plan
from blockpruner.evaluation.store import ITEMS
from blockpruner.methods.registry import KINDS
from blockpruner.reporting import statistics
from blockpruner.reporting.statistics import Effect, Floats, Interval, Mean
from blockpruner.store.files import read_json, read_table

PARTS = ("prefill", "decode", "generation")
"""Parts of a timed generation: the prompt, the other new tokens, both together."""

Items = dict[str, tuple[NDArray[Any], Floats, Floats]]
"""By task: the items' numbers, their scores in the task's metric, and p of their right answers, NaN
without one."""


@dataclass(frozen=True)
class RunLabels:
    """For people: which model, and which data it was calibrated and evaluated on."""

    name: str
    model: str
    """Where it is from, on one line, as all that follows."""
    calibration: str
    heldout: str
    tasks: str
    wikitext2: bool = False
    """Whether the held-out text is the paper's: the test split of WikiText-2, joined, in rows of
    2,048 tokens."""
    compensation: str = ""
    """Texts of the compensation."""
    training: str = ""
    """Texts and settings of the training of targets that are trained."""
    search: str = "exact"
    """Which candidates the search leaves out, as `score.acceleration`."""

    @property
    def conditions(self) -> str:
        """What a statement about the results holds for."""
        return (
            f"{self.model}; search: {self.search}; calibration: {self.calibration}; held-out text:"
            f" {self.heldout}; items: {self.tasks}"
        )


@dataclass(frozen=True)
class Text:
    perplexity: float
    rows: int
    tokens: int
    row_nll: tuple[float, ...]
    """Mean NLL of each row, nats per token."""
    row_kind: tuple[str, ...]
    """The kind of text of each row; empty where all are of one."""


@dataclass(frozen=True)
class TaskScore(Mean):
    """The main metric of one task. The error is infinite for a single item."""

    items: int


@dataclass(frozen=True, eq=False)
class Timings:
    seconds: Mapping[str, tuple[float, ...]]
    """The seconds of each repeat, by part."""
    tokens: Mapping[str, int]
    """How many a part of one repeat processes, over the whole batch."""
    cache_bytes: int
    memory_bytes: int
    """The peak while generating; on a CPU the sum of weights and KV cache."""
    setting: str
    """What was timed, and on what, in words."""

    @classmethod
    def of(cls, fields: Mapping[str, Any]) -> Self:
        """Read what `evaluation.speed` wrote of one model."""
        prompt, new, batch = fields["prompt_tokens"], fields["new_tokens"], fields["batch"]
        return cls(
            seconds={part: tuple(fields[f"{part}_seconds"]["samples"]) for part in PARTS},
            tokens={
                "prefill": batch * prompt,
                "decode": batch * (new - 1),
                "generation": batch * new,
            },
            cache_bytes=fields["kv_cache_bytes"],
            memory_bytes=fields["peak_memory_bytes"],
            setting=(
                f"{prompt} prompt and {new} new tokens, batch {batch}, {fields['repeats']} repeats"
                f" in turns with the dense model, {fields['device']}, {fields['dtype']},"
                f" {fields['threads']} threads"
            ),
        )

    def median(self, part: str) -> float:
        return median(self.seconds[part])

    def rate(self, part: str) -> float:
        """Tokens per second, from the median."""
        return self.tokens[part] / self.median(part)


@dataclass(frozen=True, eq=False)
class Race:
    """A model and the dense one, timed in turns. The dense model races against itself."""

    dense: Timings
    pruned: Timings

    @classmethod
    def of(cls, fields: Mapping[str, Any]) -> Self:
        """Read what a measurement wrote of both, or of the dense model alone."""
        return cls(Timings.of(fields["dense"]), Timings.of(fields.get("pruned", fields["dense"])))

    @cached_property
    def speedups(self) -> Mapping[str, Effect]:
        """Quotients of the medians, by part; above 1 is faster than dense. Of one repeat an
        interval is infinite."""
        dense, pruned = self.dense.seconds, self.pruned.seconds
        if len(dense["generation"]) == 1:
            return {
                part: Effect(dense[part][0] / pruned[part][0], Interval(0, math.inf), 1.0)
                for part in PARTS
            }
        return {part: statistics.ratio_of_medians(dense[part], pruned[part]) for part in PARTS}


@dataclass(frozen=True, eq=False)
class Model:
    parameters: int
    weight_bytes: int
    heldout: Text
    tasks: Mapping[str, TaskScore]
    """All that were measured."""
    average: Mean
    """The mean over the tasks of the average."""
    items: Mapping[str, NDArray[Any]]
    """Numbers of the items, by task of the average."""
    scores: Mapping[str, Floats]
    """One score for each of these items."""
    p_gold: Mapping[str, Floats]
    """p of each item's right answer, by those of these tasks that have it."""
    samples: tuple[tuple[str, str], ...] = ()
    """Prompts with the model's answers; empty where none were made."""
    made: tuple[Mapping[str, str], ...] = ()
    """Where and when each of this was computed; empty where it was not recorded."""

    @classmethod
    def of(cls, fields: Mapping[str, Any], items: Items) -> Self:
        """Read the facts that an evaluation wrote of one model."""
        scores = {task: values for task, (_, values, _) in items.items()}
        text = fields["perplexity"]
        rows = (tuple(text.get(key, ())) for key in ("row_nll", "row_kind"))
        return cls(
            parameters=fields["parameters"],
            weight_bytes=fields["weight_bytes"],
            heldout=Text(text["perplexity"], text["rows"], text["tokens"], *rows),
            tasks={
                k: TaskScore(
                    v["value"], math.inf if v["stderr"] is None else v["stderr"], v["items"]
                )
                for k, v in fields["tasks"].items()
            },
            average=statistics.average(scores),
            items={task: numbers for task, (numbers, _, _) in items.items()},
            scores=scores,
            p_gold={task: p for task, (_, _, p) in items.items() if not np.isnan(p).any()},
            samples=tuple(
                (sample["prompt"], sample["text"]) for sample in fields.get("samples", ())
            ),
            made=tuple(fields.get("made", {}).values()),
        )

    @cached_property
    def confidence(self) -> Mean | None:
        """The average of p of the right answer."""
        return statistics.average(self.p_gold) if self.p_gold else None

    @property
    def perplexity(self) -> float:
        return self.heldout.perplexity


@dataclass(frozen=True, eq=False)
class Option:
    """A model to choose: the dense one, or a pruned one."""

    name: str
    method: str
    plan: Plan | None
    """None for the dense model."""
    model: Model
    dense: Model
    timed: Race | None
    """The timing of the model and the dense one in turns."""
    calibration_perplexity: float | None
    """The perplexity on the calibration rows; None where it was not known when the plan was
    made."""
    curve: tuple[float, ...] = ()
    """Perplexities on the calibration rows: of the dense model, and after each removal, as far as
    known. Empty where there is no sequence of removals."""

    @property
    def ratio(self) -> float:
        """Share of the parameters removed."""
        return self.plan.ratio if self.plan else 0.0

    @property
    def healing(self) -> tuple[str, ...]:
        """What was done to the weights that are left, in order."""
        return ()

    @property
    def taken_out(self) -> str:
        """For instance "3 MHA + 4 MLP"."""
        return KINDS[self.plan.kind].taken_out(self.plan) if self.plan else "nothing"

    @property
    def race(self) -> Race:
        assert self.timed is not None, self.name
        return self.timed

    @property
    def speedup(self) -> float:
        """The speed-up of generation over the dense model."""
        return self.race.speedups["generation"].value

    @property
    def heldout_rise(self) -> float:
        """ln(PPL / dense PPL) on the held-out text, nats per token."""
        return math.log(self.model.perplexity / self.dense.perplexity)

    @cached_property
    def heldout(self) -> Effect:
        """PPL / dense PPL on the held-out text, from paired rows."""
        return statistics.loss(self.dense.heldout.row_nll, self.model.heldout.row_nll)

    @cached_property
    def by_kind(self) -> Mapping[str, tuple[float, Effect]]:
        """PPL, and PPL / dense PPL, on each kind of held-out text; empty where it is of one."""
        dense, own = self.dense.heldout, self.model.heldout
        return statistics.losses_by_kind(dense.row_nll, own.row_nll, dense.row_kind)


def read_results(folder: Path) -> dict[str, Any]:
    """Read results.json and speed.json of a folder of evidence; raises InputError if one is missing
    or damaged."""
    return {**read_json(folder / "results.json"), **read_json(folder / "speed.json")}


def read_items(folders: Sequence[Path], metrics: Mapping[str, str]) -> dict[str, Items]:
    """Read the items of each model, in one order, from folders of evidence; `metrics` names the
    metric of each task that is read. Raises InputError if models were evaluated on different items,
    or a file is missing or damaged."""
    read = (
        read_table(folder / "items.parquet", ITEMS)[0].drop(["loglikelihoods"])
        for folder in folders
    )
    tables = {folder.name: table.to_pandas() for folder, table in zip(folders, read, strict=True)}
    found: dict[str, Items] = {model: {} for model in tables}
    first, *others = tables
    for task, metric in metrics.items():
        for model, table in tables.items():
            own = table[table["task"] == task].sort_values("item")
            scores, p_gold = own[metric].to_numpy(float), own["p_gold"].to_numpy(float)
            found[model][task] = own["item"].to_numpy(), scores, p_gold
        for model in others:
            if not np.array_equal(found[model][task][0], found[first][task][0]):
                why = (
                    f"{model} and {first} were evaluated on different items of {task}, so they"
                    " cannot be compared"
                )
                message = f"{folders[0].parent}: {why}; run `dvc repro` to evaluate both alike"
                raise InputError(message, rule="different-items")
    return found
