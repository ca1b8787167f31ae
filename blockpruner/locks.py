"""Lock files that say who holds them, for one process or machine at a time.

The kernel frees a lock with the last process that has the file open: none is stale, and none is deleted. A name in the
file may be of a holder that was killed; while the lock is held it is the holder's.
"""

from __future__ import annotations

import fcntl
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO


@contextmanager
def hold(path: Path, holder: str, busy: Callable[[str], object]) -> Iterator[TextIO]:
    """Hold a lock file under a name; gives the open file, whose descriptor a child may hold, too.

    Args:
        busy: told the name of whoever holds it, if it is held; waits for the lock after that, unless it raises.

    Raises:
        OSError: the file cannot be opened for writing.
    """
    naming = path.with_name(f"{path.name}.naming")  # held from getting the lock to writing the name, or to reading it
    with open(path, "a+", encoding="utf-8") as handle, open(naming, "w", encoding="utf-8") as name:
        fcntl.flock(name, fcntl.LOCK_EX)
        if not _get(handle):
            handle.seek(0)
            other = handle.read()
            fcntl.flock(name, fcntl.LOCK_UN)
            busy(other)
            fcntl.flock(handle, fcntl.LOCK_EX)
            fcntl.flock(name, fcntl.LOCK_EX)
        handle.truncate(0)
        handle.write(holder)
        handle.flush()
        fcntl.flock(name, fcntl.LOCK_UN)
        yield handle


def _get(handle: TextIO) -> bool:
    """Whether nobody had the lock."""
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
