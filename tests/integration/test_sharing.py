"""A colleague clones, pulls and asks for one target more; an experiment in a folder of its own; the stores cleaned."""

import hashlib
import shutil
import subprocess

import pytest

from tests.integration.project import ROOT, counts, dvc, make_project, module, set_targets, stage, tables


def git(folder, *arguments):
    identity = ["-c", "user.name=test", "-c", "user.email=test@localhost"]
    subprocess.run(["git", *identity, *arguments], cwd=folder, check=True, capture_output=True)


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    """Scored for two removals, committed, and pushed to a remote that is a folder."""
    project = make_project(tmp_path_factory.mktemp("first"), {"small": "2blocks"})
    for name in (".gitignore", ".dvc/config"):  # those that are shipped
        shutil.copy(ROOT / name, project / name)
    git(project, "init", "-q")
    dvc(project, "remote", "add", "--default", "shared", str(project.parent / "remote"))
    dvc(project, "repro", "commit@small")
    git(project, "add", "-A")
    git(project, "commit", "-qm", "two removals")
    dvc(project, "push")
    return project


def test_a_clone_computes_only_what_is_new(project, tmp_path):
    """Of the first two iterations nothing; of the third and fourth every trial, once."""
    clone = tmp_path / "clone"
    git(tmp_path, "clone", "-q", str(project), str(clone))
    dvc(clone, "pull", "--allow-missing")
    assert not (clone / "data/trials").exists() and tables(clone) == tables(project)
    set_targets(clone, {"small": "2blocks", "large": "4blocks"})
    dvc(clone, "repro", "commit@large")
    assert counts(clone)["trials_computed"] == 6 + 5
    assert {name: table for name, table in tables(clone).items() if name in tables(project)} == tables(project)
    assert len(tables(clone)) == 4


def test_a_changed_file_of_a_remote_is_refused(project, tmp_path):
    """By the setting that docs/operations.md asks for: DVC by itself looks at no content."""
    remote, plan = shutil.copytree(project.parent / "remote", tmp_path / "remote"), "data/plans/small/greedy.json"
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


def test_clean_deletes_only_what_no_run_names_and_stores_may_go_as_a_whole(project, tmp_path):
    copy = tmp_path / "project"
    shutil.copytree(project, copy)

    def files():
        return {
            path for path in copy.rglob("*") if "provenance" not in path.parts and not path.name.startswith("flow.lock")
        }

    before = files()
    shutil.copytree(copy / "data/models/tiny", copy / "data/models/old")
    (copy / "data/scores/tiny/x.parquet.bad").touch()
    with_more = files()
    listed = stage(copy, "clean", "").stdout
    assert "  unused: data/models/old\n" in listed and "models/tiny" not in listed and files() == with_more
    assert stage(copy, "clean", "delete").returncode == 0
    assert files() == before
    for store in ("trials", "evaluations", "cache", "adapters"):
        shutil.rmtree(copy / "data" / store, ignore_errors=True)
    assert "didn't change" in dvc(copy, "repro", "commit@small") and tables(copy) == tables(project)
