"""params.yaml and runs/*.yaml, read and checked.

Only stages and flows read these files. Everything else gets the values of `core.settings`.
`python -m blockpruner.params` writes runs/schema.json, by which editors complete and check run files.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import yaml

from blockpruner.checks import check_compensation, check_run
from blockpruner.core.errors import InputError
from blockpruner.core.settings import NAME, Params, Run, T, read_settings, shorten
from blockpruner.store.files import write_text

NO_RUNS = frozenset({"sources"})
"""Files of runs/ that are something else: sources by name."""

DEPTH, VALUES = 32, 100_000
"""How deep a file of settings nests at most, and how many values it holds."""

SOURCES = "sources.yaml"
KINDS = ("pypi", "pypi-parts", "hub", "path", "tasks", "mix")
"""Kinds of source: what `source` may be beside a name in runs/sources.yaml."""


def load_params(path: Path = Path("params.yaml")) -> Params:
    """Read params.yaml; raises InputError that names file, key, value and the valid ones."""
    params = read_file(path, Params)
    for name, target in params.targets.items():
        if target.recover and load_run(target.run).recover is None:
            raise InputError(
                f"{path}: target {name!r} has recover: true, but runs/{target.run}.yaml has no recover section; add "
                "one (recover: {} is the paper's recipe), or set recover: false"
            )
        if target.compensate not in (None, "none"):
            try:
                check_compensation(load_run(target.run), target.compensate)
            except InputError as error:
                raise InputError(f"{path}: target {name!r}: {error}") from None
        formats = load_run(target.run).export if target.push else ()
        if target.push and target.push.format not in formats:
            raise InputError(
                f"{path}: target {name!r} pushes {target.push.format}, and what is written of it is "
                f"{', '.join(formats)}; set push.format to one of them, or add it to export of runs/{target.run}.yaml"
            )
    return params


def run_names(directory: Path = Path("runs")) -> list[str]:
    return sorted({path.stem for path in directory.glob("*.yaml")} - NO_RUNS)


def load_run(name: str, directory: Path = Path("runs"), text: str | None = None) -> Run:
    """Read runs/<name>.yaml, or check what it is going to hold.

    Args:
        text: what the file is going to hold; None: it is there.
    """
    if name in NO_RUNS:
        raise InputError(f"run name {name!r} is taken: runs/{name}.yaml is no run")
    if not NAME.fullmatch(name):
        raise InputError(
            f"run name {shorten(name)!r} is not valid: at most 100 letters, digits, '.', '_' and '-', no path"
        )
    path = directory / f"{name}.yaml"
    if text is None and not path.exists():
        known = ", ".join(run_names(directory)) or "none"
        raise InputError(f"run {name!r} is unknown: {path} does not exist; existing runs: {known}")
    run = read_settings(Run, _with_sources(_read(path, text), named_sources(directory), path), f"{path}: ")
    try:
        check_run(run)
    except InputError as error:
        raise InputError(f"{path}: {error}") from None
    return run


def named_sources(directory: Path = Path("runs")) -> Mapping[str, Any]:
    """The keys of each source in runs/sources.yaml by its name; none without that file."""
    path = directory / SOURCES
    found: Mapping[str, Any] = _read(path) if path.exists() else {}
    return found


def read_file(path: Path, model: type[T]) -> T:
    """Read a YAML file of settings; raises InputError that names file, key, value and the valid ones."""
    return read_settings(model, _read(path), f"{path}: ")


class _UniqueKeys(yaml.SafeLoader):
    """YAML in which no mapping has a key twice; PyYAML would take the last one."""

    def compose_mapping_node(self, anchor: Any) -> Any:
        node = super().compose_mapping_node(anchor)
        seen: set[str] = set()
        for key in (key for key, _ in node.value if isinstance(key, yaml.ScalarNode)):
            if key.value in seen:
                raise yaml.MarkedYAMLError(problem=f"key {key.value!r} is there twice", problem_mark=key.start_mark)
            seen.add(key.value)
        return node


def _read(path: Path, text: str | None = None) -> Any:
    try:
        values = yaml.load(path.read_text(encoding="utf-8") if text is None else text, Loader=_UniqueKeys)
        _count(values, {})
    except FileNotFoundError:
        raise InputError(f"{path} does not exist; run in the project folder") from None
    except RecursionError:
        raise InputError(
            f"{path} is not valid: it is nested too deep; a run file needs {DEPTH} levels at most"
        ) from None
    except (yaml.YAMLError, ValueError) as error:  # also bytes that are no UTF-8, and numbers and dates that are none
        raise InputError(f"{path} is not valid YAML: {shorten(' '.join(str(error).split()))}") from error
    return values


def _count(value: Any, known: dict[int, int], depth: int = 0) -> int:
    """How many values there are, each alias counted as what it stands for; refuses what is no settings file."""
    if depth > DEPTH:
        raise RecursionError
    if not isinstance(value, dict | list | tuple | set):
        if isinstance(value, int) and value.bit_length() > 64:
            raise ValueError(f"a number has {value.bit_length()} bits; numbers here have 64 at most")
        return 1
    if id(value) not in known:
        inner = [*value, *value.values()] if isinstance(value, dict) else value
        known[id(value)] = 1 + sum(_count(part, known, depth + 1) for part in inner)
    if known[id(value)] > VALUES:
        raise ValueError(f"it stands for more than {VALUES} values; write no aliases of aliases")
    return known[id(value)]


def _with_sources(values: Any, named: Mapping[str, Any], path: Path) -> Any:
    """The values of a run file with the keys of each named source in place of its name."""
    if isinstance(values, list):
        return [_with_sources(value, named, path) for value in values]
    if not isinstance(values, dict):
        return values
    source, found = values.get("source"), {key: _with_sources(value, named, path) for key, value in values.items()}
    if not isinstance(source, str) or source in KINDS:
        return found
    if source not in named:
        raise InputError(
            f"{path}: source {source!r} is unknown; valid: {', '.join(KINDS)}, or a name in {path.parent / SOURCES}: "
            f"{', '.join(named) or 'none'}"
        )
    return {**named[source], **{key: value for key, value in found.items() if key != "source"}}


def run_schema(named: Collection[str]) -> dict[str, Any]:
    """The JSON schema of a run file, in which a source may also be one of the names."""
    found = Run.model_json_schema()
    found["$defs"]["Named"] = {
        "description": "A source of runs/sources.yaml. Keys beside its name replace its own.",
        "properties": {"source": {"enum": sorted(named)}},
        "required": ["source"],
        "type": "object",
    }
    parts = [*found["$defs"].values(), found]
    for field in (field for part in parts for field in part.get("properties", {}).values()):
        field = field.get("items", field)
        if field.pop("discriminator", None) and named:
            field["oneOf"].append({"$ref": "#/$defs/Named"})
    return found


def main(directory: Path = Path("runs")) -> None:
    schema = run_schema(named_sources(directory))
    write_text(directory / "schema.json", json.dumps(schema, indent=1, sort_keys=True) + "\n")


if __name__ == "__main__":
    main()
