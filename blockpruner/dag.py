"""dag.yaml: what dvc.yaml makes its stages of beyond params.yaml. `python -m blockpruner.dag`
writes it.

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

from blockpruner.core.errors import InputError
from blockpruner.core.settings import Local, Runtime
from blockpruner.inputs.sources import read_yaml
from blockpruner.params import load_params, load_run, run_schema
from blockpruner.settings import Sources, resolve
from blockpruner.store.files import write_text
from blockpruner.store.provenance import fingerprint
from blockpruner.store.trials import SIXTEEN_BITS
from blockpruner.studies import load_study

FILE = Path("dag.yaml")
COMMAND = "python -m blockpruner.dag"
HEAD = f"# Derived from params.yaml, runs/, studies/ and the machine. `{COMMAND}` writes it.\n"


def here(runtime: Runtime) -> dict[str, Any]:
    """The machine and its packages, as far as they move results beyond rounding in 32 bits, and
    speeds."""
    machine = {
        "device": device_name(runtime.device),
        "threads": runtime.threads,
        "attention": runtime.attention,
    }
    packages = {
        name: version(name).partition("+")[0] for name in ("torch", "transformers", "lm_eval")
    }
    return {"lm_eval": packages.pop("lm_eval"), "machine": machine | packages}


def device_name(device: str) -> str:
    """The device that a run of this machine uses, such as "cpu" or "NVIDIA H100 80GB HBM3"."""
    if device == "cpu":
        return device
    from blockpruner.model import accelerator  # loads torch
    from blockpruner.model.models import resolve_device

    return accelerator.name(resolve_device(device))


def derived(recorded: Mapping[str, Any]) -> dict[str, Any]:
    """The content of the file. The machine and packages are those `recorded`."""
    params = load_params()
    found: dict[str, Any] = {"defaults": fingerprint(without_words(run_schema(())))}
    found |= {"searches": {}, "pruned": {}, "local": {}, "fetched": {}, "tables": {}}
    for name in params.runs:
        run = load_run(name)
        settings = resolve(run, params.targets_of(name))
        # In 16 bits a search is of one device; in 32 bits its trials are the same everywhere.
        machine = {"machine": dict(recorded["machine"])} if run.model.dtype in SIXTEEN_BITS else {}
        for method in settings.searches:
            found["searches"][f"{name}-{method}"] = {"run": name, "method": method, **machine}
        paths = local_paths(settings.sources)
        for number, path in enumerate(paths):
            found["local"][f"{name}-{number}"] = {"run": name, "path": path}
        found["fetched"][name] = {
            "local": f"data/local/{name}" if paths else f"data/settings/{name}/sources.json"
        }
    for name, target in params.targets.items():
        method = target.method or load_run(target.run).score.method
        found["pruned"][name] = {"run": target.run, "method": method}
    for name in params.studies:
        folder = name if load_study(name).experiments else "models"
        found["tables"][name] = {"manifests": f"data/manifests/{folder}"}
    return {**recorded, **found}


def without_words(schema: Any) -> Any:
    """A JSON schema without descriptions, which change no result."""
    if isinstance(schema, dict):
        return {key: without_words(value) for key, value in schema.items() if key != "description"}
    return [without_words(value) for value in schema] if isinstance(schema, list) else schema


def local_paths(sources: Sources) -> list[str]:
    named = [sources.model, sources.zero_shot.data, *sources.texts.values()]
    parts = [part for one in named for part in getattr(one, "of", (one,))]
    return sorted({part.path for part in parts if isinstance(part, Local)})


def read_dag() -> dict[str, Any]:
    return dict(read_yaml(FILE))


def write() -> None:
    """Write the file for the settings and the machine of today."""
    write_text(FILE, HEAD + yaml.safe_dump(derived(here(load_params().runtime)), sort_keys=False))


def require_current(machine: bool = False) -> None:
    """Refuse a file that is stale: of other settings, or also of another machine or other packages,
    whose results would pass for those of this one."""
    recorded = read_dag()
    kept = {key: recorded.get(key) for key in ("lm_eval", "machine")}
    now = derived(here(load_params().runtime) if machine else kept)
    stale = [key for key, value in now.items() if recorded.get(key) != value]
    if stale:
        message = (
            f"{FILE}: {', '.join(stale)} not as params.yaml, runs/, studies/ and this machine"
            " have it"
        )
        raise InputError(
            f"{message}; run `{COMMAND}`, then again", rule="dag-stale", key=stale[0], value=FILE
        )


if __name__ == "__main__":
    try:
        write()
    except InputError as error:
        sys.exit(str(error))
