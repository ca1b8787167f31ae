"""The C library's allocator, told which memory to keep.

glibc maps the memory of a large tensor anew each time, and the system fills every page of it with
zeros. For weights that is right: their memory goes back when the model goes. Of activations, above
all of logits, which come and go, it is a sixth of the CPU time of a small model's scores.
"""

import ctypes

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # malloc.h
MAPPINGS = 65536  # glibc's own M_MMAP_MAX
KEPT_BYTES = 256 * 2**20


def keep_freed_memory(keep: bool) -> None:
    """Take memory from this process's heap from now on, or map large pieces apart, as glibc does by
    itself. Free memory at the heap's end beyond KEPT_BYTES goes back to the system. Without glibc
    nothing is done."""
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return
    mallopt(M_MMAP_MAX, 0 if keep else MAPPINGS)
    mallopt(M_TRIM_THRESHOLD, KEPT_BYTES)
