"""Files made by hypothesis, whole, damaged, malicious: each gives what was put in, or an
InputError."""

import gzip
import hashlib
import json
import math
import shutil
from contextlib import suppress
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

import stages
from blockpruner.config.params import read_values
from blockpruner.core.errors import InputError
from blockpruner.core.settings import LocalModel
from blockpruner.evaluation import benchmarks
from blockpruner.evaluation.store import ITEMS, ResultsStore, Stored
from blockpruner.evaluation.tasks import tables_from_folder
from blockpruner.inputs.calibration import CALIBRATION, CalibrationSet
from blockpruner.inputs.checkpoints import (
    cached_checkpoint,
    card_fields,
    copy_files,
    fetch_config,
    licence_beside,
)
from blockpruner.inputs.texts import TEXTS, parse_texts
from blockpruner.methods.healed import kept_facts
from blockpruner.search.trace import ITERATION
from blockpruner.store.files import (
    DIGEST,
    read_checked,
    read_json,
    read_kept_json,
    read_table,
    write_sealed_json,
    write_table,
)
from blockpruner.store.manifest import EngineReport
from blockpruner.store.plans import load_plan, plan_fields
from blockpruner.store.trials import TrialStore
from tests.plans import plan_of
from tests.tiny import tiny_model

many = settings(
    suppress_health_check=[
        *settings.default.suppress_health_check,
        HealthCheck.function_scoped_fixture,
    ],
    max_examples=25,
)
flips = st.lists(st.tuples(st.integers(0, 10**6), st.integers(1, 255)), min_size=1, max_size=3)
shares = st.integers(0, 100)


def flipped(content, changes):
    damaged = bytearray(content)
    for place, mask in changes:
        damaged[place % len(damaged)] ^= mask
    return bytes(damaged)


