"""fetch <run>: model, calibration and held-out texts and benchmark items, at data/models and data/sources."""

from __future__ import annotations

from pathlib import Path

from blockpruner.core.progress import observer
from blockpruner.core.settings import TaskAnswers
from blockpruner.evaluation.benchmarks import unscored_items
from blockpruner.evaluation.tasks import check_tasks, fetch_tasks
from blockpruner.inputs.checkpoints import fetch_checkpoint
from blockpruner.inputs.texts import load_texts, write_texts
from blockpruner.params import load_run
from blockpruner.store.files import replace_directory
from stages import CACHE, DATA, PINS, run


def main(name: str) -> None:
    settings, note, out = load_run(name), observer().note, DATA / "sources" / name
    calibration, zero_shot = settings.calibration.data, settings.evaluate.zero_shot
    check_tasks(zero_shot)
    texts = {"perplexity": settings.evaluate.perplexity.data}
    if isinstance(calibration, TaskAnswers):
        for task in calibration.tasks:
            unscored_items(task, calibration.skip)  # raises before anything is downloaded
    else:
        texts["calibration"] = calibration
    if settings.compensate.data is not None:
        texts["compensate"] = settings.compensate.data
    if settings.train is not None:
        texts["train"] = settings.train.data

    def build(directory: Path) -> None:
        for role, data in texts.items():
            found = load_texts(data, CACHE, PINS)
            write_texts(directory / f"{role}.parquet", found)
            note(f"{role}: {len(found)} texts")
        fetch_tasks(zero_shot, directory / "tasks", out / "tasks", CACHE, PINS, note)

    replace_directory(out, build)
    fetch_checkpoint(settings.model, DATA / "models" / name, CACHE, PINS)


if __name__ == "__main__":
    run("fetch", main)
