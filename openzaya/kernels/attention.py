"""Kernels of attention: CCA's mixing of queries and keys (arXiv 2510.04476), causal attention inside documents.

C++ and formulas: cpp/train/cca.hpp, cpp/train/cca_backward.hpp, cpp/train/attention.hpp. fp32 on the CPU; callers ask
:func:`openzaya.kernels.calls.suits` first, and :func:`suits_attention` before :func:`attend`.

Shape suffixes: N tokens, H query heads then key heads, K key heads, d head size, C = H*d.
"""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from openzaya.kernels.calls import call, first_order_only, room

MAX_DOCUMENT_LENGTH = 8192
"""Longer documents are left to PyTorch's attention, which keeps its blocks in the cache."""


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
        offset = offset.to(torch.int64).contiguous()
        taps0 = weight0[:, 0].T.contiguous()
        taps1 = weight1.view(heads, head_dim, head_dim, kernel1).permute(3, 0, 2, 1).contiguous()
        constant = bias1 + (taps1.sum(0).transpose(1, 2) @ bias0.view(heads, head_dim, 1)).view(-1)
        temperatures = torch.cat((temperature.new_ones(query_heads), temperature))
        mixed, length = projected.new_empty(tokens, heads, head_dim), projected.new_empty(tokens, heads)
        queries_keys, values = torch.empty_like(mixed), projected.new_empty(tokens, key_heads, head_dim)
        call(
            "cca_forward", shape, projected, taps0, taps1, constant, temperatures, cosine, sine, offset,
            mixed, length, queries_keys, values,
        )  # fmt: skip
        ctx.save_for_backward(projected, taps0, taps1, bias0, temperatures, cosine, sine, offset, mixed, length)
        ctx.shape = shape
        return queries_keys, values

    @staticmethod
    @first_order_only
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
        call(
            "cca_backward", ctx.shape, projected, taps0, taps1, temperatures, cosine, sine, offset, mixed, length,
            d_queries_keys.contiguous(), d_values.contiguous(), d_projected, d_mixed, d_depthwise,
            parameters, room(sum(sizes)),
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


def attend(queries_keys_NHd: Tensor, values_NKd: Tensor, lengths: list[int], sliding_window: int | None) -> Tensor:
    """Causal attention inside each document, (N, query heads * d); twin: ``attend_documents``.

    Raises ValueError where ``lengths`` do not add up to N.
    """
    if sum(lengths) != queries_keys_NHd.shape[0]:
        raise ValueError(f"documents of {sum(lengths)} tokens, but {queries_keys_NHd.shape[0]} queries")
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
        call("attention_forward", *sizes, starts, queries_keys, values, output, log_sums)
        ctx.save_for_backward(queries_keys, values, starts, output, log_sums)
        ctx.sizes = sizes
        return output

    @staticmethod
    @first_order_only
    def backward(ctx, gradient):  # type: ignore[no-untyped-def]
        queries_keys, values, starts, output, log_sums = ctx.saved_tensors
        d_queries_keys, d_values = torch.empty_like(queries_keys), torch.empty_like(values)
        inputs = (starts, queries_keys, values, output, log_sums, gradient.contiguous())
        call("attention_backward", *ctx.sizes, *inputs, d_queries_keys, d_values)
        return d_queries_keys, d_values, None, None
