import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from jsonschema import ValidationError, validate

from blockpruner.core.errors import InputError
from blockpruner.core.settings import (
    Calibration,
    Evaluate,
    HubTexts,
    LocalModel,
    LocalTexts,
    MixedTexts,
    Score,
    Train,
    ZeroShot,
)
from blockpruner.params import NO_RUNS, load_params, load_run, run_schema
from stages import _values

ROOT = Path(__file__).parents[2]
SCHEMA = json.loads((ROOT / "runs" / "schema.json").read_text())
NAMED = yaml.safe_load((ROOT / "runs" / "sources.yaml").read_text())


def params(tmp_path, **changes):
    path = tmp_path / "params.yaml"
    path.write_text(yaml.safe_dump({"runs": ["a"], "targets": {"x": {"run": "a", "budget": "0.1"}}} | changes))
    return path


def edited_run(tmp_path, edit):
    values = load_run("smollm2", ROOT / "runs").model_dump(mode="json")
    edit(values)
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(values))
    return lambda: load_run("r", tmp_path)


def answers(limit=50, packing="per_sample", split="all", num_samples=10, metric="answer_likelihood", **data):
    """An edit of a run: calibration on the answers of tasks."""

    def edit(values):
        tasks = {"source": "tasks", "tasks": ["piqa", "arc_easy"], "skip": 50} | data
        values["calibration"].update(data=tasks, packing=packing, split=split, num_samples=num_samples, score="all")
        values["calibration"].pop("num_rows", None)
        values["score"]["metric"] = metric
        values["evaluate"]["zero_shot"]["limit"] = limit

    return edit


@pytest.mark.parametrize("name", [path.stem for path in (ROOT / "runs").glob("*.yaml") if path.stem not in NO_RUNS])
def test_shipped_runs_are_valid(name):
    text = (ROOT / "runs" / f"{name}.yaml").read_text()
    assert load_run(name, ROOT / "runs").export == ("hf",)
    assert text.startswith("# yaml-language-server: $schema=schema.json\n")
    validate(yaml.safe_load(text), SCHEMA)


def test_the_schema_is_that_of_the_settings():
    assert run_schema(NAMED) == SCHEMA, "run `make schema`"


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"model": {"source": "hub", "repo": "a/b"}, "calibraton": {}}, "calibraton"),
        ({"model": {"source": "hub", "rep": "a/b"}}, "not valid under any"),
        ({"model": {"repo": "a/b"}}, "not valid under any"),
    ],
)
def test_the_schema_shows_mistakes(values, words):
    with pytest.raises(ValidationError, match=words):
        validate(values, SCHEMA)


def test_a_named_source_is_its_keys_and_those_beside_the_name(tmp_path):
    (tmp_path / "sources.yaml").write_text("mine: {source: path, path: here, dtype: float16}")
    (tmp_path / "r.yaml").write_text(
        "model: {source: mine, dtype: float64}\ncalibration: {data: {source: hub, repo: a/b}}"
    )
    run = load_run("r", tmp_path)
    assert run.model == LocalModel(source="path", path="here", dtype="float64")
    assert run.calibration == Calibration(data=HubTexts(source="hub", repo="a/b"))
    (tmp_path / "sources.yaml").write_text("mine: {source: path, path: here, format: alpaca}")
    mix = "{source: mix, of: [{source: mine}, {source: path, path: there}]}"
    (tmp_path / "r.yaml").write_text(
        f"model: {{source: path, path: m}}\ncalibration: {{data: {mix}, split: all}}\ntrain: {{data: {mix}}}"
    )
    calibration = load_run("r", tmp_path).calibration
    one, other = LocalTexts(source="path", path="here", format="alpaca"), LocalTexts(source="path", path="there")
    assert calibration.data == MixedTexts(source="mix", of=(one, other)) and calibration.score == "response"
    (tmp_path / "r.yaml").write_text("model: {source: yours}")
    with pytest.raises(InputError, match=r"r\.yaml: source 'yours' is unknown; valid: .*, or a name in .*: mine"):
        load_run("r", tmp_path)


def test_shipped_params_are_valid():
    shipped = load_params(ROOT / "params.yaml")
    assert shipped.budgets_of("smollm2") == ("0.10",)


