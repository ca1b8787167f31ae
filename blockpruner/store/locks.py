"""Lock files that name their holder.

The kernel frees a lock when the last process that has the file open ends: no lock is ever stale, and no lock file is
deleted. The file names the current holder. After a handover it may name the holder before for a moment.

Windows has no such locks. There filelock's holds a file beside the one with the name, and a child process cannot hold
it, too.
"""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import IO, Any

from blockpruner.store.files import make_folder, storage_error

try:
    import fcntl
except ModuleNotFoundError:  # Windows
    fcntl = None  # type: ignore[assignment]

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
    with file, ExitStack() as held:
        take = partial(_take, file) if fcntl else partial(_take_beside, held.enter_context(_beside(path)))
        with _storage(path):
            is_mine = take(wait=False)
        if not is_mine:
            busy(_holder(path))
        with _storage(path):
            take(wait=True)
            file.truncate(0)
            file.write(f"{holder}\n".encode())
            os.fsync(file.fileno())  # for readers on other machines
        yield file.fileno()


def _take(file: IO[bytes], wait: bool) -> bool:
    """Whether the file is locked by this call or one before; it frees itself when the file is closed."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        return False
    return True


@contextmanager
def _beside(path: Path) -> Iterator[Any]:
    """filelock's lock of a file beside; at the end it is free, however often it was taken."""
    from filelock import FileLock

    lock = FileLock(path.with_name(f"{path.name}.held"))
    try:
        yield lock
    finally:
        lock.release(force=True)


def _take_beside(lock: Any, wait: bool) -> bool:
    from filelock import Timeout

    try:
        lock.acquire(blocking=wait)
    except Timeout:
        return False
    return True


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
