"""The C library's allocator.

glibc maps the memory of a large tensor anew each time, and the system fills every page of it with
zeros. For weights that is right: their memory goes back when the model goes. Of activations, above
all of logits, which come and go, it is a sixth of the CPU time of a small model's scores.
"""

import ctypes

# Parameters of mallopt(3), and the default of the second one.
M_TRIM_THRESHOLD = -1
M_MMAP_MAX = -4
DEFAULT_MAPPINGS = 65536
KEPT_BYTES = 256 * 2**20
"""Free memory at the heap's end that does not go back to the system."""


def keep_freed_memory(keep: bool) -> None:
    """Let this process reuse the memory of large tensors, or give it back to the system at once, as
    glibc does by itself. Without glibc nothing is done."""
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return
    mallopt(M_MMAP_MAX, 0 if keep else DEFAULT_MAPPINGS)
    mallopt(M_TRIM_THRESHOLD, KEPT_BYTES)
