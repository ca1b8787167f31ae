"""The section `study`: what the tables of the paper vary over a run."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from blockpruner.core.budgets import read_budget
from blockpruner.core.settings import Frozen, HubTexts
from blockpruner.evaluation.settings import Speed, WikiText


class Budgets(Frozen):
    """One amount of pruning, as a budget of each kind of method."""

    block: str
    """Of methods that remove blocks."""
    layer: str
    """Of methods that remove layers."""
    width: str | None = None
    """Of methods that remove width; null for none, as for families that SliceGPT does not know."""

    @field_validator("block", "layer", "width")
    @classmethod
    def _budget(cls, value: str | None) -> str | None:
        if value is not None:
            read_budget(value)
        return value


PAPER_CALIBRATIONS: dict[str, dict[str, Any]] = {
    "16 samples": {"num_samples": 16, "seq_len": 512},  # they are less than one row of 2048
    "64 samples": {"num_samples": 64},
    "1024 samples": {"num_samples": 1024},
    "rows of 512": {"seq_len": 512},
    "samples apart": {"packing": "per_sample"},
    "encyclopaedia": {
        "data": HubTexts(source="hub", repo="Salesforce/wikitext", config="wikitext-2-raw-v1").model_dump(),
        "split": "all",
    },
}
"""Those of Figure 7 of the paper, and what the figure leaves open."""


PAPER_TASKS = (
    "truthfulqa_mc1", "race", "swag", "openbookqa", "agieval_aqua_rat", "lambada_openai", "mmlu_high_school_biology",
    "mmlu_high_school_geography", "mmlu_marketing", "mmlu_miscellaneous", "mmlu_world_religions", "gsm8k",
)  # fmt: skip
"""Those of Tables 8 and 10 of the paper, and since choices hide damage, answers that are generated."""


class Healing(Frozen):
    """Models of a study whose weights are healed, and which are measured beside the plain ones."""

    methods: tuple[str, ...]
    """Names of `experiments.METHODS` that remove blocks."""
    budgets: tuple[str, ...]
    """Beside those that these methods search for anyway."""
    compensate: Literal["scale", "bias", "map", "refit"] = "refit"
    """The rest is the run's `compensate`."""
    train: bool = False
    """Whether the model is trained after that, by the run's `train`."""


class Study(Frozen):
    """What the tables of the paper vary over a run. `experiments` decides which table needs what."""

    methods: tuple[str, ...] | None = None
    """Names of `experiments.METHODS`, null for all."""
    main: Budgets
    """Of Tables 1 and 2."""
    race: Budgets | None = None
    """Of Table 6; null: those of `main`."""
    metric: tuple[str, ...] = ()
    """Budgets of Table 4."""
    js: tuple[str, ...] | None = None
    """Those of its searches by Jensen-Shannon divergence, one for each of `metric`; null: the same."""
    curve: tuple[str, ...] = ("0.05", "0.10", "0.15", "0.20", "0.25", "0.30")
    """Budgets of Figure 10 and Table 9."""
    partial: tuple[str, ...] = ("0.05", "0.10", "0.15")
    """Budgets of Figures 4 and 6, where blocks of one kind alone are removed."""
    high: tuple[Budgets, ...] = ()
    """Of Table 5."""
    sensitivity: str = Field(default_factory=lambda given: given["main"].block)
    """The budget at which the sets of `calibrations` are compared; by default `main.block`."""
    seeds: tuple[int, ...] = (43, 44)
    """Of calibration, beside its own."""
    calibrations: dict[str, dict[str, Any]] = PAPER_CALIBRATIONS
    """By name, the keys of `calibration` that each changes."""
    options: dict[str, dict[str, bool | int | float | str | tuple[str | int, ...] | None]] = {}  # noqa: RUF012
    """By method, in place of `score.options`."""
    samples: dict[str, Annotated[int, Field(ge=1)]] = {"laco": 40}  # noqa: RUF012
    """By method, in place of `calibration.num_samples`."""
    rows: dict[str, Annotated[int, Field(ge=1)]] = {"slicegpt": 1024}  # noqa: RUF012
    """By method, its `calibration.num_rows`: joined rows of all texts, every token of which counts."""
    heal: tuple[Healing, ...] = ()
    """What is compensated and trained, which the paper leaves open."""
    tasks: tuple[str, ...] = PAPER_TASKS
    """For the dense and the main models, beside those of `evaluate.zero_shot`."""
    tasks_limit: int | None = Field(default=None, ge=1)
    """How many items of each of these tasks are scored, null for all."""
    wikitext: WikiText | None = None
    speed: Speed | None = Speed(prompt_tokens=512)
    """Of the curves; Table 6 is `evaluate.speed`. null: not timed."""

    @field_validator("metric", "js", "curve", "partial")
    @classmethod
    def _budgets(cls, value: tuple[str, ...] | None) -> tuple[str, ...] | None:
        for text in value or ():
            read_budget(text)
        return value

    @model_validator(mode="after")
    def _pairs_of_table_4(self) -> Study:
        if self.js is not None and len(self.js) != len(self.metric):
            raise ValueError(
                f"js: has {len(self.js)} budgets, and metric {len(self.metric)}; give as many, or leave js out"
            )
        return self
