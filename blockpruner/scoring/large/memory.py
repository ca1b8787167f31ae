"""How much memory the system, this process's cgroups and a device have, and whether a place is a disk.

Linux only, as all of streaming: everything is read from /proc and the cgroup file systems, v1 and v2.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path


def available_memory() -> int:
    """Free bytes of main memory, in the system and within each memory cgroup of this process."""
    text = Path("/proc/meminfo").read_text()
    system = int(re.search(r"MemAvailable:\s+(\d+)", text)[1]) * 1024  # type: ignore[index]
    return max(0, min([system, *_cgroup_rooms()]))


def _cgroup_rooms() -> Iterator[int]:
    """The limit less what cannot be reclaimed, for this process's memory cgroup and those above it; v1 and v2.

    Cached pages of files can be reclaimed, except mapped ones: they are the code that runs.
    """
    groups = [line.split(":", 2)[1:] for line in Path("/proc/self/cgroup").read_text().splitlines()]
    for _, root, place, kind, options in _mounts():
        if kind == "cgroup2":
            limit, usage, stats = "memory.max", "memory.current", ("active_file", "inactive_file", "file_mapped")
            paths = [path for controllers, path in groups if not controllers]
        elif kind == "cgroup" and "memory" in options.split(","):
            limit, usage = "memory.limit_in_bytes", "memory.usage_in_bytes"
            stats = ("total_active_file", "total_inactive_file", "total_mapped_file")
            paths = [path for controllers, path in groups if "memory" in controllers.split(",")]
        else:
            continue
        for path in paths:
            top, inner = Path(place), os.path.relpath(path, root)
            group = top if inner.startswith("..") else top / inner  # in a container only its own part is mounted
            for directory in (group, *group.parents[: len(group.parts) - len(top.parts)]):
                text = (directory / limit).read_text().strip() if (directory / limit).exists() else "max"
                if text != "max":
                    stat = dict(line.split() for line in (directory / "memory.stat").read_text().splitlines())
                    active, inactive, mapped = (int(stat[name]) for name in stats)
                    used = int((directory / usage).read_text())
                    yield int(text) - used + max(0, active + inactive - mapped)


def _mounts() -> Iterator[tuple[str, str, str, str, str]]:
    """Device number, root, place, file system and its options of every mount."""
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        left, _, right = line.partition(" - ")
        _, _, device, root, place, *_ = left.split()
        kind, _, options = right.split(" ", 2)
        yield device, root, place, kind, options


def is_in_memory(place: str) -> bool:
    number = Path(place).stat().st_dev
    device = f"{os.major(number)}:{os.minor(number)}"
    return any(mount[0] == device and mount[3] in ("tmpfs", "ramfs") for mount in _mounts())
