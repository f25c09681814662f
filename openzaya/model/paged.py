"""Decoding state of many sequences at once: keys and values in pages, the CCA state in slots.

A *block* is a page of ``block_tokens`` consecutive tokens of one sequence, in all layers; a sequence names its
blocks in order, so its tokens may lie anywhere, and sequences that begin alike may name the same blocks. A *slot*
is the CCA state behind the last token of a running sequence: the last k0 + k1 - 2 vectors z and the last delayed
value (arXiv 2510.04476), fp32. At the end of each full block the same state is kept with the block (*snapshot*).

A step is a ragged batch: N tokens of several sequences in one row without padding, each sequence continuing its
own pages and slot. :meth:`PagedCache.begin` turns it into index tensors once; all layers use them. Nothing is
ever read that its own sequence did not write, so fresh memory need not be cleared.

Shape suffixes: N tokens of the step, P sequences in it (pieces), L history, C channels, V delayed value, K key
heads, d head size; B sequences of one read, T queries of each, S keys of each; R rows of all pages.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from openzaya.model.config import ZayaConfig
from openzaya.model.layout import TokenLayout


@dataclass(frozen=True)
class Piece:
    """A sequence's share of a step: ``num_tokens`` tokens behind ``start`` others."""

    num_tokens: int
    start: int
    slot: int
    blocks: Sequence[int]
    """At least those that hold the tokens before and in the step."""


@dataclass(frozen=True)
class Read:
    """Queries that attend together: B sequences with T tokens each, and where their keys lie."""

    tokens_BT: Tensor
    """int64 indices into the step's tokens."""
    rows_BS: Tensor
    """int64 rows of the pages; beyond a sequence's end its last row again, masked."""
    mask: Tensor | None
    """bool, broadcastable to (B, H, T, S); None where all keys are seen, or ``is_causal`` says it."""
    is_causal: bool


@dataclass(frozen=True)
class StepIndex:
    """Where the tokens of a step, and what comes before them, lie; all int64."""

    slots_P: Tensor
    rows_N: Tensor
    """Row of the pages that each token is written to."""
    offset_S: Tensor
    """Index in its piece of each row of the tokens with their history in front, N + P * L rows."""
    token_rows_N: Tensor
    history_rows_PL: Tensor
    end_rows_PL: Tensor
    """The last L rows of each piece: its next history."""
    first_P: Tensor
    last_P: Tensor
    full_blocks_F: Tensor
    """Blocks that become full in this step, with the index of their last token and their snapshot's rows."""
    full_tokens_F: Tensor
    full_rows_FL: Tensor


