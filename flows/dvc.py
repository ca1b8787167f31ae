"""Running dvc: in a locked workspace, in a process group of its own, never left behind.

Decides how a dvc command is started, followed and stopped, and how dvc.lock survives a kill in the middle of a write.
Which stages run, and when, is decided by flows.selection and flows.prune.

`python -m flows.dvc ARGUMENTS` is dvc itself with two signals set up, see `main`.
"""

from __future__ import annotations

import ctypes
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import yaml
from dvc.config import Config
from dvc.fs import localfs
from dvc.lock import Lock, LockError
from dvc.rwlock import RWLockFileCorruptedError, rwlock

from blockpruner.core.errors import InputError
from blockpruner.store.files import WINDOWS, set_aside, write_text
from blockpruner.store.locks import WORKSPACE, hold

GRACE = 10.0
"""Seconds from SIGINT to SIGKILL. Prefect's runner may take 2 s to hear of a cancellation; a cancelled flow's work on
the device then ends within 15 s. The runner gives the flow itself 30 s."""

FLOW_VARIABLE = "BLOCKPRUNER_DVC_PARENT"
"""Environment variable of a dvc: the process id of the flow that started it."""

PR_SET_PDEATHSIG = 1
TEMPORARY = Path(".dvc/tmp")
LOCKFILES = (Path("dvc.lock"),)
READERS = TEMPORARY / "rwlock"
"""dvc's list of the processes that read and write outputs."""

REASON = re.compile(r"error in stage [^:]*: (.*)")
"""The line in which `stages.run` names what the user can correct."""


class StageError(RuntimeError):
    """A stage failed; its output names the reason."""

    def __init__(self, message: str, reason: str = "") -> None:
        super().__init__(message)
        self.reason = reason
        """The stage's line for users, or "" if the stage ended without one."""


@contextmanager
def workspace(holder: str) -> Iterator[int]:
    """Lock the workspace in the current folder for one flow; gives the lock's file descriptor.

    Raises:
        InputError: another flow holds it, or somebody's dvc works in it; names the process. Or this is Windows.
    """
    require_posix()
    with hold(WORKSPACE, holder, _refuse) as lock:
        _require_no_dvc()
        yield lock


def require_posix() -> None:
    """Refuse Windows, which has no process groups and no files that a child inherits; raises InputError."""
    if WINDOWS:
        raise InputError("flows need Linux or macOS; here run the same stages with `dvc repro`")


def _refuse(holder: str) -> None:
    raise InputError(
        f"this workspace is in use by {holder}; wait for it or stop it, or use another clone: one flow at a time "
        "changes params.yaml, dvc.lock and data/"
    )


def _require_no_dvc() -> None:
    """Refuse while a plain dvc runs a stage that depends on params.yaml, which the flow may change.

    Takes dvc's own locks for a moment: that of the project, and that of params.yaml.
    """
    try:
        params = [str(Path("params.yaml").resolve())]
        with (
            suppress(RWLockFileCorruptedError),  # `_mend` sets it aside
            Lock(str(TEMPORARY / "lock")),
            rwlock(str(TEMPORARY), localfs, "a flow", [], params, False),
        ):
            pass
    except LockError as error:
        raise InputError(f"this workspace is in use by a dvc command; wait for it or stop it: {error}") from None


def repro(
    stage: str,
    lock: int,
    show: Callable[[str], object],
    environment: Mapping[str, str] | None = None,
    again: bool = False,
) -> bool:
    """Run `dvc repro --single-item` on one stage; True if its command ran, False if nothing had changed.

    Args:
        lock: what `workspace` gave. dvc holds it, too: after a killed flow, its last stage ends before a new flow.
        show: gets every line of output once, as it comes.
        environment: added to this process's.
        again: whether the command runs even if nothing has changed.

    Raises:
        StageError: the stage failed; `show` has all its output.
    """
    force = ["--force"] if again else []
    ran, reason = False, ""

    def read(line: str) -> None:
        nonlocal ran, reason
        ran = ran or line.startswith(f"Running stage '{stage}'")
        if found := REASON.match(line):
            reason = found[1]
        show(line)

    code = _follow(["repro", "--single-item", *force, stage], lock, read, environment)
    if code != 0:
        why = f": {reason}" if reason else f" (dvc ended with {code}); its output names the reason"
        raise StageError(f"stage {stage} failed{why}", reason)
    return ran


def require_remote(name: str) -> None:
    """Refuse a remote that DVC's config does not have; raises InputError with those that it has."""
    known = Config.from_cwd()["remote"]
    if name not in known:
        raise InputError(
            f"push: DVC has no remote {name!r}; valid: {', '.join(known) or 'none'} (one more: `dvc remote add`)"
        )


