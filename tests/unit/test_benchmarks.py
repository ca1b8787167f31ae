"""Benchmark rows against lm-eval's stock tasks; items from archives, folders and the hub."""

import gzip
import importlib.util
import io
import json
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from lm_eval.api.metrics import mean
from lm_eval.api.registry import get_metric_aggregation, is_higher_better
from lm_eval.tasks import TaskManager
from lm_eval.tasks._yaml_loader import load_yaml

from blockpruner.core.errors import InputError
from blockpruner.evaluation import zero_shot
from blockpruner.evaluation.benchmarks import BENCHMARKS
from blockpruner.evaluation.tasks import (
    hub_repository,
    tables_from_archive,
    tables_from_folder,
    tables_from_hub,
    task_digest,
    write_task,
)
from tests.errors import refused
from tests.unit.zero_shot_items import ITEMS, PASSAGES, SUMS, tables_of

STOCK = Path(load_yaml.__code__.co_filename).parent
OURS = {
    "dataset_path",
    "dataset_name",
    "dataset_kwargs",
    "training_split",
    "validation_split",
    "test_split",
}
OURS |= {"num_fewshot", "fewshot_split"}

TARGETS = {
    "lambada_openai": PASSAGES,
    "gsm8k": [(f"Question: {question}\nAnswer:", answer) for question, answer in SUMS],
}


@pytest.mark.parametrize("name", BENCHMARKS)
def test_rows_agree_with_the_stock_task(name):
    row, stock = BENCHMARKS[name], load_yaml(STOCK / BENCHMARKS[name].stock)
    metrics = [entry["metric"] for entry in stock["metric_list"]]
    main = {"lambada_openai": "acc"}.get(name, "acc_norm" if "acc_norm" in metrics else metrics[0])
    assert (row.name, row.metric, row.kind) == (stock["task"], main, stock["output_type"])
    assert is_higher_better(row.metric)
    assert get_metric_aggregation(row.metric) is mean
    assert row.filter in [entry["name"] for entry in stock.get("filter_list", [{"name": "none"}])]
    assert set(row.splits) == {
        stock[f"{s}_split"] for s in ("validation", "test") if stock.get(f"{s}_split")
    }
    assert hub_repository(name) == stock["dataset_path"]


