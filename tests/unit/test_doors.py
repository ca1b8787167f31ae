"""Every door makes the same model of the same words, and what judges a model is seen by nothing else."""

import json
import re
from dataclasses import replace
from importlib import import_module
from pathlib import Path

import pytest
import yaml
from transformers import AutoModelForCausalLM

import blockpruner
from blockpruner import pipeline
from blockpruner.cli import main as command
from blockpruner.cli.pruning import Place
from blockpruner.core.errors import InputError
from blockpruner.core.progress import SilentObserver
from blockpruner.healing import rows as healing_rows
from blockpruner.inputs import calibration
from blockpruner.params import load_run
from blockpruner.store.plans import load_plan
from flows.new_model import NewModel
from tests.tiny import save_tiny, tiny_tokenizer


def document(number):
    """Two lines, each long enough for a paragraph, with the document's number in both."""
    words = " ".join(f"{(number * 7 + k * k) % 97}" for k in range(14))
    return f"doc{number:03} begins {words}\ndoc{number:03} ends {words}"


TEXTS = [document(number) for number in range(120)]
PRUNE = ("prune", "tiny", "--budget", "0.3", "--texts", "t.jsonl", "--seq-len", "64", "--out", "pruned")
STAGES = ("settings", "fetch", "calibrate", "score", "commit", "compensate", "train", "materialize")
OF_RUN = STAGES[:4]
CONTEXT = 64


def write_texts(path, texts):
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A project with one run and one target, which is also where the command works."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    save_tiny(tmp_path / "tiny", max_position_embeddings=CONTEXT)
    write_texts(tmp_path / "t.jsonl", TEXTS)
    write_texts(tmp_path / "heldout.jsonl", [f"other words {i} " * 9 for i in range(20)])
    run = {
        "model": {"source": "path", "path": "tiny", "dtype": "float32"},
        "calibration": {"data": {"source": "path", "path": "t.jsonl"}, "split": "all", "num_rows": 16, "seq_len": 64},
        "score": {"method": "recommended"},
        "evaluate": {
            "perplexity": {"data": {"source": "path", "path": "heldout.jsonl"}, "seq_len": 64, "max_rows": 8},
            "zero_shot": {"tasks": []},
        },
    }
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs/tiny.yaml").write_text(yaml.safe_dump(run))
    params = {"runs": ["tiny"], "targets": {"pruned": {"run": "tiny", "budget": "0.3"}}, "runtime": {"device": "cpu"}}
    (tmp_path / "params.yaml").write_text(yaml.safe_dump(params))
    return tmp_path


def stages(*names):
    for name in names:
        import_module(f"stages.{name}").main("tiny" if name in OF_RUN else "pruned")


def prune_in_memory(texts=TEXTS, **given):
    model = AutoModelForCausalLM.from_pretrained("tiny")
    return blockpruner.prune(
        model, tiny_tokenizer(), texts, 0.3, **{"seq_len": 64, "observer": SilentObserver()} | given
    )


def same_plan(path, run):
    return replace(load_plan(path / "blockpruner_plan.json"), target="pruned", run=run)


@pytest.mark.usefixtures("in_process")
def test_every_door_makes_the_same_model_of_the_same_words(place, monkeypatch):
    asked, read = [], Place.read_run
    monkeypatch.setattr(Place, "read_run", lambda *given: asked.append(read(*given)) or asked[-1])
    with pytest.raises(SystemExit) as end:
        command.main(PRUNE)
    assert end.value.code == 0
    stages(*STAGES)
    exported = place / "data/checkpoints/pruned/hf"
    assert (place / "pruned/model.safetensors").read_bytes() == (exported / "model.safetensors").read_bytes()
    assert same_plan(place / "pruned", "tiny") == same_plan(exported, "tiny")
    found = prune_in_memory()
    assert found.plan.removed == same_plan(exported, "tiny").removed
    assert found.compensation["judged"].keys() == {"floating", "greedy-layers"}
    found.save(str(place / "memory"))
    assert (place / "memory/model.safetensors").read_bytes() == (exported / "model.safetensors").read_bytes()
    more = {"model": {"dtype": "float32"}, "calibration": {"seq_len": 64}}
    form = NewModel(name="form", model="tiny", budgets=("0.3",), texts="t.jsonl", more=more)
    (place / "runs/form.yaml").write_text(form.text())
    for run in (load_run("form"), load_run("tiny")):
        for section in ("score", "compensate", "train"):
            assert getattr(run, section) == getattr(asked[0], section)
        absolute = {"data": asked[0].calibration.data}
        assert run.calibration.model_copy(update=absolute) == asked[0].calibration


class RecordedError(Exception):
    """Rows are drawn, and nothing more is wanted."""


def by_command():
    command.main((*PRUNE, "--train", "all"))


def by_stages():
    path = Path("runs/tiny.yaml")
    run = yaml.safe_load(path.read_text()) | {"train": {"num_samples": 80, "seq_len": 64, "validation": 4}}
    run["train"]["data"] = run["calibration"]["data"]
    run["evaluate"]["perplexity"]["max_rows"] = None
    path.write_text(yaml.safe_dump(run))
    write_texts(Path("heldout.jsonl"), TEXTS[:20])  # which are calibration texts, too
    stages(*OF_RUN)


DOORS = [(by_command, set()), (by_stages, set(range(19))), (prune_in_memory, set())]


@pytest.mark.parametrize("ignored", [False, True])
@pytest.mark.parametrize(("door", "evaluated"), DOORS)
def test_no_row_that_judges_or_is_evaluated_is_seen_elsewhere(place, monkeypatch, door, evaluated, ignored):
    """`ignored`: that this test would find it."""
    draw_rows, found = pipeline.calibrate, []

    def recorded(*given, **more):
        found.append(draw_rows(*given, **more))
        raise RecordedError

    monkeypatch.setattr(pipeline, "calibrate", recorded)
    if ignored:
        drawn = calibration.draw
        for module in (calibration, healing_rows):
            monkeypatch.setattr(module, "draw", lambda *given, reserved=(), **more: drawn(*given, **more))
    with pytest.raises(RecordedError):
        door()
    rows = {name: part for name, part in vars(found[0]).items() if part.rows}
    decoded = {name: tiny_tokenizer().decode([t for row in part.rows for t in row]) for name, part in rows.items()}
    documents = {name: set(map(int, re.findall(r"doc(\d{3})", text))) for name, text in decoded.items()}
    judge, others = documents.pop("judge"), set().union(*documents.values())
    keys = rows.pop("judge").row_keys
    assert judge and documents.keys() >= {"search", "fit"} and ("train" in documents) is (door is not prune_in_memory)
    assert not evaluated & (judge | others)
    assert bool(judge & others) is ignored
    assert ignored or not {*keys} & {key for part in rows.values() for key in part.row_keys}


def test_with_too_few_texts_to_judge_the_first_search_is_made_alone(place):
    class Notes(SilentObserver):
        def note(self, message):
            notes.append(message)

    notes = []
    model = AutoModelForCausalLM.from_pretrained("tiny")
    found = blockpruner.prune(model, tiny_tokenizer(), TEXTS[:5], 0.3, seq_len=64, observer=Notes())
    assert found.plan.method == "floating" and "judged" not in found.compensation
    assert any("too few to set some aside" in note for note in notes)
    with pytest.raises(InputError):
        prune_in_memory(TEXTS[:1])
