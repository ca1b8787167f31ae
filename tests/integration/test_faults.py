"""A scoring process killed at any moment, an orphan beside it, damaged files: the same tables in
the end."""

import importlib
import itertools
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from functools import partial

import pytest

import stages
from blockpruner.store import provenance
from blockpruner.store.files import TEMPORARY
from blockpruner.store.locks import hold
from stages import commit
from tests.fakes import unverified
from tests.integration.project import (
    counts,
    dvc,
    environment,
    make_project,
    set_targets,
    stage,
    tables,
    write_dag,
)
from tests.power import MODES, forked

FULL = int(os.environ.get("BLOCKPRUNER_FULL", "17"))
KILLS = int(os.environ.get("BLOCKPRUNER_KILLS", "3"))
BUDGET = {"small-3": "3blocks"}
BATCH_TOKENS = 96  # 15 row batches a sweep, for a moment to be hit in
SCORE = [sys.executable, "-u", "-m", "stages.score", "tiny-greedy"]


def succeed(project, name="score"):
    result = stage(project, name, "tiny-greedy" if name == "score" else "tiny")
    assert result.returncode == 0, result.stderr
    return result.stdout


@pytest.fixture(scope="module")
def calibrated(tmp_path_factory):
    folder = tmp_path_factory.mktemp("calibrated")
    # no row twice: one would be scored for both
    project = make_project(folder, BUDGET, num_samples=60, seed=46)
    set_targets(project, BUDGET, batch_tokens=BATCH_TOKENS)
    for name in ("settings", "fetch", "calibrate"):
        succeed(project, name)
    return project


@pytest.fixture(scope="module")
def undisturbed(calibrated, tmp_path_factory):
    project = shutil.copytree(calibrated, tmp_path_factory.mktemp("undisturbed") / "project")
    succeed(project)
    return project


@pytest.fixture
def project(calibrated, tmp_path):
    return shutil.copytree(calibrated, tmp_path / "project")


def units_logged(project):
    return sum(
        max(0, len(log.read_text().splitlines()) - 1)
        for log in (project / "data/trials").rglob("*.jsonl")
    )


