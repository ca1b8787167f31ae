"""Short-lived tensors reuse memory, which is counted in pages that the system had to fill."""

import platform
import resource
import subprocess
import sys

import pytest

PROGRAM = """
import resource, sys, torch
from blockpruner.model.allocator import keep_freed_memory
keep_freed_memory(True)
keep_freed_memory(sys.argv[1] == "kept")
def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
torch.ones(2**24)
before = faults()
for _ in range(10):
    torch.ones(2**24)  # 64 MiB
print(faults() - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc's allocator can be told")
def test_freed_memory_is_used_again():
    def pages(mode):
        out = subprocess.run(
            [sys.executable, "-c", PROGRAM, mode], capture_output=True, text=True, check=True
        ).stdout
        return int(out) * resource.getpagesize()

    assert pages("plain") > 9 * 2**26  # every tensor's pages are new
    assert pages("kept") < 2**26
