"""Kernels of the dense layers: embedding, linear, RMSNorm, residual merge and the cross-entropy of a head.

C++ and formulas: cpp/train/linear.hpp, cpp/train/normalise.hpp, cpp/train/head.hpp. fp32 on the CPU; callers ask
:func:`openzaya.kernels.calls.suits` first.

Shape suffixes: N tokens, D hidden, V vocabulary.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from openzaya.kernels.calls import call, first_order_only, room
from openzaya.kernels.host import recycled_empty


def embedding(tokens_N: Tensor, weight_VD: Tensor) -> Tensor:
    """Rows of ``weight`` for int64 tokens, (N, D); twin: ``F.embedding``."""
    return _Embedding.apply(tokens_N, weight_VD)


class _Embedding(torch.autograd.Function):
    @staticmethod
    def forward(ctx, tokens, weight):  # type: ignore[no-untyped-def]
        ctx.save_for_backward(tokens)
        ctx.shape = weight.shape
        return F.embedding(tokens, weight)

    @staticmethod
    @first_order_only
    def backward(ctx, gradient):  # type: ignore[no-untyped-def]
        (tokens,) = ctx.saved_tensors
        # The table of a large vocabulary lies in memory that an earlier step has used already.
        return None, recycled_empty(*ctx.shape).zero_().index_add_(0, tokens, gradient)


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
        call("linear_forward", *sizes, x, x.shape[1], weight, None if bias is None else bias.contiguous(), output)
        return output

    @staticmethod
    @first_order_only
    def backward(ctx, gradient):  # type: ignore[no-untyped-def]
        x, weight = ctx.saved_tensors
        gradient = gradient.contiguous()
        dx = torch.empty_like(x) if ctx.needs_input_grad[0] else None
        dweight = torch.empty_like(weight) if ctx.needs_input_grad[1] else None
        dbias = weight.new_empty(weight.shape[0]) if ctx.has_bias and ctx.needs_input_grad[2] else None
        sizes = (x.shape[0], x.shape[1], weight.shape[0])
        call("linear_backward", *sizes, x, x.shape[1], weight, gradient, dx, dweight, dbias)
        return dx, dweight, dbias


def rms_norm(x_ND: Tensor, weight_D: Tensor, epsilon: float) -> Tensor:
    """x / rms(x) * weight over the last dimension; twin: ``F.rms_norm``."""
    return _RMSNorm.apply(x_ND, weight_D, epsilon)


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, epsilon):  # type: ignore[no-untyped-def]
        x, weight = x.contiguous(), weight.contiguous()
        output, inverse = torch.empty_like(x), x.new_empty(x.shape[0])
        call("norm_forward", *x.shape, float(epsilon), x, weight, output, inverse)
        ctx.save_for_backward(x, weight, inverse)
        return output

    @staticmethod
    @first_order_only
    def backward(ctx, gradient):  # type: ignore[no-untyped-def]
        x, weight, inverse = ctx.saved_tensors
        dx, dweight = torch.empty_like(x), torch.empty_like(weight)
        call("norm_backward", *x.shape, x, weight, inverse, gradient.contiguous(), dx, dweight, room(x.shape[1]))
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
        vectors = tuple(vector.contiguous() for vector in vectors)
        ctx.save_for_backward(output, residual, *vectors)
        merged = torch.empty_like(output)
        call("merge_forward", *output.shape, output, residual, *vectors, merged)
        return merged

    @staticmethod
    @first_order_only
    def backward(ctx, gradient):  # type: ignore[no-untyped-def]
        output, residual, *vectors = ctx.saved_tensors
        d_output, d_residual = torch.empty_like(output), torch.empty_like(output)
        size = output.shape[1]
        d_vectors = output.new_empty(4, size)
        outputs = (d_output, d_residual, d_vectors, room(4, size))
        call("merge_backward", *output.shape, output, residual, *vectors, gradient.contiguous(), *outputs)
        return d_output, d_residual, *d_vectors.unbind()


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
    Raises IndexError for a target that is no int64 token of the vocabulary.
    """
    hidden_ND, head_VD, targets_N = hidden_ND.contiguous(), head_VD.contiguous(), targets_N.contiguous()
    (tokens, hidden_size), vocabulary = hidden_ND.shape, head_VD.shape[0]
    if targets_N.dtype != torch.int64 or (
        tokens and not 0 <= int(targets_N.min()) <= int(targets_N.max()) < vocabulary
    ):
        raise IndexError(f"targets must be int64 in [0, {vocabulary}), the head's rows")
    width = -(-tokens // 32) * 32
    losses, logits = hidden_ND.new_empty(tokens), recycled_empty(vocabulary * max(width, logits_width))
    partial = None if d_hidden_ND is None else room(tokens, hidden_size)
    sizes = (tokens, hidden_size, vocabulary)
    outputs = (losses, d_hidden_ND, partial, d_head_VD, int(add))
    call("cross_entropy", *sizes, hidden_ND, head_VD, targets_N, float(scale), logits, room(2, width), *outputs)
    return losses