def test_killed_at_random_moments(project, undisturbed):
    """`dvc repro` with its stage is killed, and run again, KILLS times: the tables are the
    undisturbed run's, and at most one unit a kill is computed twice (the log holds each unit once;
    a torn line is a unit lost)."""
    total, dice, inside = counts(undisturbed)["units_computed"], random.Random(11), 0
    assert total >= 15 * (9 + 7 + 6)
    for kill in range(KILLS):
        process = subprocess.Popen(
            [sys.executable, "-m", "dvc", "repro", "--single-item", "score@tiny-greedy"],
            cwd=project,
            env=environment(),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        wanted = int(total * (kill + dice.random()) / KILLS)
        while units_logged(project) < wanted and process.poll() is None:
            time.sleep(0.001)
        time.sleep(dice.random() * 0.02)
        inside += 0 < units_logged(project) < total
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    print(f"{KILLS} kills, {inside} of them inside the sweeps")
    dvc(project, "repro", "--single-item", "score@tiny-greedy")
    assert inside >= KILLS // 2
    assert tables(project) == tables(undisturbed)
    assert total <= units_logged(project) <= total + KILLS


def test_a_stage_that_is_cut_before_any_of_its_writes(undisturbed, tmp_path, monkeypatch):
    """Of `commit`, which is fast, in turns by a kill and by both cuts of power."""
    project, log = tmp_path / "project", tmp_path / "log"
    shutil.copytree(
        undisturbed,
        project,
        ignore=shutil.ignore_patterns("blockpruner", "study", "stages", "flows", ".dvc"),
    )
    monkeypatch.setattr(sys, "argv", ["stages.commit", "small-3"])
    monkeypatch.setattr(provenance, "commit", lambda: None)  # git is asked in three processes
    work = partial(stages.run, "commit", commit.main)

    def plans():
        files = (project / "data/plans/small-3").iterdir()  # dvc empties it before a stage runs
        return {
            path.name: path.read_bytes() for path in files if not TEMPORARY.fullmatch(path.name)
        }

    code, writes = forked(project, work, log)
    assert code == 0 and writes > 10, log.read_text()
    whole = plans()
    for mode, cut in zip(itertools.cycle(MODES), range(1, writes + 1), strict=False):
        for made in ("plans", "provenance"):
            shutil.rmtree(project / "data" / made, ignore_errors=True)
        assert forked(project, work, log, cut, mode)[0] == -signal.SIGKILL
        assert forked(project, work, log)[0] == 0 and plans() == whole, log.read_text()


STAGES = {
    "settings": ("tiny", "settings"),
    "fetch": ("tiny", "models", "sources"),
    "calibrate": ("tiny", "calibration"),
    "score": ("tiny-greedy", "scores"),
    "commit": ("lora-3", "plans"),
    "compensate": ("lora-3", "compensated"),
    "materialize": ("lora-3", "checkpoints"),
}
if FULL == 1:  # not daily: they load lm-eval each time
    STAGES |= {
        "baseline": ("tiny", "evidence/tiny-dense"),
        "benchmark": ("lora-3", "evidence/lora-3"),
    }
"""The stages in their order, with an item and the folders of what they make; not `train`, since a
fork cannot train."""


def work_of(name):
    main = importlib.import_module(f"stages.{name}").main

    def work():
        sys.argv = [f"stages.{name}", STAGES[name][0]]
        provenance.commit = lambda: None  # git is asked in three processes
        with unverified():
            stages.run(name, main)

    return work


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("finished")
    project = make_project(folder, {"lora-3": "3blocks"})
    params = project / "params.yaml"
    params.write_text(params.read_text().replace("train: true", "train: false"))
    write_dag(project)
    for name in STAGES:
        assert forked(project, work_of(name), folder / "log")[0] == 0, (folder / "log").read_text()
    return project


@pytest.mark.parametrize("name", STAGES)
def test_a_stage_whose_disk_is_full_at_any_of_its_writes(name, finished, tmp_path):
    """It ends in one line, what is there is whole, and a later run makes the same. Every FULL-th
    write in turn."""
    project, log, (_, *made) = tmp_path / "project", tmp_path / "log", STAGES[name]
    shutil.copytree(
        finished,
        project,
        ignore=shutil.ignore_patterns("blockpruner", "study", "stages", "flows", ".dvc"),
    )

    def outputs():
        files = (
            path
            for folder in made
            for path in (project / "data" / folder).rglob("*")
            if path.is_file()
        )
        files = (path for path in files if not path.match("iteration_*.json"))  # they hold times
        return {
            path: path.read_bytes()
            for path in files
            if not any(map(TEMPORARY.fullmatch, path.parts))
        }

    whole, cut = outputs(), 1
    for store in ("trials", "cache", "adapters"):  # not evaluations: they hold times
        shutil.rmtree(project / "data" / store, ignore_errors=True)
    while True:
        for folder in made:
            shutil.rmtree(project / "data" / folder, ignore_errors=True)
        code, writes = forked(project, work_of(name), log, cut, "full")
        assert outputs().items() <= whole.items()
        told = log.read_text()
        if writes < cut:
            break
        assert code == 1 and "no space left on the device; free some" in told.splitlines()[-1], told
        assert "Traceback" not in told
        cut += FULL
    assert code == 0 and outputs() == whole != {}, told


def test_damaged_files_are_named_and_computed_again(undisturbed, tmp_path):
    project = shutil.copytree(undisturbed, tmp_path / "project")
    path = next((project / "data/scores").rglob("iteration_001.parquet"))
    path.write_bytes(path.read_bytes()[:-30])
    for log in (project / "data/trials").rglob("*.jsonl"):
        log.unlink()
    assert f"{path.name} is truncated" in succeed(project)
    assert counts(project)["trials_computed"] > 0
    path.with_name("iteration_001.parquet.bad").unlink()
    assert tables(project) == tables(undisturbed)


def test_tables_alone_spare_the_model(project, undisturbed):
    """A clone after `dvc pull` has tables but no trial store: nothing is computed, and the model is
    not loaded."""
    shutil.copytree(undisturbed / "data/scores", project / "data/scores")
    (project / "data/models/tiny/model.safetensors").unlink()
    succeed(project)
    assert counts(project)["trials_computed"] == 0
    assert tables(project) == tables(undisturbed)


def test_a_second_process_waits_and_reuses(project, undisturbed):
    """Held here as an orphaned scoring process would hold it: the stage names it, waits, then goes
    on."""
    shutil.copytree(undisturbed / "data/trials", project / "data/trials")
    (path,) = (project / "data/trials").glob("*.lock")
    with hold(path, "process 4711 on node7", pytest.fail):
        process = subprocess.Popen(
            SCORE, cwd=project, env=environment(), stdout=subprocess.PIPE, text=True
        )
        assert (
            process.stdout.readline()
            == "process 4711 on node7 computes the same trials; waiting for it, then reusing them\n"
        )
        assert process.poll() is None
    process.communicate(timeout=300)
    assert process.returncode == 0
    assert counts(project)["trials_computed"] == 0
    assert tables(project) == tables(undisturbed)


def test_ctrl_c_is_one_line(project):
    set_targets(project, BUDGET, batch_tokens=24)  # a row each: seconds to be interrupted in
    process = subprocess.Popen(
        SCORE,
        cwd=project,
        env=environment(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    while units_logged(project) < 5 and process.poll() is None:
        time.sleep(0.001)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 130
    assert (
        "interrupted; what is finished is kept: run again to go on" in errors
        and "Traceback" not in errors
    )
