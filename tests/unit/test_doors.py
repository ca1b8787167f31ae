"""Every door makes the same model of the same words, and what judges a model is seen by nothing
else."""

import gc
import json
import re
from dataclasses import replace
from functools import partial
from importlib import import_module
from pathlib import Path
from weakref import WeakSet

import pytest
import yaml
from transformers import AutoModelForCausalLM, GenerationMixin, PreTrainedModel

import blockpruner
from blockpruner import api, pipeline, splits
from blockpruner.checkpoints import output
from blockpruner.cli import main as command
from blockpruner.cli import pruning, talking
from blockpruner.cli.pruning import Command
from blockpruner.config import dag
from blockpruner.config.params import load_run
from blockpruner.core.errors import InputError
from blockpruner.core.progress import SilentObserver
from blockpruner.evaluation import perplexity
from blockpruner.healing import rows as healing_rows
from blockpruner.inputs import calibration, sources, texts
from blockpruner.inputs.texts import ALPACA_WITHOUT_INPUT
from blockpruner.store.plans import load_plan
from flows.new_model import NewModel
from tests import shipped
from tests.tiny import bos_tokenizer, save_tiny, tiny_tokenizer


def document(number):
    """Two lines, each long enough for a paragraph, with the document's number in both."""
    words = " ".join(f"{(number * 7 + k * k) % 97}" for k in range(14))
    return f"doc{number:03} begins {words}\ndoc{number:03} ends {words}"


TEXTS = [document(number) for number in range(120)]
PRUNE = (
    "prune",
    "tiny",
    "--budget",
    "0.3",
    "--texts",
    "t.jsonl",
    "--seq-len",
    "64",
    "--out",
    "pruned",
)
STAGES = ("settings", "fetch", "calibrate", "score", "commit", "compensate", "train", "materialize")
OF_RUN = STAGES[:4]
CONTEXT = 64
MIX = [{"source": "path", "path": "t.jsonl"}, {"source": "wide"}]
"""Texts of one's own, and as much of ours."""


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
        "calibration": {
            "data": {"source": "mix", "of": MIX},
            "split": "all",
            "num_rows": 64,
            "seq_len": 64,
        },
        "score": {"method": "recommended"},
        "evaluate": {
            "perplexity": {
                "data": {"source": "path", "path": "heldout.jsonl"},
                "seq_len": 64,
                "max_rows": 8,
            },
            "zero_shot": {"tasks": []},
        },
    }
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs/tiny.yaml").write_text(yaml.safe_dump(run))
    params = {
        "runs": ["tiny"],
        "targets": {"pruned": {"run": "tiny", "budget": "0.3"}},
        "runtime": {"device": "cpu"},
    }
    (tmp_path / "params.yaml").write_text(yaml.safe_dump(params))
    dag.write()
    return tmp_path


def stages(*names):
    for name in names:
        item = "tiny-recommended" if name == "score" else "tiny" if name in OF_RUN else "pruned"
        import_module(f"stages.{name}").main(item)


def prune_in_memory(texts=TEXTS, **given):
    model = AutoModelForCausalLM.from_pretrained("tiny")
    return blockpruner.prune(
        model, tiny_tokenizer(), texts, 0.3, **{"seq_len": 64, "observer": SilentObserver()} | given
    )


def same_plan(path, run):
    return replace(load_plan(path / "blockpruner_plan.json"), target="pruned", run=run)