def test_the_llama_run_is_the_papers_setting_and_so_are_the_defaults():
    run = load_run("llama2-7b", ROOT / "runs")
    assert run.model.repo == "meta-llama/Llama-2-7b-hf" and run.score == Score()
    assert (run.calibration.num_samples, run.calibration.seq_len, run.calibration.seed) == (256, 2048, 42)
    assert (run.calibration.packing, run.calibration.split, run.model.dtype) == ("joined", "paper", "bfloat16")
    train = run.train
    assert (train.num_samples, train.rank, train.alpha, train.learning_rate) == (8000, 32, 10, 2e-4)
    assert (train.batch, train.accumulation, train.epochs) == (1, 4, 1)
    evaluate = Evaluate(zero_shot=ZeroShot(bos=False))  # as its lm-eval
    assert (run.calibration, run.evaluate, train) == (Calibration(), evaluate, Train())


def test_targets_may_differ_in_healing_alone(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    target = {"run": "llama2-7b", "budget": "0.2"}
    targets = {"before": target, "between": target | {"compensate": "refit"}, "after": target | {"train": True}}
    found = load_params(params(tmp_path, runs=["llama2-7b"], targets=targets))
    assert found.target("after").train and not found.target("before").train
    assert found.budgets_of("llama2-7b") == ("0.2",)
    targets["again"] = target | {"train": True, "budget": "0.20"}
    with pytest.raises(InputError, match="'after' and 'again' mean the same"):
        load_params(params(tmp_path, runs=["llama2-7b"], targets=targets))


@pytest.mark.parametrize("method", ["laco", "slicegpt"])
def test_only_holes_are_compensated(tmp_path, monkeypatch, method):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    run = {"model": {"source": "path", "path": "m"}, "score": {"method": method}}
    target = {"run": "a", "budget": "0.2"}
    (tmp_path / "runs" / "a.yaml").write_text(yaml.safe_dump(run))
    load_params(params(tmp_path, targets={"x": target | {"compensate": "none"}}))
    with pytest.raises(InputError, match=f"target 'x': compensate: map .* score.method: {method} .*; set compensate"):
        load_params(params(tmp_path, targets={"x": target | {"compensate": "map"}}))
    (tmp_path / "runs" / "a.yaml").write_text(yaml.safe_dump(run | {"compensate": {"method": "refit"}}))
    with pytest.raises(InputError, match=f"a.yaml: compensate: refit .* score.method: {method} .*; set compensate"):
        load_run("a")


def test_what_is_pushed_is_written(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    target = {"run": "llama2-7b", "budget": "0.2", "push": {"repo": "me/small", "format": "gguf"}}
    with pytest.raises(InputError, match="pushes gguf, and what is written of it is hf; .*export of runs/llama2-7b"):
        load_params(params(tmp_path, runs=["llama2-7b"], targets={"x": target}))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"devices": 1}, ["'devices'", "report, runs, runtime, targets"]),
        ({"runtime": {"devic": "cpu"}}, ["'runtime.devic'", "batch_tokens, compile, device, executor"]),
        ({"runtime": {"workers": 2}}, ["workers: 2 needs executor: ray"]),
        ({"runtime": {"streaming": True, "device": "split"}}, ["device: split has nothing to split", "streaming"]),
        ({"runtime": {"streaming": True, "compile": True}}, ["compile: true does not fit streaming"]),
        (
            {"targets": {"x": {"run": "a", "budget": "0.1", "rato": 1}}},
            ["targets.x.rato", "budget, compensate, push, run, train"],
        ),
        ({"targets": {"x": {"run": "b", "budget": "0.1"}}}, ["'x'", "'b'", "valid: a"]),
        ({"targets": {"x": {"run": "a", "budget": "1.5"}}}, ["'1.5'", "between 0 and 1", "17blocks"]),
        ({"targets": {"x": {"run": "a", "budget": 0}}}, ["'0'", "between 0 and 1"]),
        ({"targets": {"x": {"run": "a", "budget": "0.0kv"}}}, ["'0.0kv'", "share of the KV cache"]),
        ({"targets": {"x": {"run": "a", "budget": "1.0x"}}}, ["'1.0x'", "speed-up of generation above 1"]),
        (
            {"targets": {"x": {"run": "a", "budget": "1.5x"}, "y": {"run": "a", "budget": "1.50x"}}},
            ["'x' and 'y' mean the same"],
        ),
        ({"targets": {"x": {"run": "a", "budget": "-0.1"}}}, ["'-0.1'", "between 0 and 1"]),
        (
            {"targets": {"x": {"run": "a", "budget": "0.1"}, "y": {"run": "a", "budget": 0.10}}},
            ["'x' and 'y' mean the same", "remove one"],
        ),
        (
            {"targets": {"x": {"run": "a", "budget": "0.1", "compensate": "glue"}}},
            ["targets.x.compensate", "'refit'", "'glue'"],
        ),
        ({"runs": ["../a"], "targets": {}}, ["'../a'", "no path"]),
        ({"runs": ["a", "a"]}, ["twice"]),
        ({"runs": [], "targets": {}}, ["runs"]),
        ({"targets": {"a-dense": {"run": "a", "budget": "0.1"}}}, ["'a-dense'", "choose another"]),
        (
            {
                "runs": ["smollm2"],
                "targets": {"x": {"run": "smollm2", "budget": "0.1", "train": True}},
            },
            [
                "'x' has train: true",
                "runs/smollm2.yaml has no train section",
                "train: {} is",
                "set train: false",
            ],
        ),
    ],
)
def test_bad_params_name_value_valid_ones_and_fix(tmp_path, changes, words):
    path = params(tmp_path, **changes)
    with pytest.raises(InputError) as error:
        load_params(path)
    for word in ["params.yaml", *words]:
        assert word in str(error.value)


