"""From PyTorch to C++ and back: whether the kernels suit some tensors, and how one is called.

A kernel is a C function (cpp/) that gets the number of threads, then tensors by address. Everything that such a
function cannot see for itself is checked here: type, device, layout in memory.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from openzaya.kernels.build import library

MIN_TOKENS = 32
"""Fewer tokens than this (decoding) are left to PyTorch: packing a matrix would cost more than it saves."""

_enabled = True


@contextlib.contextmanager
def disabled() -> Iterator[None]:
    """Take the plain twins inside this block."""
    global _enabled
    before, _enabled = _enabled, False
    try:
        yield
    finally:
        _enabled = before


def suits(tokens_first: Tensor, *others: Tensor | None) -> bool:
    """Whether the kernels can take these tensors; the first one's first dimension counts tokens."""
    if not _enabled or tokens_first.shape[0] < MIN_TOKENS:
        return False
    for tensor in (tokens_first, *others):
        if tensor is None:
            continue
        # Subclasses (fake, distributed, functional tensors) have no memory to point at.
        if tensor.dtype != torch.float32 or tensor.device.type != "cpu" or type(tensor) not in (Tensor, nn.Parameter):
            return False
    return library() is not None


def call(name: str, *arguments: Tensor | int | float | ctypes.Structure | None) -> None:
    """Call a kernel: the number of threads first, tensors by address, integers as int64, floats as float.

    Raises ValueError for a tensor whose elements do not lie one after another.
    """
    converted: list[Any] = [ctypes.c_int(torch.get_num_threads())]
    for argument in arguments:
        if isinstance(argument, Tensor):
            if not argument.is_contiguous():
                raise ValueError(f"{name}: a tensor of shape {tuple(argument.shape)} is not contiguous")
            converted.append(ctypes.c_void_p(argument.data_ptr()))
        elif isinstance(argument, int):
            converted.append(ctypes.c_int64(argument))
        elif isinstance(argument, float):
            converted.append(ctypes.c_float(argument))
        elif isinstance(argument, ctypes.Structure):
            converted.append(ctypes.byref(argument))
        else:
            converted.append(ctypes.c_void_p(None))
    loaded = library()
    assert loaded is not None
    getattr(loaded, name)(*converted)


def room(*shape: int) -> Tensor:
    """Memory for each thread's partial sums."""
    return torch.empty(torch.get_num_threads(), *shape)


def first_order_only(backward: Callable[..., Any]) -> Callable[..., Any]:
    """Decorates a hand-written backward pass: asked for a gradient that can be differentiated, it raises RuntimeError.

    PyTorch's ``once_differentiable`` raises later, and only where the incoming gradient requires a gradient itself.
    Elsewhere its results count as constants, and second derivatives would silently lack their part.
    """

    @functools.wraps(backward)
    def wrapped(ctx: Any, *gradients: Tensor | None) -> Any:
        if torch.is_grad_enabled():  # create_graph=True
            raise RuntimeError(
                "create_graph=True, but the kernels of openzaya have no second derivatives; run the forward pass "
                "inside openzaya.kernels.functions.disabled(), or set OPENZAYA_KERNELS=0"
            )
        return backward(ctx, *gradients)

    return wrapped
