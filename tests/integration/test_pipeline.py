"""The whole DAG on a tiny model: what runs, what is reused, what comes out."""

import csv
import json
import re
import shutil
import subprocess
import sys

import pyarrow.parquet as pq
import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM

from blockpruner.core.blocks import all_blocks
from blockpruner.model.models import masked
from blockpruner.store.files import read_json
from blockpruner.store.locks import hold
from blockpruner.store.plans import load_plan
from tests.integration.project import (
    ROOT,
    counts,
    dvc,
    environment,
    make_project,
    module,
    set_targets,
    stage,
    tables,
    write_dag,
)
from tests.tiny import full_nll


def ran(output):
    return re.findall(r"Running stage '([^']+)'", output)


TARGETS = {"small-2": "2blocks", "lora-2": "2blocks"}


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    return make_project(tmp_path_factory.mktemp("pipeline"), TARGETS)


@pytest.fixture(scope="module")
def first(project):
    return dvc(project, "repro")


def brute_force(project, removals):
    """Greedy search by full forward passes of the masked model: the oracle for the sequence."""
    model = AutoModelForCausalLM.from_pretrained(project / "data/models/tiny", dtype=torch.float64)
    rows = (
        pq.read_table(project / "data/calibration/tiny/search.parquet")
        .column("input_ids")
        .to_pylist()
    )
    removed, sequence = frozenset(), []
    for _ in range(removals):
        scores = {}
        for block in all_blocks(4):
            if block not in removed:
                with masked(model, removed | {block}):
                    scores[block] = sum(full_nll(model, row) for row in rows) / len(rows)
        best = min(scores, key=scores.get)
        removed |= {best}
        sequence.append(str(best))
    return sequence


def test_everything_runs_once_in_order(project, first):
    steps = ("commit", "compensate", "train", "materialize", "benchmark")
    own = {f"{stage}@{name}" for name in TARGETS for stage in steps}
    shared = {f"{stage}@tiny" for stage in ("settings", "fetch", "calibrate", "baseline")}
    shared |= {*(f"local@tiny-{number}" for number in range(6)), "score@tiny-greedy", "report"}
    assert sorted(ran(first)) == sorted(own | shared)
    for output in (
        "checkpoints/small-2/hf/verification.json",
        "evidence/small-2/results.json",
        "evidence/tiny-dense/results.json",
        "report/index.html",
        "report/report.md",
        "metrics/small-2.json",
        "provenance/score@tiny-greedy.json",
    ):
        assert (project / "data" / output).exists(), output
    second = dvc(project, "repro")
    assert ran(second) == [] and "up to date" in second


def test_a_benchmark_that_runs_again_times_nothing(project, first):
    path, page = project / "data/evidence/small-2/speed.json", project / "data/report/index.html"
    before = path.read_bytes()
    dvc(project, "repro", "--force", "--single-item", "benchmark@small-2")
    assert ran(dvc(project, "repro")) == [] and page.read_text()
    assert path.read_bytes() == before


def test_sequence_equals_brute_force(project, first):
    plan = load_plan(project / "data/plans/small-2/greedy.json")
    assert list(plan.order) == brute_force(project, 2)
    assert plan.blocks["mha"] + plan.blocks["mlp"] == 2
    table = pq.read_table(project / "data/plans/small-2/greedy.parquet").to_pylist()
    assert [sum(row["iteration"] == k for row in table) for k in (0, 1)] == [9, 7]
    assert all(row["rows_used"] == row["rows_total"] == counts_rows(project) for row in table)


def counts_rows(project):
    return pq.read_table(project / "data/calibration/tiny/search.parquet").num_rows


def test_checkpoint_is_verified_and_smaller(project, first):
    report = read_json(project / "data/checkpoints/small-2/hf/verification.json")
    assert report["ok"]
    assert report["greedy_tokens_equal"]
    assert not report["blockpruner_imported"]
    plan = load_plan(project / "data/plans/small-2/greedy.json")
    results = read_json(project / "data/evidence/small-2/results.json")
    assert results["parameters"] == plan.parameters["pruned"] < plan.parameters["dense"]
    assert results["tasks"]["piqa"]["items"] == 6


def test_budgets_up_down_and_back(project, first):
    """Trials computed are exactly the never-computed ones; only a new target's later stages run."""
    before = counts(project)
    assert before["trials_computed"] == 9 + 7
    set_targets(project, TARGETS | {"large-4": "4blocks"})
    output = dvc(project, "repro")
    assert sorted(ran(output)) == sorted(
        [
            "settings@tiny",
            "score@tiny-greedy",
            "commit@small-2",
            "commit@lora-2",
            "report",
            *(
                f"{stage}@large-4"
                for stage in ("commit", "compensate", "train", "materialize", "benchmark")
            ),
        ]
    )
    after = counts(project)
    assert (after["trials_computed"], after["trials_reused"]) == (6 + 5, 9 + 7)
    assert list(load_plan(project / "data/plans/large-4/greedy.json").order) == brute_force(
        project, 4
    )
    kept = tables(project)

    set_targets(project, TARGETS)
    output = dvc(project, "repro")
    assert not {"materialize@small-2", "materialize@lora-2"} & set(ran(output))
    assert counts(project)["trials_computed"] == 0 and "\ngreedy: 0 trials computed, " in output
    assert tables(project) == kept


