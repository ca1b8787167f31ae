"""Locks that name their holder.

filelock holds a file beside the one with the name. The kernel frees it when the last process that
has it open ends, so no lock is ever stale, and none of these files is deleted.
"""

import os
import socket
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

from blockpruner.core.errors import InputError
from blockpruner.store.files import make_folder, writing

WORKSPACE = Path(".dvc/tmp/flow.lock")
"""Held by a flow, which changes params.yaml."""


def this_process() -> str:
    """The name of this process, with the machine: several machines may share a store."""
    return f"process {os.getpid()} on {socket.gethostname()}"


@contextmanager
def hold(path: Path, holder: str, busy: Callable[[str], object]) -> Iterator[int]:
    """Hold a lock, and write its holder's name to the file at `path`; yields the lock's file
    descriptor, which a child process may hold, too. If another process holds the lock, `busy` is
    called with its name; if it returns, this call waits for the lock. Raises StorageError if the
    file cannot be written or locked."""
    # A soft lock would outlive a kill.
    lock = FileLock(path.with_name(f"{path.name}.held"), fallback_to_soft=False)
    with writing(path, alone=True):
        make_folder(path.parent)
        with suppress(Timeout):
            lock.acquire(blocking=False)
    if not lock.is_locked:
        # The holder may be about to write its name.
        name = ""
        if path.exists():
            name = path.read_text(encoding="utf-8").strip()
        busy(name or "another process")
        with writing(path, alone=True):
            lock.acquire()
    try:
        with writing(path, alone=True):
            path.write_text(f"{holder}\n", encoding="utf-8")
        yield lock._context.lock_file_fd or -1
    finally:
        lock.release()


def workspace(holder: str) -> AbstractContextManager[int]:
    """Hold WORKSPACE; raises InputError if another process holds it, which is named."""
    return hold(WORKSPACE, holder, _refuse)


def _refuse(holder: str) -> None:
    raise InputError(
        f"this workspace is in use by {holder}; wait for it or stop it, or use another clone: one"
        " flow at a time changes params.yaml, dvc.lock and data/",
        rule="workspace-busy",
    )
