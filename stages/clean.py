"""clean: what the local stores under data/ hold, and what of it no run or target of params.yaml uses.

    python -m stages.clean            lists; deletes nothing
    python -m stages.clean delete     deletes what is listed as unused

Not part of the DAG: run it by hand. Decides what is in use: trials over a current run's model and calibration rows,
results of a current run's or target's model, downloads that a current run names, all adapters as long as a target is
recovered; of a study that is fetched everything over its model. All of it is a cache: what is missed later is fetched
or computed again. DVC's cache is `dvc gc`'s affair.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from blockpruner.calibration import CalibrationSet
from blockpruner.errors import InputError
from blockpruner.params import load_params
from blockpruner.progress import observer
from blockpruner.provenance import model_identity
from blockpruner.sources import SOURCE_FILE, checkpoint_identity
from blockpruner.tables import read_json
from blockpruner.trials import TRIALS_VARIABLE, trials_root
from stages import CACHE, DATA, STUDIES, run


@dataclass(frozen=True)
class Entry:
    """store: the folder that it lies in; paths: its files or folders."""

    store: str
    paths: tuple[Path, ...]
    used: bool

    @property
    def bytes(self) -> int:
        files = (file for path in self.paths for file in (path, *path.rglob("*")) if file.is_file())
        return sum(file.stat().st_size for file in files)


def entries() -> Iterator[Entry]:
    """Every entry of the stores.

    Raises:
        InputError: a run that is not fetched and calibrated: nobody knows what it uses.
    """
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
    studies = [STUDIES / name / "model" for name in params.paper.studies]
    studied = {checkpoint_identity(model) for model in studies if (model / SOURCE_FILE).exists()}
    scored = {(dense[name], CalibrationSet.load(rows[name]).digest) for name in params.runs}
    folders = [DATA / kind / target / "hf" for target in params.targets for kind in ("checkpoints", "recovered")]
    models_used = {*dense.values(), *studied}
    evaluated = {*models_used, *(model_identity(folder) for folder in folders if folder.exists())}
    files = [Path("runs") / f"{name}.yaml" for name in (*params.runs, *params.paper.studies)]
    named = "".join(path.read_text(encoding="utf-8") for path in files)
    recovers = any(target.recover for target in params.targets.values())

    for path in sorted(trials_root().glob("*/fingerprint.json")):
        facts = read_json(path)
        lock = path.parent.with_name(path.parent.name + ".lock")
        used = facts["model"] in studied or (facts["model"], facts["calibration"]) in scored
        yield Entry("trials", (path.parent, lock), used)
    for path in sorted((DATA / "evaluations").glob("*.json")):
        used = read_json(path)["key"]["model"] in evaluated
        yield Entry("evaluations", (path, path.with_suffix(".parquet")), used)
    for path in sorted((DATA / "adapters").glob("*.safetensors")):
        yield Entry("adapters", (path,), recovers)
    for path in sorted((CACHE / "packages").glob("*")):
        yield Entry("cache/packages", (path,), path.name in named)
    for path in sorted((CACHE / "models").glob("*")):
        source = path / SOURCE_FILE
        yield Entry("cache/models", (path,), source.exists() and checkpoint_identity(path) in models_used)
    for path in sorted(DATA.rglob("*.bad*")):
        if path.parent.exists():
            yield Entry("set aside", (path,), False)


def main(what: str) -> None:
    if what not in ("", "delete"):
        raise InputError(f"{what!r} is unknown; valid: nothing (lists), delete")
    found, show = list(entries()), observer()
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
            show.note(f"  {'deleted' if what else 'unused'}: {entry.paths[0]}")
            for path in entry.paths if what else ():
                shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)


if __name__ == "__main__":
    run("clean", main)
