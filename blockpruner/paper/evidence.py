"""What a study measured, read from the files of its stages into values.

Decides what the tables may use: every model once, whoever's search led to it, with the scores of the same items in one
order. Comparisons of two models are computed once (`compare`). What is shown is decided in `tables`, `beyond` and
`figures`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from blockpruner.core.budgets import read_budget
from blockpruner.core.errors import InputError
from blockpruner.core.plan import Plan
from blockpruner.inputs.calibration import CalibrationSet
from blockpruner.paper import statistics
from blockpruner.paper.experiments import Variant, variants
from blockpruner.paper.published import MODELS
from blockpruner.paper.statistics import Comparison, Discordance, Floats, Interval
from blockpruner.paper.studies import DENSE, Search, load_plans, model_name
from blockpruner.reporting.inputs import RunLabels
from blockpruner.store.files import read_json

if TYPE_CHECKING:
    from blockpruner.core.settings import Run


@dataclass(frozen=True)
class Text:
    """Perplexity on one text; row_nll: mean NLL of each row, nats per token."""

    perplexity: float
    row_nll: tuple[float, ...]
    rows: int
    tokens: int
    seq_len: int


@dataclass(frozen=True)
class Score:
    """Of one task, in its main metric; stderr None: it has none."""

    metric: str
    value: float
    stderr: float | None
    items: int

    @property
    def is_accuracy(self) -> bool:
        return "perplexity" not in self.metric


@dataclass(frozen=True, eq=False)
class Pace:
    """One model's speed in one setting, fields as of `evaluation.speed.Speed`; `part`: prefill, decode, generation."""

    fields: Mapping[str, Any]

    def seconds(self, part: str) -> tuple[float, ...]:
        return tuple(self.fields[f"{part}_seconds"]["samples"])

    def median(self, part: str) -> float:
        return float(self.fields[f"{part}_seconds"]["median"])

    @property
    def new_tokens(self) -> int:
        return int(self.fields["new_tokens"])

    def tokens(self, part: str) -> int:
        """Processed in one part of a repeat, over the whole batch."""
        new, prompt = self.new_tokens, int(self.fields["prompt_tokens"])
        return int(self.fields["batch"]) * {"prefill": prompt, "decode": new - 1, "generation": new}[part]

    def rate(self, part: str) -> float:
        """Tokens per second, from the median."""
        return self.tokens(part) / self.median(part)

    def rate_interval(self, part: str) -> Interval:
        """Tokens per second; infinite where there are too few repeats."""
        found = statistics.median_interval(self.seconds(part))
        if not math.isfinite(found.low):
            return found
        return Interval(self.tokens(part) / found.high, self.tokens(part) / found.low)

    @property
    def cache_bytes(self) -> int:
        return int(self.fields["kv_cache_bytes"])

    @property
    def memory_bytes(self) -> int:
        return int(self.fields["peak_memory_bytes"])

    @property
    def setting(self) -> str:
        f = self.fields
        return (
            f"{f['prompt_tokens']} prompt and {f['new_tokens']} new tokens, batch {f['batch']}, {f['repeats']} repeats "
            f"in turns with the dense model, {f['device']}, {f['dtype']}, {f['threads']} threads"
        )


@dataclass(frozen=True, eq=False)
class Race:
    """A pruned model beside the dense one, timed in turns."""

    dense: Pace
    pruned: Pace

    @cached_property
    def speedups(self) -> Mapping[str, Comparison]:
        """By part, with intervals."""
        return {
            part: statistics.ratio_of_medians(self.dense.seconds(part), self.pruned.seconds(part))
            for part in ("prefill", "decode", "generation")
        }


@dataclass(frozen=True, eq=False)
class Model:
    """texts: "heldout" and, where measured, "wikitext2"; tasks: all that were measured; scores: of the run's own tasks,
    one score per item; races: by setting, "main" or "timed"."""

    name: str
    parameters: int
    weight_bytes: int
    texts: Mapping[str, Text]
    tasks: Mapping[str, Score]
    scores: Mapping[str, Floats]
    races: Mapping[str, Race]

    @property
    def perplexity(self) -> float:
        return self.texts["heldout"].perplexity

    @cached_property
    def average(self) -> float:
        return statistics.average(self.scores)

    @cached_property
    def stderr(self) -> float:
        return statistics.standard_error(self.scores)


