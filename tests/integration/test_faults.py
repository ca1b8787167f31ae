"""A scoring process killed at any moment, an orphan beside it, damaged files: the same tables in the end."""

import fcntl
import os
import random
import signal
import subprocess
import sys
import time

import pytest

from tests.integration.project import counts, dvc, environment, make_project, set_targets, stage, tables

KILLS = int(os.environ.get("BLOCKPRUNER_KILLS", "3"))
BUDGET = {"small.3": "3blocks"}
BATCH_TOKENS = 96  # 15 row batches a sweep, for a moment to be hit in


def make_scored(folder):
    project = make_project(folder, BUDGET, num_samples=60)
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
    """`dvc repro` with its stage is killed, and run again, KILLS times: the tables are the undisturbed run's, and at
    most one unit a kill is computed twice (the log holds each unit once; a torn line is a unit lost)."""
    total = counts(undisturbed)["units_computed"]
    assert total >= 15 * (9 + 7 + 6)
    project, dice = make_scored(tmp_path), random.Random(11)
    inside = 0
    for kill in range(KILLS):
        process = subprocess.Popen(
            [sys.executable, "-m", "dvc", "repro", "--single-item", "score@tiny"],
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
    dvc(project, "repro", "--single-item", "score@tiny")
    assert inside >= KILLS // 2
    assert tables(project) == tables(undisturbed)
    assert total <= units_logged(project) <= total + KILLS


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


def require_mounts():
    """Skip unless this process may mount in a namespace of its own, as root mostly may."""
    command = ["unshare", "--mount", "sh", "-c", "mount -t tmpfs tmpfs /mnt"]
    found = subprocess.run(command, capture_output=True, text=True, check=False)
    if found.returncode != 0:
        pytest.skip(f"a file system cannot be mounted in a namespace of its own here: {found.stderr.strip()}")


def test_a_read_only_data_folder(tmp_path):
    """Root writes anywhere, so as root the folder is mounted read-only in a mount namespace of its own."""
    project = make_scored(tmp_path)
    command = [sys.executable, "-m", "stages.score", "tiny"]
    if os.getuid() == 0:
        require_mounts()
        remount = 'mount --bind data data && mount -o remount,ro,bind data && exec "$@"'
        command = ["unshare", "--mount", "sh", "-c", remount, "sh", *command]
    else:
        (project / "data").chmod(0o555)
    result = subprocess.run(command, cwd=project, env=environment(), capture_output=True, text=True, check=False)
    (project / "data").chmod(0o755)
    assert result.returncode == 1
    assert "cannot write data/trials" in result.stderr
    assert "read-only" in result.stderr or "permission denied" in result.stderr
    assert "Traceback" not in result.stderr


def test_a_full_disk(tmp_path, undisturbed):
    """On a small tmpfs the score stage says so; what was computed before is whole, and a rerun uses it."""
    require_mounts()
    project = make_scored(tmp_path)
    fill = (
        "mkdir data/trials && mount -t tmpfs -o size=64k tmpfs data/trials; head -c 52k /dev/zero > data/trials/fill;"
        ' "$@"; code=$?; rm data/trials/fill; cp -r data/trials kept; exit $code'
    )
    command = ["unshare", "--mount", "sh", "-c", fill, "sh", sys.executable, "-m", "stages.score", "tiny"]
    result = subprocess.run(command, cwd=project, env=environment(), capture_output=True, text=True, check=False)
    assert result.returncode == 1, result.stdout
    assert "no space left on the device; free some and run again" in result.stderr
    assert "Traceback" not in result.stderr
    subprocess.run("rm -rf data/trials && mv kept data/trials", shell=True, cwd=project, check=True)
    before = units_logged(project)
    assert 0 < before < counts(undisturbed)["units_computed"]
    assert stage(project, "score").returncode == 0
    assert tables(project) == tables(undisturbed)
    assert counts(project)["units_computed"] <= counts(undisturbed)["units_computed"] - before + 1


def test_a_second_process_waits_and_reuses(tmp_path, undisturbed):
    """Held here as an orphaned scoring process would hold it: the stage says who it waits for, then goes on."""
    project = make_scored(tmp_path)
    subprocess.run(["cp", "-r", undisturbed / "data/trials", project / "data/trials"], check=True)
    (path,) = (project / "data/trials").glob("*.lock")
    with open(path, "r+") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        handle.truncate(0)
        handle.write("4711 on node7")
        handle.flush()
        process = subprocess.Popen(
            [sys.executable, "-u", "-m", "stages.score", "tiny"],
            cwd=project,
            env=environment(),
            stdout=subprocess.PIPE,
            text=True,
        )
        assert process.stdout is not None
        assert process.stdout.readline() == (
            "process 4711 on node7 computes the same trials; waiting for it, then reusing them\n"
        )
        assert process.poll() is None
    process.communicate(timeout=300)
    assert process.returncode == 0
    assert counts(project)["trials_computed"] == 0
    assert tables(project) == tables(undisturbed)


def test_a_truncated_tokenizer_is_one_line(tmp_path):
    project = make_project(tmp_path, BUDGET, num_samples=14)
    assert stage(project, "fetch").returncode == 0
    path = project / "data/models/tiny/tokenizer.json"
    content = path.read_bytes()
    path.unlink()  # a hard link into a store may be read by others
    path.write_bytes(content[: len(content) // 2])
    result = stage(project, "calibrate")
    assert result.returncode == 1
    assert "the tokenizer in data/models/tiny cannot be loaded" in result.stderr
    assert "fetch the checkpoint again" in result.stderr and "Traceback" not in result.stderr


def test_ctrl_c_is_one_line(tmp_path):
    project = make_scored(tmp_path)
    set_targets(project, BUDGET, batch_tokens=24)  # a row each: seconds to be interrupted in
    process = subprocess.Popen(
        [sys.executable, "-m", "stages.score", "tiny"],
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
    assert "interrupted; what is finished is kept: run again to go on" in errors
    assert "Traceback" not in errors
