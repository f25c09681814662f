"""Memory: reused buffers for training steps, large pages for what inference reads again and again.

A training step allocates and frees the same buffers again and again. glibc gives every large one back to the
system at once, and the next step pays for fresh pages, zeroed by the kernel, four kilobytes at a time: about half
a second a gigabyte, more on a virtual machine. :func:`keep_freed_memory` stops that up to 32 MiB a buffer, the
most glibc allows; :func:`recycled_empty` does it for larger ones (the gradient of a 262,272-token head is 2 GB).
"""

from __future__ import annotations

import contextlib
import ctypes
import math
import mmap
import sys
import weakref

import numpy as np
import torch
from torch import Tensor

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


LARGE_PAGE_BYTES = 1 << 21


def empty_in_large_pages(*shape: int, dtype: torch.dtype) -> Tensor:
    """An uninitialised tensor in pages of 2 MiB where the system has them (Linux), else like ``torch.empty``.

    Weights and caches are read from one end to the other. With pages of 4 KiB a processor looks up a new address
    every 64 lines and starts its prefetching anew: measured, a third to a half of the speed (docs/lab-notes.md).
    """
    num_bytes = math.prod(shape) * dtype.itemsize
    if num_bytes < LARGE_PAGE_BYTES or not hasattr(mmap, "MADV_HUGEPAGE"):
        return torch.empty(shape, dtype=dtype)
    # A large page must begin at a multiple of its size: ask for more, begin inside.
    memory = mmap.mmap(-1, num_bytes + LARGE_PAGE_BYTES, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with contextlib.suppress(OSError):  # a kernel without large pages: small ones serve as well
        memory.madvise(mmap.MADV_HUGEPAGE)
    address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    skipped = -address % LARGE_PAGE_BYTES
    return torch.frombuffer(memory, dtype=torch.uint8, offset=skipped, count=num_bytes).view(dtype).view(shape)


def zeros_in_large_pages(*shape: int, dtype: torch.dtype) -> Tensor:
    """Like :func:`empty_in_large_pages`, zero; fresh pages are, so none is touched."""
    num_bytes = math.prod(shape) * dtype.itemsize
    if num_bytes < LARGE_PAGE_BYTES or not hasattr(mmap, "MADV_HUGEPAGE"):
        return torch.zeros(shape, dtype=dtype)
    return empty_in_large_pages(*shape, dtype=dtype)


RECYCLE_FROM_BYTES = LARGEST_MMAP_THRESHOLD_BYTES
_free: dict[int, list[mmap.mmap]] = {}


def recycled_empty(*shape: int) -> Tensor:
    """An uninitialised fp32 tensor on the CPU; if large, in memory that an earlier one of its size has left.

    The memory comes back when the last tensor on it is gone, and stays in the process until a tensor of the same
    size asks for it or :func:`release_recycled` is called.
    """
    size = math.prod(shape)
    if 4 * size < RECYCLE_FROM_BYTES:
        return torch.empty(shape, dtype=torch.float32)
    left = _free.get(4 * size)
    memory = left.pop() if left else mmap.mmap(-1, 4 * size)
    # torch holds the array as long as any tensor uses its memory. The tensor is no view of another one, which
    # autograd would refuse to add to in place.
    array = np.frombuffer(memory, dtype=np.float32).reshape(shape)
    weakref.finalize(array, _give_back, memory, 4 * size).atexit = False
    return torch.from_numpy(array)


def _give_back(memory: mmap.mmap, size: int) -> None:
    _free.setdefault(size, []).append(memory)


def release_recycled() -> None:
    """Give the memory that no tensor uses back to the system."""
    _free.clear()
