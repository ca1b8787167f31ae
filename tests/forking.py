"""A server that forks stages and dvc from a process in which torch is loaded: a start takes
milliseconds, not seconds.

`ready()` starts one server for all workers of a session. Since then tests/starts/sitecustomize.py
hands `python -m dvc` and `python -m stages.<name>` over to it, with their arguments, folder,
environment and streams; a forked stage verifies its exports in forked processes, too. A child
imports blockpruner itself, from the folder that it works in. Processes start as usual within
`true_starts()`, and where variables that libraries read when they are loaded differ. What is not as
usual: all children have one hash seed, and objects are not destroyed at the end.
"""

from __future__ import annotations

import atexit
import contextlib
import fcntl
import gc
import importlib
import inspect
import json
import os
import random
import runpy
import select
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

VARIABLE = "BLOCKPRUNER_TESTS_FORK"
"""The environment variable that holds the server's socket."""

LOADED = (
    "torch",
    "transformers.models.llama.modeling_llama",
    "transformers.models.auto.modeling_auto",
    "transformers.generation.utils",
    "pyarrow.dataset",
    "pyarrow.parquet",
    "scipy.stats",
    "scipy.special",
    "datasets",
    "lm_eval.evaluator",
    "lm_eval.models.huggingface",
    "lm_eval.tasks",
    "peft",
    "matplotlib.pyplot",
    "pydantic.main",
    "pydantic.type_adapter",
    "pydantic.types",
    "pydantic.json_schema",
    "rich.console",
    "rich.progress",
    "yaml",
    "dvc.cli",
    "dvc.repo",
    "dvc.commands.repro",
    "dvc.commands.status",
)
STARTS = Path(__file__).with_name("starts")
PYTHON = """#!{python} -IS
import os, sys
sys.path.insert(0, {starts!r})
import sitecustomize
sitecustomize.forked(sys.argv[1:])
os.execv({python!r}, [{python!r}, *sys.argv[1:]])
"""
"""`sys.executable` of a forked process, beside the socket."""

FROZEN = (
    "CUDA_VISIBLE_DEVICES",
    "HF_DATASETS_OFFLINE",
    "HF_ENDPOINT",
    "HF_HOME",
    "HF_HUB_OFFLINE",
    "LD_",
    "OMP_NUM_THREADS",
)
"""Beginnings of the variables that are read when a library is loaded."""


def folder() -> Path:
    """Make the folder of a session's server, which ends with this process, and name it to later
    processes."""
    found = Path(tempfile.mkdtemp(prefix="blockpruner-fork-", suffix=f"-{os.getpid()}"))
    os.environ[VARIABLE] = str(found / "socket")
    return found


