"""What was measured of models: sizes, texts, tasks and speed, and how a pruned model stands against
its dense one.

Decides how the files of an evaluation become values, for the report of targets and for the paper's
tables alike. An `Option` is one model to choose. Signs of failed pruning are found in `findings`.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import product
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

PHASES = ("prefill", "decode", "generation")
"""Phases of a timed generation: the prompt, the other new tokens, both together."""


@dataclass(frozen=True, eq=False)
class TaskItems:
    """The items of one task."""

    numbers: NDArray[Any]
    scores: Floats
    """In the task's metric."""
    p_gold: Floats
    """p of their right answers, NaN without one."""


Items = dict[str, TaskItems]
"""By task."""


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
    """What was measured on the held-out text."""

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

    @classmethod
    def of(cls, fields: Mapping[str, Any]) -> Self:
        """Read what an evaluation wrote of a task."""
        stderr = math.inf if fields["stderr"] is None else fields["stderr"]
        return cls(fields["value"], stderr, fields["items"])


@dataclass(frozen=True, eq=False)
class Timings:
    """What the repeats of one model took."""

    seconds: Mapping[str, tuple[float, ...]]
    """The seconds of each repeat, by phase."""
    tokens: Mapping[str, int]
    """How many tokens a phase of one repeat processes, over the whole batch."""
    cache_bytes: int
    memory_bytes: int
    """The peak while generating; on a CPU the sum of weights and KV cache."""
    setting: str
    """What was timed, and on what, in words."""

    @classmethod
    def of(cls, fields: Mapping[str, Any]) -> Self:
        """Read what `evaluation.speed` wrote of one model."""
        prompt, new, batch = fields["prompt_tokens"], fields["new_tokens"], fields["batch"]
        # Prefill gives the first of the new tokens.
        tokens = {"prefill": prompt, "decode": new - 1, "generation": new}
        return cls(
            seconds={phase: tuple(fields[f"{phase}_seconds"]["samples"]) for phase in PHASES},
            tokens={phase: batch * count for phase, count in tokens.items()},
            cache_bytes=fields["kv_cache_bytes"],
            memory_bytes=fields["peak_memory_bytes"],
            setting=(
                f"{prompt} prompt and {new} new tokens, batch {batch}, {fields['repeats']} repeats"
                f" in turns with the dense model, {fields['device']}, {fields['dtype']},"
                f" {fields['threads']} threads"
            ),
        )

    def median(self, phase: str) -> float:
        return median(self.seconds[phase])

    def rate(self, phase: str) -> float:
        """Tokens per second, from the median."""
        return self.tokens[phase] / self.median(phase)


@dataclass(frozen=True, eq=False)
class Race:
    """A model and the dense one, timed in turns. The dense model races against itself."""

    dense: Timings
    pruned: Timings

    @classmethod
    def of(cls, fields: Mapping[str, Any]) -> Self:
        """Read what a measurement wrote of both, or of the dense model alone."""
        # The dense model is timed alone, and its speed-up is 1.
        pruned = fields.get("pruned", fields["dense"])
        return cls(Timings.of(fields["dense"]), Timings.of(pruned))

    @cached_property
    def speedups(self) -> Mapping[str, Effect]:
        """Quotients of the medians, by phase; above 1 is faster than dense. Of one repeat an
        interval is infinite."""
        speedups = {}
        for phase in PHASES:
            dense, pruned = self.dense.seconds[phase], self.pruned.seconds[phase]
            # One repeat says nothing of its spread.
            if len(dense) == 1:
                speedup = dense[0] / pruned[0]
                speedups[phase] = Effect(speedup, Interval(0, math.inf), 1.0)
            else:
                speedups[phase] = statistics.ratio_of_medians(dense, pruned)
        return speedups


@dataclass(frozen=True, eq=False)
class Model:
    """What was measured of a model."""

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
    provenance: tuple[Mapping[str, str], ...] = ()
    """Where and when each of this was computed; empty where it was not recorded."""

    @classmethod
    def of(cls, fields: Mapping[str, Any], items: Items) -> Self:
        """Read the facts that an evaluation wrote of one model."""
        scores: dict[str, Floats] = {}
        p_gold: dict[str, Floats] = {}
        for task, values in items.items():
            scores[task] = values.scores
            # Generated answers have no log-likelihood of the right one.
            if not np.isnan(values.p_gold).any():
                p_gold[task] = values.p_gold
        text = fields["perplexity"]
        heldout = Text(
            text["perplexity"],
            text["rows"],
            text["tokens"],
            tuple(text.get("row_nll", ())),
            tuple(text.get("row_kind", ())),
        )
        samples = [(sample["prompt"], sample["text"]) for sample in fields.get("samples", ())]
        return cls(
            parameters=fields["parameters"],
            weight_bytes=fields["weight_bytes"],
            heldout=heldout,
            tasks={task: TaskScore.of(values) for task, values in fields["tasks"].items()},
            average=statistics.average(scores),
            items={task: values.numbers for task, values in items.items()},
            scores=scores,
            p_gold=p_gold,
            samples=tuple(samples),
            provenance=tuple(fields.get("made", {}).values()),
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
        return KINDS[self.plan.kind].removed_words(self.plan) if self.plan else "nothing"

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
        dense, pruned = self.dense.heldout, self.model.heldout
        return statistics.losses_by_kind(dense.row_nll, pruned.row_nll, dense.row_kind)


def read_results(folder: Path) -> dict[str, Any]:
    """Read results.json and speed.json of a folder of evidence; raises InputError if one is missing
    or damaged."""
    return {**read_json(folder / "results.json"), **read_json(folder / "speed.json")}


def read_items(folders: Sequence[Path], metrics: Mapping[str, str]) -> dict[str, Items]:
    """Read the items of each model, in one order, from folders of evidence; `metrics` names the
    metric of each task that is read. Raises InputError if models were evaluated on different items,
    or a file is missing or damaged."""
    models: dict[str, Items] = {}
    for folder in folders:
        # Log-likelihoods are most of the file, and no statistic needs them.
        table, _ = read_table(folder / "items.parquet", ITEMS)
        frame = table.drop(["loglikelihoods"]).to_pandas().sort_values("item")
        items: Items = {}
        for task, metric in metrics.items():
            rows = frame[frame["task"] == task]
            numbers, scores = rows["item"].to_numpy(), rows[metric].to_numpy(float)
            items[task] = TaskItems(numbers, scores, rows["p_gold"].to_numpy(float))
        models[folder.name] = items
    reference = folders[0].name
    # Differences are paired item by item, so every model needs the same items.
    for name, task in product(models, metrics):
        numbers, expected = models[name][task].numbers, models[reference][task].numbers
        if not np.array_equal(numbers, expected):
            message = f"{name} and {reference} were evaluated on different items of {task}"
            raise InputError(
                f"{folders[0].parent}: {message}, so they cannot be compared; run `dvc repro` to"
                " evaluate both alike",
                rule="different-items",
            )
    return models
