"""The rule of the DAG: what Git holds is a function of what DVC sees, and no stage writes into
another's outputs.

The stages run in this process, in DVC's order.
"""

import csv
import json
import shutil
import sys
from importlib import import_module
from pathlib import Path

import pytest
import yaml

import stages
from blockpruner.config import dag
from blockpruner.config.params import load_run
from blockpruner.config.sections import Target, resolve
from blockpruner.store.files import read_json
from tests.errors import refused
from tests.integration.project import make_project, set_targets

UNSEEN = (("adapters", "cache", "costs", "provenance"), ("evaluations",), ("scores",), ("trials",))
"""Folders of data/ that outlive a forced stage: DVC keeps `scores` and knows none of the others but
`costs`."""


def make():
    """Force every stage."""
    found = dag.read_dag()
    names = [("settings", "tiny"), *(("local", key) for key in found["local"])]
    names += [("fetch", "tiny"), ("calibrate", "tiny")]
    names += [*(("score", key) for key in found["searches"]), ("baseline", "tiny")]
    for target in found["pruned"]:
        names += [
            (stage, target)
            for stage in ("commit", "compensate", "train", "materialize", "benchmark")
        ]
    for stage, item in (*names, ("report", "")):
        import_module(f"stages.{stage}").main(item)


def tracked():
    """What Git would hold: files by name, without timings and the digests of files that hold
    some."""
    files = [
        path
        for name in ("evidence", "metrics", "plots")
        for path in Path("data", name).rglob("*.*")
    ]
    found = {str(path): path.read_bytes() for path in files if path.name != "speed.json"}
    for path in Path("data/evidence").glob("*/speed.json"):
        search = read_json(path)["search"]
        assert not search or search["seconds"] > 0, f"{path}: {search}"
        found[str(path)] = {key: value for key, value in search.items() if key != "seconds"}
    rows = csv.DictReader(Path("data/plots/curve.csv").read_text().splitlines())
    # `front` is chosen by speed, too
    timed = (
        "speedup_prefill",
        "speedup_decode",
        "speedup_generation",
        "front",
    )
    found["data/plots/curve.csv"] = [
        {key: value for key, value in row.items() if key not in timed} for row in rows
    ]
    for path in Path("data/manifests").rglob("*.json"):
        found[str(path)] = {
            key: value for key, value in read_json(path).items() if not key.endswith("speed.json")
        }
    return found


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    folder = make_project(tmp_path_factory.mktemp("rule"), {"small": "2blocks"})
    run = yaml.safe_load((folder / "runs/tiny.yaml").read_text()) | {"export": []}
    (folder / "runs/tiny.yaml").write_text(yaml.safe_dump(run))
    set_targets(folder, {"small": "2blocks"})
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        make()
    return folder


@pytest.fixture(autouse=True)
def inside(project, monkeypatch):
    monkeypatch.chdir(project)


def test_what_git_holds_moves_in_its_timings_only_whatever_is_deleted():
    before = tracked()
    assert len(before) > 10 and before["data/evidence/small/speed.json"]["trials_asked"] == 9 + 7
    for folders in UNSEEN:
        for folder in folders:
            shutil.rmtree(Path("data", folder), ignore_errors=True)
        make()
        found = tracked()
        assert [key for key in before if found.get(key) != before[key]] == [], folders


def test_a_stage_that_fails_takes_nothing_from_others(monkeypatch):
    before, reason = tracked(), Path("data/provenance/failed/score@tiny-floating.json")
    params = yaml.safe_load(Path("params.yaml").read_text())
    params["targets"]["bad"] = {"run": "tiny", "budget": "40blocks", "method": "floating"}
    monkeypatch.setattr(sys, "argv", ["stages.score", "tiny-floating"])
    score = import_module("stages.score").main
    for budget, ends in (("40blocks", True), ("1blocks", False)):
        params["targets"]["bad"]["budget"] = budget
        Path("params.yaml").write_text(yaml.safe_dump(params))
        with refused("dag-stale") if ends else pytest.raises(AssertionError):
            dag.require_current()
            raise AssertionError("a budget is no entry of the DAG")
        dag.write()
        import_module("stages.settings").main("tiny")
        if ends:
            with pytest.raises(SystemExit):
                stages.run("score", score)
            assert "budget '40blocks' cannot be reached" in json.loads(reason.read_text())["reason"]
            assert stages.failures()[0].startswith("score@tiny-floating failed: budget '40blocks'")
        else:
            stages.run("score", score)
            assert not reason.exists()
        assert tracked() == before | {
            key: value for key, value in tracked().items() if "floating" in key
        }
    set_targets(Path(), {"small": "2blocks"})


def test_a_new_target_leaves_the_settings_of_experiments_and_of_other_methods_as_they_are():
    run, own = load_run("tiny"), Target(run="tiny", budget="2blocks")
    before = resolve(run, [own]).texts()
    after = resolve(run, [own, Target(run="tiny", budget="0.3", method="floating")]).texts()
    assert {key for key in after if after[key] != before.get(key)} == {"searches/floating"}
    further = resolve(run, [own, Target(run="tiny", budget="0.3")]).texts()
    assert {key for key in further if further[key] != before[key]} == {"searches/greedy"}


def test_a_changed_text_is_seen_and_so_is_what_a_folder_holds(tmp_path):
    local = import_module("stages.local").main
    (name, entry) = next(
        item for item in dag.read_dag()["local"].items() if item[1]["path"].endswith("inputs")
    )
    out, text = Path("data/local/tiny", f"{name}.json"), Path(entry["path"], "heldout.txt")
    before, words = out.read_text(), text.read_text()
    text.write_text(f"{words}more")
    local(name)
    assert out.read_text() != before
    text.write_text(words)
    local(name)
    assert out.read_text() == before


def test_another_machine_is_refused_where_it_moves_results():
    whole = dag.FILE.read_text()
    recorded = dag.read_dag()
    dag.require_current(machine=True)
    for change in (
        {"lm_eval": "0.1"},
        {"machine": recorded["machine"] | {"device": "NVIDIA H100"}},
    ):
        dag.FILE.write_text(yaml.safe_dump(recorded | change))
        dag.require_current()
        with refused("dag-stale") as caught:
            stages.runtime()
        assert f"{next(iter(change))} not as" in str(caught.value) and dag.COMMAND in str(
            caught.value
        )
    dag.FILE.write_text(whole)


def test_a_search_depends_on_the_machine_in_16_bits_only():
    file = Path("runs/tiny.yaml")
    text = file.read_text()
    (search,) = dag.derived(dag.read_dag())["searches"].values()
    assert search == {"run": "tiny", "method": "greedy"}
    file.write_text(text.replace("float32", "bfloat16"))
    (search,) = dag.derived(dag.read_dag())["searches"].values()
    file.write_text(text)
    assert search["machine"] == dag.read_dag()["machine"]


def test_a_stale_dag_is_named_with_its_command():
    text = dag.FILE.read_text()
    dag.FILE.write_text(text.replace("tiny-greedy", "tiny-other"))
    with refused("dag-stale") as caught:
        dag.require_current()
    dag.FILE.write_text(text)
    assert str(caught.value).startswith("dag.yaml: searches not as params.yaml")
