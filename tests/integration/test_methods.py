"""Every method from its run file to a checkpoint that a fresh process loads, stage by stage, on a
tiny model."""

import json
import math
import subprocess
from pathlib import Path

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM

from blockpruner.checkpoints import verification
from blockpruner.core.errors import InputError
from blockpruner.evaluation import latency, speed
from blockpruner.inputs.calibration import CalibrationSet
from blockpruner.methods.registry import KINDS
from blockpruner.reporting.inputs import read_results
from blockpruner.search.registry import SEARCHES
from blockpruner.search.trace import Current, trace_directory
from blockpruner.store.plans import load_plan
from stages import benchmark, calibrate, commit, compensate, fetch, materialize, score, settings
from tests.fakes import InProcess
from tests.integration.project import counts, make_project, set_targets
from tests.tiny import full_nll

METHODS = {
    "greedy": {"method": "greedy", "metric": "js"},
    "one_shot": {"method": "one_shot", "unit": "layer", "metric": "block_influence"},
    "random": {"method": "random"},
    "given": {"method": "given", "options": {"order": ["mha.2", "mlp.1", "mha.0,mlp.0"]}},
    "beam": {"method": "beam", "options": {"width": 2}},
    "genetic": {"method": "genetic", "options": {"generations": 3, "children": 4, "initial": 4}},
    "floating": {"method": "floating"},
    "laco": {"method": "laco", "options": {"count": 2}},
    "narrow": {"method": "narrow"},
    "slicegpt": {"method": "slicegpt"},
}


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    folder = make_project(tmp_path_factory.mktemp("methods"), {"t": "0.2"}, num_samples=8)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        settings.main("tiny")
        fetch.main("tiny")
        calibrate.main("tiny")
    return folder


@pytest.fixture(autouse=True)
def project(shared, monkeypatch):
    """One project for all tests, which run in its folder."""
    monkeypatch.chdir(shared)
    return shared


def choose(project, section, budget):
    path = project / "runs" / "tiny.yaml"
    path.write_text(
        yaml.safe_dump(yaml.safe_load(path.read_text()) | {"score": {"method": "greedy"} | section})
    )
    set_targets(project, {"t": budget})
    settings.main("tiny")


def scored(project, section, budget="0.2"):
    choose(project, section, budget)
    score.main(f"tiny-{section.get('method', 'greedy')}")
    return counts(project, section.get("method", "greedy"))


def materialized(project, section, budget="0.2", process=InProcess):
    """The plan and the checkpoint that a section leads to."""
    scored(project, section, budget)
    commit.main("t")
    compensate.main("t")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(verification, "subprocess", process)
        materialize.main("t")
    return load_plan(project / "data/compensated/t/plan.json"), project / "data/checkpoints/t/hf"


def loaded(out):
    return AutoModelForCausalLM.from_pretrained(out, trust_remote_code=True, dtype=torch.float32)


def forget_times(project):
    for path in [
        *project.glob("data/scores/tiny/*/latency-*.json"),
        *project.glob("data/trials/latency-*.json"),
    ]:
        path.unlink()


def test_all_methods_are_here():
    assert METHODS.keys() == SEARCHES.keys() | KINDS.keys() - {"mask"}


def test_metrics_are_the_same_whether_scores_are_computed_or_known(project):
    section, path = (
        {"method": "greedy", "metric": "kl", "acceleration": "race"},
        Path("data/metrics/tiny/greedy.json"),
    )
    first = scored(project, section)
    before = json.loads(path.read_text())
    again = scored(project, section)
    assert first["trials_computed"] > again["trials_computed"] == 0
    (figures,) = before.values()
    assert json.loads(path.read_text()) == before and figures.keys() - {"rivals", "kept"} == {
        "iterations",
        "trials",
    }