def push(remote: str, stages: Sequence[str], lock: int, show: Callable[[str], object]) -> None:
    """Run `dvc push` of what the stages have made; arguments as those of `repro`.

    Raises:
        StageError: it failed; names what DVC said, and how to go on.
    """
    said: list[str] = []

    def read(line: str) -> None:
        said.append(line)
        show(line)

    code = _follow(["push", "--remote", remote, *stages], lock, read)
    if code != 0:
        errors = [line.removeprefix("ERROR: ") for line in said if line.startswith("ERROR: ")] or said[-1:]
        why = "; ".join(errors) or f"dvc ended with {code}"
        raise StageError(f"push to the remote {remote!r} failed: {why}; `dvc push -r {remote}` tries it again")


def _follow(
    arguments: Sequence[str],
    lock: int,
    show: Callable[[str], object],
    environment: Mapping[str, str] | None = None,
) -> int:
    """The exit status of a dvc command, which is stopped when this process is interrupted."""
    _mend(show)
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])
    process = subprocess.Popen(
        [sys.executable, "-m", "flows.dvc", *arguments],
        env={
            **os.environ,
            **(environment or {}),
            "PATH": path,
            "PYTHONUNBUFFERED": "1",
            FLOW_VARIABLE: str(os.getpid()),
        },
        start_new_session=True,
        pass_fds=(lock,),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
    )
    try:
        assert process.stdout is not None
        for line in process.stdout:
            if line.strip():
                show(line.rstrip())
        return process.wait()
    except BaseException:  # a cancelled flow or Ctrl-C: only this process got the signal
        _stop(process)
        raise


def _stop(process: subprocess.Popen[str]) -> None:
    """SIGINT to the whole group, then SIGKILL to what is left of it; a second interruption kills at once."""
    try:
        with suppress(ProcessLookupError, subprocess.TimeoutExpired):
            os.killpg(process.pid, signal.SIGINT)
            process.wait(GRACE)
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def stale(stages: Sequence[str], show: Callable[[str], object]) -> frozenset[str]:
    """Those of the stages whose inputs, command or outputs have changed, by one `dvc status`.

    A stage behind one of them may have to run, too; that is known only when the one before has run.
    """
    _mend(show)
    command = [sys.executable, "-m", "dvc", "status", "--json", *stages]
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode != 0:
        raise StageError(f"dvc status failed: {result.stderr.strip() or result.stdout.strip()}")
    return frozenset(json.loads(result.stdout)) & frozenset(stages)


def _mend(show: Callable[[str], object]) -> None:
    """Copy the files that dvc writes in place, or bring the copy back where a kill has cut one short.

    dvc does not start with such a file. Its list of readers needs no copy: it names processes, and none runs now.
    """
    if READERS.exists() and not _is_whole(READERS):
        show(f"{READERS} was cut short by a kill; set aside as {set_aside(READERS)}")
    for path in filter(Path.exists, LOCKFILES):
        copy = TEMPORARY / f"flow.{'.'.join(path.parts)}"
        if _is_whole(path):
            write_text(copy, path.read_text(encoding="utf-8"))
        elif copy.exists():
            bad = set_aside(path)
            write_text(path, copy.read_text(encoding="utf-8"))
            show(f"{path} was cut short by a kill; restored from the flow's copy (the cut one is {bad})")
        else:
            raise StageError(
                f"{path} was cut short by a kill; `git checkout {path}` brings the last committed one back"
            )


def _is_whole(path: Path) -> bool:
    try:
        return isinstance(yaml.load(path.read_text(encoding="utf-8"), Loader=yaml.CSafeLoader), dict)
    except (yaml.YAMLError, UnicodeDecodeError):
        return False


def end_with(parent: int) -> None:
    """Get SIGTERM when the parent ends, or now if it has ended before this call."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
        if os.getppid() != parent:
            os.kill(os.getpid(), signal.SIGTERM)


def main() -> int | None:
    """Run dvc, which interrupts its process group on SIGTERM, and gets SIGTERM when the flow ends.

    On its own, dvc ends by SIGTERM and leaves its stage running. SIGINT to the group ends the stage; dvc itself ignores
    it while a stage runs, then reports the stage as failed. SIGINT is reset because children of `nohup` and `&` inherit
    it as ignored, and the stage would, too.
    """
    end_with(int(os.environ[FLOW_VARIABLE]))
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, lambda *_: os.killpg(0, signal.SIGINT))
    from dvc.cli import main as dvc  # after the signals: it takes a while

    result: int | None = dvc(sys.argv[1:])
    return result


if __name__ == "__main__":
    sys.exit(main())
