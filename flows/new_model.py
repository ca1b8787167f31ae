"""A new model from a form of the UI: its run file is written, and it is made.

Decides what the form asks for, what no form may ask for (a place outside the workspace, code of a model's repository),
and when the file is written. What a run file may hold is decided by blockpruner.params, and how a model is made by
flows.prune.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

import yaml
from prefect import flow
from prefect.client.schemas.objects import State
from prefect.flow_runs import suspend_flow_run
from prefect.states import Failed
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError
from pydantic.json_schema import SkipJsonSchema

from blockpruner.checkpoints.registry import EXPORTS
from blockpruner.core.errors import InputError
from blockpruner.core.settings import (
    NAME,
    Calibration,
    CompensationMethod,
    Frozen,
    HubModel,
    HubTexts,
    LocalModel,
    LocalTexts,
    Model,
    Run,
    Texts,
    ZeroShot,
)
from blockpruner.inputs.calibration import check_context
from blockpruner.inputs.checkpoints import fetch_config
from blockpruner.methods.recipes import RECIPES, RECOMMENDED, recipe
from blockpruner.methods.registry import method_names, require_budgets
from blockpruner.params import load_run, named_sources
from blockpruner.store.files import write_text
from flows.dvc import require_remote
from flows.prune import build
from flows.selection import BUDGETS, Chosen, Selection, check_budgets, choose

RUNS = Path("runs")
PINS = RUNS / "pins.json"
HEAD = "# yaml-language-server: $schema=schema.json\n# Written by the form of a new model.\n"


def as_in(model: type[BaseModel], name: str) -> Any:
    """A field with the limits, the default and the words that it has in the settings."""
    return copy.copy(model.model_fields[name])


def offer(names: Callable[[], list[str]]) -> Callable[[dict[str, Any]], None]:
    """Give a field, or its items, the names to choose from that there are when the form is made."""

    def put(schema: dict[str, Any]) -> None:
        schema.get("items", schema)["enum"] = names()

    return put


def sources_of(kind: Any) -> Callable[[], list[str]]:
    """The names in runs/sources.yaml whose keys are a source of this kind."""

    def fits(values: Any) -> bool:
        try:
            TypeAdapter(kind).validate_python(values)
        except ValidationError:
            return False
        return True

    return lambda: sorted(name for name, values in named_sources().items() if fits(values))


class HubRepository(HubModel):
    """A repository of the Hugging Face hub."""

    model_config = ConfigDict(title="Hub")
    source: SkipJsonSchema[Literal["hub"]] = "hub"
    trust_remote_code: SkipJsonSchema[Literal[False]] = False


class Folder(LocalModel):
    """A folder inside the workspace."""

    model_config = ConfigDict(title="Folder")
    source: SkipJsonSchema[Literal["path"]] = "path"
    trust_remote_code: SkipJsonSchema[Literal[False]] = False


class NamedModel(Frozen):
    """A source of runs/sources.yaml."""

    model_config = ConfigDict(title="Named source")
    source: str = Field(json_schema_extra=offer(sources_of(Model)))


class HubDataSet(HubTexts):
    """A data set of the Hugging Face hub."""

    model_config = ConfigDict(title="Hub")
    source: SkipJsonSchema[Literal["hub"]] = "hub"


class TextFile(LocalTexts):
    """A file inside the workspace: .jsonl, .json or .parquet records with a "text", or a .txt file."""

    model_config = ConfigDict(title="File")
    source: SkipJsonSchema[Literal["path"]] = "path"


class NamedTexts(Frozen):
    """A source of runs/sources.yaml."""

    model_config = ConfigDict(title="Named source")
    source: str = Field(json_schema_extra=offer(sources_of(Texts)))


class NewModel(Frozen):
    """A model that has no run file yet. What is left out has the paper's setting."""

    # Prefect's form takes the first part of a union that has most of a value's keys: those with fewer keys come first.
    name: str = Field(pattern=f"^{NAME.pattern}$", description="The run file becomes `runs/<name>.yaml`.")
    model: NamedModel | Folder | HubRepository = Field(description="The dense model.")
    budgets: tuple[str, ...] = Field(
        min_length=1, description=f"How far to prune: {BUDGETS}.", json_schema_extra=check_budgets
    )
    texts: NamedTexts | TextFile | HubDataSet | None = Field(
        default=None, description="What the blocks are scored on. None: Alpaca from the hub."
    )
    num_samples: int = Field(default=Calibration().samples, ge=1, description="How many of these texts are drawn.")
    seq_len: int = as_in(Calibration, "seq_len")
    method: str = Field(
        default=RECOMMENDED,
        description=f"{RECOMMENDED} is floating search, lazy + race, with refit; blockpruner is the paper's "
        "(docs/methods.md).",
        json_schema_extra=offer(lambda: [*RECIPES, *method_names()]),
    )
    compensate: CompensationMethod | None = Field(
        default=None,
        description="How the weights that are left make up for what is gone, without training. None: refit with the "
        f"method {RECOMMENDED}, else not at all.",
    )
    recover: bool = Field(default=False, description="Whether the model is trained after that, on the texts above.")
    heldout: NamedTexts | TextFile | HubDataSet | None = Field(
        default=None, description="What perplexity is measured on. None: WikiText-2 from the hub."
    )
    tasks: str = Field(
        default="hub",
        description="Where the items of the benchmarks are: the hub, or a source of runs/sources.yaml.",
        json_schema_extra=offer(lambda: ["hub", *sources_of(ZeroShot.model_fields["data"].annotation)()]),
    )
    export: tuple[str, ...] = Field(
        default=("hf",),
        description=f"{Run.model_fields['export'].description} Keep hf, which is benchmarked.",
        json_schema_extra=offer(lambda: list(EXPORTS)),
    )
    more: dict[str, Any] = Field(
        default={},
        description='Any other keys of the run file (docs/methods.md), such as {"score": {"unit": "layer"}}. They '
        "replace what the form says.",
    )
    push: str | None = as_in(Selection, "push")
    wait: bool = Field(
        default=True, description="Show what the search takes, then wait (Suspended) for Resume on the run's page."
    )

    def text(self) -> str:
        """The run file."""
        chosen = recipe(self.method, compensation=self.compensate)
        drawn = {"num_samples": self.num_samples, "seq_len": self.seq_len}
        values = {
            "model": _source(self.model),
            "calibration": ({} if self.texts is None else {"data": _source(self.texts), "split": "all"}) | drawn,
            "score": {"method": chosen.method, "acceleration": chosen.acceleration},
            "compensate": {"method": chosen.compensation},
            "evaluate": {
                **({} if self.heldout is None else {"perplexity": {"data": _source(self.heldout)}}),
                "zero_shot": {"data": {"source": self.tasks}},
            },
            **({"recover": {} if self.texts is None else {"data": _source(self.texts)}} if self.recover else {}),
            "export": list(self.export),
        }
        values = merged(values, self.more)
        require_inside(values)
        return HEAD + yaml.safe_dump(values, sort_keys=False, allow_unicode=True)


