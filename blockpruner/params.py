"""params.yaml and runs/*.yaml, read and checked.

Only stages and flows read these files. Everything else gets the values of `settings`.
"""

from collections.abc import Collection, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from blockpruner.checks import check_run, check_target
from blockpruner.core.errors import InputError, named
from blockpruner.core.settings import NAME, T, read_settings
from blockpruner.methods.recipes import RECIPES, completed, names
from blockpruner.methods.registry import method_names, row_of
from blockpruner.settings import Params, Run, Sections, Target, resolve

NO_RUNS = frozenset({"sources"})
"""Files of runs/ that are something else: sources by name."""

SOURCES = "sources.yaml"
"""Sources by name: our texts, next to this module, and in a folder of run files those of its own."""
KINDS_OF_SOURCE = ("pypi", "pypi-parts", "hub", "path", "mix")
"""What `source` may be beside a name."""


def load_params(path: Path = Path("params.yaml"), text: str | None = None) -> Params:
    """Read params.yaml, or check what it is going to hold; raises InputError that names key, value and valid ones."""
    params = read_settings(Params, read_yaml(path, text), f"{path}: ")
    run_of = cache(load_run)
    for name, target in params.targets.items():
        if target != Target(run=target.run, budget=target.budget):  # it has keys that must fit its run
            with named(f"{path}: target {name!r}: "):
                check_target(run_of(target.run), target)
    return params


def load_run(name: str, directory: Path = Path("runs"), text: str | None = None) -> Run:
    """Read runs/<name>.yaml, or check the `text` that it is going to hold."""
    if name in NO_RUNS or not NAME.fullmatch(name):
        message = f"run name {name!r} is not valid: at most 100 letters, digits, '_' and '-', and none of "
        raise InputError(message + ", ".join(sorted(NO_RUNS)), rule="run-name", value=name)
    path = directory / f"{name}.yaml"
    if text is None and not path.exists():
        known = ", ".join(sorted({file.stem for file in directory.glob("*.yaml")} - NO_RUNS)) or "none"
        message = f"run {name!r} is unknown: {path} does not exist; existing runs: {known}"
        raise InputError(message, rule="unknown-run", value=name)
    run = read_settings(Run, with_sources(completed(read_values(path, text)), named_sources(directory)), f"{path}: ")
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


def named_sources(directory: Path = Path("runs")) -> Mapping[str, Any]:
    """The keys of each source by its name: ours, and those of a folder of run files."""
    own = directory / SOURCES
    return {**read_yaml(Path(__file__).with_name(SOURCES)), **(read_yaml(own) if own.exists() else {})}


def read_file(path: Path, model: type[T]) -> T:
    """Read a YAML file of settings; raises InputError that names file, key, value and the valid ones."""
    return read_settings(model, read_yaml(path), f"{path}: ")


MOST_VALUES = 100_000
"""The most values of a YAML file, where an alias counts as all that it names. Nine times nine aliases, nine levels
deep, would fill any memory."""


class Loader(yaml.SafeLoader):
    """YAML in which no mapping has a key twice, of which PyYAML would take the last one, and of limited size."""

    def get_single_node(self) -> Any:
        root = super().get_single_node()
        nodes = [root]
        for node in nodes:
            value = getattr(node, "value", node)  # a mapping's are pairs of nodes
            nodes += value if isinstance(value, list | tuple) else ()
            if len(nodes) > MOST_VALUES:
                raise yaml.MarkedYAMLError(problem="its aliases repeat too much; write it without them")
        return root

    def compose_mapping_node(self, anchor: Any) -> Any:
        node = super().compose_mapping_node(anchor)
        seen: set[str] = set()
        for key in (key for key, _ in node.value if isinstance(key, yaml.ScalarNode)):
            if key.value in seen:
                raise yaml.MarkedYAMLError(problem=f"key {key.value!r} is there twice", problem_mark=key.start_mark)
            seen.add(key.value)
        return node


def read_yaml(path: Path, text: str | None = None) -> Any:
    try:
        return yaml.load(path.read_text(encoding="utf-8") if text is None else text, Loader=Loader)
    except FileNotFoundError:
        where = "" if path.is_absolute() else "; run in the project folder"
        raise InputError(f"{path} does not exist{where}", rule="no-file", value=path) from None
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}", rule="no-file", value=path) from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # also bytes that are no UTF-8, and no dates
        raise InputError(f"{path} is not valid YAML: {' '.join(str(error).split())}", rule="yaml") from error


def with_sources(values: Any, sources: Mapping[str, Any], where: str = "") -> Any:
    """The values of a run file with the keys of each named source in place of its name; `where` begins messages."""
    if isinstance(values, list):
        items = [with_sources(value, sources, where) for value in values]
        mixes = [each["of"] if isinstance(each, dict) and each.get("source") == "mix" else [each] for each in items]
        return [each for mix in mixes for each in mix]  # a mix in a list is of another mix
    if not isinstance(values, dict):
        return values
    source, found = values.get("source"), {key: with_sources(value, sources, where) for key, value in values.items()}
    if not isinstance(source, str) or source in KINDS_OF_SOURCE:
        return found
    if source not in sources:
        message = f"{where}source {source!r} is unknown; valid: {', '.join([*KINDS_OF_SOURCE, *sources])}"
        raise InputError(message, rule="unknown-source", key="source", value=source)
    others = {name: keys for name, keys in sources.items() if name != source}
    return {**with_sources(sources[source], others, where), **{k: v for k, v in found.items() if k != "source"}}


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
    found["properties"]["calibration"] |= {  # also on the file that says when stages read settings anew
        "default": completed({})["calibration"],
        "description": f"Without `data`, its default. For these methods it is the paper's set: {paper}.",
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