@dataclass(frozen=True, eq=False)
class Entry:
    """A search's answer to a budget, and the model that it leads to."""

    variant: Variant
    budget: str
    plan: Plan
    model: Model

    @property
    def method(self) -> str:
        return self.variant.method

    @property
    def ratio(self) -> float:
        """Share of the parameters removed."""
        return self.plan.ratio

    @property
    def share(self) -> float:
        """The share of the parameters that was asked for; 0 where the budget is of another kind."""
        value, unit = read_budget(self.budget)
        return 0.0 if unit else value


@dataclass(frozen=True, eq=False)
class Evidence:
    """All that one study found. tasks: those of the average; sensitivity: at which budget calibrations are compared;
    high: the budgets of Table 5 by kind of method, in order; speeds: of the dense model, by setting."""

    dense: Model
    entries: tuple[Entry, ...]
    searches: Mapping[str, Search]
    tasks: tuple[str, ...]
    sensitivity: str
    high: tuple[Mapping[str, str], ...]
    speeds: Mapping[str, Pace]

    def of(self, method: str) -> tuple[Entry, ...]:
        """The budgets of a method, nothing else varied, the least pruned first."""
        found = (entry for entry in self.entries if entry.variant.name == method)
        return tuple(sorted(found, key=lambda entry: entry.ratio))

    def at(self, variant: str, budget: str | None) -> Entry | None:
        return next((e for e in self.entries if e.variant.name == variant and e.budget == budget), None)

    def main(self, method: str) -> Entry | None:
        """The entry of Table 1."""
        return next((e for e in self.of(method) if e.budget == e.variant.main), None)

    def varied(self, method: str, factor: str) -> tuple[Entry, ...]:
        return tuple(e for e in self.entries if e.variant.factor == factor and e.method == method)

    @cached_property
    def methods(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(entry.method for entry in self.entries))

    def timed(self, setting: str) -> tuple[Entry, ...]:
        """Those with nothing else varied that were timed in a setting, by method and ratio."""
        return tuple(e for method in self.methods for e in self.of(method) if setting in e.model.races)

    def prefix(self, variant: str, budget: float) -> tuple[str, ...] | None:
        """The units that a search had removed when it came nearest to a share of the parameters, a tie going to the
        larger; None: it did not go so far, or removes no units."""
        own = [entry for entry in self.entries if entry.variant.name == variant]
        longest = max(own, key=lambda entry: entry.ratio)
        if not self.searches[variant].order or max(entry.share for entry in own) < budget:
            return None
        ratios = longest.plan.ratios
        steps = min(range(len(ratios)), key=lambda k: (abs(ratios[k] - budget), -ratios[k])) + 1
        return longest.plan.order[:steps]


@dataclass(frozen=True, eq=False)
class Subject:
    """A run of a set. model: its name for people; paper: its model's name in the paper; evidence: None, if nothing of
    it is computed here."""

    run: str
    model: str
    paper: str | None
    labels: RunLabels
    evidence: Evidence | None


@dataclass(frozen=True)
class Contrast:
    """Two models on the same items and rows. accuracy: difference of averages, as a share; items: of which only one
    model has it right; stderr: of the difference; perplexity: ratio on held-out text."""

    accuracy: Comparison
    items: Discordance
    stderr: float
    perplexity: Comparison


@cache
def compare(base: Model, other: Model) -> Contrast:
    """other against base; each pair is computed once."""
    pooled = [np.concatenate([model.scores[task] for task in base.scores]) for model in (base, other)]
    return Contrast(
        accuracy=statistics.paired_bootstrap(base.scores, other.scores),
        items=statistics.mcnemar(*pooled),
        stderr=statistics.standard_error(statistics.differences(base.scores, other.scores)),
        perplexity=statistics.perplexity_ratio(base.texts["heldout"].row_nll, other.texts["heldout"].row_nll),
    )


def read_subject(name: str, run: Run, labels: RunLabels, folder: Path) -> Subject:
    """Read a run's study at `folder`.

    Raises:
        InputError: a part of it is missing or disagrees with another part; names the command that makes it.
    """
    source: Any = run.model
    path = Path(getattr(source, "repo", None) or getattr(source, "file", None) or str(source.path))
    paper = MODELS.get(getattr(source, "repo", ""))
    found = variants(run)
    evidence = read_evidence(name, run, found, folder) if (folder / "plans").exists() else None
    title = path.name if not path.name.endswith((".gguf", ".safetensors")) else path.stem
    return Subject(name, paper or title, paper, labels, evidence)