@pytest.mark.parametrize("method", METHODS)
def test_from_run_file_to_checkpoint(project, method):
    # of its kind of plan: a fresh process verifies it
    is_first = method in (
        "greedy",
        "laco",
        "slicegpt",
    )
    plan, out = materialized(
        project, METHODS[method], process=subprocess if is_first else InProcess
    )
    assert counts(project, method)["iterations"] >= (method in SEARCHES)
    assert json.loads((out / "verification.json").read_text())["ok"]
    assert plan.ratio == pytest.approx(0.2, abs=0.06)
    model = loaded(out)
    assert model.num_parameters() == plan.parameters["pruned"]
    rows = CalibrationSet.load(project / "data/calibration/tiny/search.parquet").rows
    nll = math.fsum(full_nll(model, row) for row in rows) / len(rows)
    if method in ("slicegpt", "narrow"):
        assert plan.calibration["perplexity"] is None
    else:
        assert plan.calibration["perplexity"] == pytest.approx(math.exp(nll), rel=1e-4)
        assert "perplexity" in (out / "README.md").read_text().lower()


def test_a_sliced_model_is_benchmarked_as_any_other(project):
    plan, _ = materialized(project, METHODS["slicegpt"])
    benchmark.main("t")
    found = read_results(project / "data/evidence/t")
    assert found["parameters"] == plan.parameters["pruned"]
    assert found["speed"]["pruned"]["kv_cache_bytes"] == found["speed"]["dense"]["kv_cache_bytes"]


@pytest.mark.parametrize(
    ("method", "scored_for", "budget", "message"),
    [
        (
            "greedy",
            "0.2",
            "0.6",
            r"scored up to \d+blocks, ratio 0\.\d+, not to budget '0\.6'; run its stage score",
        ),
        ("floating", "0.2", "0.6", r"has no iteration for budget '0\.6'; run its stage score"),
        ("laco", "0.2", "0.6", r"details\.json does not exist"),
        ("floating", "0.2", "1.3x", r"'1\.3x' is a speed-up, and the run's scores know no times"),
        (
            "given",
            "3blocks",
            "3blocks",
            r"'3blocks' is not in this sequence; nearest: 2blocks, 4blocks",
        ),
    ],
)
def test_a_budget_that_was_not_scored_is_not_committed(
    project, method, scored_for, budget, message
):
    scored(project, METHODS[method], scored_for)
    set_targets(project, {"t": budget})
    settings.main("tiny")
    with pytest.raises(InputError, match=message):
        commit.main("t")


def test_switching_method_and_metric_and_back_computes_nothing_again(project):
    """Of one method of each kind, and one that draws; tests/unit/test_methods.py has the trials of
    the others."""
    sections = [METHODS[method] for method in ("greedy", "laco", "slicegpt")]
    for section in sections:
        scored(project, section)
    assert [scored(project, section)["rows_computed"] for section in sections] == [0] * len(
        sections
    )


@pytest.mark.parametrize(
    "section", [{"options": {"per": "kv"}}, METHODS["floating"], METHODS["laco"]]
)
def test_a_budget_of_the_kv_cache(project, section):
    plan, out = materialized(project, section, "0.25kv")
    assert plan.removes["kv"] == 0.25 and plan.blocks["mha"] == 1
    assert plan.blocks["mlp"] == (plan.kind == "laco")
    cache = loaded(out)(torch.arange(5)[None], use_cache=True)
    cache = getattr(cache, "past_key_values", None) or cache.cache
    assert len(cache.layers) == 3


