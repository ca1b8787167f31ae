"""params.yaml and runs/*.yaml, read and checked.

Only stages and flows read these files. Everything else gets the values of `settings`.
"""

from collections.abc import Collection
from functools import cache
from pathlib import Path
from typing import Any

from blockpruner.checks import check_run, check_target
from blockpruner.core.errors import InputError, named
from blockpruner.core.settings import NAME, T, read_settings
from blockpruner.inputs.sources import named_sources, read_yaml, with_sources
from blockpruner.methods.recipes import RECIPES, completed, names
from blockpruner.methods.registry import method_names, row_of
from blockpruner.settings import Params, Run, Sections, Target, resolve

NO_RUNS = frozenset({"sources"})
"""Files of runs/ that are something else: sources by name."""


def load_params(path: Path = Path("params.yaml"), text: str | None = None) -> Params:
    """Read params.yaml, or check what it is going to hold; raises InputError that names key, value
    and valid ones."""
    params = read_settings(Params, read_yaml(path, text), f"{path}: ")
    run_of = cache(load_run)
    for name, target in params.targets.items():
        # it has keys that must fit its run
        if target != Target(run=target.run, budget=target.budget):
            with named(f"{path}: target {name!r}: "):
                check_target(run_of(target.run), target)
    return params


def load_run(name: str, directory: Path = Path("runs"), text: str | None = None) -> Run:
    """Read runs/<name>.yaml, or check the `text` that it is going to hold."""
    if name in NO_RUNS or not NAME.fullmatch(name):
        message = (
            f"run name {name!r} is not valid: at most 100 letters, digits, '_' and '-', and"
            " none of "
        )
        raise InputError(message + ", ".join(sorted(NO_RUNS)), rule="run-name", value=name)
    path = directory / f"{name}.yaml"
    if text is None and not path.exists():
        known = (
            ", ".join(sorted({file.stem for file in directory.glob("*.yaml")} - NO_RUNS)) or "none"
        )
        message = f"run {name!r} is unknown: {path} does not exist; existing runs: {known}"
        raise InputError(message, rule="unknown-run", value=name)
    run = read_settings(
        Run, with_sources(completed(read_values(path, text)), named_sources(directory)), f"{path}: "
    )
    with named(f"{path}: "):
        check_run(run)
    return run


def read_values(path: Path, text: str | None = None) -> dict[str, Any]:
    """The values of a run file, with those of each named source."""
    found = with_sources(read_yaml(path, text), named_sources(path.parent), f"{path}: ")
    if not isinstance(found, dict):
        raise InputError(f"{path} is no run file: it holds no keys", rule="yaml")
    return found


def load_sections(run: str) -> Sections:
    """The settings of a run as its stages read them, from the files of the current folder."""
    return resolve(load_run(run), load_params().targets_of(run))


def read_file(path: Path, model: type[T]) -> T:
    """Read a YAML file of settings; raises InputError that names file, key, value and the valid
    ones."""
    return read_settings(model, read_yaml(path), f"{path}: ")


def run_schema(named: Collection[str]) -> dict[str, Any]:
    """The JSON schema of a run file, in which a source may also be one of the names."""
    found = Run.model_json_schema()
    found["$defs"]["Named"] = {
        "description": "A source by its name. Keys beside the name replace its own.",
        "properties": {"source": {"enum": sorted(named)}},
        "required": ["source"],
        "type": "object",
    }
    score = found["$defs"]["Score"]
    score["properties"]["method"]["enum"] = names()
    paper = ", ".join(name for name, one in RECIPES.items() if one.published)
    found["properties"]["calibration"] |= {
        "default": completed({})["calibration"],
        "description": (
            f"Without `data`, its default. For these methods it is the paper's set: {paper}."
        ),
    }
    score["allOf"] = [  # the options of each method
        {
            "if": {"properties": {"method": {"const": name}}},
            "then": {"properties": {"options": row_of(name).options.model_json_schema()}},
        }
        for name in method_names()
    ]
    parts = [*found["$defs"].values(), found]
    for field in (field for part in parts for field in part.get("properties", {}).values()):
        field = field.get("items", field)
        if field.pop("discriminator", None) and named:
            field["oneOf"].append({"$ref": "#/$defs/Named"})
    return found
