"""params.yaml and run files: what is valid, what is refused (by rule and key), and what stages get
of it."""

import hashlib
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from jsonschema import ValidationError, validate

from blockpruner import versions
from blockpruner.cli.values import values_of
from blockpruner.config import dag
from blockpruner.config.params import NO_RUNS, load_params, load_run, read_values, run_schema
from blockpruner.config.sections import Run, Sections, resolve
from blockpruner.core.errors import InputError
from blockpruner.core.settings import LocalModel, LocalTexts, MixedTexts, read_settings
from blockpruner.evaluation.settings import Evaluate, ZeroShot
from blockpruner.healing.settings import Train
from blockpruner.inputs.settings import Calibration
from blockpruner.inputs.sources import named_sources, with_sources
from blockpruner.methods.recipes import sections
from blockpruner.scoring.settings import Score
from tests.errors import refused

ROOT = Path(__file__).parents[2]
SCHEMA = json.loads((ROOT / "runs" / "schema.json").read_text())
NAMED = named_sources(ROOT / "runs")
X = {"run": "a", "budget": "0.1"}


def params(tmp_path, **changes):
    path = tmp_path / "params.yaml"
    path.write_text(yaml.safe_dump({"runs": ["a"], "targets": {"x": X}} | changes))
    return path


def edited_run(tmp_path, edit):
    values = load_run("smollm2", ROOT / "runs").model_dump(mode="json")
    edit(values)
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(values))
    return load_run("r", tmp_path)


@pytest.mark.parametrize(
    "name", [path.stem for path in (ROOT / "runs").glob("*.yaml") if path.stem not in NO_RUNS]
)
def test_shipped_runs_are_valid(name):
    text = (ROOT / "runs" / f"{name}.yaml").read_text()
    assert load_run(name, ROOT / "runs").export in ((), ("hf",))
    assert text.startswith("# yaml-language-server: $schema=schema.json\n")
    validate(yaml.safe_load(text), SCHEMA)


def test_the_schema_is_that_of_the_settings():
    assert run_schema(NAMED) == SCHEMA, "run `make schema`"


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"model": {"source": "hub", "repo": "a/b"}, "calibraton": {}}, "calibraton"),
        ({"model": {"source": "hub", "rep": "a/b"}}, "not valid under any"),
        (
            {
                "model": {"source": "hub", "repo": "a/b"},
                "score": {"method": "floating", "options": {"width": 1}},
            },
            "width",
        ),
    ],
)
def test_the_schema_shows_mistakes(values, words):
    with pytest.raises(ValidationError, match=words):
        validate(values, SCHEMA)


def test_a_named_source_is_its_keys_and_those_of_the_run_file(tmp_path):
    (tmp_path / "sources.yaml").write_text("mine: {source: path, path: here, format: alpaca}")
    mix = "{source: mix, of: [{source: mine}, {source: path, path: there}]}"
    (tmp_path / "r.yaml").write_text(
        f"model: {{source: mine, dtype: float64, format: x}}\ncalibration: {{data: {mix}, split:"
        " all}"
    )
    with refused("settings") as error:  # what is named has a key that a model has not
        load_run("r", tmp_path)
    assert error.value.key == "model.path.format"
    (tmp_path / "r.yaml").write_text(
        f"model: {{source: path, path: m}}\ncalibration: {{data: {mix}, split: all}}"
    )
    run = load_run("r", tmp_path)
    item, other = (
        LocalTexts(source="path", path="here", format="alpaca"),
        LocalTexts(source="path", path="there"),
    )
    assert run.calibration.data == MixedTexts(source="mix", of=(item, other))
    assert run.calibration.score == "response"
    assert run.model == LocalModel(source="path", path="m")
    (tmp_path / "sources.yaml").write_text("loop: {source: loop}")
    for name in ("yours", "loop"):
        (tmp_path / "r.yaml").write_text(f"model: {{source: {name}}}")
        with refused("unknown-source") as error:
            load_run("r", tmp_path)
        assert error.value.value == name


