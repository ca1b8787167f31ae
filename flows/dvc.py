"""Running dvc: in a locked workspace, in a process group of its own, never left behind.

Decides how a dvc command is started, followed and stopped, and how dvc.lock survives a kill in the middle of
its being written. Which stages run, and when, is decided by flows.selection and flows.prune.

`python -m flows.dvc ARGUMENTS` is dvc itself with two signals set up, see `main`.
"""

from __future__ import annotations

import ctypes
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import yaml
from dvc.lock import Lock, LockError

from blockpruner.core.errors import InputError
from blockpruner.store.files import set_aside, write_text
from blockpruner.store.locks import hold

GRACE = 10.0
"""Seconds from SIGINT to SIGKILL: with the 2 s that Prefect's runner may need to hear of it, a cancelled flow's device
work ends within 15. The runner gives the flow itself 30."""

PARENT = "BLOCKPRUNER_DVC_PARENT"
PR_SET_PDEATHSIG = 1
LOCKFILES, SNAPSHOTS, WORKSPACE_LOCK = (
    (Path("dvc.lock"), Path("runs/dvc.lock")),
    Path(".dvc/tmp"),
    Path(".dvc/tmp/flow.lock"),
)
DVC_LOCK, READERS = Path(".dvc/tmp/lock"), Path(".dvc/tmp/rwlock")

SAID = re.compile(r"error in stage [^:]*: (.*)")
"""The line in which `stages.run` says what the user can correct."""


class StageError(RuntimeError):
    """A stage failed and has printed why; reason: its line for users, "" where it ended in another way."""

    def __init__(self, message: str, reason: str = "") -> None:
        super().__init__(message)
        self.reason = reason


@contextmanager
def workspace(holder: str) -> Iterator[int]:
    """Lock the workspace in the current folder for one flow; gives the lock's file descriptor.

    Raises:
        InputError: another flow holds it, or a dvc of somebody's works in it; says which.
    """
    with hold(WORKSPACE_LOCK, holder, _refuse) as lock:
        _require_no_writer()
        yield lock


def _refuse(holder: str) -> None:
    raise InputError(
        f"this workspace is in use by {holder}; wait for it or stop it, or use another clone: one flow at a time "
        "changes params.yaml, dvc.lock and data/"
    )


def _require_no_writer() -> None:
    """Refuse beside a plain dvc that runs stages: it reads params.yaml when a stage ends, and would write into
    dvc.lock that the stage had used what a flow has changed meanwhile. It holds its lock but while a stage runs, and
    then is named in the other file."""
    try:
        with Lock(str(DVC_LOCK)), suppress(FileNotFoundError, json.JSONDecodeError):  # a cut one is set aside later
            for path, writer in json.loads(READERS.read_text(encoding="utf-8")).get("write", {}).items():
                if _alive(writer["pid"]):
                    raise InputError(
                        f"this workspace is in use by process {writer['pid']} ({writer['cmd']}), which writes {path}; "
                        f"wait for it or stop it; if there is no such process, remove {READERS}"
                    )
    except LockError:  # dvc itself waits no longer for another
        holder = DVC_LOCK.read_text(encoding="utf-8").strip()
        raise InputError(
            f"this workspace is in use by a dvc command, process {holder}; wait for it or stop it"
        ) from None


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # another user's
        return True
    return True


