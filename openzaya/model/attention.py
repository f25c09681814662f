"""The attention block: projection, QK-norm, RoPE, causal attention inside documents, output.

Only the projection differs between the kinds of attention, so each kind is one small class:
``cca`` (cca.py, the ZAYA model), ``gqa`` and ``mha`` (plain projections), ``mla`` (keys and values
from a shared latent, RoPE dimensions shared by all heads), the latter three for ablations.

QK-norm (arXiv 2605.05365): Q <- sqrt(d) Q/|Q|, K <- T_g sqrt(d) K/|K| with one learned temperature a
key head. The norm is bounded from below, without which padding rows would be 0/0.

Shape suffixes: N tokens (B rows of T), D hidden, H = h_q query heads, then h_k = K key heads, d head
size, S keys.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from openzaya.kernels import functions as kernels
from openzaya.model.cache import DecodeCache, LayerCache
from openzaya.model.cca import CCAProjection
from openzaya.model.config import ZayaConfig
from openzaya.model.layers import Linear, at_least_float, rotate
from openzaya.model.layout import TokenLayout
from openzaya.model.paged import PagedLayer


class PlainProjection(nn.Module):
    """Queries, keys and values by one matrix each: grouped-query (``gqa``) or multi-head (``mha``) attention."""

    def __init__(self, config: ZayaConfig):
        super().__init__()
        self.head_dim = config.head_dim
        self.q_proj = Linear(config.hidden_size, config.num_attention_heads * config.head_dim)
        self.k_proj = Linear(config.hidden_size, config.num_cache_heads * config.head_dim)
        self.v_proj = Linear(config.hidden_size, config.num_cache_heads * config.head_dim)

    def forward(
        self, hidden_ND: Tensor, layout: TokenLayout, cache: LayerCache | PagedLayer | None
    ) -> tuple[Tensor, Tensor]:
        queries_keys = torch.cat((self.q_proj(hidden_ND), self.k_proj(hidden_ND)), dim=-1)
        shape = (-1, self.head_dim)
        return at_least_float(queries_keys).unflatten(-1, shape), self.v_proj(hidden_ND).unflatten(-1, shape)


class LatentProjection(nn.Module):
    """Multi-head latent attention: keys (but for their RoPE part) and values come from one narrow latent."""

    def __init__(self, config: ZayaConfig):
        super().__init__()
        self.heads, self.head_dim, self.rotary_dim = config.num_attention_heads, config.head_dim, config.rotary_dim
        self.q_proj = Linear(config.hidden_size, self.heads * self.head_dim)
        self.latent_proj = Linear(config.hidden_size, config.mla_latent_size)
        self.k_rotary_proj = Linear(config.hidden_size, self.rotary_dim)
        self.k_latent_proj = Linear(config.mla_latent_size, self.heads * (self.head_dim - self.rotary_dim))
        self.v_latent_proj = Linear(config.mla_latent_size, self.heads * self.head_dim)

    def forward(
        self, hidden_ND: Tensor, layout: TokenLayout, cache: LayerCache | PagedLayer | None
    ) -> tuple[Tensor, Tensor]:
        latent = self.latent_proj(hidden_ND)
        rotary = self.k_rotary_proj(hidden_ND)[:, None, :].expand(-1, self.heads, -1)
        plain = self.k_latent_proj(latent).unflatten(-1, (self.heads, -1))
        queries = self.q_proj(hidden_ND).unflatten(-1, (self.heads, -1))
        queries_keys = torch.cat((queries, torch.cat((rotary, plain), dim=-1)), dim=1)
        return at_least_float(queries_keys), self.v_latent_proj(latent).unflatten(-1, (self.heads, -1))


PROJECTIONS = {"cca": CCAProjection, "gqa": PlainProjection, "mha": PlainProjection, "mla": LatentProjection}


class QKNorm(nn.Module):
    """Each head of queries and keys to length sqrt(d); keys times their learned temperature, used linearly.

    A temperature of 0 (the start in ``transformers``) makes all keys zero and starves the query projection
    and both convolutions of gradient, so training starts from 1.
    """

    def __init__(self, config: ZayaConfig):
        super().__init__()
        self.temp = nn.Parameter(torch.ones(config.num_cache_heads))
        self.num_query_heads = config.num_attention_heads

    def forward(self, queries_keys_NHd: Tensor) -> Tensor:
        length = torch.linalg.vector_norm(queries_keys_NHd, dim=-1, keepdim=True)
        length = length.clamp_min(torch.finfo(length.dtype).eps)
        temperatures = torch.cat((self.temp.new_ones(self.num_query_heads), self.temp)).to(length.dtype)
        return queries_keys_NHd * (queries_keys_NHd.shape[-1] ** 0.5 * temperatures[:, None] / length)


class Attention(nn.Module):
    """Hidden states (N, D) to the attention block's output (N, D)."""

    def __init__(self, config: ZayaConfig, layer_index: int):
        super().__init__()
        self.qkv_proj = PROJECTIONS[config.attention](config)
        self.qk_norm = QKNorm(config)
        self.o_proj = Linear(config.num_attention_heads * config.head_dim, config.hidden_size)
        self.num_query_heads = config.num_attention_heads
        sliding = config.layer_types[layer_index] == "hybrid_sliding"
        self.sliding_window = config.sliding_window if sliding else None

    def forward(
        self,
        hidden_ND: Tensor,
        layout: TokenLayout,
        rotary: tuple[Tensor, Tensor],
        cache: LayerCache | PagedLayer | None,
    ) -> Tensor:
        queries_keys_NHd, values_NKd = self._queries_keys_values(hidden_ND, layout, rotary, cache)
        return self.o_proj(self._attend(queries_keys_NHd, values_NKd, layout, cache))

    def _queries_keys_values(
        self,
        hidden_ND: Tensor,
        layout: TokenLayout,
        rotary: tuple[Tensor, Tensor],
        cache: LayerCache | PagedLayer | None,
    ) -> tuple[Tensor, Tensor]:
        """Projection, QK-norm and RoPE; one kernel does all three of CCA."""
        if cache is None and isinstance(self.qkv_proj, CCAProjection) and kernels.suits(hidden_ND, self.qk_norm.temp):
            return self.qkv_proj.mixed_and_turned(hidden_ND, layout, self.qk_norm.temp, rotary)
        queries_keys_NHd, values_NKd = self.qkv_proj(hidden_ND, layout, cache)
        return rotate(self.qk_norm(queries_keys_NHd), rotary).to(values_NKd.dtype), values_NKd

    def _attend(
        self, queries_keys_NHd: Tensor, values_NKd: Tensor, layout: TokenLayout, cache: LayerCache | PagedLayer | None
    ) -> Tensor:
        """The heads' outputs (N, H * d); without cache and padding, rows are documents like any others."""
        if cache is None and layout.is_token_BT is None and kernels.suits(queries_keys_NHd, values_NKd):
            lengths = layout.document_lengths or [layout.row_length] * layout.batch_size
            if kernels.suits_attention(lengths, values_NKd.shape[1]):
                return kernels.attend(queries_keys_NHd, values_NKd, lengths, self.sliding_window)
        queries_NHd, keys_NKd = queries_keys_NHd.tensor_split((self.num_query_heads,), dim=1)
        if isinstance(cache, PagedLayer):
            return attend_pages(queries_NHd, keys_NKd, values_NKd, self.sliding_window, cache)
        if layout.document_lengths is None:
            return attend_rows(queries_NHd, keys_NKd, values_NKd, layout, self.sliding_window, cache)
        return attend_documents(queries_NHd, keys_NKd, values_NKd, layout.document_lengths, self.sliding_window)