@pytest.mark.parametrize("section", [{}, {"options": {"per": "latency"}}, METHODS["floating"]])
def test_a_speed_up_is_measured_once(project, monkeypatch, section):
    """The times are made up: that an MHA block is worth two MLP blocks decides what 1.3x means."""
    seconds = {"dense": 1.0, "mha": 1.0 - 2 * 0.1, "mlp": 1.0 - 2 * 0.05}
    measured = []

    def generate(model, prompt, new_tokens):
        measured.append(tuple(prompt.shape))
        without = [
            name for name in ("mha", "mlp") if getattr(model.config, f"layers_without_{name}", None)
        ]
        assert len(without) <= 1
        return speed.Generation(prompt, seconds[without[0] if without else "dense"], 0.0, 0)

    monkeypatch.setattr(latency, "generate", generate)
    forget_times(project)
    section = section | {"latency": {"prompt_tokens": 6, "new_tokens": 3, "repeats": 2, "batch": 2}}
    scored(project, section, "1.3x")
    assert measured == [(2, 6)] * 9
    commit.main("t")
    plan = load_plan(next(project.glob("data/plans/t/*.json")))
    expected = 0.1 * plan.blocks["mha"] + 0.05 * plan.blocks["mlp"]
    assert plan.removes["latency"] == pytest.approx(expected)
    assert plan.removes["latency"] == pytest.approx(1 - 1 / 1.3, abs=0.05)
    scored(project, section, "1.2x")
    assert len(measured) == 9
    set_targets(project, {"t": "1.3x"}, streaming=True)
    settings.main("tiny")
    forget_times(project)
    with pytest.raises(
        InputError, match=r"runtime.streaming and runtime.ray_address exclude; give budgets"
    ):
        score.main(f"tiny-{section.get('method', 'greedy')}")


def test_other_budgets_are_refused_before_times_are_measured(project, monkeypatch):
    monkeypatch.setattr(latency, "generate", None)
    forget_times(project)
    choose(project, {"method": "greedy"}, "1.3x")
    set_targets(project, {"t": "1.3x", "u": "9blocks"})
    settings.main("tiny")
    with pytest.raises(
        InputError, match="'9blocks' cannot be reached; the largest reachable is 8blocks"
    ):
        score.main("tiny-greedy")


def test_a_damaged_measurement_is_set_aside(project, monkeypatch):
    monkeypatch.setattr(
        latency, "generate", lambda model, prompt, n: speed.Generation(prompt, 1.0, 0.0, 0)
    )
    with pytest.raises(
        InputError, match=r"'1\.3x' cannot be reached; the largest reachable is 8blocks, 1\.0000x"
    ):
        scored(project, {"method": "greedy"}, "1.3x")
    (path,) = (project / "data/scores/tiny/greedy").glob("latency-*.json")
    (shared,) = (project / "data/trials").glob("latency-*.json")
    whole = path.read_text()
    for damaged in ((path,), (path, shared)):  # another run's is taken, or it is measured again
        for file in damaged:
            file.write_text("{}")
        with pytest.raises(InputError, match="largest reachable"):
            scored(project, {"method": "greedy"}, "1.3x")
        assert path.read_text() == shared.read_text() == whole
        assert all(file.with_name(file.name + ".bad").read_text() == "{}" for file in damaged)


def test_a_changed_decision_is_not_taken(project):
    """What a stage left for others holds the digest of its content; valid JSON is not enough."""
    scored(project, METHODS["laco"])
    commit.main("t")
    scores = Path("data/scores/tiny/laco/laco")
    details = trace_directory(scores, Current.load(scores), "0.2") / "details.json"
    for path, step in {
        scores / "current.json": lambda: commit.main("t"),
        details: lambda: commit.main("t"),
        Path("data/plans/t/laco.json"): lambda: compensate.main("t"),
        Path("data/models/tiny/blockpruner_source.json"): lambda: score.main("tiny-laco"),
    }.items():
        text = path.read_text()
        path.write_text(json.dumps(json.loads(text) | {"more": 1}))
        with pytest.raises(
            InputError, match=f"{path.name} is damaged: its content is not what was written"
        ):
            step()
        path.write_text(text)
    text = details.read_text()
    details.write_text(json.dumps(json.loads(text) | {"more": 1}))
    score.main("tiny-laco")
    assert details.read_text() == text and details.with_name("details.json.bad").exists()