@pytest.mark.usefixtures("in_process")
def test_every_door_makes_the_same_model_of_the_same_words(place, monkeypatch):
    asked, read = [], Command.read_run
    monkeypatch.setattr(
        Command,
        "read_run",
        lambda *args, **more: asked.append(read(*args, **more)) or asked[-1],
    )
    with pytest.raises(SystemExit) as end:
        command.main(PRUNE)
    assert end.value.code == 0
    stages(*STAGES)
    exported = place / "data/checkpoints/pruned/hf"
    assert (place / "pruned/model.safetensors").read_bytes() == (
        exported / "model.safetensors"
    ).read_bytes()
    assert same_plan(place / "pruned", "tiny") == same_plan(exported, "tiny")
    with pytest.raises(SystemExit) as end:
        command.main(("prune", "--config", "runs/tiny.yaml", "--budget", "0.3", "--out", "by-file"))
    assert end.value.code == 0
    assert (place / "by-file/model.safetensors").read_bytes() == (
        exported / "model.safetensors"
    ).read_bytes()
    result = prune_in_memory()
    assert result.plan.removed == same_plan(exported, "tiny").removed
    assert (result.compensation["heat"] | result.compensation["judged"]).keys() == {
        "layers",
        "narrow",
    }
    fit = splits.Rows.load(place / "data/calibration/tiny").fit.rows
    assert load_plan(place / "data/plans/pruned/narrow.json").calibration["rows"] == len(fit), (
        "not the search's rows"
    )
    result.save(str(place / "memory"))
    assert (place / "memory/model.safetensors").read_bytes() == (
        exported / "model.safetensors"
    ).read_bytes()
    more = {"model": {"dtype": "float32"}, "calibration": {"seq_len": 64}}
    form = NewModel(name="form", model="tiny", budgets=("0.3",), texts="t.jsonl", more=more)
    (place / "runs/form.yaml").write_text(form.text())
    for run in (load_run("form"), load_run("tiny"), asked[1]):
        for section in ("score", "compensate", "train"):
            assert getattr(run, section) == getattr(asked[0], section)
        absolute = {"data": asked[0].calibration.data}
        assert run.calibration.data.title == asked[0].calibration.data.title
        assert run.calibration.model_copy(update=absolute) == asked[0].calibration


class ModelCounter:
    """Counts the models in memory: those that transformers has built, and that are still alive."""

    def __init__(self, monkeypatch):
        self._alive = WeakSet()
        self.most = 0
        build = PreTrainedModel.__init__

        def counted(model, *given, **named):
            build(model, *given, **named)
            gc.collect()
            # An inner decoder is a model of transformers, too.
            if isinstance(model, GenerationMixin):
                self._alive.add(model)
            self.most = max(self.most, len(self._alive))

        monkeypatch.setattr(PreTrainedModel, "__init__", counted)

    def most_during(self, work):
        gc.collect()
        self.most = len(self._alive)
        work()
        return self.most


@pytest.mark.usefixtures("in_process")
@pytest.mark.parametrize(
    ("method", "more", "expected"),
    [
        ("recommended", (), 1),
        ("narrow", (), 1),
        ("greedy", ("--compensate", "refit"), 1),
        ("laco", ("--set", "score.options.count=2"), 1),
        ("recommended", ("--train", "all"), 2),
        ("recommended", ("--train", "lora"), 1),
    ],
)
def test_the_command_holds_one_dense_model_and_in_training_one_student(
    place, monkeypatch, method, more, expected
):
    monkeypatch.setattr(output.Output, "missing", lambda *_: {})  # an export is a model of its own
    models = ModelCounter(monkeypatch)

    def prune():
        with pytest.raises(SystemExit) as end:
            command.main((*PRUNE, "--method", method, *more))
        assert end.value.code == 0

    assert models.most_during(prune) == expected


@pytest.mark.usefixtures("in_process")
def test_every_stage_holds_one_dense_model_and_training_one_student(place, monkeypatch):
    run = yaml.safe_load(Path("runs/tiny.yaml").read_text())
    run["train"] = {
        "num_samples": 80,
        "seq_len": 64,
        "validation": 4,
        "weights": "all",
        "distill": 1.0,
    }
    run["train"]["data"] = run["calibration"]["data"]
    Path("runs/tiny.yaml").write_text(yaml.safe_dump(run))
    params = yaml.safe_load(Path("params.yaml").read_text())
    params["targets"]["pruned"]["train"] = True
    Path("params.yaml").write_text(yaml.safe_dump(params))
    dag.write()
    models = ModelCounter(monkeypatch)
    most = {name: models.most_during(partial(stages, name)) for name in STAGES}
    assert most == dict.fromkeys(STAGES[:3], 0) | {
        "score": 1,
        "commit": 0,
        "compensate": 1,
        "train": 2,
        "materialize": 1,
    }