def ready() -> None:
    """Have a server, which starts later processes."""
    if sys.platform != "linux" or VARIABLE not in os.environ:
        return
    place = Path(os.environ[VARIABLE])
    with open(place.with_suffix(".lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if place.exists():
            return
        python = place.with_name("python")
        python.write_text(PYTHON.format(python=sys.executable, starts=str(STARTS)))
        python.chmod(0o755)
        environment = os.environ | {"JE_ARROW_MALLOC_CONF": "background_thread:false"}
        models = [name for name in sys.modules if name.startswith("transformers.models.")]
        command = [sys.executable, __file__, str(place), *models]
        with open(place.with_suffix(".log"), "w") as log:
            streams: dict[str, Any] = {"stdin": subprocess.DEVNULL, "stdout": log, "stderr": log}
            server = subprocess.Popen(command, env=environment, **streams)
        while not place.exists():
            assert server.poll() is None, place.with_suffix(".log").read_text()
            time.sleep(0.05)


@contextlib.contextmanager
def true_starts() -> Iterator[None]:
    """Within, processes start as usual."""
    place = os.environ.pop(VARIABLE, None)
    try:
        yield
    finally:
        if place is not None:
            os.environ[VARIABLE] = place


def frozen(environment: dict[str, str]) -> dict[str, str]:
    """Variables that a forked process cannot have otherwise than the server."""
    return {key: value for key, value in environment.items() if key.startswith(FROZEN)}


def serve(place: Path, variables: dict[str, str]) -> dict[str, Any]:
    """Fork a child for every process that connects, until the process that made the socket's folder
    is gone.

    Returns:
        The job, in a child. Its streams are those of the process that connected.
    """
    owner = int(place.parent.name.rpartition("-")[2])
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for the keepers
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    listener.bind(str(place.with_suffix(".new")))
    listener.listen(64)
    listener.settimeout(1)
    place.with_suffix(".new").rename(place)
    while place.exists() and Path(f"/proc/{owner}").exists():
        try:
            connection, _ = listener.accept()
        except TimeoutError:
            continue
        message, streams, *_ = socket.recv_fds(connection, 1 << 18, 3)
        job = json.loads(message)
        if frozen(job["environment"]) == variables and os.fork() == 0:
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            listener.close()
            if child := os.fork():
                keep(child, connection)
            connection.close()
            for number, stream in enumerate(streams):
                os.dup2(stream, number)
            os.closerange(3, 1024)
            return job
        connection.close()
        for stream in streams:
            os.close(stream)
    os._exit(0)


def keep(child: int, connection: socket.socket) -> NoReturn:
    """Pass signals on to a child, kill it when the process that asked for it was killed, and report
    its end."""
    with contextlib.suppress(PermissionError):  # it did so itself
        os.setpgid(child, child)
    handle = os.pidfd_open(child)
    connection.send(b"started")
    while handle not in select.select([connection, handle], [], [])[0]:
        received = b""
        with contextlib.suppress(ConnectionError):
            received = connection.recv(1)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child, received[0] if received else signal.SIGKILL)
        if not received:
            break
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    with contextlib.suppress(BrokenPipeError):
        connection.send(str(code).encode())
    os._exit(0)


def work(job: dict[str, Any], path: list[str]) -> NoReturn:
    """Become the process that was asked for.

    Args:
        path: where Python finds installed packages.
    """
    # a signal for the group of the process that asked reaches that process, which passes it on
    os.setpgid(0, 0)
    os.fsync = lambda descriptor: None  # a killed process loses no page that it has written
    signal.signal(signal.SIGINT, signal.default_int_handler if job["interrupt"] else signal.SIG_IGN)
    os.getppid = lambda: job["parent"]
    os.chdir(job["folder"])
    os.environ.clear()
    os.environ.update(job["environment"])
    sys.executable = str(Path(sys.argv[1]).with_name("python"))
    sys.argv = ["", *job["arguments"]]
    if "module" in job:
        added = os.environ.get("PYTHONPATH", "").split(os.pathsep)
        path = [job["folder"], *(str(Path(each).absolute()) for each in added if each), *path]
    sys.path[:] = path
    now = job["unbuffered"]
    sys.stdin = open(0, closefd=False)  # noqa: SIM115
    sys.stdout = open(1, "w", closefd=False)  # noqa: SIM115
    sys.stdout.reconfigure(write_through=now, line_buffering=now)
    sys.stderr = open(2, "w", buffering=1, errors="backslashreplace", closefd=False)  # noqa: SIM115
    import numpy as np
    import transformers.dynamic_module_utils

    transformers.dynamic_module_utils.HF_MODULES_CACHE = os.environ["HF_MODULES_CACHE"]
    random.seed()
    np.random.seed()
    code = 1
    try:
        if "module" in job:
            runpy.run_module(job["module"], run_name="__main__", alter_sys=True)
        else:
            sys.argv[0] = job["script"]
            runpy.run_path(job["script"], run_name="__main__")
        code = 0
    except SystemExit as end:
        if isinstance(end.code, int) or end.code is None:
            code = end.code or 0
        else:
            print(end.code, file=sys.stderr)
    except BaseException as error:
        sys.excepthook(*sys.exc_info())
        code = -signal.SIGINT if isinstance(error, KeyboardInterrupt) else 1
    threading._shutdown()
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    if code < 0:
        signal.signal(-code, signal.SIG_DFL)
        os.kill(os.getpid(), -code)
    os._exit(code)


if __name__ == "__main__":
    path = [each for each in sys.path[1:] if each != str(STARTS)]
    variables = frozen(dict(os.environ))  # some libraries set theirs
    for name in (*LOADED, *sys.argv[2:]):
        importlib.import_module(name)
    # keeps the file of every module, for which pydantic asks
    inspect.getmodule(sys._getframe(), "absent")
    assert len([*Path("/proc/self/task").iterdir()]) == 1, (
        "a process of several threads cannot be forked"
    )
    gc.collect()
    gc.freeze()
    work(serve(Path(sys.argv[1]), variables), path)
