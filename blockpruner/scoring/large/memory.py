"""How much memory the system and this process's cgroups have.

Linux only, as all of streaming: everything is read from /proc and the file system of cgroups v2.
"""

import re
from pathlib import Path

CGROUPS = Path("/sys/fs/cgroup")


def available_memory() -> int:
    """Free bytes of main memory, in the system and within each memory cgroup of this process and
    those above it: the limit less what cannot be reclaimed."""
    rooms = [int(re.findall(r"MemAvailable:\s+(\d+)", Path("/proc/meminfo").read_text())[0]) * 1024]
    for path in re.findall(r"^0::/(.*)$", Path("/proc/self/cgroup").read_text(), re.MULTILINE):
        group = CGROUPS / path
        for directory in (group, *group.parents):
            limit = directory / "memory.max"
            if (
                directory.is_relative_to(CGROUPS)
                and limit.exists()
                and (text := limit.read_text().strip()) != "max"
            ):
                stat = dict(
                    line.split() for line in (directory / "memory.stat").read_text().splitlines()
                )
                active, inactive, mapped = (
                    int(stat[name]) for name in ("active_file", "inactive_file", "file_mapped")
                )
                used = int((directory / "memory.current").read_text())
                # cached pages of files can be reclaimed, except mapped ones: they are the code that
                # runs
                rooms.append(int(text) - used + max(0, active + inactive - mapped))
    return max(0, min(rooms))
