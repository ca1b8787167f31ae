"""A new model from a form of the UI: its run file is written, and it is made.

Decides what the form asks for, and what no form may ask for (a place outside the workspace, code of
a model's repository). What a run file may hold is decided by blockpruner.config.params, and how a
model is made by flows.prune.
"""

from pathlib import Path
from typing import Any

import yaml
from prefect import flow
from prefect.client.schemas.objects import State
from pydantic import Field

from blockpruner.config.params import load_run
from blockpruner.core.errors import InputError
from blockpruner.core.settings import Frozen, merged, source_of
from blockpruner.inputs.sources import named_sources
from blockpruner.methods.recipes import RECOMMENDED, sections
from blockpruner.store.files import write_text
from flows.prune import build
from flows.selection import BUDGETS, Chosen, Selection, choose

RUNS = Path("runs")
HEAD = "# yaml-language-server: $schema=schema.json\n# Written by the form of a new model.\n"
WHERE = (
    "a folder or file of the workspace, a name on the hub (NAME@REVISION), or a name in a"
    " sources.yaml"
)


class NewModel(Frozen):
    """A model that has no run file yet. What is left out has the defaults of the command."""

    name: str = Field(description="The run file becomes `runs/<name>.yaml`.")
    model: str = Field(description=f"The dense model: {WHERE}.")
    budgets: tuple[str, ...] = Field(min_length=1, description=f"How far to prune: {BUDGETS}.")
    texts: str | None = Field(
        default=None,
        description=(
            f"Your texts, half of those that decide: {WHERE}. None: ours alone, eight kinds."
        ),
    )
    heldout: str | None = Field(
        default=None,
        description=f"What perplexity is measured on: {WHERE}. None: WikiText-2 from the hub.",
    )
    method: str = Field(
        default=RECOMMENDED,
        description=f"{RECOMMENDED}, blockpruner (the paper's), or a search of docs/methods.md.",
    )
    train: bool = Field(
        default=False, description="Whether all weights are then distilled, on the texts above."
    )
    more: dict[str, Any] = Field(
        default={},
        description=(
            'Any other keys of the run file (docs/methods.md), such as {"compensate": {"num_rows":'
            " 512}}. They replace what the form says."
        ),
    )
    push: str | None = Field(default=None, description=Selection.model_fields["push"].description)
    share: str | None = Field(default=None, description=Selection.model_fields["share"].description)

    @property
    def selection(self) -> Selection:
        return Selection(runs=(self.name,), budgets=self.budgets, train=self.train)

    def text(self) -> str:
        named = named_sources(RUNS)
        data = None if self.texts is None else source_of(self.texts, named)
        run_sections = sections(
            self.method, data=data, calibration={}, score={}, train="all" if self.train else None
        )
        values = {"model": source_of(self.model, named), **run_sections}
        if self.heldout is not None:
            values["evaluate"] = {"perplexity": {"data": source_of(self.heldout, named)}}
        values = merged(values, self.more)
        require_inside(values)
        return HEAD + yaml.safe_dump(values, sort_keys=False, allow_unicode=True)


def require_inside(values: Any) -> None:
    """Refuse what no form may ask for, at any depth of a run file's values."""
    if isinstance(values, list):
        for value in values:
            require_inside(value)
    if not isinstance(values, dict):
        return
    for key, value in values.items():
        require_inside(value)
        # Who reaches the form need not own the machine: code of others is for a file on it.
        if key == "trust_remote_code" and value is not False:
            raise InputError(
                "trust_remote_code: a form cannot allow it; write a run file by hand",
                rule="form-trust",
            )
        if key != "path":
            continue
        path = Path(str(value)).expanduser().resolve()
        if not path.is_relative_to(Path.cwd().resolve()):
            message = (
                f"path {value!r} leads out of the workspace; put a copy inside, or write a run file"
                " by hand"
            )
            raise InputError(message, rule="form-path")


def add(form: NewModel) -> Chosen:
    """Write the run file and choose its targets; if that is refused, the file is not there."""
    text = form.text()
    run = load_run(form.name, RUNS, text)
    file = RUNS / f"{form.name}.yaml"
    is_new = not file.exists()
    # The same form sent again is the same run; another one would change what the name means.
    if not is_new and load_run(form.name, RUNS) != run:
        raise InputError(
            f"{file} is there and has other settings; choose another name", rule="run-taken"
        )
    if is_new:
        write_text(file, text)
    try:
        return choose(form.selection)
    except InputError:
        # The name stays free for the corrected form.
        if is_new:
            file.unlink()
        raise


@flow(name="new-model", flow_run_name="{form.selection.words}")
def new_model(form: NewModel) -> State[None]:
    """Write a new model's run file, and make it as the flow `prune` does."""
    return build(lambda: add(form), push=form.push, share=form.share)
