"""The values of a run file as the command gets them, and its own names for their keys.

Decides the order: what --set gives replaces what other options give, and those replace --config.
Values are checked by the settings classes.
"""

import json
import re
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from blockpruner.core.errors import InputError
from blockpruner.core.settings import HUB, merged, source_of
from blockpruner.methods.recipes import RECOMMENDED, completed, mixed, sections, training

OPTIONS = {
    key: f"--{key.rpartition('.')[2].replace('_', '-')}"
    for key in (
        "calibration.num_samples",
        "calibration.seq_len",
        "evaluate.perplexity.seq_len",
        "evaluate.perplexity.max_rows",
        "score.method",
        "score.unit",
        "score.metric",
        "score.acceleration",
        "model.dtype",
        "model.trust_remote_code",
        "model.revision",
        "runtime.device",
        "runtime.workers",
        "runtime.streaming",
        "method",
        "train",
        "export",
        "compensate",
    )
} | {"compensate.method": "--compensate", "benchmark": "--tasks"}
"""The options that give a settings key."""

KEY = re.compile(r"\b(?:calibration|score|evaluate|compensate|train|runtime)(?:\.[a-z_]+)+")
TAGS = re.compile(r"\.(hub|path|pypi|pypi-parts|mix)(?=\.)")
"""Kinds of source, which pydantic puts into the key of a mistake."""


def data_of(texts: Path | None, dataset: str | None) -> dict[str, Any] | None:
    """The source of texts that options name."""
    if texts is not None and dataset is not None:
        raise InputError(
            "--texts and --dataset are both given; give one",
            rule="texts-twice",
            key="calibration.data",
        )
    if dataset is None:
        return None if texts is None else {"source": "path", "path": str(texts)}
    repo, _, split = HUB.sub("", dataset).removeprefix("datasets/").partition(":")
    return {"source": "hub", "repo": repo} | ({"split": split} if split else {})


def model_of(text: str) -> dict[str, Any]:
    """The source of a model, as `source_of` reads it, with the whole path of a folder."""
    found = source_of(text)
    if "path" in found:
        found["path"] = str(Path(found["path"]).expanduser().absolute())
    return found


def values_of(
    config: Path | None,
    sets: Sequence[str],
    others: Mapping[str, Any],
    method: str | None,
    only_texts: bool = False,
    **given: Any,
) -> dict[str, Any]:
    """Sections of a run file, and `runtime`.

    Args:
        config: a run file, which is kept but for what else is given.
        sets: texts KEY=VALUE, the key dotted and the value as in YAML.
        others: values of sections that are no argument of `methods.recipes.sections`, as the rest
            is.
    """
    from blockpruner.inputs.sources import named_sources, with_sources
    from blockpruner.params import read_values

    if config is None:
        found = sections(method or RECOMMENDED, only_texts=only_texts, **given)
    else:
        score = given["score"] | ({"method": method} if method else {})
        compensate = {"method": given["compensate"]} if given["compensate"] else {}
        more = {"calibration": given["calibration"], "score": score, "compensate": compensate}
        found = merged(
            read_values(config.expanduser()), {key: value for key, value in more.items() if value}
        )
        name = str((found.get("score") or {}).get("method") or RECOMMENDED)
        own = {} if given["data"] is None else {"data": mixed(given["data"], name, only_texts)}
        found = merged(
            completed(found, given["data"], only_texts), {"calibration": own} if own else {}
        )
        if given["train"]:
            texts = found.get("train") or found.get("calibration") or {}
            found["train"] = (
                training(given["train"])
                | {key: texts[key] for key in ("data",) if key in texts}
                | own
            )
    for each in (others, *map(_set, sets)):
        for key, value in each.items():
            if key == "export":
                each = {key: value.split(",") if isinstance(value, str) else value or []}
            elif not isinstance(value, Mapping) and (key, value) != ("train", None):
                raise InputError(
                    f"{key} is {value!r}; valid: keys within it, as {key}.NAME=VALUE",
                    rule="settings",
                )
        found = merged(found, each)
    return dict(with_sources(found, named_sources()))


def _set(text: str) -> dict[str, Any]:
    from blockpruner.inputs.sources import Loader

    key, equals, value = text.partition("=")
    if not equals or not key:
        raise InputError(
            f"--set {text!r} is not KEY=VALUE; an example: --set calibration.split=all",
            rule="set-form",
        )
    try:
        found: Any = yaml.load(value, Loader=Loader)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise InputError(
            f"--set {text!r}: the value is not valid YAML", rule="yaml", key=key, value=value
        ) from error
    for part in reversed(key.strip().split(".")):
        found = {part: found}
    return dict(found)


def called(message: str, key: str, options: Collection[str]) -> str:
    """A message, and what a command with these options calls the settings keys in it, and the
    error's own `key`."""
    keys = [key, *KEY.findall(message)]
    found = []
    for each in dict.fromkeys(TAGS.sub("", one) for one in keys):
        if (option := OPTIONS.get(each, "")) in options:
            found.append(option)
        elif "--set" in options and "." in each:
            found.append(f"--set {each}=VALUE")
    return f"{message} (here: {', '.join(found)})" if found else message


def to_json(value: Any, **options: Any) -> str:
    """A value as JSON, which has no infinity: null is in its place."""
    return json.dumps(json.loads(json.dumps(value), parse_constant=lambda name: None), **options)
