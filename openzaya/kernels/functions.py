"""The kernels of ``train.cpp`` as differentiable functions, fp32 on the CPU.

Each function computes what its plain twin in openzaya/model computes; callers ask :func:`suits` first and take
the twin where it says no (other dtypes and devices, no compiler, too few tokens to pay). Backward passes are
written by hand: they keep little and recompute what is cheap. They are not differentiable again.

Shape suffixes: N tokens, D hidden, H query heads then key heads, K key heads, d head size, C = H*d,
M tokens at an expert, E experts, F expert width, V vocabulary.
"""

from __future__ import annotations

import contextlib
import ctypes
import itertools
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from openzaya.kernels.build import library
from openzaya.kernels.host import recycled_empty

MIN_TOKENS = 32
"""Fewer tokens than this (decoding) are left to PyTorch: packing a matrix would cost more than it saves."""
MAX_DOCUMENT_LENGTH = 8192
"""Longer documents are left to PyTorch's attention, which keeps its blocks in the cache."""
LARGE_EXPERT = 1 << 20
"""Experts with this many weights in a matrix are multiplied by PyTorch: few tokens visit each, and packing a
matrix would cost as much as using it."""

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


def _call(name: str, *arguments: Tensor | int | float | ctypes.Structure | None) -> None:
    """Call a kernel: the number of threads first, tensors by address, integers as int64, floats as float."""
    converted: list[Any] = [ctypes.c_int(torch.get_num_threads())]
    for argument in arguments:
        if isinstance(argument, Tensor):
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


def _room(*shape: int) -> Tensor:
    """Memory for each thread's partial sums."""
    return torch.empty(torch.get_num_threads(), *shape)


# --- embedding ------------------------------------------------------------------------------------------------


def embedding(tokens_N: Tensor, weight_VD: Tensor) -> Tensor:
    """Rows of ``weight`` for int64 tokens, (N, D); twin: ``F.embedding``."""
    return _Embedding.apply(tokens_N, weight_VD)


class _Embedding(torch.autograd.Function):
    @staticmethod
    def forward(ctx, tokens, weight):  # type: ignore[no-untyped-def]
        ctx.save_for_backward(tokens)
        ctx.shape = weight.shape
        return weight[tokens]

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient):  # type: ignore[no-untyped-def]
        (tokens,) = ctx.saved_tensors
        # The table of a large vocabulary lies in memory that an earlier step has used already.
        return None, recycled_empty(*ctx.shape).zero_().index_add_(0, tokens, gradient)


