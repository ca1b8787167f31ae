"""A scorer without a model, and searches and scored runs over it or over a tiny model."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import median
from types import SimpleNamespace
from typing import Any, NamedTuple

from transformers import PreTrainedModel

from blockpruner.core.blocks import Mask, format_mask
from blockpruner.core.budgets import Resources, resources_of
from blockpruner.core.families import Config
from blockpruner.core.progress import Observer, SilentObserver
from blockpruner.core.settings import read_settings
from blockpruner.evaluation.speed import MeasuredSpeed, Timing
from blockpruner.inputs.calibration import CalibrationSet
from blockpruner.methods.kind import Material
from blockpruner.methods.score import score_run
from blockpruner.scoring.engine import Engine
from blockpruner.scoring.objectives import Counts
from blockpruner.scoring.settings import Score
from blockpruner.scoring.work import Rows, ScoredRows, Scorer, Span, Task
from blockpruner.search.iteration import Iteration
from blockpruner.search.registry import request
from blockpruner.search.run import search
from blockpruner.search.trace import Current
from blockpruner.store.trials import Origin, TrialStore


def small_config(layers: int) -> Config:
    """Enough of a Llama's config to count its parameters."""
    return {
        "model_type": "llama",
        "hidden_size": 8,
        "intermediate_size": 12,
        "num_hidden_layers": layers,
        "num_attention_heads": 2,
        "vocab_size": 16,
    }


def short_rows(count: int) -> CalibrationSet:
    """Calibration rows of two tokens."""
    return CalibrationSet(tuple((row, row + 1) for row in range(count)))


def by_text(loss: str, base: Mask, mask: Mask, row: int) -> float:
    """A loss that the mask's text fixes."""
    return 1 + len(mask) + sum(map(ord, format_mask(mask))) % 97 / 100


class FakeScorer:
    """A scorer without a model. It keeps what it was asked for: (loss, base, mask, row), in
    order."""

    def __init__(
        self, loss: Callable[[str, Mask, Mask, int], float] = by_text, one_row: bool = False
    ) -> None:
        """Args:
        loss: of a loss's name, what was removed before, a mask, and a row.
        one_row: batches are of one row; otherwise of all rows.
        """
        self._loss, self._one_row = loss, one_row
        self.asked: list[tuple[str, Mask, Mask, int]] = []

    def row_batches(self, rows: Rows, span: Span) -> list[Span]:
        return [(row,) for row in span] if self._one_row else [span]

    def run(self, tasks: Sequence[Task], rows: Rows) -> Iterator[ScoredRows]:
        for task in tasks:
            for mask in task.masks:
                asked = [(task.metric.name, task.base, mask, row) for row in task.span]
                self.asked += asked
                yield ScoredRows(
                    mask, task.span, tuple(self._loss(*question) for question in asked)
                )

    def origin(self) -> Origin:
        return {"device": "none", "batch_tokens": 8}

    def close(self) -> None:
        pass


class Traces(NamedTuple):
    """What a search found."""

    traces: Mapping[str, Sequence[Iteration]]
    counts: Counts

    def of(self, budget: str) -> Sequence[Iteration]:
        return self.traces.get("") or self.traces[budget]


def searched(
    model: PreTrainedModel | Scorer,
    rows: CalibrationSet,
    budgets: Sequence[str],
    resources: Resources | None = None,
    **score: Any,
) -> Traces:
    """A search over stores in memory.

    Args:
        resources: of what a scorer scores; a model's own are counted.
    """
    asked = request(read_settings(Score, {"method": "greedy", **score}))
    scorer: Any = model
    if isinstance(model, PreTrainedModel):
        scorer, resources = Engine(model, 24), resources or resources_of(model.config.to_dict())
    assert resources is not None
    stores = {loss: TrialStore({}, rows.row_keys) for loss in asked.losses}
    return Traces(*search(asked, rows, stores, scorer, resources, budgets))


def removed_in(trace: Sequence[Iteration]) -> list[str]:
    """What each iteration of a nested search removed."""
    return [format_mask(step.added[step.chosen]) for step in trace]


def material_of(
    folder: Path,
    scorer: Scorer,
    config: Config,
    *,
    identity: str = "m",
    dtype: str = "float32",
    dense: Callable[[], PreTrainedModel] | None = None,
    observer: Observer | None = None,
) -> Material:
    return Material(
        identity, dtype, config, folder / "trials", scorer, dense, observer or SilentObserver()
    )


MATERIAL = ("identity", "dtype", "dense", "observer")
"""What `scored` passes on to `material_of`."""


def scored(
    folder: Path,
    scorer: Scorer,
    config: Config,
    budgets: Sequence[str],
    rows: CalibrationSet,
    times: Mapping[str, int] | None = None,
    **score: Any,
) -> SimpleNamespace:
    """A run scored at `folder`/scores: what `score_run` counted, and the `current` search.

    Args:
        times: the measured latency.
        score: keys of a `score` section, and of `MATERIAL`.
    """
    material = material_of(
        folder, scorer, config, **{key: score.pop(key) for key in MATERIAL if key in score}
    )
    latency = None if times is None else lambda: times
    asked = read_settings(Score, {"method": "greedy", **score})
    counts = score_run(material, rows, asked, budgets, folder / "scores", latency)
    return SimpleNamespace(**counts, current=Current.load(folder / "scores"))


def speed_facts(
    seconds: Mapping[str, Sequence[float]], cache: int, memory: int, **setting: Any
) -> dict[str, Any]:
    """What a measurement of speed leaves of one model, from the seconds of each repeat by part."""
    timings = {f"{part}_seconds": Timing(median(s), tuple(s)) for part, s in seconds.items()}
    sizes = {"kv_cache_bytes": cache, "peak_memory_bytes": memory}
    rates = {"prefill_tokens_per_second": 1.0, "decode_tokens_per_second": 1.0}
    words = {"peak_memory": "weights + KV cache", "device": "cpu", "dtype": "float32"}
    return asdict(MeasuredSpeed(threads=2, **timings, **sizes, **rates, **(words | setting)))