def _source(source: BaseModel) -> dict[str, Any]:
    return source.model_dump(mode="json", exclude_none=True)


def merged(values: Mapping[str, Any], more: Mapping[str, Any]) -> dict[str, Any]:
    """Values of which those in `more` replace the ones at the same keys; another `source` replaces all beside it."""
    found = {} if "source" in more else dict(values)
    for key, value in more.items():
        old = found.get(key)
        found[key] = merged(old, value) if isinstance(old, dict) and isinstance(value, dict) else value
    return found


def require_inside(values: Any) -> None:
    """Refuse what no form may ask for, at any depth of a run file's values.

    Raises:
        InputError: a path that leads out of the workspace, or trust in a repository's code.
    """
    if isinstance(values, list):
        for value in values:
            require_inside(value)
    for key, value in values.items() if isinstance(values, dict) else ():
        require_inside(value)
        if key == "trust_remote_code" and value is not False:
            raise InputError("trust_remote_code: a form cannot allow it; write a run file by hand")
        if key == "path" and not Path(str(value)).expanduser().resolve().is_relative_to(Path.cwd().resolve()):
            raise InputError(
                f"path {value!r} leads out of the workspace; put a copy inside, or write a run file by hand"
            )


def check(form: NewModel, text: str) -> Run:
    """The settings that the run file is going to hold; raises InputError as for a file, or if another one is there."""
    run = load_run(form.name, RUNS, text)
    if form.push is not None:
        require_remote(form.push)
    if file_of(form).exists() and load_run(form.name, RUNS) != run:
        raise InputError(f"{file_of(form)} is there and has other settings; choose another name")
    return run


def file_of(form: NewModel) -> Path:
    return RUNS / f"{form.name}.yaml"


def require_fit(form: NewModel, run: Run) -> None:
    """Refuse what the model's shape forbids; a model that is not yet at hand passes."""
    if isinstance(run.model, HubModel | LocalModel):
        config = fetch_config(run.model, PINS)
        check_context(run.calibration.seq_len, config, "calibration.seq_len")
        check_context(run.evaluate.perplexity.seq_len, config, "evaluate.perplexity.seq_len")
        require_budgets(run.score, config, form.budgets)


def add(form: NewModel, text: str) -> Chosen:
    """Write the run file and choose its targets; if that is refused, the file is not there."""
    check(form, text)  # somebody may have written it meanwhile
    file = file_of(form)
    is_new = not file.exists()
    if is_new:
        write_text(file, text)
    try:
        return choose(Selection(runs=(form.name,), budgets=form.budgets, recover=form.recover, push=form.push))
    except InputError:
        if is_new:
            file.unlink()
        raise


@flow(name="new-model")
def new_model(form: NewModel) -> State[None]:
    """Check a new model, write its run file, and make it as the flow `prune` does."""
    try:
        text = form.text()
        run = check(form, text)
        require_fit(form, run)
    except InputError as error:
        return Failed(name="Refused", message=str(error))
    if form.wait and not file_of(form).exists():  # Retry does not ask again
        suspend_flow_run(key="estimate")
    return build(lambda: add(form, text), form.push)