# --- linear ---------------------------------------------------------------------------------------------------


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x W^T + b for x (N, in), weight (out, in); twin: ``F.linear``."""
    return _Linear.apply(x, weight, bias)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias):  # type: ignore[no-untyped-def]
        x, weight = x.contiguous(), weight.contiguous()
        ctx.save_for_backward(x, weight)
        ctx.has_bias = bias is not None
        output = x.new_empty(x.shape[0], weight.shape[0])
        sizes = (x.shape[0], x.shape[1], weight.shape[0])
        _call("linear_forward", *sizes, x, x.shape[1], weight, None if bias is None else bias.contiguous(), output)
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient):  # type: ignore[no-untyped-def]
        x, weight = ctx.saved_tensors
        gradient = gradient.contiguous()
        dx = torch.empty_like(x) if ctx.needs_input_grad[0] else None
        dweight = torch.empty_like(weight) if ctx.needs_input_grad[1] else None
        dbias = weight.new_empty(weight.shape[0]) if ctx.has_bias and ctx.needs_input_grad[2] else None
        sizes = (x.shape[0], x.shape[1], weight.shape[0])
        _call("linear_backward", *sizes, x, x.shape[1], weight, gradient, dx, dweight, dbias)
        return dx, dweight, dbias


# --- RMSNorm and residual merge ---------------------------------------------------------------------------------


def rms_norm(x_ND: Tensor, weight_D: Tensor, epsilon: float) -> Tensor:
    """x / rms(x) * weight over the last dimension; twin: ``F.rms_norm``."""
    return _RMSNorm.apply(x_ND, weight_D, epsilon)


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, epsilon):  # type: ignore[no-untyped-def]
        x = x.contiguous()
        output, inverse = torch.empty_like(x), x.new_empty(x.shape[0])
        _call("norm_forward", *x.shape, float(epsilon), x, weight, output, inverse)
        ctx.save_for_backward(x, weight, inverse)
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient):  # type: ignore[no-untyped-def]
        x, weight, inverse = ctx.saved_tensors
        dx, dweight = torch.empty_like(x), torch.empty_like(weight)
        _call("norm_backward", *x.shape, x, weight, inverse, gradient.contiguous(), dx, dweight, _room(x.shape[1]))
        return dx, dweight, None


def merge(
    output_ND: Tensor, residual_ND: Tensor, scale: Tensor, bias: Tensor, r_scale: Tensor, r_bias: Tensor
) -> Tensor:
    """(output + bias) * scale + (residual + r_bias) * r_scale; twin: ``LearnedResidual``."""
    return _Merge.apply(output_ND, residual_ND, scale, bias, r_scale, r_bias)


class _Merge(torch.autograd.Function):
    @staticmethod
    def forward(ctx, output, residual, *vectors):  # type: ignore[no-untyped-def]
        output, residual = output.contiguous(), residual.contiguous()
        ctx.save_for_backward(output, residual, *vectors)
        merged = torch.empty_like(output)
        _call("merge_forward", *output.shape, output, residual, *vectors, merged)
        return merged

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient):  # type: ignore[no-untyped-def]
        output, residual, *vectors = ctx.saved_tensors
        d_output, d_residual = torch.empty_like(output), torch.empty_like(output)
        size = output.shape[1]
        d_vectors = output.new_empty(4, size)
        outputs = (d_output, d_residual, d_vectors, _room(4, size))
        _call("merge_backward", *output.shape, output, residual, *vectors, gradient.contiguous(), *outputs)
        return d_output, d_residual, *d_vectors.unbind()


# --- CCA --------------------------------------------------------------------------------------------------------


class _CcaShape(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_int64) for name in ("tokens", "query_heads", "key_heads", "head_dim", "kernel0", "kernel1")),
        *((name, ctypes.c_int64) for name in ("rotary_half", "value_half")),
        ("epsilon", ctypes.c_float),
    ]


def cca_mix(
    projected: Tensor,
    depthwise: tuple[Tensor, Tensor],
    grouped: tuple[Tensor, Tensor],
    temperature_K: Tensor,
    rotary: tuple[Tensor, Tensor],
    offset_N: Tensor,
    num_query_heads: int,
) -> tuple[Tensor, Tensor]:
    """From the joint projection to attention's inputs: queries and keys (N, H, d), values (N, K, d).

    ``projected`` is (N, C + K*d): z, the current and the delayed half of the values. ``depthwise`` and ``grouped``
    are weight and bias of the convolutions. Twin: ``CCAProjection.forward``, ``QKNorm``, ``rotate`` in turn.
    """
    return _CcaMix.apply(projected, *depthwise, *grouped, temperature_K, *rotary, offset_N, num_query_heads)


class _CcaMix(torch.autograd.Function):
    @staticmethod
    def forward(ctx, projected, weight0, bias0, weight1, bias1, temperature, cosine, sine, offset, query_heads):  # type: ignore[no-untyped-def]
        tokens, key_heads = projected.shape[0], temperature.shape[0]
        channels, head_dim, kernel1 = weight1.shape
        heads = channels // head_dim
        shape = _CcaShape(
            tokens, query_heads, key_heads, head_dim, weight0.shape[2], kernel1, cosine.shape[1],
            (projected.shape[1] - channels) // 2, torch.finfo(torch.float32).eps,
        )  # fmt: skip
        projected, cosine, sine = projected.contiguous(), cosine.contiguous(), sine.contiguous()
        taps0 = weight0[:, 0].T.contiguous()
        taps1 = weight1.view(heads, head_dim, head_dim, kernel1).permute(3, 0, 2, 1).contiguous()
        constant = bias1 + (taps1.sum(0).transpose(1, 2) @ bias0.view(heads, head_dim, 1)).view(-1)
        temperatures = torch.cat((temperature.new_ones(query_heads), temperature))
        mixed, length = projected.new_empty(tokens, heads, head_dim), projected.new_empty(tokens, heads)
        queries_keys, values = torch.empty_like(mixed), projected.new_empty(tokens, key_heads, head_dim)
        _call(
            "cca_forward", shape, projected, taps0, taps1, constant, temperatures, cosine, sine, offset,
            mixed, length, queries_keys, values,
        )  # fmt: skip
        ctx.save_for_backward(projected, taps0, taps1, bias0, temperatures, cosine, sine, offset, mixed, length)
        ctx.shape = shape
        return queries_keys, values

    @staticmethod
    @once_differentiable
    def backward(ctx, d_queries_keys, d_values):  # type: ignore[no-untyped-def]
        projected, taps0, taps1, bias0, temperatures, cosine, sine, offset, mixed, length = ctx.saved_tensors
        kernel1, heads, head_dim, _ = taps1.shape
        sizes = (taps0.numel(), taps1.numel(), heads * head_dim, heads)
        parameters = projected.new_empty(sum(sizes))
        d_projected, d_mixed, d_depthwise = (
            torch.empty_like(projected),
            torch.empty_like(mixed),
            torch.empty_like(mixed),
        )
        _call(
            "cca_backward", ctx.shape, projected, taps0, taps1, temperatures, cosine, sine, offset, mixed, length,
            d_queries_keys.contiguous(), d_values.contiguous(), d_projected, d_mixed, d_depthwise,
            parameters, _room(sum(sizes)),
        )  # fmt: skip
        d_taps0, d_taps1, d_constant, d_temperatures = parameters.split(sizes)
        # The constant is b1 + sum_l M_l b0.
        d_constant_Hd, bias0_Hd = d_constant.view(heads, 1, head_dim), bias0.view(heads, head_dim, 1)
        d_taps1 = d_taps1.view(heads, kernel1, head_dim, head_dim) + (bias0_Hd * d_constant_Hd)[:, None]
        d_bias0 = (taps1.sum(0) * d_constant_Hd).sum(2).view(-1)
        d_weight1 = d_taps1.permute(0, 3, 2, 1).reshape(heads * head_dim, head_dim, kernel1)
        d_weight0 = d_taps0.view(-1, heads * head_dim).T.contiguous()[:, None]
        d_temperature = d_temperatures[ctx.shape.query_heads :].clone()
        return d_projected, d_weight0, d_bias0, d_weight1, d_constant.clone(), d_temperature, None, None, None, None


# --- attention --------------------------------------------------------------------------------------------------


def attend(queries_keys_NHd: Tensor, values_NKd: Tensor, lengths: list[int], sliding_window: int | None) -> Tensor:
    """Causal attention inside each document, (N, query heads * d); twin: ``attend_documents``."""
    return _Attend.apply(queries_keys_NHd, values_NKd, lengths, sliding_window)


def suits_attention(lengths: list[int], num_key_heads: int) -> bool:
    """Whether there is enough to share out, in pieces small enough for the cache."""
    pieces = len(lengths) * num_key_heads
    return max(lengths) <= MAX_DOCUMENT_LENGTH and pieces >= torch.get_num_threads()


class _Attend(torch.autograd.Function):
    @staticmethod
    def forward(ctx, queries_keys, values, lengths, window):  # type: ignore[no-untyped-def]
        queries_keys, values = queries_keys.contiguous(), values.contiguous()
        tokens, heads, head_dim = queries_keys.shape
        key_heads = values.shape[1]
        query_heads = heads - key_heads
        starts = torch.tensor([0, *lengths]).cumsum(0)
        sizes = (tokens, len(lengths), query_heads, key_heads, head_dim, tokens if window is None else window)
        output, log_sums = values.new_empty(tokens, query_heads * head_dim), values.new_empty(query_heads, tokens)
        _call("attention_forward", *sizes, starts, queries_keys, values, output, log_sums)
        ctx.save_for_backward(queries_keys, values, starts, output, log_sums)
        ctx.sizes = sizes
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient):  # type: ignore[no-untyped-def]
        queries_keys, values, starts, output, log_sums = ctx.saved_tensors
        d_queries_keys, d_values = torch.empty_like(queries_keys), torch.empty_like(values)
        inputs = (starts, queries_keys, values, output, log_sums, gradient.contiguous())
        _call("attention_backward", *ctx.sizes, *inputs, d_queries_keys, d_values)
        return d_queries_keys, d_values, None, None


# --- experts ----------------------------------------------------------------------------------------------------


def experts(hidden_ND: Tensor, choice_N: Tensor, gate_N: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    """Each token through its expert, (N, D); twins: ``grouped_experts`` and ``loop_experts``."""
    function = _LargeExperts if down[0].numel() >= LARGE_EXPERT else _Experts
    return function.apply(hidden_ND, choice_N, gate_N, gate_up, down)


class _Experts(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, choice, gate, gate_up, down):  # type: ignore[no-untyped-def]
        hidden, gate, gate_up, down = hidden.contiguous(), gate.contiguous(), gate_up.contiguous(), down.contiguous()
        num_experts, hidden_size, width = down.shape
        order, ends = _sort_by_expert(choice, num_experts)
        visits = int(ends[-1])
        sizes = (num_experts, hidden_size, width, visits)
        output = torch.empty_like(hidden) if visits == hidden.shape[0] else torch.zeros_like(hidden)
        inside = hidden.new_empty(visits, 2 * width)
        _call("experts_forward", *sizes, order, ends, hidden, gate, gate_up, down, output, inside)
        ctx.save_for_backward(hidden, gate, gate_up, down, order, ends, inside)
        ctx.sizes = sizes
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient):  # type: ignore[no-untyped-def]
        hidden, gate, gate_up, down, order, ends, inside = ctx.saved_tensors
        _, hidden_size, width, visits = ctx.sizes
        make = torch.empty_like if visits == hidden.shape[0] else torch.zeros_like
        d_hidden, d_gate = make(hidden), make(gate)
        d_gate_up, d_down = torch.empty_like(gate_up), torch.empty_like(down)
        room = hidden.new_empty(visits * (2 * hidden_size + 3 * width))
        inputs = (order, ends, hidden, gate, gate_up, down, inside, gradient.contiguous())
        _call("experts_backward", *ctx.sizes, *inputs, d_hidden, d_gate, d_gate_up, d_down, room)
        return d_hidden, None, d_gate, d_gate_up, d_down


def _sort_by_expert(choice_N: Tensor, num_experts: int) -> tuple[Tensor, Tensor]:
    """Tokens sorted by expert, the skip class last (N), and the end of each expert's run (E); both int64."""
    ends_E = torch.bincount(choice_N, minlength=num_experts + 1)[:num_experts].cumsum(0)
    return choice_N.argsort(stable=True), ends_E