def test_a_target_is_healed_beside_the_one_that_is_not(project, first):
    """Its benchmark is of the trained weights."""
    facts = read_json(project / "data/trained/lora-2/train.json")
    assert facts["rows"] == 12 and len(facts["losses"]) == 6
    assert read_json(project / "data/checkpoints/lora-2/hf/verification.json")["ok"]
    healed = read_json(project / "data/compensated/lora-2/compensate.json")
    assert healed["method"] == "refit"
    plain = read_json(project / "data/compensated/small-2/compensate.json")
    assert (
        plain["search"] == "greedy"
        and "method" not in plain
        and plain["judged"].keys() == {"greedy"}
    )
    assert read_json(project / "data/trained/small-2/train.json") == {"enabled": False}
    before, after = (
        read_json(project / f"data/evidence/{name}/results.json") for name in ("small-2", "lora-2")
    )
    assert before["parameters"] == after["parameters"]
    assert after["perplexity"]["perplexity"] < before["perplexity"]["perplexity"]
    report = (project / "data/report/report.md").read_text()
    # A refit towards a random model helps or does not, by rounding; the report says which.
    ways, words = (
        (" + refit + training |", "lora-2: refit, ")
        if healed["share"]
        else (" + training |", "refit, no help, left out")
    )
    assert ways in report and words in report and (" + refit" in report) == bool(healed["share"])


def test_dvc_reads_metrics_and_plots(project, first):
    shown = json.loads(dvc(project, "metrics", "show", "--json"))
    assert "data/metrics/small-2.json" in json.dumps(shown)
    assert not [word for word in ("speed", "seconds", "computed") if word in json.dumps(shown)]
    assert "index.html" in dvc(project, "plots", "show")


def test_a_new_name_and_a_comment_make_nothing_stale(project, first):
    code = project / "blockpruner"
    (code / "search/trace.py").rename(code / "search/record.py")
    others = [*(project / "stages").glob("*.py"), *(project / "study").rglob("*.py")]
    for path in (*code.rglob("*.py"), *others):
        path.write_text(
            path.read_text().replace("search.trace", "search.record") + "# A comment.\n"
        )
    assert "up to date" in dvc(project, "status")


def replaced(path, old, new):
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