def test_a_run_file_has_the_recipe_of_the_command_and_the_texts_that_belong_to_it(tmp_path):
    drawn = with_sources(
        sections("recommended", calibration={}, score={})["calibration"], named_sources()
    )
    for score, calibration in (
        ("", drawn),
        ("score: {method: narrow}", drawn),
        (
            "score: {metric: js}\ncalibration: {num_samples: 8}",
            drawn | {"num_samples": 8, "num_rows": None},
        ),
        ("calibration: {num_rows: 5}", drawn | {"num_rows": 5}),
        ("score: {method: shortgpt}\ncalibration: {seed: 7}", {"seed": 7}),
    ):
        (tmp_path / "r.yaml").write_text(f"model: {{source: path, path: m}}\n{score}\n")
        run = load_run("r", tmp_path)
        assert run.score.method == (
            "recommended" if "method" not in score else score.split()[2].rstrip("}")
        )
        assert run.calibration == read_settings(Calibration, calibration)


@pytest.mark.parametrize("method", [None, "recommended", "blockpruner"])
@pytest.mark.parametrize("data", [None, {"source": "path", "path": "texts.txt"}])
@pytest.mark.parametrize("train", [None, "all"])
def test_a_run_file_of_a_model_alone_adds_nothing_to_the_options_of_the_command(
    tmp_path, method, data, train
):
    given = {
        "data": data,
        "calibration": {"seq_len": 99},
        "score": {},
        "compensate": None,
        "train": train,
    }
    (tmp_path / "r.yaml").write_text("model: {source: path, path: m}")
    model = {"source": "path", "path": "m"}
    own, plain = (
        values_of(file, [], {"model": model}, method, **given)
        for file in (tmp_path / "r.yaml", None)
    )
    assert read_settings(Run, own) == read_settings(Run, plain)


def test_the_llama_run_is_the_papers_setting():
    run = load_run("llama2-7b", ROOT / "runs")
    assert run.model.repo == "meta-llama/Llama-2-7b-hf"
    assert run.score == Score(method="blockpruner")
    assert (run.calibration.num_samples, run.calibration.seq_len, run.calibration.seed) == (
        256,
        2048,
        42,
    )
    assert (run.calibration.packing, run.calibration.split, run.model.dtype) == (
        "joined",
        "paper",
        "bfloat16",
    )
    recover = run.train
    assert (recover.num_samples, recover.rank, recover.alpha, recover.learning_rate) == (
        8000,
        32,
        10,
        2e-4,
    )
    assert (recover.batch, recover.accumulation, recover.epochs) == (1, 4, 1)
    tasks = (*ZeroShot().tasks, "truthfulqa_mc1", "race", "swag", "openbookqa", "agieval_aqua_rat")
    evaluate = Evaluate(zero_shot=ZeroShot(bos=False, tasks=tasks))  # bos: as its lm-eval
    assert (run.calibration, run.evaluate, recover) == (Calibration(), evaluate, Train())


def test_shipped_params_are_valid():
    shipped = load_params(ROOT / "params.yaml")
    methods = [(target.method, target.budget) for target in shipped.targets_of("smollm2")]
    assert methods == [(None, "0.10"), ("blockpruner", "0.10")]
    assert shipped.studies == ()


STUDY = {"FETCH_VERSION": 5, "CALIBRATION_VERSION": 6, "SEARCH_VERSION": 5, "WEIGHTS_VERSION": 9}
"""The versions by which the study was measured, where they are not those of today. The default and
the settings have changed since, so that DVC measures the study anew where it is asked for it;
docs/results.md says so."""


