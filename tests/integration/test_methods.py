"""Every method from its run file to a checkpoint that a fresh process loads, stage by stage, on a tiny model."""

import json
import math

import pytest
import torch
import yaml
from blockpruner.methods.transforms import TRANSFORMS
from transformers import AutoModelForCausalLM

from blockpruner.core.errors import InputError
from blockpruner.evaluation import latency, speed
from blockpruner.inputs.calibration import CalibrationSet
from blockpruner.search import SEARCHES
from blockpruner.store.plans import load_plan
from stages import calibrate, commit, fetch, materialize, score
from stages.benchmark import evaluate
from tests.integration.project import make_project, set_targets
from tests.tiny import full_nll

METHODS = {
    "greedy": {"method": "greedy", "metric": "js"},
    "one_shot": {"method": "one_shot", "unit": "layer", "metric": "block_influence"},
    "random": {"method": "random"},
    "given": {"method": "given", "options": {"order": ["mha.2", "mlp.1", "mha.0,mlp.0"]}},
    "beam": {"method": "beam", "options": {"width": 2}},
    "evolution": {"method": "evolution", "metric": "kl", "options": {"generations": 3, "offspring": 4}},
    "swap": {"method": "swap"},
    "laco": {"method": "laco", "options": {"count": 2}},
    "slicegpt": {"method": "slicegpt"},
}


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    folder = make_project(tmp_path_factory.mktemp("methods"), {"t": "0.2"}, num_samples=8)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        fetch.main("tiny")
        calibrate.main("tiny")
    return folder


def choose(project, section, budget):
    path = project / "runs" / "tiny.yaml"
    path.write_text(yaml.safe_dump(yaml.safe_load(path.read_text()) | {"score": section}))
    set_targets(project, {"t": budget})


def forget_times(project):
    for path in [*project.glob("data/scores/tiny/latency-*.json"), *project.glob("data/trials/latency-*.json")]:
        path.unlink()


def scored(section, project, budget="0.2"):
    choose(project, section, budget)
    score.main("tiny")
    return json.loads((project / "data/metrics/tiny/score.json").read_text())


def test_all_methods_are_here():
    assert METHODS.keys() == SEARCHES.keys() | TRANSFORMS.keys()


@pytest.mark.parametrize("method", METHODS)
def test_from_run_file_to_checkpoint(project, monkeypatch, method):
    monkeypatch.chdir(project)
    assert scored(METHODS[method], project)["iterations"] >= (method not in TRANSFORMS)
    commit.main("t")
    materialize.main("t")
    plan, out = load_plan(project / "data/plans/t/plan.json"), project / "data/checkpoints/t/hf"
    assert json.loads((out / "verification.json").read_text())["ok"]
    assert plan.ratio == pytest.approx(0.2, abs=0.06)
    model = AutoModelForCausalLM.from_pretrained(out, trust_remote_code=True, dtype=torch.float32)
    assert model.num_parameters() == plan.parameters["pruned"]
    rows = CalibrationSet.load(project / "data/calibration/tiny/rows.parquet").rows
    nll = math.fsum(full_nll(model, row) for row in rows) / len(rows)
    if method == "slicegpt":
        assert plan.calibration["perplexity"] is None
    else:
        assert plan.calibration["perplexity"] == pytest.approx(math.exp(nll), rel=1e-4)
    assert "perplexity" in (out / "README.md").read_text().lower() or method == "slicegpt"


def test_a_plain_model_needs_no_code_of_ours(project, monkeypatch):
    monkeypatch.chdir(project)
    scored(METHODS["laco"], project, "1layers")
    commit.main("t")
    materialize.main("t")
    out = project / "data/checkpoints/t/hf"
    assert not list(out.glob("*.py"))
    assert type(AutoModelForCausalLM.from_pretrained(out)).__name__ == "LlamaForCausalLM"


