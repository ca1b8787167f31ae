"""The evaluation of a checkpoint: results, the store, and what is computed again when something
changes or breaks."""

import contextlib
import json
import math
import os
import shutil
from functools import partial
from importlib.metadata import version
from pathlib import Path
from statistics import mean
from types import SimpleNamespace

import pyarrow.parquet as pq
import pytest
import torch

from blockpruner.core.blocks import parse_mask
from blockpruner.core.errors import InputError, NonFiniteLossError
from blockpruner.core.progress import SilentObserver
from blockpruner.evaluation import suite, zero_shot
from blockpruner.evaluation.processes import run_processes
from blockpruner.evaluation.settings import Evaluate
from blockpruner.evaluation.store import ITEMS
from blockpruner.evaluation.suite import Checkpoint, InMemory
from blockpruner.inputs.calibration import CalibrationSet
from blockpruner.inputs.texts import MixedText, TextKind, write_texts
from blockpruner.methods.healed import find_healed, save_healed
from blockpruner.model.models import masked, prune_
from blockpruner.store.files import read_json, write_sealed_json, write_table
from blockpruner.store.manifest import manifest
from blockpruner.store.plans import load_plan
from tests.plans import SOMEONE, plan_of, save_pruned
from tests.tiny import full_nll, save_tiny, tiny_model, tiny_tokenizer
from tests.unit.zero_shot_items import write_tasks

MASK = parse_mask("mha.0,mlp.2,mha.3,mlp.3")
TEXT = "The quick brown fox jumps over the lazy dog. " * 6
TASKS = ("piqa", "winogrande", "arc_easy")
NOWHERE = {"source": "path", "path": "nowhere"}
PLAN = plan_of(tiny_model().config.to_dict(), sorted(map(str, MASK)))
SEARCH = {"seconds": 1.5, "trials_asked": 20, "trials_computed": 10}
PHASES = ["perplexity", *TASKS, "samples", "speed"]


