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
    source = source_of(text)
    if "path" in source:
        source["path"] = str(Path(source["path"]).expanduser().absolute())
    return source


def values_of(
    config: Path | None,
    sets: Sequence[str],
    section_values: Mapping[str, Any],
    method: str | None,
    only_texts: bool = False,
    **options: Any,
) -> dict[str, Any]:
    """Sections of a run file, and `runtime`.

    Args:
        config: a run file; the other arguments replace what it says.
        sets: texts KEY=VALUE, the key dotted and the value as in YAML.
        section_values: values by section, of sections that are no argument of
            `methods.recipes.sections`.
        options: the other arguments of `methods.recipes.sections`.
    """
    from blockpruner.inputs.sources import named_sources, with_sources

    if config is None:
        values = sections(method or RECOMMENDED, only_texts=only_texts, **options)
    else:
        values = _run_file_with(config, method, only_texts, **options)
    for replacing in (section_values, *map(_set, sets)):
        values = merged(values, _checked(replacing))
    return dict(with_sources(values, named_sources()))


def _run_file_with(
    config: Path,
    method: str | None,
    only_texts: bool,
    *,
    data: Mapping[str, Any] | None,
    calibration: Mapping[str, Any],
    score: Mapping[str, Any],
    compensate: str | None,
    train: str | None,
) -> dict[str, Any]:
    """The sections of a run file, with what options say in place of the same keys."""
    from blockpruner.config.params import read_values

    values: dict[str, Any] = dict(read_values(config.expanduser()))
    if calibration:
        values = merged(values, {"calibration": calibration})
    if score or method:
        values = merged(values, {"score": {**score, **({"method": method} if method else {})}})
    if compensate:
        values = merged(values, {"compensate": {"method": compensate}})
    values = completed(values, data, only_texts)
    # Texts that an option names win over those of the file, in training, too.
    texts: dict[str, Any] = {}
    if data is not None:
        method_name = str((values.get("score") or {}).get("method") or RECOMMENDED)
        texts = {"data": mixed(data, method_name, only_texts)}
        values = merged(values, {"calibration": texts})
    if train:
        section = values.get("train") or values.get("calibration") or {}
        if "data" in section:
            texts = {"data": section["data"], **texts}
        values["train"] = training(train) | texts
    return values


def _checked(values: Mapping[str, Any]) -> dict[str, Any]:
    """Values by section; raises InputError for a section that has a single value."""
    if "export" in values:
        formats = values["export"]
        return {"export": formats.split(",") if isinstance(formats, str) else formats or []}
    for section, value in values.items():
        # `train=null` is a run without training.
        if not isinstance(value, Mapping) and (section, value) != ("train", None):
            raise InputError(
                f"{section} is {value!r}; valid: keys within it, as {section}.NAME=VALUE",
                rule="settings",
            )
    return dict(values)


def _set(text: str) -> dict[str, Any]:
    """The values of one --set KEY=VALUE, nested by the parts of the key."""
    from blockpruner.inputs.sources import Loader

    key, equals, value_text = text.partition("=")
    if not equals or not key:
        raise InputError(
            f"--set {text!r} is not KEY=VALUE; an example: --set calibration.split=all",
            rule="set-form",
        )
    try:
        value: Any = yaml.load(value_text, Loader=Loader)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise InputError(
            f"--set {text!r}: the value is not valid YAML", rule="yaml", key=key, value=value_text
        ) from error
    for name in reversed(key.strip().split(".")):
        value = {name: value}
    return dict(value)


def called(message: str, key: str, options: Collection[str]) -> str:
    """A message, and what a command with these options calls the settings keys in it, and the
    error's own `key`."""
    keys = [TAGS.sub("", name) for name in (key, *KEY.findall(message))]
    names = []
    for settings_key in dict.fromkeys(keys):
        option = OPTIONS.get(settings_key, "")
        if option in options:
            names.append(option)
        # A key within a section can be set where no option gives it.
        elif "--set" in options and "." in settings_key:
            names.append(f"--set {settings_key}=VALUE")
    return f"{message} (here: {', '.join(names)})" if names else message


def to_json(value: Any, **options: Any) -> str:
    """A value as JSON, which has no infinity: null is in its place."""
    return json.dumps(json.loads(json.dumps(value), parse_constant=lambda name: None), **options)