def test_a_sliced_model_is_benchmarked_as_any_other(project, monkeypatch):
    monkeypatch.chdir(project)
    scored(METHODS["slicegpt"], project)
    commit.main("t")
    materialize.main("t")
    found = evaluate("t", "tiny", project / "data/checkpoints/t/hf")
    assert found["parameters"] == load_plan(project / "data/plans/t/plan.json").parameters["pruned"]
    assert found["speed"]["pruned"]["kv_cache_bytes"] == found["speed"]["dense"]["kv_cache_bytes"]


@pytest.mark.parametrize(
    ("method", "message"),
    [
        ("greedy", r"run tiny is scored up to \d+blocks, ratio 0\.\d+, not to budget '0\.6'; run its stage score"),
        ("beam", r"has no iteration for budget '0\.6'; run its stage score"),
        ("given", r"run tiny is scored up to 2blocks, ratio 0\.\d+, not to budget '0\.6'; run its stage score"),
        ("laco", r"details\.json does not exist"),
    ],
)
def test_a_budget_that_was_not_scored_is_not_committed(project, monkeypatch, method, message):
    monkeypatch.chdir(project)
    scored(METHODS[method], project)
    set_targets(project, {"t": "0.6"})
    with pytest.raises(InputError, match=message):
        commit.main("t")


def test_a_speed_up_that_was_not_measured_is_not_committed(project, monkeypatch):
    monkeypatch.chdir(project)
    scored(METHODS["beam"], project)
    set_targets(project, {"t": "1.3x"})
    with pytest.raises(InputError, match=r"'1\.3x' is a speed-up, and the run's scores know no times"):
        commit.main("t")


def test_a_step_over_a_budget_in_blocks_names_what_is_near(project, monkeypatch):
    monkeypatch.chdir(project)
    scored(METHODS["given"], project, "3blocks")
    with pytest.raises(InputError, match=r"'3blocks' is not in this sequence; nearest: 2blocks, 4blocks"):
        commit.main("t")


def test_switching_method_and_metric_and_back_computes_nothing_again(project, monkeypatch):
    monkeypatch.chdir(project)
    for section in METHODS.values():
        scored(section, project)
    for method, section in METHODS.items():
        again = scored(section, project)
        assert again["rows_computed"] == 0, method


@pytest.mark.parametrize(
    "section", [{"options": {"per": "kv"}}, METHODS["beam"], {"method": "laco", "options": {"count": 2}}]
)
def test_a_budget_of_the_kv_cache(project, monkeypatch, section):
    monkeypatch.chdir(project)
    scored(section, project, "0.25kv")
    commit.main("t")
    materialize.main("t")
    plan, out = load_plan(project / "data/plans/t/plan.json"), project / "data/checkpoints/t/hf"
    assert plan.removes["kv"] == 0.25 and plan.blocks["mha"] == 1
    assert plan.blocks["mlp"] == (plan.kind == "laco")
    model = AutoModelForCausalLM.from_pretrained(out, trust_remote_code=True, dtype=torch.float32)
    cache = model(torch.arange(5)[None], use_cache=True)
    cache = getattr(cache, "past_key_values", None) or cache.cache
    assert len(cache.layers) == 3


@pytest.mark.parametrize("section", [{}, {"options": {"per": "latency"}}, METHODS["swap"]])
def test_a_speed_up_is_measured_once(project, monkeypatch, section):
    """The times are made up: that an MHA block is worth two MLP blocks decides what 1.3x means."""
    monkeypatch.chdir(project)
    seconds = {"dense": 1.0, "mha": 1.0 - 2 * 0.1, "mlp": 1.0 - 2 * 0.05}
    measured = []

    def generate(model, prompt, new_tokens):
        measured.append(tuple(prompt.shape))
        without = [name for name in ("mha", "mlp") if getattr(model.config, f"layers_without_{name}", None)]
        assert len(without) <= 1
        return speed.Generation(prompt, seconds[without[0] if without else "dense"], 0.0, 0)

    monkeypatch.setattr(latency, "generate", generate)
    forget_times(project)
    section = section | {"latency": {"prompt_tokens": 6, "new_tokens": 3, "repeats": 2, "batch": 2}}
    scored(section, project, "1.3x")
    assert measured == [(2, 6)] * 9
    commit.main("t")
    plan = load_plan(project / "data/plans/t/plan.json")
    expected = 0.1 * plan.blocks["mha"] + 0.05 * plan.blocks["mlp"]
    assert plan.removes["latency"] == pytest.approx(expected)
    assert plan.removes["latency"] == pytest.approx(1 - 1 / 1.3, abs=0.05)
    scored(section, project, "1.2x")
    assert len(measured) == 9
    set_targets(project, {"t": "1.3x"}, streaming=True)
    forget_times(project)
    with pytest.raises(InputError, match=r"runtime.streaming: True it is larger than it; give budgets in parameters"):
        score.main("tiny")


