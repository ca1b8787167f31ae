"""Locks that name their holder.

`flock` holds a file beside the one with the name. The kernel frees it when the last process that has it open ends: no
lock is ever stale, and no lock file is deleted.
"""

from __future__ import annotations

import fcntl
import os
import socket
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path

from blockpruner.core.errors import InputError
from blockpruner.store.files import make_folder, writing

WORKSPACE = Path(".dvc/tmp/flow.lock")
"""Held by a flow, which changes params.yaml, and by `stages.clean`, which deletes outputs."""


def this_process() -> str:
    """This process in words; other machines may share a store."""
    return f"process {os.getpid()} on {socket.gethostname()}"


@contextmanager
def hold(path: Path, holder: str, busy: Callable[[str], object]) -> Iterator[int]:
    """Hold a lock under a name; gives its file descriptor, which a child process may hold, too.

    Args:
        path: the file with the holder's name.
        busy: called with the holder's name if the lock is held. If it returns, this call waits for the lock.

    Raises:
        StorageError: the file cannot be written or locked.
    """
    with writing(path, alone=True):
        make_folder(path.parent)
        lock = open(path.with_name(f"{path.name}.held"), "a")  # noqa: SIM115
    with lock:
        is_free = False
        with writing(path, alone=True), suppress(BlockingIOError):
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            is_free = True
        if not is_free:
            busy(_holder(path))
        try:
            with writing(path, alone=True):
                fcntl.flock(lock, fcntl.LOCK_EX)
                path.write_text(f"{holder}\n", encoding="utf-8")
            yield lock.fileno()
        finally:
            fcntl.flock(lock, fcntl.LOCK_UN)  # also for a child that holds it


def workspace(holder: str) -> AbstractContextManager[int]:
    """Hold WORKSPACE; raises InputError if another process holds it, which is named."""
    return hold(WORKSPACE, holder, _refuse)


def _refuse(holder: str) -> None:
    raise InputError(
        f"this workspace is in use by {holder}; wait for it or stop it, or use another clone: one flow at a time "
        "changes params.yaml, dvc.lock and data/",
        rule="workspace-busy",
    )


def _holder(path: Path) -> str:
    """The name in the file; whoever has just taken the lock may not have written it yet."""
    try:
        return path.read_text(encoding="utf-8").strip() or "another process"
    except FileNotFoundError:
        return "another process"
