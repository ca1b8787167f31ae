"""Forked stages behave as processes that were started: arguments, streams, exit codes, signals, and a kill."""

import signal
import subprocess
import sys

import pytest

from tests.forking import true_starts
from tests.integration.project import environment
from tests.processes import alive, wait_until

PROGRAM = """
import os, sys, time
print(os.getpid(), *sys.argv[1:], os.environ["WORD"], os.getcwd(), "torch" in sys.modules, flush=True)
if sys.argv[1] == "wait":
    time.sleep(600)
sys.exit(f"wrong: {sys.stdin.read()}") if sys.argv[1] == "fail" else sys.exit(int(sys.argv[1]))
"""


@pytest.fixture
def start(tmp_path):
    """Starts the program as a stage; returns the process."""
    (tmp_path / "stages").mkdir()
    (tmp_path / "stages/__init__.py").write_text("")
    (tmp_path / "stages/program.py").write_text(PROGRAM)

    def start(*arguments):
        command, streams = (
            [sys.executable, "-m", "stages.program", *arguments],
            dict.fromkeys(("stdin", "stdout", "stderr"), -1),
        )
        return subprocess.Popen(command, cwd=tmp_path, env=environment() | {"WORD": "w"}, text=True, **streams)

    return start


@pytest.mark.parametrize("arguments", [("fail", "a b"), ("3",), ("0",)])
def test_it_ends_as_an_ordinary_process_does(start, tmp_path, arguments):
    forked = start(*arguments)
    found = forked.communicate("input", timeout=300)
    with true_starts():
        plain = start(*arguments)
    expected = plain.communicate("input", timeout=300)
    assert forked.returncode == plain.returncode and found[1] == expected[1]
    words, plain_words = found[0].split(), expected[0].split()
    assert words[-1] == "True" and plain_words[-1] == "False", "only the server has loaded torch"
    assert words[1:-1] == plain_words[1:-1]
    assert int(words[0]) != forked.pid and int(plain_words[0]) == plain.pid


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_a_signal_reaches_it(start, number):
    process = start("wait")
    child = int(process.stdout.readline().split()[0])
    process.send_signal(number)
    process.communicate(timeout=300)
    assert process.returncode == -number
    wait_until(lambda: not alive(child), f"process {child} lives on", seconds=60)
