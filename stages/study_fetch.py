"""study_fetch <run>: model, texts and benchmark items of a study, at data/studies/<run>/model and sources."""

from __future__ import annotations

import os
from pathlib import Path

from blockpruner.core.progress import observer
from blockpruner.inputs.checkpoints import fetch_checkpoint
from blockpruner.inputs.texts import load_texts
from blockpruner.paper.experiments import study_of, variants
from blockpruner.params import load_run
from blockpruner.store.files import replace_directory
from blockpruner.store.provenance import fingerprint
from stages import CACHE, PINS, STUDIES, run
from stages.fetch import check_tasks, write_tasks, write_texts

DATA_VARIABLE = "BLOCKPRUNER_DATA"
"""Names a folder of benchmark data; of it a study takes WikiText-2, which no package holds."""


def main(name: str) -> None:
    settings = load_run(name)
    study, evaluate, out = study_of(settings), settings.evaluate, STUDIES / name
    tasks = tuple(dict.fromkeys([*evaluate.zero_shot.tasks, *study.tasks]))
    check_tasks(tasks, evaluate.zero_shot.data)
    held_out = evaluate.perplexity.data
    calibration = {
        variant.calibration.data.model_dump_json(): variant.calibration.data for variant in variants(settings)
    }

    def build(directory: Path) -> None:
        write_texts(directory, "perplexity", load_texts(held_out.model_dump(), CACHE, PINS))
        for data in calibration.values():
            texts = load_texts(data.model_dump(), CACHE, PINS)
            if data == held_out:  # it is evaluated on the beginning
                texts = texts[len(texts) // 2 :]
            write_texts(directory, f"calibration-{fingerprint(data.model_dump())}", texts)
        if study.wikitext is not None:
            folder = os.environ.get(DATA_VARIABLE)
            if folder:
                path = Path(folder) / "wikitext2_raw_test.parquet"
                texts = load_texts({"source": "path", "path": str(path), "format": "text"}, CACHE, PINS)
                write_texts(directory, "wikitext", texts)
            else:
                observer().note(f"no WikiText-2: {DATA_VARIABLE} is not set, so its column stays empty")
        write_tasks(directory / "tasks", tasks, evaluate.zero_shot.data, out / "sources" / "tasks")

    replace_directory(out / "sources", build)
    fetch_checkpoint(settings.model.model_dump(), out / "model", CACHE, PINS)


if __name__ == "__main__":
    run("study_fetch", main)
