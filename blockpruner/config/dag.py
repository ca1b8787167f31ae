"""dag.yaml: what dvc.yaml makes its stages of beyond params.yaml.

`python -m blockpruner.config.dag` writes it.

DVC cannot work out which searches the targets need, which local paths a run names, the defaults of
settings, and what moves results besides the settings: the machine and its packages. A flow writes
the file before it starts stages; a stage refuses a stale one.
"""

import sys
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import yaml

from blockpruner.config.params import load_params, load_run, run_schema
from blockpruner.config.sections import Sources, resolve
from blockpruner.core.errors import InputError
from blockpruner.core.settings import Local, Runtime
from blockpruner.inputs.sources import read_yaml
from blockpruner.store.files import write_text
from blockpruner.store.provenance import fingerprint
from blockpruner.store.trials import SIXTEEN_BITS

FILE = Path("dag.yaml")
COMMAND = "python -m blockpruner.config.dag"
HEAD = f"# Derived from params.yaml, runs/, studies/ and the machine. `{COMMAND}` writes it.\n"


def machine_facts(runtime: Runtime) -> dict[str, Any]:
    """The machine and its packages, as far as they move results beyond rounding in 32 bits, and
    speeds."""
    machine = {
        "device": device_name(runtime.device),
        "threads": runtime.threads,
        "attention": runtime.attention,
    }
    for package in ("torch", "transformers"):
        machine[package] = _release(package)
    return {"lm_eval": _release("lm_eval"), "machine": machine}


def _release(package: str) -> str:
    """The version of a package without the name of its build, as in 2.9.0+cpu."""
    return version(package).partition("+")[0]


def device_name(device: str) -> str:
    """The device that a run of this machine uses, such as "cpu" or "NVIDIA H100 80GB HBM3"."""
    if device == "cpu":
        return device
    from blockpruner.model import accelerator  # loads torch
    from blockpruner.model.models import resolve_device

    return accelerator.name(resolve_device(device))


def derived(recorded: Mapping[str, Any]) -> dict[str, Any]:
    """The content of dag.yaml, which dvc.yaml reads: an entry for each stage that is there once a
    search, target, path, run or study.

    As in `searches: {smollm2-recommended: {run: smollm2, method: recommended}}`, which becomes the
    stage score@smollm2-recommended. The machine and packages are those `recorded`.
    """
    params = load_params()
    searches: dict[str, Any] = {}
    pruned: dict[str, Any] = {}
    local: dict[str, Any] = {}
    fetched: dict[str, Any] = {}
    tables: dict[str, Any] = {}
    for name in params.runs:
        run = load_run(name)
        settings = resolve(run, params.targets_of(name))
        # In 16 bits a search is of one device; in 32 bits its trials are the same everywhere.
        machine = {"machine": dict(recorded["machine"])} if run.model.dtype in SIXTEEN_BITS else {}
        for method in settings.searches:
            searches[f"{name}-{method}"] = {"run": name, "method": method, **machine}
        paths = local_paths(settings.sources)
        for number, path in enumerate(paths):
            local[f"{name}-{number}"] = {"run": name, "path": path}
        # Without local paths a run is fetched again only if its sources change.
        digests = f"data/local/{name}" if paths else f"data/settings/{name}/sources.json"
        fetched[name] = {"local": digests}
    for name, target in params.targets.items():
        method = target.method or load_run(target.run).score.method
        pruned[name] = {"run": target.run, "method": method}
    with_experiments = {experiment.study for experiment in params.experiments.values()}
    for name in params.studies:
        # A study without experiments is of the models of params.yaml.
        folder = name if name in with_experiments else "models"
        tables[name] = {"manifests": f"data/manifests/{folder}"}
    return {
        **recorded,
        "defaults": fingerprint(without_words(run_schema(()))),
        "searches": searches,
        "pruned": pruned,
        "local": local,
        "fetched": fetched,
        "tables": tables,
    }


def without_words(schema: Any) -> Any:
    """A JSON schema without descriptions, which change no result."""
    if isinstance(schema, dict):
        return {key: without_words(value) for key, value in schema.items() if key != "description"}
    if isinstance(schema, list):
        return [without_words(value) for value in schema]
    return schema


def local_paths(sources: Sources) -> list[str]:
    """The paths that a run names; a mix names those of its parts."""
    paths = set()
    for source in (sources.model, sources.zero_shot.data, *sources.texts.values()):
        for data in getattr(source, "of", (source,)):
            if isinstance(data, Local):
                paths.add(data.path)
    return sorted(paths)


def read_dag() -> dict[str, Any]:
    return dict(read_yaml(FILE))


def write() -> None:
    """Write the file for the settings and the machine of today."""
    content = derived(machine_facts(load_params().runtime))
    write_text(FILE, HEAD + yaml.safe_dump(content, sort_keys=False))


def require_current(machine: bool = False) -> None:
    """Refuse a file that is stale: of other settings, or also of another machine or other packages,
    whose results would pass for those of this one."""
    recorded = read_dag()
    facts = {key: recorded.get(key) for key in ("lm_eval", "machine")}
    if machine:
        facts = machine_facts(load_params().runtime)
    current = derived(facts)
    stale = [key for key, value in current.items() if recorded.get(key) != value]
    if stale:
        raise InputError(
            f"{FILE}: {', '.join(stale)} not as params.yaml, runs/, studies/ and this machine have"
            f" it; run `{COMMAND}`, then again",
            rule="dag-stale",
            key=stale[0],
            value=FILE,
        )


if __name__ == "__main__":
    try:
        write()
    except InputError as error:
        sys.exit(str(error))