def attend_rows(
    queries_NHd: Tensor,
    keys_NKd: Tensor,
    values_NKd: Tensor,
    layout: TokenLayout,
    sliding_window: int | None,
    cache: LayerCache | None,
) -> Tensor:
    """Causal attention where every row of the batch is one document, possibly continued from a cache; (N, H*d)."""
    rows = (layout.batch_size, layout.row_length)
    queries, keys, values = (x.unflatten(0, rows).transpose(1, 2) for x in (queries_NHd, keys_NKd, values_NKd))
    start, is_token = 0, layout.is_token_BT
    if cache is not None and isinstance(layout.cache, DecodeCache):
        start = layout.cache.length
        keys, values = cache.append(keys, values, start)
        is_token = layout.cache.is_token_BS[:, : keys.shape[2]] if layout.cache.has_padding else None
    mask = causal_mask(layout.row_length, start, sliding_window, is_token, queries.device)
    output = scaled_dot_product(queries, keys, values, mask, is_causal=mask is None and layout.row_length > 1)
    return output.transpose(1, 2).flatten(2).flatten(0, 1)


def attend_pages(
    queries_NHd: Tensor, keys_NKd: Tensor, values_NKd: Tensor, sliding_window: int | None, cache: PagedLayer
) -> Tensor:
    """Causal attention of a ragged step over paged keys and values, sequences of like shape together; (N, H*d)."""
    cache.append(keys_NKd, values_NKd)
    output_NHd = torch.empty_like(queries_NHd)
    for read in cache.reads(sliding_window):
        keys_BKSd, values_BKSd = cache.gather(read, queries_NHd.dtype)
        queries_BHTd = queries_NHd[read.tokens_BT].transpose(1, 2)
        output = scaled_dot_product(queries_BHTd, keys_BKSd, values_BKSd, read.mask, read.is_causal)
        output_NHd[read.tokens_BT] = output.transpose(1, 2)
    return output_NHd.flatten(1)