class RecordedError(BaseException):
    """Rows are drawn, and nothing more is wanted. The command makes a line of error of every
    Exception."""


def by_command():
    command.main((*PRUNE, "--train", "all"))


def by_stages():
    path = Path("runs/tiny.yaml")
    run = yaml.safe_load(path.read_text()) | {
        "train": {"num_samples": 80, "seq_len": 64, "validation": 4}
    }
    run["train"]["data"] = run["calibration"]["data"]
    run["evaluate"]["perplexity"]["max_rows"] = None
    path.write_text(yaml.safe_dump(run))
    write_texts(Path("heldout.jsonl"), TEXTS[:20])  # which are calibration texts, too
    stages(*OF_RUN)


def by_command_without_texts():
    command.main((*PRUNE[:4], "--num-samples", "40", "--train", "all"))


@pytest.fixture
def gemma(place, monkeypatch):
    """A model that needs BOS, packages of five kinds of text, and a hub of instructions and of an
    encyclopaedia."""
    save_tiny(place / "tiny", "gemma3_text", max_position_embeddings=512)
    bos_tokenizer().save_pretrained(place / "tiny")
    write_texts(place / "heldout.jsonl", [f"other words {i} " * 9 for i in range(20)])

    def load(data, *args):
        if data.source != "hub":
            return texts.load_texts(data, *args)
        return TEXTS[60:] if data.repo == "Salesforce/wikitext" else [*map(instruction, TEXTS[:60])]

    parts = [TEXTS[i : i + 24] for i in range(0, len(TEXTS), 24)]
    files = {
        "alpaca_en_demo.json": json.dumps(
            [{"instruction": "Count.", "output": text} for text in parts[0]]
        ),
        "wiki.utf8": "".join(f"<doc >\n{text}\n</doc>" for text in parts[1]),
        "c4_demo.jsonl": "\n".join(json.dumps({"text": text}) for text in parts[2]),
        "code.utf8": "\n\n\n".join(parts[3]),
        "tiny.utf8": "<|endoftext|>\n".join(parts[4]),
    }
    five = yaml.safe_load(shipped.REAL.read_text()) | {"wide": {"source": "general"}}
    (place / "five.yaml").write_text(yaml.safe_dump(five))
    monkeypatch.setattr(sources, "OURS", place / "five.yaml")
    monkeypatch.setattr(texts, "package_file", lambda *args: None)
    monkeypatch.setattr(texts, "read_member", lambda archive, file: files[Path(file).name].encode())
    monkeypatch.setattr(pruning, "load_texts", load)
    return place


def decoded(rows):
    return "".join(tiny_tokenizer().decode([max(token, ~token) for token in row]) for row in rows)


def instruction(text):
    return ALPACA_WITHOUT_INPUT.format(instruction="Count.", output=text)


def test_without_texts_every_family_can_read_the_rows_and_responses_are_scored(gemma, monkeypatch):
    """The paper's draw begins one row with BOS, and scores Alpaca's template."""
    result, noted = [], []

    class Noted(SilentObserver):
        def note(self, message):
            noted.append(message)

    def recorded(*args, **more):
        result.append(calibrate(*args, **more))
        raise RecordedError

    calibrate = splits.calibrate
    monkeypatch.setattr(splits, "calibrate", recorded)
    monkeypatch.setattr(command, "stderr_observer", Noted)
    with pytest.raises(RecordedError):
        by_command_without_texts()
    for name, part in vars(result[0]).items():
        assert part.rows, name
        assert {max(row[0], ~row[0]) for row in part.rows} == {257}, name
    rows = {
        name: set(re.findall(r"doc\d{3}", decoded(part.rows)))
        for name, part in vars(result[0]).items()
    }
    judge = rows.pop("judge")
    assert judge and not judge & set().union(*rows.values()), "set aside before the search draws"
    scored = decoded([token for token in row if token >= 0] for row in result[0].search.rows)
    assert {int(number) // 24 for number in re.findall(r"doc(\d{3})", scored)} == {*range(5)}, (
        "all kinds of text"
    )
    kinds = {"encyclopaedia", "instructions", "web", "program text", "stories"}
    assert {*result[0].judge.kinds} == {*kinds, "Python's library"}
    assert "Response" not in scored
    assert not any("BOS" in note for note in noted)
    paper = ("--method", "blockpruner", "--seq-len", "64", "--num-samples", "4")
    with pytest.raises(RecordedError):
        command.main(("prune", "tiny", "--budget", "0.3", *paper))
    assert "Response" in decoded(result[1].search.rows), "as published"


