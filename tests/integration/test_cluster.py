"""The Ray cluster of docs/operations.md on this machine: a head, three nodes, one of which is lost
during a search."""

import importlib.util
import os
import re
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

from stages import calibrate, fetch, score, settings
from tests.integration.project import environment, make_project, set_targets, tables

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("ray") is None,
    reason="ray is not installed: pip install 'blockpruner[ray]'",
)
TARGETS = {"tiny-3": "3blocks"}
SECONDS = 300


@pytest.fixture
def cluster(tmp_path, monkeypatch):
    """Its address, and its nodes: a head without and three nodes with one CPU, each a process group
    of its own."""
    # of a private Ray that this process had
    for name in [name for name in os.environ if name.startswith("RAY_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    monkeypatch.setenv("RAY_AUTH_TOKEN", secrets.token_hex(32))
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    # a full machine is no reason to lose a worker
    monkeypatch.setenv("RAY_memory_monitor_refresh_ms", "0")
    log = tmp_path / "ray.log"
    sockets = tempfile.mkdtemp(prefix="ray-", dir="/tmp")  # a socket's path has at most 107 bytes
    nodes = []

    def start(*options):
        command = [
            Path(sys.executable).with_name("ray"),
            "start",
            "--block",
            "--object-store-memory",
            str(80 << 20),
        ]
        with open(log, "a") as output:
            nodes.append(
                subprocess.Popen(
                    [*command, *options],
                    stdout=output,
                    stderr=output,
                    env=environment(),
                    start_new_session=True,
                )
            )
        wait_until(lambda: log.read_text().count("Ray runtime started.") == len(nodes), log)

    try:
        start(
            "--head",
            "--port",
            "0",
            "--num-cpus",
            "0",
            "--include-dashboard",
            "false",
            "--temp-dir",
            sockets,
        )
        told = re.compile(r"ray start --address='(.*?)'")
        # a few lines behind what `start` waits for
        wait_until(lambda: told.search(log.read_text()), log)
        address = told.search(log.read_text())[1]
        for _ in range(3):
            start("--address", address, "--num-cpus", "1")
        yield address, nodes
    finally:
        for node in reversed(nodes):
            end(node)
        shutil.rmtree(sockets)


def wait_until(condition, log):
    deadline = time.monotonic() + SECONDS
    while not condition():
        assert time.monotonic() < deadline, log.read_text()
        time.sleep(0.02)


def end(node):
    """All its processes at once, as when its machine is switched off."""
    if node.poll() is None:
        os.killpg(node.pid, signal.SIGKILL)
        node.wait()


def has_worker(node):
    """Whether one of our workers is on it."""
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            group = int((entry / "stat").read_text().rpartition(")")[2].split()[3])  # the session
            if group == node.pid and (entry / "cmdline").read_bytes().startswith(b"ray::Replica"):
                return True
        except OSError:  # it has ended meanwhile
            continue
    return False


@pytest.mark.slow
def test_a_node_is_lost_and_the_others_go_on(cluster, tmp_path, monkeypatch):
    address, nodes = cluster
    project = make_project(tmp_path, TARGETS, num_samples=60)
    set_targets(project, TARGETS, batch_tokens=24)
    monkeypatch.chdir(project)
    for stage in (settings, fetch, calibrate, score):
        stage.main("tiny")
    reference = tables(project)
    for folder in ("scores", "trials"):
        shutil.rmtree(project / "data" / folder)

    set_targets(project, TARGETS, batch_tokens=24, executor="ray", workers=2, ray_address=address)
    log = project / "score.log"
    with open(log, "w") as output:
        scoring = subprocess.Popen(
            [sys.executable, "-m", "stages.score", "tiny"],
            cwd=project,
            env=environment(),
            stdout=output,
            stderr=output,
        )

    def units():
        assert scoring.poll() is None, log.read_text()
        return sum(
            path.read_bytes().count(b"\n") for path in project.glob("data/trials/**/*.jsonl")
        )

    wait_until(lambda: units() > 50, log)
    scoring.send_signal(signal.SIGSTOP)  # so that its search has not ended when the node is found
    try:
        end(next(node for node in nodes if has_worker(node)))
    finally:
        scoring.send_signal(signal.SIGCONT)
    assert scoring.wait(SECONDS) == 0, log.read_text()
    said = log.read_text()
    assert "was lost; 1 workers go on" in said, said
    assert tables(project) == reference