class Recorder(SilentObserver):
    def __init__(self):
        self.computed, self.cached, self.notes, self.steps, self.overall = [], [], [], [], []

    def note(self, message):
        self.notes.append(message)

    def begin(self, phase, overall=None):
        self.phase = phase
        self.overall.append(overall)

    def advance(self, done, total, detail):
        self.steps.append((self.phase, done, total, detail))

    def end(self, summary, table=(), cached=False):
        (self.cached if cached else self.computed).append(self.phase)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Dense and pruned checkpoint, sources, and the results of the first evaluation, which nobody
    may change."""
    root = tmp_path_factory.mktemp("world")
    save_tiny(root / "dense", max_position_embeddings=512)
    model = tiny_model(dtype=torch.float32, max_position_embeddings=512)
    save_pruned(prune_(model, MASK), root / "pruned")
    tiny_tokenizer().save_pretrained(root / "pruned")
    call_verified(root / "pruned")
    write_texts(root / "sources" / "perplexity.parquet", [TEXT, TEXT])
    write_tasks(root / "sources" / "tasks", location=Path("sources/tasks"))
    observer = Recorder()
    with contextlib.chdir(root):
        results = evaluate(root, observer)
    return SimpleNamespace(root=root, results=results, observer=observer)


@pytest.fixture
def place(world, tmp_path, monkeypatch):
    """A copy of the world to change, as the working folder (task files name their items relative to
    it)."""
    root = shutil.copytree(world.root, tmp_path / "copy")
    monkeypatch.chdir(root)
    return root


def evaluate(root, observer, checkpoint="pruned", subject=None, processes=1, **changes):
    sections = {
        "perplexity": {"seq_len": 40, "max_rows": 3, "data": NOWHERE},
        "zero_shot": {"tasks": TASKS, "limit": 3, "data": {"source": "hub"}},
        "speed": {"prompt_tokens": 6, "new_tokens": 4, "repeats": 2, "batch": 1},
    }
    changed = {name: section | (changes.get(name) or {}) for name, section in sections.items()}
    settings = Evaluate(
        **changed | {name: None for name, change in changes.items() if change is None}
    )
    dense = Checkpoint(root / "dense", changes.get("dtype", "float32"), "cpu", False)
    subject = (
        subject(dense)
        if subject
        else dense
        if checkpoint == "dense"
        else dense.export(root / checkpoint)
    )
    places = [root / name for name in ("sources", "out", "store")]
    extra = {"plan": PLAN, "search": SEARCH, "processes": processes}
    return suite.benchmark(subject, dense, *places, settings=settings, observer=observer, **extra)


def call_verified(checkpoint):
    """As after a verification that found no difference."""
    write_sealed_json(
        checkpoint / "verification.json",
        {"ok": True, "engine": "transformers", "manifest": manifest(checkpoint)},
    )


def no_model(*args, **kwargs):
    raise AssertionError("a model was loaded although everything is stored")


def greedy_text(model, prompt):
    """48 tokens by whole forward passes."""
    tokenizer = tiny_tokenizer()
    ids = tokenizer(prompt)["input_ids"]
    start = len(ids)
    while len(ids) < start + 48 and ids[-1] != tokenizer.eos_token_id:
        with torch.no_grad():
            ids.append(
                int(model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1].argmax())
            )
    return tokenizer.decode(ids[start:], skip_special_tokens=True).strip()


def test_results(world):
    results = world.results
    assert world.observer.computed == PHASES
    assert world.observer.overall == [i / 6 for i in range(6)]
    assert [step for step in world.observer.steps if step[0] == "perplexity"] == [
        ("perplexity", i, 3, "rows") for i in (1, 2, 3)
    ]
    out = world.root / "out"
    written = read_json(out / "results.json") | read_json(out / "speed.json")
    assert written == json.loads(json.dumps(results))
    assert load_plan(out / "plan.json") == PLAN
    assert written["search"] == SEARCH
    ids = tiny_tokenizer()(f"{TEXT}\n\n{TEXT}")["input_ids"]
    dense = tiny_model(dtype=torch.float32, max_position_embeddings=512)
    with masked(dense, MASK) as model:
        nlls = [full_nll(model, ids[i : i + 40]) for i in (0, 40, 80)]
        said = [greedy_text(model, sample["prompt"]) for sample in results["samples"]]
    assert [sample["text"] for sample in results["samples"]] == said
    assert len({*said}) == len(said) == 3
    assert results["formats"] == ["pruned"]
    nll, result = mean(nlls), results["perplexity"]
    assert result == {
        "perplexity": pytest.approx(math.exp(nll), rel=1e-4),
        "nll": pytest.approx(nll, rel=1e-5),
        "row_nll": pytest.approx(nlls, rel=1e-5),
        "rows": 3,
        "tokens": 120,
        "seq_len": 40,
    }
    parameters = 2 * 260 * 32 + 32 + 2 * (2 * 32 * 32 + 2 * 32 * 16 + 32) + 2 * (3 * 32 * 48 + 32)
    assert (results["parameters"], results["weight_bytes"]) == (parameters, 4 * parameters)
    scores = results["tasks"]
    assert list(scores) == list(TASKS)
    assert [scores[task]["metric"] for task in TASKS] == ["acc_norm", "acc", "acc_norm"]
    for score in scores.values():
        assert (score["value"], score["stderr"]) == (
            score[score["metric"]],
            score[f"{score['metric']}_stderr"],
        )
    assert results["average"]["value"] == pytest.approx(
        sum(s["value"] for s in scores.values()) / 3
    )
    assert results["average"]["stderr"] == pytest.approx(
        math.sqrt(sum(s["stderr"] ** 2 for s in scores.values())) / 3
    )
    chance = {"piqa": 0.5, "winogrande": 0.5, "arc_easy": (1 / 4 + 1 / 3 + 1 / 5) / 3}
    assert results["chance"] == pytest.approx(chance)
    speed = results["speed"]
    assert speed["dense"]["kv_cache_bytes"] == 2 * speed["pruned"]["kv_cache_bytes"]
    items = pq.read_table(world.root / "out" / "items.parquet")
    assert items.schema.names == ITEMS.names
    assert items.num_rows == 9
    for task in TASKS:
        rows = [row for row in items.to_pylist() if row["task"] == task]
        assert sum(row[scores[task]["metric"]] for row in rows) / len(rows) == pytest.approx(
            scores[task]["value"]
        )
    assert list(results["made"]) == PHASES
    for made in results["made"].values():
        assert made["torch"] == version("torch")
        assert (made["device"], made["attention"]) == (
            "cpu",
            "sdpa",
        )
    figures = suite.headline(results, PLAN)
    assert (figures["ratio"], figures["mha_removed"], figures["mlp_removed"]) == (
        round(PLAN.ratio, 4),
        2,
        2,
    )
    assert (figures["kv_cache"], figures["parameters"]) == (0.5, parameters)
    assert suite.headline(results, None)["kv_cache"] == 1.0


def test_a_model_in_memory_gives_what_its_checkpoint_gives(world, place):
    """Nothing is written of it, and its results are stored under a key of its own."""
    rows = CalibrationSet(((1, 2, 3, 4),))
    observer = Recorder()
    result = evaluate(place, observer, subject=lambda dense: InMemory(dense, PLAN, rows))
    same = ("parameters", "weight_bytes", "perplexity", "tasks", "average", "chance", "samples")
    assert {key: result[key] for key in same} == {key: world.results[key] for key in same}
    assert observer.computed == PHASES
    assert result["formats"] == []
    assert (
        result["speed"]["dense"]["kv_cache_bytes"]
        == 2 * result["speed"]["pruned"]["kv_cache_bytes"]
    )
    again = Recorder()
    evaluate(place, again, subject=lambda dense: InMemory(dense, PLAN, rows))
    assert again.cached == PHASES


def test_a_model_in_memory_has_its_healed_weights(place, tmp_path):
    """A last norm of zeros makes all tokens equally likely."""
    save_healed(
        tmp_path / "healed", {"model.norm.weight": torch.zeros(32)}, "it", "healed by hand", SOMEONE
    )
    healed = find_healed([tmp_path / "healed"], "it")
    rows, results = CalibrationSet(((1, 2, 3, 4),)), []
    for weights in (None, healed):
        subject = partial(InMemory, plan=PLAN, rows=rows, healed=weights)
        results.append(evaluate(place, Recorder(), subject=subject, speed=None))
    plain, changed = (result["perplexity"]["perplexity"] for result in results)
    assert changed == pytest.approx(260)
    assert plain != pytest.approx(260)


def test_what_is_stored_is_neither_computed_nor_loaded(world, place, monkeypatch):
    monkeypatch.setattr(suite, "load_model", no_model)
    monkeypatch.setattr(
        "blockpruner.store.provenance.version", lambda package: "of another machine"
    )
    before = {path.name: path.read_bytes() for path in (place / "out").iterdir()}
    shutil.rmtree(place / "out")
    observer = Recorder()
    assert evaluate(place, observer) == world.results
    assert (observer.computed, observer.cached) == ([], PHASES)
    assert {path.name: path.read_bytes() for path in (place / "out").iterdir()} == before


def test_two_processes_evaluate_what_is_missing(world, place):
    shutil.rmtree(place / "store")
    observer = Recorder()
    rows = CalibrationSet(((1, 2, 3, 4),))
    results = evaluate(
        place, observer, subject=lambda dense: InMemory(dense, PLAN, rows), processes=2
    )
    for name in ("perplexity", "tasks", "average", "samples"):
        assert results[name] == world.results[name]
    # Only speed is measured in this process; the first phases are those of the first process.
    assert observer.computed[-1] == "speed"
    assert observer.cached == PHASES[:-1]


def touch(device, observer, folder):
    (folder / str(os.getpid())).touch()
    observer.note(device)


def test_each_process_works_and_the_first_one_reports(tmp_path):
    observer = Recorder()
    notes = []
    observer.note = notes.append
    run_processes(2, "cpu", touch, observer, tmp_path)
    assert len(list(tmp_path.iterdir())) == 2
    assert notes == ["cpu"]


def fail(device, observer):
    raise NonFiniteLossError("the loss is nan")


def test_what_a_process_raises_arrives_as_itself():
    with pytest.raises(NonFiniteLossError, match="the loss is nan"):
        run_processes(2, "cpu", fail, Recorder())


def test_what_is_not_to_be_timed_is_not(place, world, monkeypatch):
    monkeypatch.setattr(suite, "measure_speed", no_model)
    monkeypatch.setattr(suite, "load_model", no_model)  # all else is stored
    observer = Recorder()
    results = evaluate(place, observer, speed=None)
    assert observer.cached == PHASES[:-1]
    assert observer.overall == [i / 5 for i in range(5)]
    assert results == world.results | {
        "speed": None,
        "made": {name: world.results["made"][name] for name in PHASES[:-1]},
    }


def test_the_dense_model_alone(place):
    results = evaluate(
        place, Recorder(), checkpoint="dense", zero_shot={"tasks": ["piqa"], "limit": 2}
    )
    assert list(results["speed"]) == ["dense"]
    assert results["parameters"] == tiny_model().num_parameters()


def test_any_mix_of_tasks(place):
    """Guessing a word or a number is never right."""
    tasks = ["piqa", "lambada_openai", "mmlu_marketing"]
    results = evaluate(place, Recorder(), zero_shot={"tasks": tasks, "limit": 2})
    scores = results["tasks"]
    assert [scores[task]["metric"] for task in tasks] == ["acc_norm", "acc", "acc"]
    assert results["average"]["value"] == pytest.approx(
        sum(scores[task]["value"] for task in tasks) / 3
    )
    assert results["chance"] == {"piqa": 0.5, "lambada_openai": 0.0, "mmlu_marketing": 0.25}
    rows = pq.read_table(place / "out" / "items.parquet").to_pylist()
    assert [row["task"] for row in rows] == [task for task in tasks for _ in range(2)]
    again = Recorder()
    assert evaluate(place, again, zero_shot={"tasks": tasks, "limit": 2}) == results
    assert not again.computed


def change_text(root):
    write_texts(root / "sources" / "perplexity.parquet", [TEXT, "other" * 20])


def change_kinds(root):
    mix = [MixedText(TEXT, TextKind(name, 1.0)) for name in "ab"]
    write_texts(root / "sources" / "perplexity.parquet", mix)


def change_item(root):
    path = root / "sources" / "tasks" / "piqa" / "validation.parquet"
    write_table(path, pq.read_table(path).take([1, 0, 2, 3, 4]))


def change_tokenizer(root):
    path = root / "pruned" / "tokenizer_config.json"
    path.write_text(
        json.dumps(json.loads(path.read_text()) | {"clean_up_tokenization_spaces": True})
    )
    call_verified(root / "pruned")


def change_weights(root):
    model = tiny_model(dtype=torch.float32, max_position_embeddings=512)
    model.get_output_embeddings().weight[3, 3] += 1
    shutil.move(root / "pruned/model.safetensors", root / "before")
    save_pruned(prune_(model, MASK), root / "other")
    shutil.move(root / "other/model.safetensors", root / "pruned")
    call_verified(root / "pruned")


def change_dense(root):
    path = root / "dense" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"rms_norm_eps": 1e-4}))


def change_layout(root):
    """As a later version of transformers would write the same configs."""
    for path in (*root.glob("*/config.json"), *root.glob("*/generation_config.json")):
        path.write_text(
            json.dumps(json.loads(path.read_text()) | {"transformers_version": "6.0.0"})
        )


@pytest.mark.parametrize(
    ("change", "settings", "again"),
    [
        (change_text, {}, ["perplexity"]),
        (change_kinds, {}, ["perplexity"]),
        (None, {"perplexity": {"seq_len": 20}}, ["perplexity"]),
        (None, {"perplexity": {"max_rows": 2}}, ["perplexity"]),
        (change_item, {}, ["piqa"]),
        (None, {"zero_shot": {"limit": 2}}, list(TASKS)),
        (None, {"zero_shot": {"bos": False}}, list(TASKS)),
        (change_tokenizer, {}, ["perplexity", *TASKS, "samples"]),
        (change_layout, {}, []),
        (change_weights, {}, PHASES),
        (None, {"dtype": "float64"}, PHASES),
        (change_dense, {}, ["speed"]),
        (None, {"speed": {"new_tokens": 5}}, ["speed"]),
        (None, {"zero_shot": {"tasks": TASKS[::-1]}}, []),
    ],
)
def test_only_what_a_change_touches_is_computed_again(place, change, settings, again):
    if change is not None:
        change(place)
    observer = Recorder()
    evaluate(place, observer, **settings)
    assert observer.computed == again


def test_rows_of_a_mix_keep_their_kinds(place):
    change_kinds(place)
    result = evaluate(place, Recorder())["perplexity"]
    assert result["row_kind"] == ["a"] * (result["rows"] // 2) + ["b"] * (result["rows"] // 2)
    assert result["rows"] > 2


@pytest.mark.parametrize("name", ["EVAL_VERSION", "machine", "harness"])
def test_versions_and_machine_are_in_the_keys(place, name, monkeypatch):
    if name == "EVAL_VERSION":
        monkeypatch.setattr(suite, "EVAL_VERSION", suite.EVAL_VERSION + 1)
    elif name == "machine":
        monkeypatch.setattr(suite, "machine", lambda: "another machine")
    else:
        known = suite.version
        monkeypatch.setattr(
            suite, "version", lambda package: "0" if package == "lm-eval" else known(package)
        )
    observer = Recorder()
    evaluate(place, observer)
    assert (
        observer.computed
        == {"EVAL_VERSION": PHASES, "machine": ["speed"], "harness": list(TASKS)}[name]
    )


def test_a_kill_loses_one_task(place, monkeypatch):
    shutil.rmtree(place / "store")
    out = (place / "out" / "results.json").read_bytes()
    original = zero_shot.evaluate

    def killed(model, tokenizer, task, *args, **kwargs):
        if task == "winogrande":
            raise KeyboardInterrupt
        return original(model, tokenizer, task, *args, **kwargs)

    monkeypatch.setattr(zero_shot, "evaluate", killed)
    with pytest.raises(KeyboardInterrupt):
        evaluate(place, Recorder())
    assert (place / "out" / "results.json").read_bytes() == out
    monkeypatch.setattr(zero_shot, "evaluate", original)
    observer = Recorder()
    evaluate(place, observer)
    assert observer.cached == ["perplexity", "piqa"]


def entry_of(root, kind, task=None):
    for path in sorted((root / "store").glob("*.json")):
        key = json.loads(path.read_text())["key"]
        if key["kind"] == kind and key.get("task") == task:
            return path
    raise AssertionError(kind)


@pytest.mark.parametrize("damage", ["foreign", "items gone", "items swapped"])
def test_an_entry_that_cannot_be_trusted_is_named_and_computed_again(world, place, damage):
    path, other = (entry_of(place, "task", task) for task in ("piqa", "winogrande"))
    table, others = path.with_suffix(".parquet"), other.with_suffix(".parquet")
    contents = {
        "foreign": (path, other.read_bytes()),
        "items gone": (table, None),
        "items swapped": (table, others.read_bytes()),
    }
    bad, content = contents[damage]
    bad.unlink() if content is None else bad.write_bytes(content)
    observer = Recorder()
    assert evaluate(place, observer)["tasks"] == world.results["tasks"]
    assert observer.computed == ["piqa"]
    assert len(observer.notes) == 1
    assert str(bad) in observer.notes[0]
    assert f"{path.name}.bad" in observer.notes[0]
    assert path.with_name(f"{path.name}.bad").exists()


@pytest.mark.parametrize(
    "change", ["tokenizer.json", "model.safetensors", "custom_generate/generate.py"]
)
def test_an_export_that_was_changed_since_is_not_measured(place, change):
    path = place / "pruned" / change
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(path.read_bytes()[:-1] + b" " if path.exists() else b"")
    with pytest.raises(
        InputError, match=rf"pruned is not what was verified: {change} changed, or came or went"
    ):
        evaluate(place, Recorder())