class PagedCache:
    """Pages, slots and snapshots of all layers.

    Args:
        num_blocks: pages of ``block_tokens`` tokens each.
        num_slots: sequences that can run at once.
        dtype: of keys and values; int8 keeps an fp32 scale a token and head beside them.
    """

    def __init__(
        self,
        config: ZayaConfig,
        num_blocks: int,
        num_slots: int,
        *,
        block_tokens: int,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ):
        self.block_tokens, self.device = block_tokens, torch.device(device)
        self.history = config.cca_time0 + config.cca_time1 - 2 if config.attention == "cca" else 0
        self.layers = [PagedLayer(self, config, num_blocks, num_slots, dtype) for _ in range(config.num_hidden_layers)]
        self.index: StepIndex
        self._pieces: Sequence[Piece] = ()
        self._reads: dict[int | None, list[Read]] = {}

    def begin(self, pieces: Sequence[Piece]) -> TokenLayout:
        """Prepare a step; the layout is what the model runs with."""
        history, block_tokens = self.history, self.block_tokens
        lengths_P = np.array([piece.num_tokens for piece in pieces])
        starts_P = np.array([piece.start for piece in pieces])
        num_pieces, num_tokens = len(pieces), int(lengths_P.sum())
        first_P = np.cumsum(lengths_P) - lengths_P
        piece_N = np.repeat(np.arange(num_pieces), lengths_P)
        positions_N = np.arange(num_tokens) + (starts_P - first_P)[piece_N]
        self._tables = block_tables(pieces, block_tokens)
        blocks_N = self._tables[piece_N, positions_N // block_tokens]
        token_rows_N = np.arange(num_tokens) + (piece_N + 1) * history
        begin_P = first_P + np.arange(num_pieces) * history
        back_L = np.arange(history)
        full_F = np.flatnonzero((positions_N + 1) % block_tokens == 0)
        self.index = StepIndex(
            slots_P=self._tensor([piece.slot for piece in pieces]),
            rows_N=self._tensor(blocks_N * block_tokens + positions_N % block_tokens),
            offset_S=self._tensor(
                np.arange(num_tokens + num_pieces * history) - np.repeat(begin_P, lengths_P + history)
            ),
            token_rows_N=self._tensor(token_rows_N),
            history_rows_PL=self._tensor(begin_P[:, None] + back_L),
            end_rows_PL=self._tensor((begin_P + lengths_P)[:, None] + back_L),
            first_P=self._tensor(first_P),
            last_P=self._tensor(first_P + lengths_P - 1),
            full_blocks_F=self._tensor(blocks_N[full_F]),
            full_tokens_F=self._tensor(full_F),
            full_rows_FL=self._tensor((token_rows_N[full_F] + 1 - history)[:, None] + back_L),
        )
        self._pieces, self._first_P, self._reads = pieces, first_P, {}
        fresh = [piece.slot for piece in pieces if piece.start == 0]
        if fresh:
            for layer in self.layers:
                # Zeros are the start of a document.
                layer.slot_z[fresh] = 0
                layer.slot_delayed[fresh] = 0
        positions = self._tensor(positions_N)
        return TokenLayout(1, num_tokens, positions, None, positions, None, self)

    def reads(self, sliding_window: int | None) -> list[Read]:
        """What this step's queries read; the same for all layers with that window."""
        if sliding_window not in self._reads:
            groups: dict[tuple[int, int], list[int]] = {}
            for number, piece in enumerate(self._pieces):
                # Single tokens go together where their numbers of keys are alike, longer pieces where they are equal.
                alike = (piece.start // self.block_tokens).bit_length() if piece.num_tokens == 1 else piece.start
                groups.setdefault((piece.num_tokens, alike), []).append(number)
            self._reads[sliding_window] = [
                self._read(numbers, length, sliding_window) for (length, _), numbers in groups.items()
            ]
        return self._reads[sliding_window]

    def _read(self, numbers: list[int], length: int, window: int | None) -> Read:
        starts_B = np.array([self._pieces[number].start for number in numbers])
        tokens_BT = self._first_P[numbers][:, None] + np.arange(length)
        first_B = np.zeros_like(starts_B) if window is None else np.maximum(starts_B + 1 - window, 0)
        last_B = starts_B + length - 1
        keys_BS = first_B[:, None] + np.arange(int((last_B - first_B).max()) + 1)
        held_BS = np.minimum(keys_BS, last_B[:, None])
        rows_BS = self._tables[np.array(numbers)[:, None], held_BS // self.block_tokens] * self.block_tokens
        rows_BS = rows_BS + held_BS % self.block_tokens
        mask, is_causal = None, False
        if length == 1:
            if bool((keys_BS > last_B[:, None]).any()):
                mask = (keys_BS <= last_B[:, None])[:, None, None, :]
        elif starts_B[0] == 0 and (window is None or window >= length):
            is_causal = True
        else:
            queries_T1, keys_1S = (starts_B[0] + np.arange(length))[:, None], keys_BS[:1]
            mask = keys_1S <= queries_T1
            if window is not None:
                mask &= keys_1S > queries_T1 - window
        return Read(
            self._tensor(tokens_BT),
            self._tensor(rows_BS),
            None if mask is None else torch.from_numpy(mask).to(self.device),
            is_causal,
        )

    def copy_block(self, source: int, target: int) -> None:
        """Copy keys, values and snapshot of all layers."""
        rows = slice(source * self.block_tokens, (source + 1) * self.block_tokens)
        into = slice(target * self.block_tokens, (target + 1) * self.block_tokens)
        for layer in self.layers:
            for pages in layer.pages:
                pages[into] = pages[rows]
            layer.block_z[target] = layer.block_z[source]
            layer.block_delayed[target] = layer.block_delayed[source]

    def copy_slot(self, source: int, target: int) -> None:
        """Copy the CCA state of all layers."""
        for layer in self.layers:
            layer.slot_z[target] = layer.slot_z[source]
            layer.slot_delayed[target] = layer.slot_delayed[source]

    def save_slot(self, slot: int, block: int) -> None:
        """Make a slot's state the snapshot of a block, full or not."""
        for layer in self.layers:
            layer.block_z[block] = layer.slot_z[slot]
            layer.block_delayed[block] = layer.slot_delayed[slot]

    def restore_slot(self, block: int, slot: int) -> None:
        """Set a slot to a block's snapshot."""
        for layer in self.layers:
            layer.slot_z[slot] = layer.block_z[block]
            layer.slot_delayed[slot] = layer.block_delayed[block]

    def _tensor(self, numbers: np.ndarray | list[int]) -> Tensor:
        return torch.as_tensor(numbers, dtype=torch.int64).to(self.device)


def block_tables(pieces: Sequence[Piece], block_tokens: int) -> np.ndarray:
    """The pieces' blocks as int64 (P, most of them), zeros behind the shorter ones."""
    counts = [-(-(piece.start + piece.num_tokens) // block_tokens) for piece in pieces]
    tables = np.zeros((len(pieces), max(counts)), dtype=np.int64)
    for row, (piece, count) in enumerate(zip(pieces, counts, strict=True)):
        tables[row, :count] = piece.blocks[:count]
    return tables


class PagedLayer:
    """One layer's pages and CCA state, with the interface of :class:`openzaya.model.cache.LayerCache` to CCA."""

    def __init__(self, cache: PagedCache, config: ZayaConfig, num_blocks: int, num_slots: int, dtype: torch.dtype):
        self.cache = cache
        num_rows, heads = num_blocks * cache.block_tokens, config.num_cache_heads
        self.dtype = dtype

        def memory(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
            return torch.empty(shape, dtype=dtype, device=cache.device)

        self.keys_RKd = memory(num_rows, heads, config.head_dim, dtype=dtype)
        self.values_RKd = memory(num_rows, heads, config.head_dim, dtype=dtype)
        self.pages = [self.keys_RKd, self.values_RKd]
        if dtype == torch.int8:
            self.key_scales_RK1, self.value_scales_RK1 = memory(num_rows, heads, 1), memory(num_rows, heads, 1)
            self.pages += [self.key_scales_RK1, self.value_scales_RK1]
        is_cca = config.attention == "cca"
        channels, delayed = (config.conv_channels, heads * config.head_dim // 2) if is_cca else (0, 0)
        self.slot_z, self.slot_delayed = memory(num_slots, cache.history, channels), memory(num_slots, delayed)
        self.block_z, self.block_delayed = memory(num_blocks, cache.history, channels), memory(num_blocks, delayed)

    def with_history(self, z_NC: Tensor, layout: TokenLayout) -> tuple[Tensor, Tensor]:
        """The new z, each sequence's behind its remembered ones, fp32 (N + P*L, C), and each row's index there."""
        index = self.cache.index
        z_SC = z_NC.new_empty(index.offset_S.shape[0], z_NC.shape[1], dtype=torch.float32)
        z_SC[index.token_rows_N] = z_NC.float()
        z_SC[index.history_rows_PL] = self.slot_z[index.slots_P]
        self.slot_z[index.slots_P] = z_SC[index.end_rows_PL]
        self.block_z[index.full_blocks_F] = z_SC[index.full_rows_FL]
        return z_SC, index.offset_S

    def without_history(self, x_SHd: Tensor, layout: TokenLayout) -> Tensor:
        """Undo :meth:`with_history` on what was computed from its rows: (N + P*L, ...) to (N, ...)."""
        return x_SHd[self.cache.index.token_rows_N]

    def previous_values(self, delayed_source_NV: Tensor, layout: TokenLayout) -> Tensor:
        """The delayed value projection one token late, each sequence's continued from its slot; (N, V)."""
        index = self.cache.index
        shifted_NV = delayed_source_NV.roll(1, dims=0)
        shifted_NV[index.first_P] = self.slot_delayed[index.slots_P].to(shifted_NV.dtype)
        self.slot_delayed[index.slots_P] = delayed_source_NV[index.last_P].float()
        self.block_delayed[index.full_blocks_F] = delayed_source_NV[index.full_tokens_F].float()
        return shifted_NV

    def append(self, keys_NKd: Tensor, values_NKd: Tensor) -> None:
        """Write the step's keys and values into the pages."""
        rows_N = self.cache.index.rows_N
        if self.dtype == torch.int8:
            self.keys_RKd[rows_N], self.key_scales_RK1[rows_N] = to_int8(keys_NKd)
            self.values_RKd[rows_N], self.value_scales_RK1[rows_N] = to_int8(values_NKd)
        else:
            self.keys_RKd[rows_N] = keys_NKd.to(self.dtype)
            self.values_RKd[rows_N] = values_NKd.to(self.dtype)

    def reads(self, sliding_window: int | None) -> list[Read]:
        return self.cache.reads(sliding_window)

    def gather(self, read: Read, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Keys and values of a read, each (B, K, S, d) in ``dtype``."""
        keys_BSKd, values_BSKd = self.keys_RKd[read.rows_BS], self.values_RKd[read.rows_BS]
        if self.dtype == torch.int8:
            keys_BSKd = keys_BSKd * self.key_scales_RK1[read.rows_BS]
            values_BSKd = values_BSKd * self.value_scales_RK1[read.rows_BS]
        return keys_BSKd.to(dtype).transpose(1, 2), values_BSKd.to(dtype).transpose(1, 2)


def to_int8(x_NKd: Tensor) -> tuple[Tensor, Tensor]:
    """x as int8 (N, K, d) times an fp32 scale (N, K, 1), which is the largest absolute value over 127."""
    x_NKd = x_NKd.float()
    scales_NK1 = x_NKd.abs().amax(dim=-1, keepdim=True) / 127
    # All-zero heads have scale 0, and 0/0 must not become a number that cannot be stored.
    return (x_NKd / scales_NK1.clamp_min(1e-30)).round().to(torch.int8), scales_NK1
