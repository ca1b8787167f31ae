"""params.yaml and runs/*.yaml, read and checked.

Only stages and flows read these files. Everything else gets the values of `settings`.
"""

from collections.abc import Collection
from functools import cache
from pathlib import Path
from typing import Any

from blockpruner.config.checks import check_run, check_target
from blockpruner.config.sections import Params, Run, Sections, Target, resolve
from blockpruner.core.errors import InputError, named
from blockpruner.core.settings import NAME, T, read_settings
from blockpruner.inputs.sources import named_sources, read_yaml, with_sources
from blockpruner.methods.recipes import RECIPES, completed, names
from blockpruner.methods.registry import method_names, row_of

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
        raise InputError(
            f"run name {name!r} is not valid: at most 100 letters, digits, '_' and '-', and none of"
            f" {', '.join(sorted(NO_RUNS))}",
            rule="run-name",
            value=name,
        )
    path = directory / f"{name}.yaml"
    if text is None and not path.exists():
        stems = {file.stem for file in directory.glob("*.yaml")} - NO_RUNS
        raise InputError(
            f"run {name!r} is unknown: {path} does not exist; existing runs:"
            f" {', '.join(sorted(stems)) or 'none'}",
            rule="unknown-run",
            value=name,
        )
    values = completed(read_values(path, text))
    run = read_settings(Run, with_sources(values, named_sources(directory)), f"{path}: ")
    with named(f"{path}: "):
        check_run(run)
    return run


def read_values(path: Path, text: str | None = None) -> dict[str, Any]:
    """The values of a run file, with those of each named source."""
    values = with_sources(read_yaml(path, text), named_sources(path.parent), f"{path}: ")
    if not isinstance(values, dict):
        raise InputError(f"{path} is no run file: it holds no keys", rule="yaml")
    return values


def load_sections(run: str) -> Sections:
    """The settings of a run as its stages read them, from the files of the current folder."""
    return resolve(load_run(run), load_params().targets_of(run))


def read_file(path: Path, model: type[T]) -> T:
    """Read a YAML file of settings; raises InputError that names file, key, value and the valid
    ones."""
    return read_settings(model, read_yaml(path), f"{path}: ")


def run_schema(named: Collection[str]) -> dict[str, Any]:
    """The JSON schema of a run file, in which a source may also be one of the names."""
    schema = Run.model_json_schema()
    definitions = schema["$defs"]
    definitions["Named"] = {
        "description": "A source by its name. Keys beside the name replace its own.",
        "properties": {"source": {"enum": sorted(named)}},
        "required": ["source"],
        "type": "object",
    }
    score = definitions["Score"]
    score["properties"]["method"]["enum"] = names()
    paper = ", ".join(name for name, recipe in RECIPES.items() if recipe.published)
    schema["properties"]["calibration"] |= {
        "default": completed({})["calibration"],
        "description": (
            f"Without `data`, its default. For these methods it is the paper's set: {paper}."
        ),
    }
    # Each method has options of its own, which a schema ties to its name.
    score["allOf"] = []
    for name in method_names():
        options = row_of(name).options.model_json_schema()
        rule = {
            "if": {"properties": {"method": {"const": name}}},
            "then": {"properties": {"options": options}},
        }
        score["allOf"].append(rule)
    for section in [*definitions.values(), schema]:
        for field in section.get("properties", {}).values():
            choice = field.get("items", field)
            # Pydantic marks a choice between kinds of source; a name is one more kind.
            if choice.pop("discriminator", None) and named:
                choice["oneOf"].append({"$ref": "#/$defs/Named"})
    return schema
