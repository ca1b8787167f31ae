"""A colleague clones, pulls and asks for one target more; an experiment is queued here and pulled
there; the stores are deleted. All in bfloat16, where losses of one device are not mixed with those
of another."""

import hashlib
import json
import shutil
import subprocess

import pytest
import yaml

from blockpruner.store.files import read_json
from tests.integration.project import (
    ROOT,
    counts,
    dvc,
    make_project,
    module,
    set_targets,
    tables,
    write_dag,
)


def git(folder, *arguments):
    identity = ["-c", "user.name=test", "-c", "user.email=test@localhost"]
    command = ["git", *identity, *arguments]
    return subprocess.run(command, cwd=folder, check=True, capture_output=True, text=True).stdout


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    """Pruned by two blocks, committed, and pushed to a remote that is a folder."""
    project = make_project(tmp_path_factory.mktemp("first"), {"small": "2blocks"})
    run = yaml.safe_load((project / "runs/tiny.yaml").read_text()) | {"export": []}
    run["model"]["dtype"] = "bfloat16"
    (project / "runs/tiny.yaml").write_text(yaml.safe_dump(run))
    write_dag(project)
    for name in (".gitignore", ".dvc/config"):  # those that are shipped
        shutil.copy(ROOT / name, project / name)
    git(project, "init", "-q")
    dvc(project, "remote", "add", "--default", "shared", str(project.parent / "remote"))
    dvc(project, "repro")
    git(project, "add", "-A")
    git(project, "commit", "-qm", "two removals")
    dvc(project, "push")
    return project


def test_a_clone_computes_only_what_is_new(project, tmp_path):
    """Of the first two iterations nothing; of the third and fourth every trial, once."""
    clone = tmp_path / "clone"
    git(tmp_path, "clone", "-q", str(project), str(clone))
    assert "up to date" in dvc(clone, "repro", "--dry", "--allow-missing")
    dvc(clone, "pull", "score@tiny-greedy")
    assert not (clone / "data/trials").exists() and tables(clone) == tables(project)
    set_targets(clone, {"small": "2blocks", "large": "4blocks"})
    dvc(clone, "repro", "--pull", "--allow-missing", "commit@large")
    assert counts(clone)["trials_computed"] == 6 + 5
    assert {
        name: table for name, table in tables(clone).items() if name in tables(project)
    } == tables(project)
    assert len(tables(clone)) == 4


def test_an_experiment_is_queued_in_one_clone_and_pulled_in_another(project, tmp_path):
    """No trial is scored twice, and Git alone knows the plots of both."""
    git(tmp_path, "clone", "-q", "--bare", str(project), "origin.git")
    here, there = tmp_path / "here", tmp_path / "there"
    for clone in (here, there):
        git(tmp_path, "clone", "-q", "origin.git", str(clone))
        git(clone, "config", "user.name", "test")
        git(clone, "config", "user.email", "test@localhost")
    dvc(here, "pull", "--allow-missing")
    dvc(here, "exp", "run", "--queue", "--name", "further", "-S", "targets.small.budget=4blocks")
    dvc(here, "exp", "run", "--run-all")
    dvc(here, "exp", "push", "origin", "further")
    dvc(there, "exp", "pull", "origin", "further")
    dvc(there, "exp", "apply", "further")
    searched = read_json(there / "data/evidence/small/speed.json")["search"]
    assert (
        searched["trials_computed"] == searched["trials_asked"] == 9 + 7 + 6 + 5
        and searched["seconds"] > 0
    )
    change = json.loads(dvc(there, "metrics", "diff", "--json", "HEAD", "further"))
    small = change["data/metrics/small.json"]
    assert {"ratio", "parameters", "kv_cache", "perplexity"} <= small.keys()
    assert small["mha_removed"]["new"] + small["mlp_removed"]["new"] == 4
    plot = "data/plots/iterations.csv"
    drawn = json.loads(dvc(there, "plots", "diff", "HEAD", "further", "--json", "--targets", plot))
    shown = [
        point["rev"] for point in drawn["data"][f"dvc.yaml::{plot}"][0]["content"]["data"]["values"]
    ]
    assert (shown.count("HEAD"), shown.count("further")) == (3, 5)
    set_targets(there, {"small": "4blocks", "large": "5blocks"})
    dvc(there, "repro", "commit@large")
    assert counts(there)["trials_computed"] == 4


def test_weights_may_stay_at_home(project, tmp_path):
    """By the line that docs/operations.md names; it makes nothing stale."""
    copy, line = shutil.copytree(project, tmp_path / "project"), "data/models/${key}: {push: false}"
    assert line in (ROOT / "docs/operations.md").read_text()
    pipeline = (copy / "dvc.yaml").read_text()
    (copy / "dvc.yaml").write_text(
        pipeline.replace("outs:\n      - data/models/${key}", f"outs:\n      - {line}")
    )
    dvc(copy, "remote", "modify", "shared", "url", str(tmp_path / "remote"))
    dvc(copy, "push")
    assert "didn't change" in dvc(copy, "repro", "score@tiny-greedy")
    fetched = yaml.safe_load((copy / "dvc.lock").read_text())["stages"]["fetch@tiny"]
    outs = {out["path"]: out["md5"] for out in fetched["outs"]}
    pushed = {f"{path.parent.name}{path.name}" for path in (tmp_path / "remote").rglob("*")}
    assert outs["data/sources/tiny"] in pushed and outs["data/models/tiny"] not in pushed


def test_a_changed_file_of_a_remote_is_refused(project, tmp_path):
    """By the setting that docs/operations.md asks for: DVC by itself looks at no content."""
    remote, plan = (
        shutil.copytree(project.parent / "remote", tmp_path / "remote"),
        "data/plans/small/greedy.json",
    )
    md5 = hashlib.md5((project / plan).read_bytes()).hexdigest()
    (stored,) = remote.rglob(md5[2:])
    stored.chmod(0o644)
    stored.write_text("{}")
    line = "dvc remote modify shared verify true"
    assert line in (ROOT / "docs/operations.md").read_text()
    for setting in ([], line.split()[1:]):
        clone = tmp_path / f"clone{len(setting)}"
        git(tmp_path, "clone", "-q", str(project), str(clone))
        dvc(clone, "remote", "modify", "shared", "url", str(remote))
        if setting:
            dvc(clone, *setting)
        assert (module(clone, "dvc", "pull", "commit@small").returncode != 0) == bool(setting)
        assert (clone / plan).exists() != bool(setting)


def test_stores_may_be_deleted_as_a_whole(project, tmp_path):
    copy = tmp_path / "project"
    shutil.copytree(project, copy)
    for store in ("trials", "evaluations", "cache", "adapters"):
        shutil.rmtree(copy / "data" / store, ignore_errors=True)
    assert "didn't change" in dvc(copy, "repro", "commit@small") and tables(copy) == tables(project)