def damages(path, changes, keep):
    """Damage a file in two ways, one after the other: some bytes changed, and the end cut off."""
    content = path.read_bytes()
    for damaged in (flipped(content, changes), content[: len(content) * keep // 101]):
        path.write_bytes(damaged)
        yield damaged


def refused_or(name, read, *arguments):
    """What is read, or None where it is refused by an error that names the file; any other
    exception fails the test."""
    try:
        return read(*arguments)
    except InputError as error:
        assert name in str(error)  # noqa: PT017 (it may come)
        return None


# --- texts and items


@given(
    content=st.binary(max_size=200),
    form=st.sampled_from(["alpaca", "text", "wikipedia", "questions"]),
)
@many
def test_bytes_that_are_no_texts_are_refused(content, form):
    for name in ("x.json", "x.jsonl", "x.jsonl.gz", "x.parquet", "x.txt"):
        result = refused_or(name, parse_texts, content, name, form, str)
        assert result is None or all(isinstance(text, str) for text in result)


ITEMS_OF = {
    "piqa": pa.table(
        {
            "goal": ["open a jar", "ein Hund: äöü"],
            "sol1": ["twist", "a"],
            "sol2": ["hit", "c"],
            "label": [0, 1],
            "source": ["not needed", "ü"],
        }
    ),
    "truthfulqa_mc1": pa.table(
        {"question": ["q", "ü"], "mc1_targets": [{"choices": ["a", "b"], "labels": [1, 0]}] * 2}
    ),
}


def check_items(task, path):
    """They are refused, or can be read whole and have the columns that are needed; of piqa, which
    has no structs whose fields could have other names, of the same types. Values may differ: a
    user's Parquet has no digest."""
    complete, needed = ITEMS_OF[task], benchmarks.BENCHMARKS[task].columns
    if tables := refused_or(path.name, tables_from_folder, task, path.parent):
        result = tables["validation"]
        assert len(result.to_pylist()) == result.num_rows > 0
        assert task != "piqa" or result.select(needed).schema == complete.select(needed).schema


@pytest.mark.parametrize("task", ITEMS_OF)
@given(changes=flips, keep=shares)
@many
def test_damaged_items_are_refused_or_have_the_same_columns(task, changes, keep, tmp_path):
    path = tmp_path / f"{task}_validation.parquet"
    pq.write_table(ITEMS_OF[task], path)
    for _ in damages(path, changes, keep):
        check_items(task, path)


# --- tables and logs

WHOLE = {
    "texts": (
        TEXTS,
        {
            "text": ["a cat", "", "ein Hund: äöü"],
            "kind": [None, "web", "tales"],
            "share": [None, 1.0, 0.5],
        },
        {},
    ),
    "calibration": (CALIBRATION, {"input_ids": [[1, 2, 3], [~4, 5]]}, {"digest": "x"}),
    "iteration": (
        ITERATION,
        {
            "removed": [[], ["mha.0"], ["mlp.1", "mha.2"]],
            "added": [None, "mha.0", "mlp.1"],
            "loss": [1.5, 2.5, 0.3],
            "perplexity": [3.0, 4.0, None],
            "rows_used": [3, 3, 3],
            "rows_total": [3, 3, 3],
            "chosen": [False, True, False],
            "row_loss": [[1.0, 2.0, 3.0]] * 3,
            "row_nll": [None, [1.0, 2.0, 0.1], None],
            "lazy_choice": [None, True, None],
        },
        {"search": "s", "iteration": "0", "complete": "true"},
    ),
    "items": (
        ITEMS,
        {
            "task": ["piqa"] * 2,
            "item": [0, 1],
            "gold": [1, 0],
            "loglikelihoods": [[-1.0, -2.0]] * 2,
            "acc": [0.0, 1.0],
            "acc_norm": [None, 1.0],
            "prompt_hash": ["x", "y"],
            "exact_match": [None, 0.0],
            "response": ["", "18"],
            "p_gold": [0.5, None],
        },
        {},
    ),
}


@pytest.mark.parametrize("kind", WHOLE)
@given(changes=flips, keep=shares)
@many
def test_a_damaged_table_is_refused_or_is_the_same(kind, changes, keep, tmp_path):
    schema, columns, facts = WHOLE[kind]
    path = tmp_path / "t.parquet"
    write_table(path, pa.table(columns, schema=schema), facts)
    for _ in damages(path, changes, keep):
        if result := refused_or("t.parquet", read_table, path, schema):
            assert result[0].to_pydict() == columns
            # a name of Parquet's own that is damaged is one fact more; the readers of these two
            # check their facts
            assert facts.items() <= result[1].items() or kind in ("calibration", "iteration")


@given(
    kind=st.sampled_from(sorted(WHOLE)),
    other=st.sampled_from(sorted(WHOLE)),
    column=st.integers(0, 9),
)
@many
def test_another_schema_is_refused(kind, other, column, tmp_path):
    schema, columns, _ = WHOLE[kind]
    table, path = pa.table(columns, schema=schema), tmp_path / "t.parquet"
    position = column % table.num_columns
    nulls = pa.nulls(table.num_rows, pa.decimal128(5))
    wrong = [
        table.remove_column(position),
        table.set_column(position, schema.names[position], nulls),
    ]
    if other != kind:
        wrong.append(pa.table(WHOLE[other][1], schema=WHOLE[other][0]))
    for item in wrong:
        pq.write_table(item, path)
        with pytest.raises(InputError, match="expected"):
            read_table(path, schema)
    required = [field for field in schema if not field.nullable]
    field = required[column % len(required)]
    empty = pa.nulls(len(table), field.type)
    pq.write_table(table.set_column(schema.get_field_index(field.name), field.name, empty), path)
    with pytest.raises(InputError, match=f"no value in some rows of {field.name}"):
        read_table(path, schema)


@given(changes=flips, keep=shares)
@example(changes=[(12, 3)], keep=100)  # a digit of a number
@many
def test_a_damaged_sealed_object_is_refused_or_is_the_same(changes, keep, tmp_path):
    path, complete, notes = (
        tmp_path / "plan.json",
        {"ratio": 0.5, "order": ["mha.1", "ü"], "of": {"2": None}},
        [],
    )
    write_sealed_json(path, complete | {"of": {2: None}})
    for _ in damages(path, changes, keep):
        if result := refused_or("plan.json", read_json, path):
            # where the digest's own name is damaged, it is one field more
            assert complete.items() <= result.items()
        assert read_kept_json(path, notes.append) == result
        assert path.exists() == (result is not None)
        assert result or "plan.json.bad" in notes[-1]
    for aside in tmp_path.glob("*.bad*"):
        aside.unlink()


@given(changes=flips, keep=shares)
@many
def test_a_damaged_calibration_set_is_refused(changes, keep, tmp_path):
    path, complete = tmp_path / "rows.parquet", CalibrationSet(((1, 2, 3), (~4, 5)))
    complete.save(path, "text")
    for _ in damages(path, changes, keep):
        assert refused_or("rows.parquet", CalibrationSet.load, path) in (None, complete)


@given(changes=flips, keep=shares)
@example(changes=[(1, ord("\n") ^ ord(" "))], keep=0)
@many
def test_a_damaged_result_is_set_aside(changes, keep, tmp_path):
    schema, columns, _ = WHOLE["items"]
    complete, notes = Stored({"acc": 0.5}, pa.table(columns, schema=schema)), []
    store = ResultsStore(tmp_path, notes.append)
    store.save({"k": 1}, complete)
    for suffix in ("json", "parquet"):
        (path,) = (path for path in tmp_path.glob(f"*.{suffix}"))
        for _ in damages(path, changes, keep):
            result = store.load({"k": 1})
            # the latter where a blank of the JSON text became another
            assert result in (
                None,
                complete,
            )
            assert result is not None or "computed again" in notes[-1]
            if result is None:
                store.save({"k": 1}, complete)
        for aside in tmp_path.glob("*.bad*"):
            aside.unlink()


@given(changes=flips, keep=shares)
@many
def test_a_damaged_log_gives_no_other_loss(changes, keep, tmp_path):
    put = {"mha.0": [1.0, 2.0], "mlp.1": [0.25, 1e-9]}
    for path in tmp_path.glob("*/*"):
        path.unlink()
    store = TrialStore({"model": "m"}, "ab", tmp_path)
    for key, loss in put.items():
        store.put(key, [0, 1], loss)
    store.close()
    (log,) = tmp_path.glob("*/*.jsonl")
    content = log.read_bytes()
    for damaged in (flipped(content, changes), content[: len(content) * keep // 101]):
        log.write_bytes(damaged)
        again = TrialStore({"model": "m"}, "ab", tmp_path)
        assert all(again.get(key) in (None, put[key]) for key in put)
        for aside in log.parent.glob("*.bad*"):
            aside.unlink()


# --- what strangers wrote ---

CONFIG = tiny_model(dtype=None, layers=2).config.to_dict() | {
    "auto_map": {"AutoConfig": "code.Config"}
}
PLAN = plan_of(CONFIG, ["mha.1"])
REPORT = {"ok": True, "engine": "transformers", "manifest": {"config.json": "0" * 64}}
HEALED = {
    "words": "fitted",
    "datasets": ["someone/texts"],
    "perplexity": {"refit": {"dense": 2.0, "before": 4.0, "after": 3.0}},
}
INDEX = {"metadata": {"total_size": 1}, "weight_map": {"model.norm.weight": "model.safetensors"}}
CARD = {"license": "mit", "base_model": "someone/model", "tags": ["pruned"]}
RUN = {
    "model": {"source": "hub", "repo": "someone/model"},
    "calibration": {"seq_len": 64, "num_samples": 8},
}
QUESTIONS = [{"doc": {"story": "Once."}}, {"doc": {"query": "1 + 1?", "solution": "2."}}]
RECORDS = [{"text": "a cat", "kind": "tales", "share": 0.5}, {"text": "ein Hund: äöü"}]


def lines(records):
    return "\n".join(json.dumps(record) for record in records).encode()


def sealed(value):
    """As a stranger would seal it: with the right digest."""
    if not isinstance(value, dict):
        return plain(value)
    content = json.loads(json.dumps(value))
    digest = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
    return plain({**content, DIGEST: digest})


def plain(value):
    return json.dumps(value).encode()


def card(value):
    return f"---\n{json.dumps(value)}\n---\n# A model\n".encode()


def fetched(folder):
    return cached_checkpoint(
        LocalModel(source="path", path=str(folder)), folder.parent / "cache", folder / "pins"
    )


def copied(folder):
    copy_files(folder, folder.parent, ("generation_config.json",))


def sizes(folder):
    return fetch_config(LocalModel(source="path", path=str(folder)), folder / "pins")


def verification(folder):
    return read_checked(folder / "verification.json", EngineReport, sealed=True)


READERS = {
    "config.json": (CONFIG, plain, sizes),
    "generation_config.json": ({"max_length": 20, "auto_map": {}}, plain, copied),
    "model.safetensors.index.json": (INDEX, plain, fetched),
    "blockpruner_healed.json": (HEALED, plain, kept_facts),
    "verification.json": (REPORT, sealed, verification),
    "blockpruner_plan.json": (
        plan_fields(PLAN),
        sealed,
        lambda folder: load_plan(folder / "blockpruner_plan.json"),
    ),
    "README.md": (CARD, card, lambda folder: (licence_beside(folder), card_fields(folder))),
    "run.yaml": (RUN, plain, lambda folder: read_values(folder / "run.yaml")),
}
"""By file: its content, how that is written, and what reads it in a folder. The records of texts
are apart."""

ODD = (
    None,
    True,
    0,
    -1,
    10**9,
    10**400,
    1e309,
    math.nan,
    "",
    "x",
    "\ud83d",
    [],
    [1],
    {},
    {"a": []},
    [[]] * 3,
)
MISSING = "missing"


def changed(value, path, odd):
    """The value with something odd in place of a part, or without it."""
    if not path or not isinstance(value, dict | list) or not value:
        return odd
    keys = list(value) if isinstance(value, dict) else list(range(len(value)))
    key = keys[path[0] % len(keys)]
    copy = value.copy()
    if len(path) == 1 and odd is MISSING:
        del copy[key]
    else:
        copy[key] = changed(value[key], path[1:], odd)
    return copy


@pytest.mark.parametrize("name", READERS)
@given(
    path=st.lists(st.integers(0, 99), max_size=3),
    odd=st.sampled_from((*ODD, MISSING)),
    flip=flips,
    keep=shares,
)
@many
def test_a_strangers_file_is_refused_or_read(name, path, odd, flip, keep, tmp_path, monkeypatch):
    """Never a traceback, or a loop over 10^9 layers."""
    value, write, read = READERS[name]
    folder = tmp_path / "model"
    folder.mkdir(exist_ok=True)
    monkeypatch.chdir(tmp_path)
    for file, other in READERS.items():
        (folder / file).write_bytes(other[1](other[0]))
    (folder / "model.safetensors").touch()
    read(folder)
    complete = write(value)
    for content in (
        flipped(complete, flip),
        complete[: len(complete) * keep // 101],
        write(changed(value, path, odd)),
    ):
        (folder / name).write_bytes(content)
        with suppress(InputError):
            read(folder)


@pytest.mark.parametrize(("form", "records"), [("text", RECORDS), ("questions", QUESTIONS)])
@pytest.mark.parametrize("name", ["x.jsonl", "x.jsonl.gz"])
@given(
    path=st.lists(st.integers(0, 99), max_size=3),
    odd=st.sampled_from((*ODD, MISSING)),
    flip=flips,
    keep=shares,
)
@many
def test_records_are_refused_by_file_or_are_texts(name, form, records, path, odd, flip, keep):
    def write(value):
        content = lines(value) if isinstance(value, list) else plain(value)
        return gzip.compress(content) if name.endswith("gz") else content

    complete = write(records)
    for content in (
        flipped(complete, flip),
        complete[: len(complete) * keep // 101],
        write(changed(records, path, odd)),
    ):
        result = refused_or(name, parse_texts, content, name, form, str)
        assert result is None or "".join(result).encode() is not None


# --- advice ---


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("data/plans/t.json", "{", "; delete it and run `dvc repro`"),
        ("data/plans/t.json", None, "; run `dvc repro`, which makes it"),
        ("models/mine/config.json", "{", ""),
        ("data/.model.01234567.tmp/config.json", "{", ""),
    ],
)
def test_a_stage_tells_to_delete_what_the_dag_makes_again_and_nothing_else(
    tmp_path, monkeypatch, capsys, name, content, said
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["clean"])
    monkeypatch.setattr(stages, "require_current", lambda: None)
    path = Path(name)
    path.parent.mkdir(parents=True)
    if content:
        path.write_text(content)

    def main(item):
        try:
            read_json(path)
        finally:
            if "tmp" in name:
                shutil.rmtree(path.parent)

    with pytest.raises(SystemExit):
        stages.run("clean", main)
    err = capsys.readouterr().err.strip()
    assert name in err
    assert err.endswith(said)
    assert ("dvc" in err) is bool(said)