def test_held_out_rows_begin_with_bos_in_every_door(gemma, monkeypatch):
    seen, held_out = [], perplexity.held_out

    def recorded(*given):
        seen.append(held_out(*given).rows)
        raise RecordedError

    for module in (perplexity, talking, api):
        monkeypatch.setattr(module, "held_out", recorded)
    given = ("--texts", "heldout.jsonl", "--seq-len", "64")
    model = AutoModelForCausalLM.from_pretrained("tiny")
    for door in (
        lambda: blockpruner.evaluate(model, bos_tokenizer(), TEXTS, 64),
        lambda: command.main(("compare", "tiny", "tiny", *given)),
    ):
        with pytest.raises(RecordedError):
            door()
    assert all({row[0] for row in rows} == {257} and len(rows) > 1 for rows in seen)


def in_memory():
    prune_in_memory(TEXTS[:32])  # so few that a fit would see all


DOORS = [(by_command, set()), (by_stages, set(range(19))), (in_memory, set())]


@pytest.mark.parametrize("ignored", [False, True])
@pytest.mark.parametrize(("door", "evaluated"), DOORS)
def test_no_row_that_judges_or_is_evaluated_is_seen_elsewhere(
    place, monkeypatch, door, evaluated, ignored
):
    """`ignored`: that this test would find it."""
    draw_rows, result = splits.calibrate, []

    def recorded(*args, **more):
        result.append(draw_rows(*args, **more))
        raise RecordedError

    monkeypatch.setattr(splits, "calibrate", recorded)
    if ignored:
        drawn = calibration.draw
        for module in (calibration, healing_rows):
            monkeypatch.setattr(
                module, "draw", lambda *args, reserved=(), **more: drawn(*args, **more)
            )
    with pytest.raises(RecordedError):
        door()
    rows = {name: part for name, part in vars(result[0]).items() if part.rows}
    decoded = {
        name: tiny_tokenizer().decode([t for row in part.rows for t in row])
        for name, part in rows.items()
    }
    documents = {
        name: set(map(int, re.findall(r"doc(\d{3})", text))) for name, text in decoded.items()
    }
    ours = {name: set(re.findall(r"(?:tales|code) \d+", text)) for name, text in decoded.items()}
    if not ignored:
        assert ours["judge"]
        assert ours["fit"]
        assert not ours["judge"] & (ours["search"] | ours["fit"] | ours["tuning"])
    assert {*rows["judge"].kinds} >= {"tales", "code", "Python's library"}
    judge, others = documents.pop("judge"), set().union(*documents.values())
    keys = rows.pop("judge").row_keys
    assert judge
    assert documents.keys() >= {"search", "fit", "tuning"}
    assert ("train" in documents) is (door is not in_memory)
    assert not evaluated & (judge | others)
    assert bool(judge & others) is ignored
    assert ignored or not {*keys} & {key for part in rows.values() for key in part.row_keys}


