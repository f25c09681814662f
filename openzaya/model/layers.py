"""Small layers that every ZAYA block uses: RMSNorm, rotary positions, residual merging.

Precision policy of the whole model, in this one place (arXiv 2605.05365, precision): the residual
stream, RMSNorm, QK-mean, QK-norm, router softmax and LM head run in fp32; matrix products run in
the dtype of their weights. ``float()`` is free where a tensor is fp32 already. No autocast anywhere.

Shape suffixes: N tokens of the whole batch in one row (padding-free), D hidden, H heads, d head size.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from openzaya.kernels import functions as kernels


class RMSNorm(nn.Module):
    """x / rms(x) * weight over the last dimension; in fp32, returned in the weight's dtype."""

    def __init__(self, size: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        if x.dim() == 2 and kernels.suits(x, self.weight):
            return kernels.rms_norm(x, self.weight, self.eps)
        return F.rms_norm(at_least_float(x), (x.shape[-1],), at_least_float(self.weight), self.eps).to(
            self.weight.dtype
        )


class Linear(nn.Module):
    """A matrix product whose parameters stay uninitialised until :meth:`Zaya.initialize` fills them."""

    def __init__(self, in_features: int, out_features: int, *, bias: bool = False):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(out_features, in_features))
        self.bias = nn.Parameter(torch.empty(out_features)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias)


class LearnedResidual(nn.Module):
    """x <- (output + b_h) * a_h + (x + b_r) * a_r, in fp32: learned residual scaling."""

    def __init__(self, hidden_size: int):
        super().__init__()
        self.hidden_states_scale = nn.Parameter(torch.ones(hidden_size))
        self.hidden_states_bias = nn.Parameter(torch.zeros(hidden_size))
        self.residual_scale = nn.Parameter(torch.ones(hidden_size))
        self.residual_bias = nn.Parameter(torch.zeros(hidden_size))

    def forward(self, output_ND: Tensor, residual_ND: Tensor) -> Tensor:
        vectors = (self.hidden_states_scale, self.hidden_states_bias, self.residual_scale, self.residual_bias)
        if kernels.suits(output_ND, residual_ND, *vectors):
            return kernels.merge(output_ND, residual_ND, *vectors)
        scaled_ND = (at_least_float(output_ND) + self.hidden_states_bias) * self.hidden_states_scale
        return scaled_ND + (residual_ND + self.residual_bias) * self.residual_scale


class PlainResidual(nn.Module):
    """x <- x + output, in fp32: the usual residual connection, for ablations."""

    def __init__(self, hidden_size: int):
        super().__init__()

    def forward(self, output_ND: Tensor, residual_ND: Tensor) -> Tensor:
        return residual_ND + output_ND


RESIDUALS = {"learned": LearnedResidual, "plain": PlainResidual}


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x W^T + b over the last dimension."""
    if x.dim() == 2 and kernels.suits(x, weight, bias):
        return kernels.linear(x, weight, bias)
    return F.linear(x, weight, bias)


def embed(tokens_N: Tensor, weight_VD: Tensor) -> Tensor:
    """Rows of ``weight`` (V, D) for int64 tokens, (N, D)."""
    if kernels.suits(weight_VD):
        return kernels.embedding(tokens_N, weight_VD)
    return F.embedding(tokens_N, weight_VD)


def at_least_float(x: Tensor) -> Tensor:
    """``x`` in fp32, or untouched where it is wider already (fp64 gradient checks stay fp64)."""
    return x if x.dtype in (torch.float32, torch.float64) else x.float()


def rotary_tables(positions_N: Tensor, rotary_dim: int, base: float) -> tuple[Tensor, Tensor]:
    """cos and sin of position * base^(-2i/rotary_dim), each (N, rotary_dim / 2) in fp32."""
    exponents = torch.arange(0, rotary_dim, 2, dtype=torch.float32, device=positions_N.device) / rotary_dim
    angles = positions_N.float()[:, None] * (1.0 / base**exponents)
    return angles.cos(), angles.sin()


def rotate(x_NHd: Tensor, tables: tuple[Tensor, Tensor]) -> Tensor:
    """Turn the first ``2 * tables.shape[-1]`` dimensions of each head; dimension i pairs with i + half."""
    cos, sin = (table[:, None, :].to(x_NHd.dtype) for table in tables)
    half = cos.shape[-1]
    first, second, rest = x_NHd.split((half, half, x_NHd.shape[-1] - 2 * half), dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin, rest), dim=-1)
