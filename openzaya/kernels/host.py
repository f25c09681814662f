"""The C library's memory allocator, set up for training.

A training step allocates and frees the same buffers again and again. glibc gives every large one back to the
system at once, and the next step pays for fresh pages, zeroed by the kernel, four kilobytes at a time.
"""

from __future__ import annotations

import ctypes
import sys

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
LARGEST_MMAP_THRESHOLD_BYTES = 1 << 25
"""glibc refuses more: larger buffers always come from, and go back to, the system."""


def keep_freed_memory() -> bool:
    """Keep freed buffers of up to 32 MiB in the process for reuse; process-wide, cannot be undone.

    Returns False, and changes nothing, where the C library is not glibc.
    """
    if not sys.platform.startswith("linux"):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError):
        return False
    mallopt.argtypes, mallopt.restype = (ctypes.c_int, ctypes.c_int), ctypes.c_int
    keeps = mallopt(M_MMAP_THRESHOLD, LARGEST_MMAP_THRESHOLD_BYTES) == 1
    return keeps and mallopt(M_TRIM_THRESHOLD, 2**31 - 1) == 1
