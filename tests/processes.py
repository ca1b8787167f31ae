"""Processes of a test: what it waits for, and what is left of them."""

import time
from contextlib import suppress
from pathlib import Path


def wait_until(condition, otherwise="waited in vain", seconds=300.0):
    """Seconds until the condition held; fails the test after `seconds`."""
    started = time.monotonic()
    while not condition():
        assert time.monotonic() < started + seconds, otherwise
        time.sleep(0.02)
    return time.monotonic() - started


def alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def processes_in(folder):
    """The ids of all living processes that work in a folder."""
    found = set()
    for entry in Path("/proc").iterdir():
        with suppress(OSError):  # it has ended meanwhile
            if (
                entry.name.isdecimal()
                and (entry / "cwd").readlink() == folder
                and alive(entry.name)
            ):
                found.add(int(entry.name))
    return found
