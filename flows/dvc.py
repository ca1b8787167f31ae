"""DVC as a flow uses it: in a locked workspace, in a process group of its own, never left behind.

Decides how a dvc command is started, followed and stopped, and how dvc.lock is written. Which
stages run, and when, is decided by flows.selection and flows.prune.

`python -m flows.dvc ARGUMENTS` is dvc itself, which writes dvc.lock whole, with two signals set up,
see `main`.
"""

import ctypes
import io
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from blockpruner.core.errors import InputError
from blockpruner.store.files import write_text

GRACE = 10.0
"""Seconds from SIGINT to SIGKILL. Prefect's runner gives the flow itself 30 s."""

FLOW_VARIABLE = "BLOCKPRUNER_DVC_PARENT"
"""Environment variable of a dvc: the process id of the flow that started it."""

PR_SET_PDEATHSIG = 1
REASON = re.compile(r"error in stage [^:]*: (.*)")
"""The line in which `stages.run` names what the user can correct."""

COLOURS = re.compile(r"\x1b\[[0-9;]*m")


class StageError(RuntimeError):
    """A stage failed, or dvc itself; the output names the reason."""


def read_pipeline() -> dict[str, tuple[str, ...]]:
    """DVC's names of all stages, each behind those that it depends on, with the names of these."""
    import networkx
    from dvc.repo import Repo

    with Repo() as repo:
        graph = repo.index.graph
        pipeline = dict[str, tuple[str, ...]]()
        # An edge leads from a stage to one that it depends on.
        for stage in networkx.dfs_postorder_nodes(graph):
            dependencies = graph.successors(stage)
            pipeline[stage.addressing] = tuple(needed.addressing for needed in dependencies)
        return pipeline


def stale(stages: Sequence[str]) -> frozenset[str]:
    """Those of the stages whose inputs, command or outputs have changed, by one `dvc status`."""
    from dvc.exceptions import DvcException
    from dvc.repo import Repo

    try:
        with Repo() as repo:
            return frozenset(repo.status(targets=list(stages)))
    except DvcException as error:
        raise StageError(f"dvc status failed: {error}") from error


def repro(
    stage: str,
    lock: int,
    show: Callable[[str], object],
    environment: Mapping[str, str] | None = None,
) -> bool:
    """Run `dvc repro --single-item` on one stage; False if nothing changed, True if it ran or has
    earlier outputs back.

    Args:
        lock: the workspace's. dvc holds it, too: after a killed flow, its last stage ends before a
            new flow.
        show: gets every line of output once, as it comes.
    """
    code, lines = _follow(["repro", "--single-item", stage], lock, show, environment or {})
    if code != 0:
        raise StageError(f"stage {stage} failed{_reason(lines, code)}")
    starts = (f"Running stage '{stage}'", f"Stage '{stage}' is cached")
    return any(line.startswith(starts) for line in lines)


def _reason(lines: Sequence[str], code: int) -> str:
    """Why a stage failed, by its last output that names a reason."""
    for line in reversed(lines):
        match = REASON.match(line)
        if match:
            return f": {match[1]}"
    return f" (dvc ended with {code}); its output names the reason"


def require_remotes(push: str | None, share: str | None) -> None:
    """Refuse remotes that are not there; None is none. Raises InputError."""
    from dvc.repo import Repo

    with Repo() as repo:
        dvc_remotes = sorted(repo.config["remote"])
    if push is not None and push not in dvc_remotes:
        raise InputError(
            f"push {push!r} is no remote of DVC; existing: {', '.join(dvc_remotes) or 'none'};"
            " `dvc remote add` adds one",
            rule="no-remote",
            key="push",
            value=push,
        )
    if share is None:
        return
    command = ["git", "ls-remote", "--heads", share]
    answer = subprocess.run(command, capture_output=True, check=False)
    if answer.returncode != 0:
        raise InputError(
            f"share {share!r} is no remote of Git that answers; see `git remote -v`",
            rule="no-remote",
            key="share",
            value=share,
        )


def push(remote: str, stages: Sequence[str], lock: int, show: Callable[[str], object]) -> None:
    """Run `dvc push` of what the stages have made; arguments as those of `repro`."""
    _send(
        ["push", "--remote", remote, *stages],
        f"push to the remote {remote!r}",
        lock,
        show,
        hint=f"; `dvc push -r {remote}` tries it again",
    )