def test_other_budgets_are_refused_before_times_are_measured(project, monkeypatch):
    monkeypatch.chdir(project)
    monkeypatch.setattr(latency, "generate", None)
    forget_times(project)
    choose(project, {"method": "greedy"}, "1.3x")
    set_targets(project, {"t": "1.3x", "u": "9blocks"})
    with pytest.raises(InputError, match="'9blocks' cannot be reached; the largest reachable is 8blocks"):
        score.main("tiny")


def test_a_damaged_measurement_is_set_aside(project, monkeypatch):
    monkeypatch.chdir(project)
    monkeypatch.setattr(latency, "generate", lambda model, prompt, n: speed.Generation(prompt, 1.0, 0.0, 0))
    with pytest.raises(InputError, match=r"'1\.3x' cannot be reached; the largest reachable is 8blocks, 1\.0000x"):
        scored({"method": "greedy"}, project, "1.3x")
    (path,) = (project / "data/scores/tiny").glob("latency-*.json")
    (shared,) = (project / "data/trials").glob("latency-*.json")
    whole = path.read_text()
    for damaged in ((path,), (path, shared)):  # another run's is taken, or it is measured again
        for file in damaged:
            file.write_text("{}")
        with pytest.raises(InputError, match="largest reachable"):
            scored({"method": "greedy"}, project, "1.3x")
        assert path.read_text() == shared.read_text() == whole
        assert all(file.with_name(file.name + ".bad").read_text() == "{}" for file in damaged)


@pytest.mark.parametrize(
    ("section", "budget", "message"),
    [
        ({"method": "laco"}, "0.2", r"count C = 4 is not valid; choose 2 to H - L = 3"),
        ({"method": "laco", "options": {"count": 2}}, "3blocks", "nearest: 2blocks, 4blocks"),
        ({"method": "laco", "options": {"variant": "mine"}}, "0.2", "'mine' is unknown; valid: repo, paper"),
        ({"method": "slicegpt"}, "4blocks", "met by removing blocks, and slicegpt removes none"),
        ({"method": "slicegpt"}, "0.25kv", "met by removing blocks, and slicegpt removes none"),
        ({"method": "greedy", "candidates": "mlp"}, "0.25kv", "largest reachable is 4blocks, 0.0000kv"),
        (
            {"method": "greedy", "candidates": "mlp", "options": {"per": "kv"}},
            "0.2",
            "no candidate takes",
        ),
        ({"method": "laco", "options": {"count": 2}}, "0.95kv", "largest reachable is 6blocks, 0.7500kv"),
        ({"method": "slicegpt"}, "0.999", "out of SliceGPT's reach"),
        ({"method": "slicegpt", "unit": "layer"}, "0.2", "score.unit: layer does nothing with method: slicegpt"),
        ({"method": "slicegpt", "options": {"width": 8}}, "0.2", "score.options.width is unknown.*valid: none"),
        ({"method": "greedy"}, "0.001", "nearest to removing nothing"),
        ({"method": "beam", "metric": "block_influence"}, "0.2", "compares whole masks"),
        ({"method": "random", "metric": "kl"}, "0.2", "asks for no score"),
        ({"method": "given"}, "0.2", "needs score.options.order"),
    ],
)
def test_an_impossible_request_is_a_clear_error(project, monkeypatch, section, budget, message):
    monkeypatch.chdir(project)
    with pytest.raises(InputError, match=message):
        scored(section, project, budget)