def attend_documents(
    queries_NHd: Tensor,
    keys_NKd: Tensor,
    values_NKd: Tensor,
    lengths: list[int],
    sliding_window: int | None,
) -> Tensor:
    """Causal attention inside each document of a packed batch, document by document; (N, H*d).

    The work grows with the sum of squared document lengths, not with the square of the window.
    """
    outputs = []
    pieces = (x.transpose(0, 1)[None].split(lengths, dim=2) for x in (queries_NHd, keys_NKd, values_NKd))
    for queries, keys, values in zip(*pieces, strict=True):
        length = queries.shape[2]
        mask = causal_mask(length, 0, sliding_window, None, queries.device)
        output = scaled_dot_product(queries, keys, values, mask, is_causal=mask is None and length > 1)
        outputs.append(output[0].transpose(0, 1).flatten(1))
    return torch.cat(outputs)


def scaled_dot_product(queries: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None, is_causal: bool) -> Tensor:
    """softmax(Q K^T / sqrt(d)) V; each key head serves its group of query heads."""
    if queries.shape[2] == 1 and queries.device.type == "cpu":
        return _attend_one_token(queries, keys, values, mask)
    grouped = queries.shape[1] != keys.shape[1]
    return F.scaled_dot_product_attention(queries, keys, values, mask, is_causal=is_causal, enable_gqa=grouped)


def _attend_one_token(queries: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None) -> Tensor:
    """Decoding: PyTorch's fused kernel works in blocks of queries, and two plain products beat it for one query."""
    grouped_BKGd = queries[:, :, 0].unflatten(1, (keys.shape[1], -1))
    scores_BKGS = (grouped_BKGd @ keys.transpose(2, 3)).float() * queries.shape[-1] ** -0.5
    if mask is not None:
        scores_BKGS = scores_BKGS.masked_fill(~mask, float("-inf"))
    return (scores_BKGS.softmax(dim=-1).to(values.dtype) @ values).flatten(1, 2)[:, :, None]


def causal_mask(
    num_queries: int,
    start: int,
    sliding_window: int | None,
    is_token_BS: Tensor | None,
    device: torch.device,
) -> Tensor | None:
    """Which of ``start + num_queries`` keys each query may see, bool, broadcastable to (B, H, T, S).

    None where plain causal attention says it all: no padding, no window that bites, and either a whole
    prompt or a single new token.
    """
    num_keys = start + num_queries
    window_bites = sliding_window is not None and num_keys > sliding_window
    if is_token_BS is None and not window_bites and (start == 0 or num_queries == 1):
        return None
    query = torch.arange(start, num_keys, device=device)[:, None]
    key = torch.arange(num_keys, device=device)[None, :]
    allowed = key <= query
    if sliding_window is not None:
        allowed = allowed & (key > query - sliding_window)
    if is_token_BS is None:
        return allowed
    # A padding query would see no key at all, and a softmax over nothing is NaN: let it see itself.
    return (allowed & is_token_BS[:, None, None, :]) | (key == query)