def repro(
    stage: str,
    lock: int,
    show: Callable[[str], object],
    environment: Mapping[str, str] | None = None,
    again: bool = False,
) -> bool:
    """Run `dvc repro --single-item` on one stage; True if its command ran, False if nothing had changed.

    Args:
        lock: what `workspace` gave; dvc holds it too, so that a killed flow's last stage ends before a new flow.
        show: gets every line of output once, as it comes.
        environment: added to this process's.
        again: whether the command runs even if nothing has changed.

    Raises:
        StageError: the stage failed; `show` has seen all that it said.
    """
    force = ["--force"] if again else []
    command = [sys.executable, "-m", "flows.dvc", "repro", "--single-item", *force, stage]
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])
    env = {**os.environ, **(environment or {}), "PATH": path, "PYTHONUNBUFFERED": "1", PARENT: str(os.getpid())}
    ran, reason = False, ""
    with _lockfiles(show):
        process = subprocess.Popen(
            command,
            env=env,
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
                ran = ran or line.startswith(f"Running stage '{stage}'")
                if said := SAID.match(line):
                    reason = said[1]
                if line.strip():
                    show(line.rstrip())
            code = process.wait()
        except BaseException:  # a cancelled flow, Ctrl-C: this process is told, the stage is not
            _stop(process)
            raise
    if code != 0:
        why = f": {reason}" if reason else f" (dvc ended with {code}); its output says why"
        raise StageError(f"stage {stage} failed{why}", reason)
    return ran


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
    """Those of the stages whose inputs, command or outputs are not what dvc last saw, by one `dvc status`.

    A stage behind one of them may have to run, too, which is known only when that has run.
    """
    with _lockfiles(show):
        command = [sys.executable, "-m", "dvc", "status", "--json", *stages]
        result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode != 0:
        raise StageError(f"dvc status failed: {result.stderr.strip() or result.stdout.strip()}")
    return frozenset(json.loads(result.stdout)) & frozenset(stages)


@contextmanager
def _lockfiles(show: Callable[[str], object]) -> Iterator[None]:
    """Repair dvc.lock files before and after a command: dvc writes them in place, and cannot read an empty one."""
    _repair(show)
    for path in LOCKFILES:
        if path.exists():
            for old in SNAPSHOTS.glob(f"{_snapshots(path)}*"):
                old.unlink()
            shutil.copyfile(path, _snapshot(path))
    try:
        yield
    finally:
        _repair(show)


def _snapshots(path: Path) -> str:
    return f"flow.{'.'.join(path.parts)}"


def _snapshot(path: Path) -> Path:
    """Named after what is committed of the file: after a commit or a pull, that is newer than any snapshot before."""
    found = subprocess.run(["git", "rev-parse", "-q", "--verify", f"HEAD:./{path}"], capture_output=True, text=True)
    return SNAPSHOTS / f"{_snapshots(path)}.{found.stdout.strip() or 'new'}"


def _repair(show: Callable[[str], object]) -> None:
    """Bring an empty or truncated dvc.lock back from the last snapshot, or else from the last commit.

    dvc's own list of who reads and writes what is set aside where it is cut short: it is of processes, and this
    flow's are the only ones.
    """
    if READERS.exists() and not _whole(READERS):
        show(f"{READERS} was cut short by a kill; set aside as {set_aside(READERS)}")
    for path in LOCKFILES:
        if not path.exists() or _whole(path):
            continue
        bad, snapshot = set_aside(path), _snapshot(path)
        if snapshot.exists() and _whole(snapshot):
            shutil.copyfile(snapshot, path)
            show(f"{path} was cut short by a kill; restored from the flow's snapshot (the cut one is {bad})")
            continue
        committed = subprocess.run(["git", "show", f"HEAD:./{path}"], capture_output=True, text=True)
        if committed.returncode == 0:
            write_text(path, committed.stdout)
        origin = "restored from the last commit" if committed.returncode == 0 else "dvc starts a new one"
        show(f"{path} was cut short by a kill; {origin} (the cut one is {bad})")


def _whole(path: Path) -> bool:
    try:
        return isinstance(yaml.load(path.read_text(encoding="utf-8"), Loader=yaml.CSafeLoader), dict)
    except (yaml.YAMLError, UnicodeDecodeError):
        return False


def main() -> int | None:
    """dvc, which interrupts its process group on SIGTERM, and gets SIGTERM when the flow dies.

    On its own, dvc dies of SIGTERM and leaves its stage running. A group SIGINT ends the stage (dvc itself
    ignores SIGINT while a stage runs, then reports the stage as failed). SIGINT is reset because the children
    of `nohup` and `&` inherit it as ignored, and the stage would, too.
    """
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, lambda *_: os.killpg(0, signal.SIGINT))
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
        if os.getppid() != int(os.environ[PARENT]):
            return 1  # the flow died before the line above
    from dvc.cli import main as dvc  # after the signals: it takes a while

    result: int | None = dvc(sys.argv[1:])
    return result


if __name__ == "__main__":
    sys.exit(main())
