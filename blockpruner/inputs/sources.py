"""Sources of models and texts by name, and the YAML files that name them.

Decides what a name stands for. Run files and params.yaml are read in `params`.
"""

import os
from collections.abc import Mapping
from copy import deepcopy
from functools import lru_cache
from pathlib import Path
from typing import Any

import yaml
from pydantic import TypeAdapter

from blockpruner.core.errors import InputError
from blockpruner.core.settings import Texts

SOURCES = "sources.yaml"
"""Sources by name: our texts, next to the package, and in a folder of run files those of its
own."""
OURS = Path(__file__).parent.with_name(SOURCES)
KINDS_OF_SOURCE = ("pypi", "pypi-parts", "packages", "hub", "path", "mix")
"""What `source` may be beside a name."""


SHIPPED = "wide"
"""The name of our own texts: many sources with a little of each. The shares of its kinds are 1 in
all, as the share of texts of one's own is, so that these are half."""


def named_sources(directory: Path = Path("runs")) -> Mapping[str, Any]:
    """The keys of each source by its name: ours, and those of a folder of run files."""
    sources: dict[str, Any] = dict(read_yaml(OURS))
    path = directory / SOURCES
    if path.exists():
        sources.update(read_yaml(path))
    return sources


def shipped_texts() -> Texts:
    """The source of our own texts."""
    values = with_sources({"source": SHIPPED}, named_sources())
    texts: Texts = TypeAdapter(Texts).validate_python(values)
    return texts


MOST_VALUES = 100_000
"""The most values of a YAML file, where an alias counts as all that it names. Nine times nine
aliases, nine levels deep, would fill any memory."""


class Loader(yaml.SafeLoader):
    """YAML in which no mapping has a key twice, of which PyYAML would take the last one, and of
    limited size."""

    def get_single_node(self) -> Any:
        root = super().get_single_node()
        nodes = [root]
        for node in nodes:
            value = getattr(node, "value", node)  # a mapping's are pairs of nodes
            nodes += value if isinstance(value, list | tuple) else ()
            if len(nodes) > MOST_VALUES:
                raise yaml.MarkedYAMLError(
                    problem="its aliases repeat too much; write it without them"
                )
        return root

    def compose_mapping_node(self, anchor: Any) -> Any:
        node = super().compose_mapping_node(anchor)
        keys: set[str] = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                continue
            if key.value in keys:
                raise yaml.MarkedYAMLError(
                    problem=f"key {key.value!r} is there twice", problem_mark=key.start_mark
                )
            keys.add(key.value)
        return node


@lru_cache(maxsize=64)
def _parse(text: str) -> Any:
    """The values of a YAML text. Parsing is slow, and a stage reads its few files many times."""
    return yaml.load(text, Loader=Loader)


def read_yaml(path: Path, text: str | None = None) -> Any:
    try:
        if text is None:
            text = path.read_text(encoding="utf-8")
        return deepcopy(_parse(text))
    except FileNotFoundError:
        hint = "" if path.is_absolute() else "; run in the project folder"
        raise InputError(f"{path} does not exist{hint}", rule="no-file", value=path) from None
    except OSError as error:
        raise InputError(
            f"{path} cannot be read: {error.strerror}", rule="no-file", value=path
        ) from error
    except (
        yaml.YAMLError,
        ValueError,
        RecursionError,
    ) as error:  # also bytes that are no UTF-8, and no dates
        raise InputError(
            f"{path} is not valid YAML: {' '.join(str(error).split())}", rule="yaml"
        ) from error


def with_sources(values: Any, sources: Mapping[str, Any], context: str = "") -> Any:
    """The values of a run file with the keys of each named source in place of its name; `context`
    begins messages."""
    if isinstance(values, list):
        items: list[Any] = []
        for value in values:
            item = with_sources(value, sources, context)
            if isinstance(item, dict) and item.get("source") == "mix":
                # A list of sources belongs to a mix, and a mix in a mix is its sources.
                items.extend(item["of"])
            else:
                items.append(item)
        return items
    if not isinstance(values, dict):
        return values
    resolved = {key: with_sources(value, sources, context) for key, value in values.items()}
    source = values.get("source")
    if not isinstance(source, str) or source in KINDS_OF_SOURCE:
        return resolved
    if source not in sources:
        valid = ", ".join([*KINDS_OF_SOURCE, *sources])
        message = f"{context}source {source!r} is unknown; valid: {valid}"
        raise InputError(message, rule="unknown-source", key="source", value=source)
    # Without the source itself, a circle of names ends in the refusal above.
    remaining = {name: keys for name, keys in sources.items() if name != source}
    named_keys: dict[str, Any] = with_sources(sources[source], remaining, context)
    del resolved["source"]
    return {**named_keys, **resolved}


def cache_folder() -> Path:
    """Where the command and the API keep what they fetch."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "blockpruner"
