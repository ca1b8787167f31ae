"""A scoring process killed at any moment, an orphan beside it, damaged files: the same tables in the end."""

import os
import random
import signal
import subprocess
import sys
import time

import pytest
from tests.integration.project import counts, environment, make_project, set_targets, stage, tables

KILLS = int(os.environ.get("BLOCKPRUNER_KILLS", "3"))
BUDGET = {"small": "3blocks"}
BATCH_TOKENS = 96  # four row batches a sweep


def make_scored(folder):
    project = make_project(folder, BUDGET, num_samples=14)
    set_targets(project, BUDGET, batch_tokens=BATCH_TOKENS)
    for name in ("fetch", "calibrate"):
        result = stage(project, name)
        assert result.returncode == 0, result.stderr
    return project


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    project = make_scored(tmp_path_factory.mktemp("undisturbed"))
    result = stage(project, "score")
    assert result.returncode == 0, result.stderr
    return project


def units_logged(project):
    return sum(max(0, len(log.read_text().splitlines()) - 1) for log in (project / "data/trials").rglob("*.jsonl"))


def test_killed_at_random_moments(tmp_path, undisturbed):
    """At most one unit a kill is computed twice: units logged over all processes are exactly the undisturbed run's."""
    assert counts(undisturbed)["units_computed"] >= 4 * 9
    project, dice = make_scored(tmp_path), random.Random(11)
    total = counts(undisturbed)["units_computed"]
    for kill in range(KILLS):
        process = subprocess.Popen(
            [sys.executable, "-m", "stages.score", "tiny"], cwd=project, env=environment(),
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        wanted = min(total - 1, int(total * (kill + dice.random()) / KILLS))
        while units_logged(project) < wanted and process.poll() is None:
            time.sleep(0.002)
        process.send_signal(signal.SIGKILL)
        process.wait()
    result = stage(project, "score")
    assert result.returncode == 0, result.stderr
    assert tables(project) == tables(undisturbed)
    assert units_logged(project) == total


def test_damaged_files_are_named_and_computed_again(tmp_path, undisturbed):
    project = make_scored(tmp_path)
    assert stage(project, "score").returncode == 0
    path = next((project / "data/scores").rglob("iteration_001.parquet"))
    path.write_bytes(path.read_bytes()[:-30])
    for log in (project / "data/trials").rglob("*.jsonl"):
        log.unlink()
    result = stage(project, "score")
    assert result.returncode == 0, result.stderr
    assert f"{path.name} is truncated" in result.stdout
    assert counts(project)["trials_computed"] > 0
    assert path.with_name("iteration_001.parquet.bad").exists()
    path.with_name("iteration_001.parquet.bad").unlink()
    assert tables(project) == tables(undisturbed)


def test_tables_alone_spare_the_model(tmp_path, undisturbed):
    """A clone after `dvc pull` has tables but no trial store: nothing is computed, and the model is not loaded."""
    project = make_scored(tmp_path)
    subprocess.run(["cp", "-r", undisturbed / "data/scores", project / "data/scores"], check=True)
    (project / "data/models/tiny/model.safetensors").unlink()
    result = stage(project, "score")
    assert result.returncode == 0, result.stderr
    assert counts(project)["trials_computed"] == 0
    assert tables(project) == tables(undisturbed)


def test_a_read_only_data_folder(tmp_path):
    """Root writes anywhere, so the stage runs as an unprivileged user where the tests run as root."""
    project = make_scored(tmp_path)
    identity = {"user": 65534, "group": 65534, "extra_groups": []} if os.getuid() == 0 else {}
    (project / "data").chmod(0o555)
    for parent in [tmp_path, *tmp_path.parents]:
        if parent.stat().st_uid == os.getuid() and parent.stat().st_mode & 0o001 == 0 and str(parent) != "/":
            parent.chmod(parent.stat().st_mode | 0o055)
    try:
        result = subprocess.run(
            [sys.executable, "-m", "stages.score", "tiny"], cwd=project, env=environment(), capture_output=True,
            text=True, check=False, **identity,
        )  # fmt: skip
    finally:
        (project / "data").chmod(0o755)
    if "Permission denied" in result.stderr and "error in stage" not in result.stderr:
        pytest.skip(f"an unprivileged user cannot read this Python: {result.stderr.splitlines()[-1]}")
    assert result.returncode == 1
    assert "cannot write data/trials" in result.stderr
    assert "permission denied; make the folder writable" in result.stderr
    assert "Traceback" not in result.stderr