def share(
    remote: str,
    name: str,
    to: str | None,
    stages: Sequence[str],
    lock: int,
    show: Callable[[str], object],
) -> None:
    """Save settings and results as an experiment of DVC, and send it with the files that its
    dvc.lock names.

    Args:
        remote: of Git; gets the experiment's commit.
        name: the experiment's; one of this name is replaced.
        to: the remote of DVC that gets the files; None: the default one.
        stages: what has run. DVC records these alone, so nothing that is stale passes for current.
    """
    save = ["exp", "save", "--force", "--name", name]
    for path in _untracked_results():
        save += ["--include-untracked", path]
    send = ["exp", "push", "--force"]
    if to:
        send += ["--remote", to]
    action = f"share by the remote {remote!r}"
    _send([*save, *stages], action, lock, show)
    _send([*send, remote, name], action, lock, show)


def _untracked_results() -> list[str]:
    """Results, run files and studies that Git does not know yet. Its other new files stay here."""
    command = ["git", "ls-files", "-z", "--others", "--exclude-standard", "data", "runs", "studies"]
    output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return output.split("\0")[:-1]


def _send(
    arguments: Sequence[str], action: str, lock: int, show: Callable[[str], object], hint: str = ""
) -> None:
    code, lines = _follow(arguments, lock, show, {})
    if code != 0:
        errors = [line for line in lines if "ERROR" in line]
        reason = errors[-1] if errors else f"dvc ended with {code}"
        raise StageError(f"{action} failed: {COLOURS.sub('', reason)}{hint}")


def _follow(
    arguments: Sequence[str],
    lock: int,
    show: Callable[[str], object],
    environment: Mapping[str, str],
) -> tuple[int, list[str]]:
    """Exit status and output of a dvc command, which is stopped when this process is
    interrupted."""
    # Stages call `python`, which has to be the one of this environment.
    folders = [str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)]
    variables = {
        **os.environ,
        **environment,
        "PATH": os.pathsep.join(folders),
        "PYTHONUNBUFFERED": "1",
        FLOW_VARIABLE: str(os.getpid()),
    }
    process = subprocess.Popen(
        [sys.executable, "-m", "flows.dvc", *arguments],
        env=variables,
        start_new_session=True,
        pass_fds=(lock,),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
    )
    lines: list[str] = []
    try:
        assert process.stdout is not None
        for line in process.stdout:
            line = line.rstrip()
            if line:
                lines.append(line)
                show(line)
        return process.wait(), lines
    except BaseException:  # a cancelled flow or Ctrl-C: only this process got the signal
        stop(process, lambda: os.killpg(process.pid, signal.SIGINT), GRACE)
        raise


def stop(process: subprocess.Popen[Any], interrupt: Callable[[], object], grace: float) -> None:
    """Interrupt a process, and kill what is left of its group after so many seconds, or a second
    interruption."""
    try:
        with suppress(ProcessLookupError, subprocess.TimeoutExpired):
            interrupt()
            process.wait(grace)
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def dump_whole(
    path: str, data: Any, dumper: Callable[..., object], fs: object = None, **options: Any
) -> None:
    """Write a file of dvc as `dvc.utils.serialize` does, but a kill leaves the old file or the new
    one.

    dvc itself writes in place; most beginnings of a dvc.lock are valid, so stages would vanish from
    it unseen.
    """
    text = io.StringIO()
    dumper(data, text, **options)
    write_text(Path(path), text.getvalue())


def end_with(parent: int) -> None:
    """Get SIGTERM when the parent ends, or now if it has ended before this call."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
        if os.getppid() != parent:
            os.kill(os.getpid(), signal.SIGTERM)


def main() -> int | None:
    """Run dvc, which interrupts its process group on SIGTERM, and gets SIGTERM when the flow ends.

    On its own, dvc ends by SIGTERM and leaves its stage running. SIGINT to the group ends the
    stage, and dvc reports it as failed. SIGINT is reset because children of `nohup` and `&` inherit
    it as ignored.
    """
    parent = os.environ.get(FLOW_VARIABLE)
    if parent:
        end_with(int(parent))
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, lambda *_: os.killpg(0, signal.SIGINT))
    from dvc.cli import main as dvc  # after the signals: it takes a while
    from dvc.utils.serialize import _common, _yaml

    _common._dump_data = _yaml._dump_data = dump_whole
    result: int | None = dvc(sys.argv[1:])
    return result


if __name__ == "__main__":
    sys.exit(main())