def force_score(project, edits):
    """What `dvc repro` of the stage score says, and whether it fails, if files change while the
    stage waits for the trial store, which is locked here; they are as before then."""
    texts = {file: (project / file).read_text() for file in edits}
    (path,) = (project / "data/trials").glob("*.lock")
    with hold(path, "a test", pytest.fail):
        process = subprocess.Popen(
            [sys.executable, "-m", "dvc", "repro", "--force", "--single-item", "score@tiny-greedy"],
            cwd=project,
            env=environment() | {"PYTHONUNBUFFERED": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        assert any("waiting for it" in line for line in process.stdout)
        for file, (old, new) in edits.items():
            replaced(project / file, old, new)
    output, _ = process.communicate(timeout=300)
    for file, text in texts.items():
        (project / file).write_text(text)
    return output, process.returncode != 0


def test_a_stage_does_not_finish_on_settings_that_have_changed(project, first):
    """DVC then keeps the record that it had."""
    record = (project / "dvc.lock").read_text()
    output, fails = force_score(project, {"params.yaml": ("budget: 2blocks", "budget: 3blocks")})
    line = (
        "error in stage score tiny-greedy: data/settings/tiny/searches/greedy.json changed while"
        " running: run again\n"
    )
    assert fails and line in output and (project / "dvc.lock").read_text() == record


def test_a_stage_finishes_whatever_else_has_changed(project, first):
    """Sections of its run that it does not read, the runtime, and a module."""
    edits = {
        "params.yaml": ("threads: 1", "threads: 2"),
        "runs/tiny.yaml": ("limit: 6", "limit: 5"),
        "blockpruner/reporting/report.py": ("report", "page"),
    }
    output, fails = force_score(project, edits)
    assert not fails, output


def test_a_stage_run_by_hand_refuses_settings_that_are_not_resolved(project, first):
    replaced(project / "runs/tiny.yaml", "seed: 42", "seed: 43")
    result = stage(project, "calibrate")
    replaced(project / "runs/tiny.yaml", "seed: 43", "seed: 42")
    assert result.returncode == 1 and "run `dvc repro settings@tiny`" in result.stderr
    assert result.stderr.startswith(
        "error in stage calibrate tiny: data/settings/tiny/calibration.json is not what"
    )


def stale(project):
    """The stages that DVC would run, once the settings are resolved."""
    dvc(project, "repro", "settings@tiny")
    found = json.loads(dvc(project, "status", "--json"))
    return {name for name in found if name != "report"}


def test_a_change_of_settings_starts_what_reads_it(project, first):
    """An evaluation limit, one more export, a target of another run; then everything is as it
    was."""
    run, params = ((project / name).read_text() for name in ("runs/tiny.yaml", "params.yaml"))
    replaced(project / "runs/tiny.yaml", "limit: 6", "limit: 5")
    assert stale(project) == {"baseline@tiny", "benchmark@small-2", "benchmark@lora-2"}
    (project / "runs/tiny.yaml").write_text(f"{run}export: [hf, nas]\n")
    assert stale(project) == {"materialize@small-2", "materialize@lora-2"}
    (project / "runs/tiny.yaml").write_text(run)
    (project / "runs/other.yaml").write_text(run)
    more = yaml.safe_load(params)
    more["runs"].append("other")
    more["targets"]["more"] = {"run": "other", "budget": "1blocks", "method": "floating"}
    (project / "params.yaml").write_text(yaml.safe_dump(more))
    write_dag(project)
    assert {re.split("[@-]", name)[1] for name in stale(project)} == {"other", "more"}
    (project / "params.yaml").write_text(params)
    write_dag(project)
    (project / "runs/other.yaml").unlink()
    assert not stale(project) and "up to date" in dvc(project, "status")


def test_each_stage_depends_on_the_sections_that_it_reads(project, first):
    """What the stages' records name, against dvc.yaml."""
    for name, entry in yaml.safe_load((project / "dvc.yaml").read_text())["stages"].items():
        # one writes them, one reads all; test_experiments.py
        if name in ("settings", "report", "experiment"):
            continue
        deps = {dep.replace("${item.run}", "tiny") for dep in entry.get("do", entry)["deps"]}
        deps = {dep.replace("${key}", "tiny").replace("${item.method}", "greedy") for dep in deps}
        records = (project / "data/provenance").glob(f"{name}@*.json")
        read = {
            where
            for path in records
            for where in read_json(path)["inputs"]["settings"]
            if where.startswith("data/")
        }
        assert read == {dep for dep in deps if dep.startswith("data/settings/")}, name


@pytest.fixture(scope="module")
def studied(project, first, tmp_path_factory):
    """The project with no export, a study, a target of another method, and one whose training
    diverges."""
    folder = shutil.copytree(project, tmp_path_factory.mktemp("studied") / "project")
    run = yaml.safe_load((folder / "runs/tiny.yaml").read_text()) | {"export": []}
    run["train"]["learning_rate"] = 1e30
    (folder / "runs/tiny.yaml").write_text(yaml.safe_dump(run))
    targets = {
        "small-2": {"run": "tiny", "budget": "2blocks"},
        "others-2": {"run": "tiny", "budget": "2blocks", "method": "one_shot"},
        "bad": {"run": "tiny", "budget": "2blocks", "train": True},
    }
    shutil.copytree(ROOT / "data/paper", folder / "data/paper")
    (folder / "studies/mine.yaml").write_text(
        yaml.safe_dump({"title": "Mine", "runs": ["tiny"], "targets": targets})
    )
    params = yaml.safe_load((folder / "params.yaml").read_text()) | {
        "targets": targets,
        "studies": ["mine"],
    }
    (folder / "params.yaml").write_text(yaml.safe_dump(params))
    write_dag(folder)
    result = module(folder, "dvc", "repro", "--keep-going")
    assert (
        result.returncode != 0
        and "error in stage train bad: training diverged" in result.stdout + result.stderr
    )
    return folder


def test_without_an_export_the_same_model_is_measured_in_memory(project, studied):
    assert not list((studied / "data/checkpoints/small-2").iterdir())
    before, after = (
        read_json(folder / "data/evidence/small-2/results.json") for folder in (project, studied)
    )
    assert (before.pop("formats"), after.pop("formats")) == (["hf"], [])
    assert before == after


def test_a_target_of_another_method(studied):
    plan = load_plan(studied / "data/evidence/others-2/plan.json")
    assert plan.method == "one_shot" and len(plan.order) == 2
    scores = pq.read_table(
        next((studied / "data/scores/tiny/one_shot").rglob("iteration_000.parquet"))
    ).to_pylist()
    cheapest = sorted((row for row in scores if row["added"]), key=lambda row: row["loss"])[:2]
    assert list(plan.order) == [row["added"] for row in cheapest]


def test_the_tables_of_a_study_name_what_failed(studied):
    output = dvc(studied, "repro", "--single-item", "tables@mine")
    assert (
        "train@bad failed: training diverged" in output
        and "not measured: bad: not measured yet" in output
    )
    rows = {
        row["target"]: row
        for row in csv.DictReader((studied / "data/tables/mine/tables/models.csv").open())
    }
    assert rows.keys() == {"tiny-dense", "small-2", "others-2", "bad"}
    assert [name for name, row in rows.items() if row["reason"]] == ["bad"]
    assert rows["bad"]["reason"] == "not measured yet"
    results = read_json(studied / "data/evidence/small-2/results.json")
    assert float(rows["small-2"]["heldout_ppl"]) == pytest.approx(
        results["perplexity"]["perplexity"]
    )
