"""Does a compiled inference library compute what it should, on this processor? A process of its own says.

    python -m openzaya.kernels.check LIBRARY

Exit code 0: its tiles can be had, and a packed product for many tokens is right. Anything else, the end by a signal
included, means that the library must not be used. Run once for instructions that could not be tried where the kernels
were written (AMX).
"""

from __future__ import annotations

import ctypes
import sys

import torch

from openzaya.kernels.build import loaded_openmp

TOKENS, ROWS, COLUMNS = 40, 48, 128


class _Matrix(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("data", "scales")),
        *((name, ctypes.c_int64) for name in ("rows", "columns", "format", "stride", "scale_stride")),
    ]


def is_right(path: str) -> bool:
    """Multiply small integers, for which every sum is exact, with an 8-bit matrix."""
    ctypes.CDLL(loaded_openmp(), mode=ctypes.RTLD_GLOBAL)
    library = ctypes.CDLL(path)
    library.cpu_prepare.restype = ctypes.c_int64
    if library.cpu_prepare() != 0:
        return False
    generator = torch.Generator().manual_seed(0)
    codes_NK = torch.randint(-127, 128, (ROWS, COLUMNS), generator=generator)
    x_TK = torch.randint(-127, 128, (TOKENS, COLUMNS), generator=generator)
    x_TK[:, ::64] = 127  # every group's largest magnitude: activations are then their own codes
    packed = (codes_NK + 128).to(torch.uint8).view(ROWS // 16, 16, COLUMNS // 4, 4).transpose(1, 2).contiguous()
    scales, floats, y_TN = torch.ones(ROWS), x_TK.float(), torch.empty(TOKENS, ROWS)
    matrix = _Matrix(packed.data_ptr(), scales.data_ptr(), ROWS, COLUMNS, 2, 0, 0)
    addresses = (ctypes.c_void_p(floats.data_ptr()), ctypes.c_void_p(y_TN.data_ptr()))
    library.cpu_product(1, ctypes.byref(matrix), ctypes.c_int64(0), ctypes.c_int64(TOKENS), *addresses)
    return torch.equal(y_TN, (x_TK @ codes_NK.T).float())


if __name__ == "__main__":
    sys.exit(0 if is_right(sys.argv[1]) else 1)