@pytest.mark.parametrize(
    ("edit", "words"),
    [
        (lambda v: v["calibration"].update(nsamples=1), ["calibration.nsamples", "num_samples", "seq_len"]),
        (lambda v: v["model"].update(pakage="x"), ["model.pypi.pakage", "package", "sha256"]),
        (lambda v: v["model"].update(source="web"), ["'web'", "pypi, pypi-parts, hub, path"]),
        (lambda v: v["model"].update(sha256="abc"), ["sha256", "'abc'"]),
        (lambda v: v["calibration"].update(packing="padded"), ["packing", "'joined'", "'per_sample'", "'padded'"]),
        (answers(tasks=[]), ["calibration.data.tasks.tasks", "at least 1"]),
        (answers(skipp=1), ["calibration.data.tasks.skipp", "skip, source, tasks"]),
        (answers(tasks=["piqa", "piqa"]), ["same task twice", "keep one"]),
        (answers(tasks=["boolq"]), ["'boolq' is not among evaluate.zero_shot.tasks", "valid: piqa, winogrande"]),
        (answers(skip=49), ["skip: 49 would calibrate on what is evaluated", "first 50 items", "at most 49"]),
        (answers(limit=None), ["skip: 50 would calibrate", "scores every item", "leave skip out"]),
        (answers(packing="joined"), ["packing: joined does not fit", "set packing: per_sample"]),
        (answers(split="paper"), ["split: paper is for texts", "set split: all"]),
        (answers(num_samples=1), ["num_samples: 1 gives no item to some of the 2 tasks", "at least 2"]),
        (answers(metric="perplexity"), ["perplexity of answers", "set score.metric: answer_likelihood"]),
        (lambda v: v["score"].update(metric="answer_likelihood"), ["needs the answers of items", "source: tasks"]),
        (lambda v: v["score"].update(unit="layer", candidates="mha"), ["candidates", "unit: layer"]),
        (lambda v: v["score"].update(acceleration="fast"), ["'fast'", "'lazy+race'"]),
        (
            lambda v: v["score"].update(acceleration="none", audit=3),
            ["audit does nothing with acceleration: none", "lazy or lazy+race"],
        ),
        (lambda v: v["score"].update(acceleration="race", floor=3), ["floor does nothing", "lazy or lazy+race"]),
        (lambda v: v["score"].update(acceleration="lazy", confidence=0.9), ["confidence does nothing", "race or"]),
        (lambda v: v.update(export=[]), ["export: [] lacks hf", "add it"]),
        (lambda v: v.update(export=["gguf"]), ["export: ['gguf'] lacks hf", "add it"]),
        (lambda v: v.update(export=["gguf", "hf"], score={"method": "slicegpt"}), ["SliceGPT", "valid with it: hf"]),
        (lambda v: v["calibration"].update(num_samples=0), ["num_samples", "0"]),
        (lambda v: v.pop("model"), ["model", "required"]),
        (lambda v: v.update(study={}), ["study.main", "required"]),
        (lambda v: v.update(train={"r": 8}), ["train.r", "accumulation, alpha, batch", "rank"]),
        (lambda v: v.update(train={"rank": 0}), ["train.rank", "0"]),
        (lambda v: v.update(train={"learning_rate": -1}), ["train.learning_rate", "-1"]),
    ],
)
def test_bad_runs(tmp_path, edit, words):
    with pytest.raises(InputError) as error:
        edited_run(tmp_path, edit)()
    for word in words:
        assert word in str(error.value)