def test_what_must_be_apart_has_no_row_and_no_text_in_common(place):
    """The audit of texts, of a mix that all steps draw from."""
    save_tiny(place / "tiny", max_position_embeddings=512)
    for i in range(3):
        write_texts(place / f"{i}.jsonl", TEXTS[i::3])
    files = [
        {"source": "path", "path": f"{i}.jsonl", "kind": "abc"[i], "share": i + 1} for i in range(3)
    ]
    mix, run = {"source": "mix", "of": files}, yaml.safe_load(Path("runs/tiny.yaml").read_text())
    run["calibration"] |= {"data": mix, "num_rows": 6, "seq_len": 256}
    run["compensate"] = {"num_rows": 18, "validation": 0.3334}
    run["train"] = {"data": mix, "num_rows": 6, "seq_len": 256, "validation": 6}
    run["evaluate"]["perplexity"] |= {
        "data": mix,
        "max_rows": 1,
        "seq_len": 256,
        "packing": "documents",
    }
    Path("runs/tiny.yaml").write_text(yaml.safe_dump(run))
    stages(*OF_RUN[:3])
    result = splits.Rows.load(Path("data/calibration/tiny"))
    held = texts.read_texts(Path("data/sources/tiny/perplexity.parquet"))
    evaluated = perplexity.held_out(tiny_tokenizer(), held, load_run("tiny").evaluate.perplexity)
    rows = {name: part.rows for name, part in vars(result).items()} | {"evaluated": evaluated.rows}
    seen = {name: re.findall(r"doc(\d{3}) begins", decoded(own)) for name, own in rows.items()}
    apart = [("fit", "tuning"), ("train", "validation"), ("judge", "evaluated")]
    apart += [
        (name, other)
        for name in ("search", "fit", "tuning", "train", "validation")
        for other in ("judge", "evaluated")
    ]
    for name, other in apart:
        assert seen[name] and not {*seen[name]} & {*seen[other]}, (name, other)
        assert not {*rows[name]} & {*rows[other]}, (name, other)
    assert evaluated.kinds == ("a", "b", "c")
    assert list(dict.fromkeys(result.judge.kinds)) == [
        "a",
        "b",
        "c",
        "tales",
        "code",
        "Python's library",
    ]
    for name in ("search", "fit", "tuning", "train", "validation"):
        shares = [
            sum(int(number) % 3 == i for number in seen[name]) / len(seen[name]) for i in range(3)
        ]
        assert all(abs(share - (i + 1) / 6) < 0.15 for i, share in enumerate(shares)), (
            name,
            shares,
        )


def test_texts_too_few_to_set_some_aside_are_named_and_others_judge(place):
    class Notes(SilentObserver):
        def note(self, message):
            notes.append(message)

    notes = []
    model = AutoModelForCausalLM.from_pretrained("tiny")
    result = blockpruner.prune(
        model, tiny_tokenizer(), TEXTS[:5], 0.3, seq_len=64, only_texts=True, observer=Notes()
    )
    assert "your texts" not in result.plan.kinds
    assert any("too few texts of your texts" in note for note in notes)


@pytest.mark.parametrize(
    ("target", "fit_rows", "refused"),
    [
        ({}, "kept", "refit"),
        ({"compensate": "none"}, "kept", None),
        ({"compensate": "none", "train": True}, "kept", "training"),
        ({}, "none", "too-few-rows"),
        ({"compensate": "none"}, "none", None),
    ],
)
def test_the_stage_score_refuses_what_a_later_stage_cannot_finish(
    place, monkeypatch, target, fit_rows, refused
):
    """The refit of a target, and its training, are checked before hours of search."""
    run = yaml.safe_load(Path("runs/tiny.yaml").read_text())
    run["train"] = {"num_samples": 80, "seq_len": 64, "validation": 4}
    run["train"]["data"] = run["calibration"]["data"]
    Path("runs/tiny.yaml").write_text(yaml.safe_dump(run))
    params = yaml.safe_load(Path("params.yaml").read_text())
    params["targets"]["pruned"] |= target
    Path("params.yaml").write_text(yaml.safe_dump(params))
    dag.write()
    stages(*OF_RUN[:3])
    if fit_rows == "none":
        rows = splits.Rows.load(Path("data/calibration/tiny"))
        replace(rows, fit=splits.NONE).save(Path("data/calibration/tiny"), "t")
    checked = []

    def room(config, dtype, runtime, score, compensate, train, budget):
        checked.append(("refit" if compensate == "refit" else None, train and "training", budget))
        if compensate == "refit" or train:
            raise InputError("no room", rule="training" if train else "refit")

    monkeypatch.setattr(pipeline, "require_room", room)
    monkeypatch.setattr(pipeline, "score", lambda *args: {})
    if refused is None:
        stages("score")
        assert checked == [(None, None, "0.3")]
    else:
        with pytest.raises(InputError) as error:
            stages("score")
        assert error.value.rule == refused
