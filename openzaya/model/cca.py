"""Compressed Convolutional Attention: how queries, keys and values are made (arXiv 2510.04476).

Queries and keys live in a space narrower than the hidden state, and each is mixed with its
predecessors by two short causal convolutions:

    z = [W_q h, W_k h]                                       one vector of (h_q + h_k) * d channels a token
    y = depthwise(z) + b0                                    kernel k0, one filter a channel
    c = grouped(y) + b1                                      kernel k1, one d x d matrix a head and tap
    Q_j = c_j + (q_j + k_g)/2,  K_g = c_g + (k_g + mean_j q_j)/2       QK-mean, before the convolutions
    V = [W_v1 h_t, W_v2 h_(t-1)] viewed as h_k heads         half of the value channels come one token late

Before a document z is 0, so y is b0 there. The code moves that constant out: with y' = y - b0, which is 0
before a document, c = sum_l M_l y'_(t-l) + (b1 + sum_l M_l b0). Then "delayed, zero before the document" is
the only boundary rule, and the zeros of an empty decoding state are the start of a document.

Shape suffixes: N tokens, D hidden, C = (h_q + h_k) * d channels, H heads (queries, then keys), d head size,
S tokens with their history in front.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from openzaya.kernels import functions as kernels
from openzaya.model.cache import LayerCache
from openzaya.model.config import ZayaConfig
from openzaya.model.layers import Linear, at_least_float, linear
from openzaya.model.layout import TokenLayout
from openzaya.model.paged import PagedLayer
from openzaya.model.quantised import QuantisedMatrix


class CausalConvolution(nn.Module):
    """Weight (C, channels per group, kernel) and bias (C) of one of the two convolutions."""

    def __init__(self, channels: int, channels_per_group: int, kernel: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(channels, channels_per_group, kernel))
        self.bias = nn.Parameter(torch.empty(channels))


class CCAProjection(nn.Module):
    """Hidden states (N, D) to queries (N, h_q, d), keys and values (N, h_k, d), before QK-norm and RoPE."""

    def __init__(self, config: ZayaConfig):
        super().__init__()
        self.num_query_heads, self.num_key_heads = config.num_attention_heads, config.num_key_value_heads
        self.head_dim = config.head_dim
        query_size, value_size = self.num_query_heads * self.head_dim, self.num_key_heads * self.head_dim
        self.q_proj = Linear(config.hidden_size, query_size)
        self.k_proj = Linear(config.hidden_size, value_size)
        self.v_proj_current = Linear(config.hidden_size, value_size // 2)
        self.v_proj_delayed = Linear(config.hidden_size, value_size // 2)
        self.conv_qk_depthwise = CausalConvolution(config.conv_channels, 1, config.cca_time0)
        self.conv_qk_grouped = CausalConvolution(config.conv_channels, self.head_dim, config.cca_time1)

    def forward(
        self, hidden_ND: Tensor, layout: TokenLayout, cache: LayerCache | PagedLayer | None
    ) -> tuple[Tensor, Tensor]:
        """Returns queries and keys together (N, h_q + h_k, d) and values (N, h_k, d), in fp32."""
        half_of_values = self.num_key_heads * self.head_dim // 2
        sizes = (self.conv_qk_depthwise.bias.numel(), half_of_values, half_of_values)
        z_NC, current, delayed_source = self.project(hidden_ND, layout).split(sizes, dim=-1)
        if cache is None:
            mixed_NHd = self.convolve(z_NC, layout.offset_N)
            delayed = delay(delayed_source, 1, layout.offset_N)
        else:
            z_SC, offset_S = cache.with_history(z_NC, layout)
            mixed_NHd = cache.without_history(self.convolve(z_SC, offset_S), layout)
            delayed = cache.previous_values(delayed_source, layout)
        values = torch.cat((current, delayed.to(current.dtype)), dim=-1)
        return mixed_NHd + self.mean_of_queries_and_keys(z_NC), values.unflatten(-1, (-1, self.head_dim))

    def project(self, hidden_ND: Tensor, layout: TokenLayout) -> Tensor:
        """z, the current and the not yet delayed value channels side by side, in one product; 0 at padding."""
        if layout.is_token_N is not None:
            hidden_ND = hidden_ND * layout.is_token_N[:, None]
        projections = (self.q_proj, self.k_proj, self.v_proj_current, self.v_proj_delayed)
        if isinstance(self.q_proj, QuantisedMatrix):
            return torch.cat([projection(hidden_ND) for projection in projections], dim=-1)
        return linear(hidden_ND, torch.cat([projection.weight for projection in projections]))

    def convolve(self, z_NC: Tensor, offset_N: Tensor) -> Tensor:
        """Both convolutions: (N, C) to (N, H, d) in fp32; rows with ``offset`` 0 start a document."""
        z_NC = at_least_float(z_NC)
        taps_C = at_least_float(self.conv_qk_depthwise.weight[:, 0])
        y_NC = z_NC * taps_C[:, -1]
        for lag in range(1, taps_C.shape[1]):
            y_NC = torch.addcmul(y_NC, delay(z_NC, lag, offset_N), taps_C[:, -1 - lag])

        grouped = self.conv_qk_grouped
        heads = z_NC.shape[1] // self.head_dim
        # (C, d_in, kernel) -> (kernel, H, d_in, d_out): one d x d product a head and tap.
        taps_Hdd = grouped.weight.unflatten(0, (heads, self.head_dim)).permute(3, 0, 2, 1)
        constant_Hd = at_least_float(grouped.bias).view(heads, self.head_dim) + torch.einsum(
            "khio,hi->ho", at_least_float(taps_Hdd), at_least_float(self.conv_qk_depthwise.bias).view(heads, -1)
        )
        y_NC = y_NC.to(grouped.weight.dtype)
        mixed_HNd = constant_Hd[:, None, :]
        for lag in range(taps_Hdd.shape[0]):
            y_HNd = delay(y_NC, lag, offset_N).unflatten(1, (heads, self.head_dim)).transpose(0, 1)
            mixed_HNd = mixed_HNd + at_least_float(y_HNd @ taps_Hdd[-1 - lag])
        return mixed_HNd.transpose(0, 1)

    def mixed_and_turned(
        self, hidden_ND: Tensor, layout: TokenLayout, temperature_K: Tensor, rotary: tuple[Tensor, Tensor]
    ) -> tuple[Tensor, Tensor]:
        """:meth:`forward` without a cache, QK-norm and RoPE in one pass of a kernel."""
        depthwise, grouped = self.conv_qk_depthwise, self.conv_qk_grouped
        return kernels.cca_mix(
            self.project(hidden_ND, layout),
            (depthwise.weight, depthwise.bias),
            (grouped.weight, grouped.bias),
            temperature_K,
            rotary,
            layout.offset_N,
            self.num_query_heads,
        )

    def mean_of_queries_and_keys(self, z_NC: Tensor) -> Tensor:
        """QK-mean (N, H, d) in fp32: each query with its key head, each key head with its queries' mean."""
        z_NHd = at_least_float(z_NC).unflatten(1, (-1, self.head_dim))
        queries, keys = z_NHd.split((self.num_query_heads, self.num_key_heads), dim=1)
        queries = queries.unflatten(1, (self.num_key_heads, -1))
        mean_queries = (queries + keys[:, :, None]) * 0.5
        return torch.cat((mean_queries.flatten(1, 2), (queries.mean(2) + keys) * 0.5), dim=1)


def delay(x_NC: Tensor, lag: int, offset_N: Tensor) -> Tensor:
    """Each row ``lag`` tokens late: row t holds x[t - lag], or 0 where that lies before its document."""
    if lag == 0:
        return x_NC
    shifted = torch.cat((x_NC.new_zeros(min(lag, x_NC.shape[0]), x_NC.shape[1]), x_NC[:-lag]))
    return shifted.masked_fill((offset_N < lag)[:, None], 0)