@pytest.mark.parametrize("edit", [answers(), answers(skip=None, limit=None), answers(skip=60, num_samples=2)])
def test_calibration_on_answers(tmp_path, edit):
    assert edited_run(tmp_path, edit)().calibration.data.tasks == ("piqa", "arc_easy")


def test_unknown_run_names_the_known(tmp_path):
    with pytest.raises(InputError, match=r"'nope' is unknown.*existing runs: .*llama2-7b, llama2-7b-official"):
        load_run("nope", ROOT / "runs")
    with pytest.raises(InputError, match="no path"):
        load_run("../smollm2", ROOT / "runs")


BOMB = "\n".join(
    [f"a0: &a0 [{', '.join('x' * 9)}]", *(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, 9))]
)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"runs: [a\n", "not valid YAML"),
        (b"runs: [\xff]", "not valid YAML: 'utf-8' codec can't decode"),
        (b"runs: [\x00]", "not valid YAML: .*special characters"),
        (b"runs: " + b"[" * 3000, "nested too deep"),
        (b"runs: " + b"[" * 40 + b"]" * 40, "nested too deep"),
        (b"runs: &a [*a]", "nested too deep"),
        (b"runs: " + b"9" * 5000, "not valid YAML: Exceeds the limit .4300 digits"),
        (b"runs: 0x" + b"f" * 5000, "a number has 20000 bits"),
        (b"runs: 2026-13-40", "not valid YAML: month must be in 1..12"),
        (BOMB.encode(), "more than 100000 values"),
        (b"runs: [a]\ntargets: {}\nruns: [b]", "key 'runs' is there twice .*line 3"),
        (b"runs: [a]\ntargets: {x: {run: a, run: a}}", "key 'run' is there twice"),
        (b"runs: [" + b"a" * 5000 + b"]\ntargets: {}", "name 'aaa.* is not valid: at most 100 letters"),
        (b"runs: [a]\ntargets: {" + b"a" * 900 + b": {run: a, budget: '0.1'}}", "name 'aaa.* at most 100 letters"),
        (b"runs: [a]\n" + b"a" * 900 + b": 1", "unknown key 'aaa.*valid keys there"),
        (b"runs: [a]\n" + b"a" * 5000 + b": 1", "not valid YAML"),
        (b"runs: a" + b"b" * 10**6, "runs: .*given: 'abbb"),
        (b"runs: [" + b"[], " * 9999 + b"]", r"99\d\d mistakes more"),
    ],
    ids=lambda value: str(value[:20]),
)
def test_a_file_that_is_no_settings_is_answered_in_short_lines(tmp_path, content, words):
    """The stage's own look at its settings leaves the answer to this one."""
    path = tmp_path / "params.yaml"
    path.write_bytes(content)
    _values(path)
    with pytest.raises(InputError, match=f"(?s){words}") as as_params:
        load_params(path)
    with pytest.raises(InputError) as as_run:
        load_run("params", tmp_path)
    for error in (as_params, as_run):
        lines = str(error.value).splitlines()
        assert len(lines) <= 21 and all(len(line) < 1300 and "params.yaml" in line for line in lines)


@pytest.mark.parametrize("name", ["a" * 101, "a" * 5000, "é", "a; touch P", "a\n"])
def test_a_run_name_that_is_no_short_word_is_refused(name):
    with pytest.raises(InputError, match="at most 100 letters, digits") as error:
        load_run(name, ROOT / "runs")
    assert len(str(error.value)) < 1300


def test_anchors_that_save_writing_stay_valid(tmp_path):
    (tmp_path / "r.yaml").write_text(
        "model: {source: hub, repo: a/b}\nevaluate: {speed: &speed {repeats: 3}, perplexity: {seq_len: 8}}\n"
        "study: {main: {block: '0.1', layer: '0.1'}, speed: {<<: *speed, repeats: 4, batch: 2}}"
    )
    run = load_run("r", tmp_path)
    assert run.evaluate.speed.repeats == 3 and (run.study.speed.repeats, run.study.speed.batch) == (4, 2)


def test_a_hub_that_cannot_be_reached_is_one_line(tmp_path):
    shutil.copytree(ROOT / "runs", tmp_path / "runs", ignore=shutil.ignore_patterns("pins.json"))
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "stages.fetch", "qwen1.5-7b"]
    result = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 1
    assert result.stderr.count("\n") == 1
    assert result.stderr.startswith("error in stage fetch qwen1.5-7b: hub repository ")
    assert "HF_HUB_OFFLINE is set: unset it, or use another source" in result.stderr