class _LargeExperts(torch.autograd.Function):
    """The same expert by expert with PyTorch's products, written straight into their places."""

    @staticmethod
    def forward(ctx, hidden, choice, gate, gate_up, down):  # type: ignore[no-untyped-def]
        num_experts, _, width = down.shape
        order, ends = _sort_by_expert(choice, num_experts)
        bounds = [0, *ends.tolist()]
        order = order[: bounds[-1]]
        sorted_hidden, sorted_gate = hidden[order], gate[order][:, None]
        inside = hidden.new_empty(bounds[-1], 2 * width)
        for expert, (start, end) in enumerate(itertools.pairwise(bounds)):
            torch.mm(sorted_hidden[start:end], gate_up[expert].T, out=inside[start:end])
        active = F.silu(inside[:, :width]).mul_(inside[:, width:])
        sorted_output = torch.empty_like(sorted_hidden)
        for expert, (start, end) in enumerate(itertools.pairwise(bounds)):
            torch.mm(active[start:end], down[expert].T, out=sorted_output[start:end])
        ctx.save_for_backward(sorted_hidden, sorted_gate, gate_up, down, order, inside)
        ctx.bounds, ctx.num_tokens = bounds, hidden.shape[0]
        return torch.zeros_like(hidden).index_copy_(0, order, sorted_output.mul_(sorted_gate))

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient):  # type: ignore[no-untyped-def]
        sorted_hidden, sorted_gate, gate_up, down, order, inside = ctx.saved_tensors
        width = down.shape[2]
        d_output = gradient[order]
        d_active = inside.new_empty(len(order), width)
        for expert, (start, end) in enumerate(itertools.pairwise(ctx.bounds)):
            torch.mm(d_output[start:end], down[expert], out=d_active[start:end])
        gate_part, up_part = inside[:, :width], inside[:, width:]
        sigmoid = gate_part.sigmoid()
        silu = gate_part * sigmoid
        active = silu * up_part
        d_gate = inside.new_zeros(ctx.num_tokens).index_copy_(0, order, torch.linalg.vecdot(d_active, active))
        d_active.mul_(sorted_gate)
        active.mul_(sorted_gate)
        d_inside = torch.empty_like(inside)
        torch.mul(d_active, silu, out=d_inside[:, width:])
        d_silu = sigmoid.addcmul_(silu, 1 - sigmoid)
        torch.mul(d_active.mul_(up_part), d_silu, out=d_inside[:, :width])
        d_hidden = torch.empty_like(sorted_hidden)
        d_gate_up, d_down = recycled_empty(*gate_up.shape), recycled_empty(*down.shape)
        for expert, (start, end) in enumerate(itertools.pairwise(ctx.bounds)):
            # Products over no tokens are zeros: an expert that nobody visits still gets its gradient.
            torch.mm(d_inside[start:end], gate_up[expert], out=d_hidden[start:end])
            torch.mm(d_inside[start:end].T, sorted_hidden[start:end], out=d_gate_up[expert])
            torch.mm(d_output[start:end].T, active[start:end], out=d_down[expert])
        d_hidden = torch.zeros_like(gradient).index_copy_(0, order, d_hidden)
        return d_hidden, None, d_gate, d_gate_up, d_down


