"""dag.yaml: what dvc.yaml makes its stages of beyond params.yaml. `python -m blockpruner.dag` writes it.

DVC cannot work out which searches the targets need, which local paths a run names, and what moves results besides the
settings: the machine and its packages. A flow writes the file before it starts stages; a stage refuses a stale one.
"""

import sys
from collections.abc import Iterator, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import yaml

from blockpruner.core.errors import InputError
from blockpruner.core.settings import Runtime
from blockpruner.params import load_params, load_run, read_yaml
from blockpruner.settings import resolve
from blockpruner.store.files import write_text
from blockpruner.store.trials import SIXTEEN_BITS
from blockpruner.studies import load_study

FILE = Path("dag.yaml")
COMMAND = "python -m blockpruner.dag"
HEAD = f"# Derived from params.yaml, runs/, studies/ and the machine. `{COMMAND}` writes it.\n"


def here(runtime: Runtime) -> dict[str, Any]:
    """The machine and its packages, as far as they move results beyond rounding in 32 bits, and speeds."""
    packages = {name: version(name).partition("+")[0] for name in ("torch", "transformers", "lm_eval")}
    harness = packages.pop("lm_eval")
    machine = {"device": device_name(runtime.device), "threads": runtime.threads, "attention": runtime.attention}
    return {"machine": machine | packages, "lm_eval": harness}


def device_name(device: str) -> str:
    """The device that a run of this machine uses, such as "cpu" or "NVIDIA H100 80GB HBM3"."""
    if device == "cpu":
        return device
    import torch

    from blockpruner.model.models import resolve_device

    found = resolve_device(device)
    return torch.cuda.get_device_name(found) if found.type == "cuda" else found.type


def derived(recorded: Mapping[str, Any]) -> dict[str, Any]:
    """The content of the file. The machine and packages are those `recorded`."""
    params = load_params()
    searches = dict[str, Any]()
    pruned = dict[str, Any]()
    local = dict[str, Any]()
    fetched = dict[str, Any]()
    for name in params.runs:
        run = load_run(name)
        settings = resolve(run, params.targets_of(name))
        # In 16 bits a search is of one device; in 32 bits its trials are the same everywhere.
        machine = {"machine": dict(recorded["machine"])} if run.model.dtype in SIXTEEN_BITS else {}
        for method in settings.searches:
            searches[f"{name}-{method}"] = {"run": name, "method": method, **machine}
        paths = sorted(set(local_paths(settings.sources.model_dump(mode="json"))))
        local |= {f"{name}-{number}": {"run": name, "path": path} for number, path in enumerate(paths)}
        fetched[name] = {"local": f"data/local/{name}" if paths else f"data/settings/{name}/sources.json"}
        for key, target in params.targets.items():
            if target.run == name:
                pruned[key] = {"run": name, "method": target.method or run.score.method}
    folders = {name: name if load_study(name).experiments else "models" for name in params.studies}
    tables = {name: {"manifests": f"data/manifests/{folder}"} for name, folder in folders.items()}
    found = {"searches": searches, "pruned": pruned, "local": local, "fetched": fetched, "tables": tables}
    return {**found, "machine": recorded["machine"], "lm_eval": recorded["lm_eval"]}


def local_paths(values: Any) -> Iterator[str]:
    """The paths that sources name, at any depth."""
    if isinstance(values, dict):
        if values.get("source") == "path":
            yield values["path"]
        values = list(values.values())
    for value in values if isinstance(values, list) else ():
        yield from local_paths(value)


def read_dag() -> dict[str, Any]:
    return dict(read_yaml(FILE))


def write() -> None:
    """Write the file for the settings and the machine of today."""
    write_text(FILE, HEAD + yaml.safe_dump(derived(here(load_params().runtime)), sort_keys=False))


def require_current(machine: bool = False) -> None:
    """Refuse a file that is stale: of other settings, or also of another machine or other packages, whose results would
    pass for those of this one."""
    recorded = read_dag()
    now = derived(here(load_params().runtime) if machine else recorded)
    stale = [key for key, value in now.items() if recorded.get(key) != value]
    if stale:
        message = f"{FILE}: {', '.join(stale)} not as params.yaml, runs/, studies/ and this machine have it"
        raise InputError(f"{message}; run `{COMMAND}`, then again", rule="dag-stale", key=stale[0], value=FILE)


if __name__ == "__main__":
    try:
        write()
    except InputError as error:
        sys.exit(str(error))