def read_evidence(name: str, run: Run, found: tuple[Variant, ...], folder: Path) -> Evidence:
    assert run.study is not None
    needed = {folder / "results" / "models.json": "evaluate", folder / "results" / "items.parquet": "evaluate",
              folder / "speed" / "speed.json": "speed"}  # fmt: skip
    for variant in found:
        files = ("search.json", "rows.parquet", *(f"{budget}.json" for budget in variant.budgets))
        needed |= {folder / "plans" / variant.slug / file: "search" for file in files}
    for path, stage in needed.items():
        if not path.exists():
            raise InputError(
                f"{path} does not exist; `python -m flows.paper` with a set that holds {name} makes it, or "
                f"`dvc repro runs/dvc.yaml:{stage}@{name}`"
            )
    tasks = tuple(run.evaluate.zero_shot.tasks)
    models = _models(folder, name, tasks)
    entries = []
    for variant in found:
        plans = folder / "plans"
        digest = CalibrationSet.load(plans / variant.slug / "rows.parquet").digest
        for budget, plan in load_plans(plans, variant).items():
            key = model_name(plan, digest)
            if key not in models:
                raise InputError(
                    f"{folder / 'results'} has no model {key} ({variant.name}, {budget}), so it is of other plans; "
                    f"run `dvc repro runs/dvc.yaml:evaluate@{name}`"
                )
            entries.append(Entry(variant, budget, plan, models[key]))
    speeds = {
        setting: Pace(value["dense"]) for setting, value in read_json(folder / "speed" / "speed.json")[DENSE].items()
    }
    return Evidence(
        dense=models[DENSE],
        entries=tuple(entries),
        searches={variant.name: Search.load(folder / "plans" / variant.slug) for variant in found},
        tasks=tasks,
        sensitivity=run.study.sensitivity,
        high=tuple(budgets.model_dump() for budgets in run.study.high),
        speeds=speeds,
    )


def _models(folder: Path, name: str, tasks: tuple[str, ...]) -> dict[str, Model]:
    facts = read_json(folder / "results" / "models.json")
    speeds = read_json(folder / "speed" / "speed.json")
    metrics = {task: facts[DENSE]["tasks"][task]["metric"] for task in tasks}
    scores = _scores(folder / "results" / "items.parquet", metrics, name)
    keys = ("metric", "value", "stderr", "items")
    return {
        model: Model(
            name=model,
            parameters=fields["parameters"],
            weight_bytes=fields["weight_bytes"],
            texts={
                text: Text(v["perplexity"], tuple(v["row_nll"]), v["rows"], v["tokens"], v["seq_len"])
                for text, v in fields["perplexity"].items()
            },
            tasks={task: Score(**{key: score[key] for key in keys}) for task, score in fields["tasks"].items()},
            scores=scores[model],
            races={
                setting: Race(Pace(value["dense"]), Pace(value["pruned"]))
                for setting, value in speeds.get(model, {}).items()
                if model != DENSE
            },
        )
        for model, fields in facts.items()
    }


def _scores(path: Path, metrics: Mapping[str, str], name: str) -> dict[str, dict[str, Floats]]:
    """By model and task, each task's items in one order.

    Raises:
        InputError: the file is damaged, or models were evaluated on different items.
    """
    try:
        table = pq.read_table(path, columns=["model", "task", "item", *sorted(set(metrics.values()))])
    except (pa.ArrowException, OSError) as error:
        raise InputError(f"{path} cannot be read ({error}); `dvc repro runs/dvc.yaml:evaluate@{name}`") from error
    found: dict[str, dict[str, Floats]] = {}
    for task, metric in metrics.items():
        part = table.filter(pc.equal(table["task"], task)).sort_by([("model", "ascending"), ("item", "ascending")])
        names, starts = np.unique(part["model"].to_numpy(zero_copy_only=False), return_index=True)
        items = np.split(part["item"].to_numpy(), starts[1:])
        values = np.split(part[metric].to_numpy().astype(float), starts[1:])
        for model, own, score in zip(names, items, values, strict=True):
            if not np.array_equal(own, items[0]):
                raise InputError(
                    f"{path}: {model} and {names[0]} were evaluated on different items of {task}, so they cannot be "
                    f"compared; run `dvc repro runs/dvc.yaml:evaluate@{name}`"
                )
            found.setdefault(str(model), {})[task] = score
    return found