@pytest.mark.parametrize("name", BENCHMARKS)
def test_a_written_task_is_the_stock_one_over_local_items(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tables = tables_of(name)
    write_task(name, Path("being-written"), tables, location=Path("data/tasks"))
    Path("data").mkdir()
    Path("being-written").rename("data/tasks")
    written = load_yaml(Path(f"data/tasks/{name}/{name}.yaml"))
    stock = load_yaml(STOCK / BENCHMARKS[name].stock)
    for key in (written.keys() | stock.keys()) - OURS:
        ours, theirs = written[key], stock[key]
        assert (
            (ours.__code__.co_code == theirs.__code__.co_code)
            if callable(theirs)
            else ours == theirs
        ), key
    assert written["dataset_kwargs"]["data_files"] == {
        s: f"data/tasks/{name}/{s}.parquet" for s in tables
    }
    splits = {
        f"{split}_split": split if split in tables else None
        for split in ("training", "validation", "test")
    }
    assert {key: written[key] for key in splits} == splits
    assert written["num_fewshot"] == 0
    assert "fewshot_split" not in written
    task = TaskManager(include_path="data/tasks", include_defaults=False).load([name])["tasks"][
        name
    ]
    documents = list(task.eval_docs)
    if name not in ITEMS:
        assert [
            (task.doc_to_text(document), task.doc_to_target(document)) for document in documents
        ] == TARGETS[name]
        return
    assert len(documents) == len(ITEMS[name])
    for document, item in zip(documents, ITEMS[name], strict=True):
        if name == "winogrande":
            assert task.doc_to_choice(document) == list(item.contexts)
        else:
            result = task.fewshot_context(document, 0), task.doc_to_choice(document)
            assert result == (item.contexts[0], list(item.choices))


def test_the_digest_is_of_the_content_not_of_the_place(tmp_path):
    tables = tables_of("hellaswag")
    write_task("hellaswag", tmp_path / "a", tables, location=Path("data/a"))
    write_task("hellaswag", tmp_path / "b", tables, location=Path("data/b"))
    digest = task_digest("hellaswag", tmp_path / "a")
    assert task_digest("hellaswag", tmp_path / "b") == digest
    # other bytes, as another version of Arrow writes them
    (split,) = (tmp_path / "b/hellaswag").glob("*.parquet")
    pq.write_table(pq.read_table(split), split, compression="none", version="1.0")
    assert task_digest("hellaswag", tmp_path / "b") == digest
    write_task(
        "hellaswag",
        tmp_path / "b",
        {k: v.slice(1) for k, v in tables.items()},
        location=Path("data/b"),
    )
    seen = {digest, task_digest("hellaswag", tmp_path / "b")}
    for file, old, new in (
        ("utils.py", '"  "', '"   "'),
        ("hellaswag.yaml", "{{query}}", "{{query}} "),
    ):
        path = tmp_path / "a" / "hellaswag" / file
        path.write_text(path.read_text().replace(old, new))
        seen.add(task_digest("hellaswag", tmp_path / "a"))
    assert len(seen) == 4
    with pytest.raises(InputError, match=r"piqa\.yaml does not exist"):
        task_digest("piqa", tmp_path / "a")
    (split,) = (tmp_path / "a/hellaswag").glob("*.parquet")
    split.write_bytes(split.read_bytes()[:-9])
    with pytest.raises(
        InputError, match=r"benchmark hellaswag: .*\.parquet is truncated, damaged or not Parquet"
    ):
        task_digest("hellaswag", tmp_path / "a")


def unchecked_bytecode(path, source):
    """Python runs such a file in place of the module, and does not look at the module."""
    code = importlib._bootstrap_external._code_to_hash_pyc(
        compile(source, "utils.py", "exec"), bytes(8), False
    )
    cached = Path(importlib.util.cache_from_source(str(path)))
    cached.parent.mkdir(exist_ok=True)
    cached.write_bytes(code)


def edit(name, change):
    def apply(folder):
        path = folder / name
        path.write_text(change(path.read_text() if path.exists() else ""))

    return apply


@pytest.mark.parametrize(
    ("change", "file"),
    [
        (edit("utils.py", lambda text: text + "\nopen('ran', 'w')"), "utils.py"),
        (
            edit(
                "hellaswag.yaml", lambda text: "task: hellaswag\ndoc_to_text: !function os.getcwd"
            ),
            "hellaswag.yaml",
        ),
        (
            edit("hellaswag.yaml", lambda text: text.replace("n.parquet", "n.parquet/../x")),
            "hellaswag.yaml",
        ),
        (
            edit(
                "zz.yaml", lambda text: "task: hellaswag\ndoc_to_text: !function utils.process_docs"
            ),
            "zz.yaml",
        ),
        (
            lambda folder: (folder / "validation.parquet").rename(folder / "test.parquet"),
            "test.parquet",
        ),
    ],
)
def test_task_files_of_others_do_not_run(tmp_path, monkeypatch, change, file):
    """What a remote storage may bring: each is refused before lm-eval sees it."""
    monkeypatch.setattr(zero_shot, "TaskManager", None)
    write_task("hellaswag", tmp_path, tables_of("hellaswag"), location=tmp_path)
    change(tmp_path / "hellaswag")
    with refused("not-stock") as caught:
        zero_shot._load("hellaswag", tmp_path)
    assert f"/hellaswag/{file} " in str(caught.value)


def test_bytecode_beside_a_helper_does_not_run(tmp_path, monkeypatch):
    write_task("hellaswag", tmp_path, tables_of("hellaswag"), location=tmp_path)
    monkeypatch.chdir(tmp_path)
    for _ in range(2):
        unchecked_bytecode(tmp_path / "hellaswag/utils.py", "open('ran', 'w'); process_docs = list")
        zero_shot._load("hellaswag", tmp_path)
    assert not Path("ran").exists()


def test_items_from_an_archive():
    sink = io.BytesIO()
    validation = tables_of("arc_easy")["validation"].replace_schema_metadata({"huggingface": "{}"})
    with pa.ipc.new_stream(sink, validation.schema) as stream:
        stream.write_table(validation)
    docs = [
        {
            "id": "x",
            "query": "Question: Why\u2028?\nAnswer:",
            "choices": ["as", "so", "thus", "hm", "no"],
            "gold": 4,
        },
        {
            "id": "y",
            "query": "Question: Answer: or Question: ?\nAnswer:",
            "choices": ["a", "b", "c"],
            "gold": 0,
        },
    ]
    requests = [{"doc": doc, "idx": idx} for doc in docs for idx in range(len(doc["choices"]))]
    lines = "\n".join(json.dumps(request, ensure_ascii=False) for request in requests) + "\n"
    splits = BENCHMARKS["arc_easy"].splits
    archive = {
        splits["validation"].member: sink.getvalue(),
        splits["test"].member: gzip.compress(lines.encode()),
    }
    tables = tables_from_archive("arc_easy", archive.__getitem__)
    assert tables["validation"].equals(tables_of("arc_easy")["validation"])
    assert tables["validation"].schema.metadata is None
    shown = [
        {"text": doc["choices"], "label": list("ABCDE"[: len(doc["choices"])])} for doc in docs
    ]
    assert tables["test"].to_pylist() == [
        {"id": "x", "question": "Why\u2028?", "choices": shown[0], "answerKey": "E"},
        {"id": "y", "question": "Answer: or Question: ?", "choices": shown[1], "answerKey": "A"},
    ]


def test_passages_sums_and_openbookqa_from_an_archive():
    lambada = [
        {"id": i, "query": context, "choices": [word.strip()]}
        for i, (context, word) in enumerate(PASSAGES)
    ]
    gsm8k = [
        {"id": i, "question": q, "answer": a, "choices": ["?"]} for i, (q, a) in enumerate(SUMS)
    ]
    openbookqa = [
        {
            "id": i,
            "query": f"Question: {item.contexts[0]}\nAnswer:",
            "choices": list(item.choices),
            "gold": item.gold,
        }
        for i, item in enumerate(ITEMS["openbookqa"])
        for _ in item.choices
    ]
    for name, documents in (
        ("lambada_openai", lambada),
        ("gsm8k", gsm8k),
        ("openbookqa", openbookqa),
    ):
        lines = "\n".join(json.dumps({"doc": document}) for document in documents)
        table = BENCHMARKS[name].splits["test"].read(gzip.compress(lines.encode()))
        expected = tables_of(name)["test"]
        assert table.select(expected.column_names).equals(expected)


def test_items_from_a_folder(tmp_path):
    table = tables_of("piqa")["validation"]
    pq.write_table(table, tmp_path / "piqa_validation.parquet")
    assert tables_from_folder("piqa", tmp_path)["validation"].equals(table)
    with pytest.raises(
        InputError, match=r"winogrande_xl_validation\.parquet does not exist; .* sentence, option1"
    ):
        tables_from_folder("winogrande", tmp_path)
    pq.write_table(table.drop_columns(["label"]), tmp_path / "piqa_validation.parquet")
    with pytest.raises(InputError, match=r"has no column label \(it has goal, sol1, sol2\)"):
        tables_from_folder("piqa", tmp_path)
    pq.write_table(table.slice(0, 0), tmp_path / "piqa_validation.parquet")
    with pytest.raises(InputError, match="holds no item"):
        tables_from_folder("piqa", tmp_path)
    (tmp_path / "piqa_validation.parquet").write_bytes(b"PAR1 no more")
    with pytest.raises(
        InputError, match=r"piqa_validation\.parquet is truncated, damaged or not Parquet"
    ):
        tables_from_folder("piqa", tmp_path)


def test_items_from_the_hub(monkeypatch):
    asked = []

    def load(repository, config, split, revision):
        asked.append((repository, config, split, revision))
        return datasets.Dataset(tables_of("arc_challenge")[split])

    monkeypatch.setattr(datasets, "load_dataset", load)
    tables = tables_from_hub("arc_challenge", "c0ffee")
    assert {split: table.to_pylist() for split, table in tables.items()} == {
        split: table.to_pylist() for split, table in tables_of("arc_challenge").items()
    }
    assert asked == [
        ("allenai/ai2_arc", "ARC-Challenge", split, "c0ffee") for split in ("validation", "test")
    ]

    def offline(*args, **kwargs):
        raise ConnectionError("Couldn't reach 'baber/piqa' on the Hub\nmore")

    monkeypatch.setattr(datasets, "load_dataset", offline)
    with pytest.raises(
        InputError, match=r"piqa: split validation of hub data set 'baber/piqa'.*Couldn't reach"
    ):
        tables_from_hub("piqa")
