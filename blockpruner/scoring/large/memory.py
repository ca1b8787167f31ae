"""How much memory the system and this process's cgroups have.

Linux only, as all of streaming: everything is read from /proc and the file system of cgroups v2.
"""

import re
from pathlib import Path

CGROUPS = Path("/sys/fs/cgroup")


def available_memory() -> int:
    """Free bytes of main memory: the least of what is free in the system and within each memory
    cgroup of this process and those above it."""
    system = re.findall(r"MemAvailable:\s+(\d+)", Path("/proc/meminfo").read_text())
    free = [int(system[0]) * 1024]
    cgroups = Path("/proc/self/cgroup").read_text()
    for path in re.findall(r"^0::/(.*)$", cgroups, re.MULTILINE):
        group = CGROUPS / path
        for directory in (group, *group.parents):
            limit = directory / "memory.max"
            if directory.is_relative_to(CGROUPS) and limit.exists():
                text = limit.read_text().strip()
                if text != "max":
                    free.append(int(text) - _unreclaimable(directory))
    return max(0, min(free))


def _unreclaimable(cgroup: Path) -> int:
    """The used bytes without cached pages of files. Mapped pages stay: they are the code that
    runs."""
    lines = (cgroup / "memory.stat").read_text().splitlines()
    stat = dict(line.split() for line in lines)
    cached = int(stat["active_file"]) + int(stat["inactive_file"]) - int(stat["file_mapped"])
    return int((cgroup / "memory.current").read_text()) - max(0, cached)
