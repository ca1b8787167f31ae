"""Lock files that name their holder.

The kernel frees a lock when the last process that has the file open ends: no lock is ever stale, and no lock file is
deleted. The file names the current holder. After a handover it may name the holder before for a moment.
"""

from __future__ import annotations

import fcntl
import os
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from blockpruner.store.files import make_folder, storage_error

WORKSPACE = Path(".dvc/tmp/flow.lock")
"""Held by a flow, which changes params.yaml, and by `stages.clean`, which deletes outputs."""


def this_process() -> str:
    """This process in words; other machines may share a store."""
    return f"process {os.getpid()} on {socket.gethostname()}"


@contextmanager
def hold(path: Path, holder: str, busy: Callable[[str], object]) -> Iterator[int]:
    """Hold a lock file under a name; gives its file descriptor, which a child process may hold, too.

    Args:
        busy: called with the holder's name if the lock is held. If it returns, this call waits for the lock.

    Raises:
        StorageError: the file cannot be written or locked.
    """
    with _storage(path):
        make_folder(path.parent)
        file = open(path, "ab", buffering=0)  # noqa: SIM115 (closed below, which then has nothing left to write)
    with file:
        with _storage(path):
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                is_mine = True
            except BlockingIOError:
                is_mine = False
        if not is_mine:
            busy(_holder(path))
        with _storage(path):
            fcntl.flock(file, fcntl.LOCK_EX)
            file.truncate(0)
            file.write(f"{holder}\n".encode())
            os.fsync(file.fileno())  # for readers on other machines
        yield file.fileno()


def _holder(path: Path) -> str:
    """The name in a lock file; a name without an end is being written."""
    for _ in range(10):
        name = path.read_text(encoding="utf-8")
        if name.endswith("\n"):
            return name.strip()
        time.sleep(0.05)
    return "another process"


@contextmanager
def _storage(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise storage_error(path, error) from error
