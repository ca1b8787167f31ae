"""study_fetch <run>: model, texts and benchmark items of a study, at data/studies/<run>/model and sources."""

from __future__ import annotations

import os
from pathlib import Path

from blockpruner.core.progress import observer
from blockpruner.core.settings import LocalTexts, TaskAnswers
from blockpruner.evaluation.tasks import check_tasks, fetch_tasks
from blockpruner.inputs.checkpoints import fetch_checkpoint
from blockpruner.inputs.texts import load_texts, write_texts
from blockpruner.paper.experiments import DATA_VARIABLE, study_of, variants
from blockpruner.params import load_run
from blockpruner.store.files import replace_directory
from blockpruner.store.provenance import fingerprint
from stages import CACHE, PINS, STUDIES, run


def main(name: str) -> None:
    settings, note, out = load_run(name), observer().note, STUDIES / name
    study, held_out, zero_shot = study_of(settings), settings.evaluate.perplexity.data, settings.evaluate.zero_shot
    zero_shot = zero_shot.model_copy(update={"tasks": tuple(dict.fromkeys([*zero_shot.tasks, *study.tasks]))})
    check_tasks(zero_shot)
    found = [variant.calibration.data for variant in variants(settings)]
    found += [wanted.data for wanted in (settings.compensate, settings.train) if wanted and wanted.data]
    calibrations = {fingerprint(data.model_dump()): data for data in found if not isinstance(data, TaskAnswers)}

    def build(directory: Path) -> None:
        def write(role: str, texts: list[str]) -> None:
            write_texts(directory / f"{role}.parquet", texts)
            note(f"{role}: {len(texts)} texts")

        write("perplexity", load_texts(held_out, CACHE, PINS))
        for key, data in calibrations.items():
            write(f"calibration-{key}", load_texts(data, CACHE, PINS))
        folder = os.environ.get(DATA_VARIABLE)
        if study.wikitext is not None and folder:
            path = Path(folder) / "wikitext2_raw_test.parquet"
            write("wikitext", load_texts(LocalTexts(source="path", path=str(path)), CACHE, PINS))
        elif study.wikitext is not None:
            note(f"no WikiText-2: {DATA_VARIABLE} is not set, so its column stays empty")
        fetch_tasks(zero_shot, directory / "tasks", out / "sources" / "tasks", CACHE, PINS, note)

    replace_directory(out / "sources", build)
    fetch_checkpoint(settings.model, out / "model", CACHE, PINS)


if __name__ == "__main__":
    run("study_fetch", main)