def test_the_lock_is_of_one_workspace_and_of_the_versions_of_today():
    """No path has two hashes. A red test asks for `dvc repro`, never for an edit by hand."""
    shipped, lock = (
        load_params(ROOT / "params.yaml"),
        yaml.safe_load((ROOT / "dvc.lock").read_text())["stages"],
    )
    seed = yaml.safe_load((ROOT / "studies/seed.yaml").read_text())
    study = seed["experiments"]
    measured = {path.name for path in (ROOT / "data/evidence").glob("seed-*")}
    searches = yaml.safe_load((ROOT / "dag.yaml").read_text())["searches"]
    asked = {name.partition("@")[2] for name in lock}
    assert asked <= {*shipped.runs, *shipped.targets, *searches, "", *seed["runs"], *measured}
    assert measured <= asked
    for name in measured:
        key = name.removeprefix("seed-")
        params = lock[f"experiment@{name}"]["params"]["studies/seed.yaml"]
        assert params == {f"experiments.{key}": study[key]}, f"{name} was measured by another plan"
    hashes = {}
    for name, stage in lock.items():
        is_study = name.startswith("experiment@") or name.partition("@")[2] in seed["runs"]
        for file in (*stage.get("deps", ()), *stage["outs"]):
            known = hashes.setdefault((is_study, file["path"]), file["md5"])
            assert known == file["md5"], (name, file["path"])
        for constant, value in stage["params"].get("blockpruner/versions.py", {}).items():
            expected = STUDY.get(constant) if is_study else None
            assert value in (getattr(versions, constant), expected), (name, constant)


def md5(path):
    """As DVC hashes a file, or a folder by its files."""
    if path.is_file():
        return hashlib.md5(path.read_bytes()).hexdigest()
    files = sorted(file.relative_to(path).as_posix() for file in path.rglob("*") if file.is_file())
    listed = [{"md5": md5(path / name), "relpath": name} for name in files]
    return f"{hashlib.md5(json.dumps(listed).encode()).hexdigest()}.dir"