# --- cross-entropy of a head ------------------------------------------------------------------------------------


def cross_entropy(
    hidden_ND: Tensor,
    head_VD: Tensor,
    targets_N: Tensor,
    scale: float,
    d_hidden_ND: Tensor | None,
    d_head_VD: Tensor | None,
    *,
    add: bool,
    logits_width: int = 0,
) -> Tensor:
    """Unscaled losses (N) in nats of one block of tokens; not differentiable, writes the gradients at once.

    ``d_hidden_ND`` (None: loss alone) and ``d_head_VD`` (None: not wanted) receive the gradients of ``scale``
    times the summed loss; the head's are added to what is there if ``add``. ``logits_width``: make room for
    the logits of this many tokens, so that blocks of several sizes share memory. Twin: ``plain_cross_entropy``.
    """
    hidden_ND, head_VD, targets_N = hidden_ND.contiguous(), head_VD.contiguous(), targets_N.contiguous()
    (tokens, hidden_size), vocabulary = hidden_ND.shape, head_VD.shape[0]
    width = -(-tokens // 32) * 32
    losses, logits = hidden_ND.new_empty(tokens), recycled_empty(vocabulary * max(width, logits_width))
    partial = None if d_hidden_ND is None else _room(tokens, hidden_size)
    sizes = (tokens, hidden_size, vocabulary)
    outputs = (losses, d_hidden_ND, partial, d_head_VD, int(add))
    _call("cross_entropy", *sizes, hidden_ND, head_VD, targets_N, float(scale), logits, _room(2, width), *outputs)
    return losses
