"""Lock files that say who holds them.

The kernel frees a lock with the last process that has the file open: none is stale, and none is deleted. While a lock
is held, the name in the file is the holder's, but for the moment in which one that waited gets it.
"""

from __future__ import annotations

import fcntl
import os
import socket
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import IO, Any

from blockpruner.store.files import storage_error


def this_process() -> str:
    return f"{os.getpid()} on {socket.gethostname()}"  # a store may be shared with other machines


@contextmanager
def hold(path: Path, holder: str, busy: Callable[[str], object]) -> Iterator[int]:
    """Hold a lock file under a name; gives its file descriptor, which a child process may hold, too.

    Args:
        busy: told the name of whoever holds it, if it is held; waits for the lock after that, unless it raises.

    Raises:
        StorageError: the file cannot be written or locked.
    """
    naming = path.with_name(f"{path.name}.naming")  # locked from getting the lock to writing the name, or to reading it
    with ExitStack() as stack:
        with _storage(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            file, name = (stack.enter_context(open(p, "a", encoding="utf-8")) for p in (path, naming))
            fcntl.flock(name, fcntl.LOCK_EX)
            other = None if _is_free(file) else path.read_text(encoding="utf-8")  # opened anew: NFS caches the old one
        if other is not None:
            fcntl.flock(name, fcntl.LOCK_UN)
            busy(other)
        with _storage(path):
            if other is not None:
                fcntl.flock(file, fcntl.LOCK_EX)
                fcntl.flock(name, fcntl.LOCK_EX)
            file.truncate(0)
            file.write(holder)
            file.flush()
            os.fsync(file.fileno())  # for readers on other machines
            fcntl.flock(name, fcntl.LOCK_UN)
        yield file.fileno()


def _is_free(file: IO[Any]) -> bool:
    """Whether nobody had the lock, which is this process's then."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


@contextmanager
def _storage(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise storage_error(path, error) from error