def test_the_lock_has_the_hashes_of_the_files_that_git_holds():
    """Evidence that was changed or added by hand, or a lock that was copied from elsewhere."""
    listed = subprocess.run(
        ["git", "ls-files", "data"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout
    held = {str(path) for name in listed.splitlines() for path in (Path(name), *Path(name).parents)}
    lock = yaml.safe_load((ROOT / "dvc.lock").read_text())["stages"]
    outs = {
        out["path"]: out["md5"]
        for stage in lock.values()
        for out in stage["outs"]
        if out["path"] in held
    }
    assert len(outs) > 100
    assert [path for path, digest in outs.items() if md5(ROOT / path) != digest] == []


def test_a_fresh_clone_is_up_to_date(tmp_path):
    """As CI asks DVC; a red test asks for `dvc repro` and a commit of dvc.lock."""
    listed = subprocess.run(
        ["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout
    for name in (name for name in listed.splitlines() if not name.startswith(("tests/", "docs/"))):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    subprocess.run(["git", "init", "-q"], cwd=tmp_path, check=True)
    command = [sys.executable, "-m", "dvc", "repro", "--dry", "--allow-missing"]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert result.returncode == 0 and "Running stage" not in result.stdout, (
        result.stdout + result.stderr
    )


@pytest.mark.usefixtures("real_texts")
def test_the_shipped_dag_is_of_the_shipped_settings_and_pins(monkeypatch):
    monkeypatch.chdir(ROOT)
    dag.require_current()
    recorded = dag.read_dag()
    pins = (ROOT / "Makefile").read_text() + (ROOT / "constraints/dag.txt").read_text()
    for name in ("torch", "transformers"):
        assert f"{name}=={recorded['machine'][name]}" in pins
    assert f"lm-eval=={recorded['lm_eval']}" in pins


@pytest.fixture
def llama(tmp_path, monkeypatch):
    """Makes params.yaml of targets of one run, in the project's folder."""
    monkeypatch.chdir(ROOT)
    target = {"run": "llama2-7b", "budget": "0.2"}
    return lambda **targets: load_params(
        params(
            tmp_path,
            runs=["llama2-7b"],
            targets={name: target | changes for name, changes in targets.items()},
        )
    )


def test_targets_may_differ_in_healing_and_method_alone(llama):
    result = llama(
        before={},
        between={"compensate": "refit"},
        after={"train": True},
        other={"method": "floating"},
    )
    assert result.target("after").train
    assert not result.target("before").train
    with refused("settings") as error:
        llama(after={"train": True}, again={"train": True, "budget": "0.20"})
    assert "'after' and 'again' mean the same" in str(error.value)
    assert llama(x={"method": "blockpruner"}).target("x").method == "blockpruner"


@pytest.mark.parametrize(
    ("changes", "rule"),
    [
        ({"method": "laco", "compensate": "refit"}, "compensates-no-holes"),
        ({"run": "smollm2", "train": True}, "no-recipe-of-training"),
    ],
)
def test_a_target_that_does_not_fit_its_run(tmp_path, monkeypatch, changes, rule):
    monkeypatch.chdir(ROOT)
    target = {"run": "llama2-7b", "budget": "0.2"} | changes
    with refused(rule) as error:
        load_params(params(tmp_path, runs=[target["run"]], targets={"x": target}))
    assert str(error.value).startswith(f"{tmp_path}/params.yaml: target 'x': ")


def test_sections_have_the_searches_of_all_targets(llama):
    """The run's own comes first, and another method keeps what is measured, not how."""
    run = load_run("smollm2", ROOT / "runs")
    own = {"method": "floating", "options": {"tries": 2}, "acceleration": "lazy+race"}
    run = run.model_copy(update={"score": Score.model_validate(own)})
    targets = llama(
        a={},
        b={"budget": "0.3"},
        c={"method": "one_shot"},
        d={"method": "recommended", "budget": "7layers"},
    )
    result = resolve(run, targets.targets_of("llama2-7b"))
    assert {name: asked.budgets for name, asked in result.searches.items()} == {
        "floating": ("0.2", "0.3"),
        "one_shot": ("0.2",),
        "recommended": ("7layers",),
    }
    own, other, recommended = (asked.score for asked in result.searches.values())
    assert own.options == {"tries": 2, "per": "parameters"}
    assert other.acceleration is None
    assert (recommended.method, recommended.options) == ("recommended", {})
    assert set(result.sources.texts) == {"perplexity", "calibration", "judge"}
    assert result.train is None
    assert Sections.model_validate_json(result.model_dump_json()) == result


BAD_PARAMS = [
    ({"devices": 1}, "devices", ""),
    ({"runtime": {"devic": "cpu"}}, "runtime.devic", ""),
    ({"runtime": {"workers": 2}}, "runtime", "needs executor: ray"),
    ({"runtime": {"streaming": True, "device": "split"}}, "runtime", "set device: auto"),
    ({"targets": {"x": X | {"rato": 1}}}, "targets.x.rato", ""),
    ({"targets": {"x": X | {"run": "b"}}}, "", "valid: a"),
    *(
        ({"targets": {"x": X | {"budget": budget}}}, "targets.x.budget", "")
        for budget in ("1.5", 0)
    ),
    (
        {"targets": {"x": X | {"budget": "1.5x"}, "y": X | {"budget": "1.50x"}}},
        "",
        "'x' and 'y' mean the same",
    ),
    ({"runs": ["../a"], "targets": {}}, "", "'../a' is not valid"),
    ({"targets": {"x-0.10": X}}, "", "'x-0.10' is not valid"),
    ({"runs": ["a", "a"]}, "", "twice"),
    ({"targets": {"a-dense": X}}, "", "choose another"),
]


@pytest.mark.parametrize(("changes", "key", "words"), BAD_PARAMS)
def test_bad_params(tmp_path, changes, key, words):
    with refused("settings") as error:
        load_params(params(tmp_path, **changes))
    assert error.value.key == key
    assert words in str(error.value)


BAD_RUNS = [
    (lambda v: v["calibration"].update(nsamples=1), "calibration.nsamples"),
    (lambda v: v["model"].update(pakage="x"), "model.pypi.pakage"),
    (lambda v: v["score"].update(unit="layer", candidates="mha"), "score"),
    (lambda v: v["score"].update(options={"width": 2}), "score.options.width"),
    (lambda v: v.update(export=["gguf"]), "export"),
]


@pytest.mark.parametrize(("edit", "key"), BAD_RUNS)
def test_bad_runs(tmp_path, edit, key):
    with refused("settings") as error:
        edited_run(tmp_path, edit)
    assert error.value.key == key


def test_a_mistake_is_a_line_with_the_file_the_key_and_the_value(tmp_path):
    """The one test of wording."""
    (tmp_path / "r.yaml").write_text(
        "model: {source: path, path: m}\nscore: {unit: head}\nexports: [hf]\nexport: 7"
    )
    with refused("settings") as error:
        load_run("r", tmp_path)
    lines = str(error.value).splitlines()
    assert (
        lines[0]
        == f"{tmp_path}/r.yaml: score.unit: Input should be 'block', 'layer' or 'shifted' (given"
        " 'head')"
    )
    assert lines[2] == f"{tmp_path}/r.yaml: exports: Extra inputs are not permitted (given ['hf'])"
    assert len(lines) == 3


@pytest.mark.parametrize(
    ("edit", "words"),
    [
        (
            lambda v: v.update(export=["gguf", "hf"], score={"method": "slicegpt"}),
            "valid with it: hf",
        ),
    ],
)
def test_sections_that_do_not_fit_together(tmp_path, edit, words):
    with pytest.raises(InputError, match=words):
        edited_run(tmp_path, edit)


NAMES = ("../smollm2", "a" * 101, "é", "a; touch P", "a\n", "a.b", "sources")


@pytest.mark.parametrize(
    ("name", "rule"), [*((name, "run-name") for name in NAMES), ("nope", "unknown-run")]
)
def test_a_run_name_that_is_no_short_word_is_refused(name, rule):
    with refused(rule):
        load_run(name, ROOT / "runs")


LEVELS = (b"%c: &%c [%s]\n" % (i + 1, i + 1, b",".join([b"*%c" % i] * 9)) for i in range(97, 106))
BOMB = b"a: &a [{x: 1}]\n" + b"".join(LEVELS)
"""Nine aliases of nine aliases, nine deep."""


def test_aliases_may_be_used(tmp_path):
    (tmp_path / "run.yaml").write_text("a: &a {x: 1}\nb: {<<: *a, y: 2}\nc: [*a, *a]")
    assert read_values(tmp_path / "run.yaml") == {
        "a": {"x": 1},
        "b": {"x": 1, "y": 2},
        "c": [{"x": 1}, {"x": 1}],
    }


@pytest.mark.parametrize("value", ["&a [*a]", 500 * "[" + 500 * "]", "9" * 5000])
def test_a_set_value_that_no_run_file_may_hold(value):
    with refused("yaml"):
        values_of(
            None,
            [f"score.options={value}"],
            {},
            None,
            data=None,
            calibration={},
            score={},
            compensate=None,
            train=None,
        )


@pytest.mark.parametrize(
    "content",
    [
        b"runs: [a\n",
        b"runs: [\xff]",
        b"runs: 2026-13-40",
        b"runs: [a]\ntargets: {}\nruns: [b]",
        b"x: {a: 1, a: 2}",
        b"runs: " + 500 * b"[" + 500 * b"]",
        b"runs: &all [*all]",
        BOMB,
        BOMB.replace(b" [", b" {<<: [").replace(b"]", b"]}"),
    ],
)
def test_a_file_that_is_no_yaml(tmp_path, content):
    path = tmp_path / "params.yaml"
    path.write_bytes(content)
    with refused("yaml"):
        load_params(path)
