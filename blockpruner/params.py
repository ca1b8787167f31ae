"""params.yaml and runs/<name>.yaml as frozen values.

Decides which keys exist and which combinations make sense. Components take plain values and never import
this module; registries (search methods, benchmarks, families) check their own names.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ValidationError

from blockpruner.core.errors import InputError
from blockpruner.core.settings import NAME, Params, Run, Sets

T = TypeVar("T", bound=BaseModel)
NO_RUNS = frozenset({"dvc", "sets"})
"""Files of runs/ that are something else: the pipeline of studies, and the sets of them."""


def load_params(path: Path = Path("params.yaml")) -> Params:
    """Read params.yaml; raises InputError that names file, key, value and the valid ones."""
    params = _load(path, Params)
    for name, target in params.targets.items():
        if target.recover and load_run(target.run).recover is None:
            raise InputError(
                f"{path}: target {name!r} has recover: true, but runs/{target.run}.yaml has no recover section; add "
                "one (at least recover: {data: ...}, as in runs/llama2-7b.yaml), or set recover: false"
            )
        formats = ("hf",) if target.recover else load_run(target.run).export if target.push else ()
        if target.push and target.push.format not in formats:
            raise InputError(
                f"{path}: target {name!r} pushes {target.push.format}, and what is written of it is "
                f"{', '.join(formats)}; set push.format to one of them, or add it to export of runs/{target.run}.yaml"
            )
    return params


def run_names(directory: Path = Path("runs")) -> list[str]:
    return sorted({path.stem for path in directory.glob("*.yaml")} - NO_RUNS)


def load_run(name: str, directory: Path = Path("runs")) -> Run:
    """Read runs/<name>.yaml."""
    if name in NO_RUNS:
        raise InputError(f"run name {name!r} is taken: runs/{name}.yaml is no run")
    if not NAME.fullmatch(name):
        raise InputError(f"run name {name!r} is not valid: letters, digits, '.', '_' and '-' only, no path")
    path = directory / f"{name}.yaml"
    if not path.exists():
        known = ", ".join(run_names(directory)) or "none"
        raise InputError(f"run {name!r} is unknown: {path} does not exist; existing runs: {known}")
    return _load(path, Run)


SETS = Path("runs/sets.yaml")


def load_sets(path: Path = SETS) -> dict[str, tuple[str, ...]]:
    """Runs by set, from runs/sets.yaml."""
    return _load(path, Sets).root


def load_set(name: str, path: Path = SETS) -> dict[str, Run]:
    """The runs of a set by name; raises InputError for an unknown set, or a run of it without a study."""
    sets = load_sets(path)
    if name not in sets:
        raise InputError(f"set {name!r} is unknown; valid: {', '.join(sets)} (one more is a line in {path})")
    runs = {run: load_run(run, path.parent) for run in sets[name]}
    for run, settings in runs.items():
        if settings.study is None:
            raise InputError(f"{path}: set {name!r} names {run!r}, and runs/{run}.yaml has no study section; add one")
    return runs


def _load(path: Path, model: type[T]) -> T:
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"{path} does not exist; run in the project folder") from None
    except yaml.YAMLError as error:
        raise InputError(f"{path} is not valid YAML: {error}") from error
    try:
        return model.model_validate(values)
    except ValidationError as error:
        raise InputError("\n".join(_describe(path, model, values, e) for e in error.errors())) from error


def _describe(path: Path, model: type[BaseModel], values: Any, error: Mapping[str, Any]) -> str:
    where = ".".join(str(part) for part in error["loc"])
    if error["type"] == "extra_forbidden":
        valid = ", ".join(_valid_keys(model, error["loc"]))
        return f"{path}: unknown key {where!r}; valid keys there: {valid}"
    message = str(error["msg"]).removeprefix("Value error, ")
    given = "" if error["type"] in ("value_error", "missing") else f" (given: {error.get('input')!r})"
    return f"{path}: {where or 'file'}: {message}{given}"


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
