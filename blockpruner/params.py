"""params.yaml and runs/*.yaml, read and checked.

Only stages and flows read these files. Everything else gets the values of `core.settings`.
"""

from __future__ import annotations

from pathlib import Path

import yaml

from blockpruner.checks import check_run
from blockpruner.core.errors import InputError
from blockpruner.core.settings import NAME, Params, Run, Sets, T, read_settings

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
    run = _load(path, Run)
    try:
        check_run(run)
    except InputError as error:
        raise InputError(f"{path}: {error}") from None
    return run


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
    return read_settings(model, values, f"{path}: ")
