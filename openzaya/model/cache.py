"""Decoding state: keys and values of every token so far, plus what the CCA needs of the last ones.

Per layer and sequence (arXiv 2510.04476): the KV cache (keys after norm, temperature and RoPE; values
after the shift), the last k0 + k1 - 2 vectors z, and the last delayed value; the latter two in fp32.
The EDA state of the router is not a time cache. Keys and values are only ever appended, so a snapshot
is the length plus the small CCA state, and restoring one is a rollback; ``select`` reorders, drops or
forks rows (N candidates of one prompt cost one prefill).

Shape suffixes: B rows, K key heads, S slots (capacity), d head size, N = B*T tokens, C channels.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from openzaya.errors import DataError
from openzaya.model.config import ZayaConfig

if TYPE_CHECKING:
    from openzaya.model.layout import TokenLayout


class LayerCache:
    """State of one layer; ``keys`` and ``values`` are (B, K, S, d), filled up to the cache's length."""

    def __init__(self, config: ZayaConfig, batch_size: int, capacity: int, device: torch.device, dtype: torch.dtype):
        kv_shape = (batch_size, config.num_cache_heads, capacity, config.head_dim)
        self.keys_BKSd = torch.zeros(kv_shape, device=device, dtype=dtype)
        self.values_BKSd = torch.zeros(kv_shape, device=device, dtype=dtype)
        history = config.cca_time0 + config.cca_time1 - 2
        delayed_size = config.num_cache_heads * config.head_dim // 2
        is_cca = config.attention == "cca"
        # Zeros are the start of a document.
        self.z_history_BLC = torch.zeros((batch_size, history, config.conv_channels) if is_cca else (batch_size, 0, 0))
        self.last_delayed_B1V = torch.zeros((batch_size, 1, delayed_size) if is_cca else (batch_size, 0, 0))
        self.z_history_BLC = self.z_history_BLC.to(device)
        self.last_delayed_B1V = self.last_delayed_B1V.to(device)

    def with_history(self, z_NC: Tensor, layout: TokenLayout) -> tuple[Tensor, Tensor]:
        """The new z behind the remembered ones, B*(L+T) rows in fp32, and each row's index in its sequence."""
        history = self.z_history_BLC.shape[1]
        z_BSC = torch.cat((self.z_history_BLC, z_NC.view(layout.batch_size, layout.row_length, -1).float()), dim=1)
        self.z_history_BLC = z_BSC[:, z_BSC.shape[1] - history :].clone()
        offset_S = torch.arange(z_BSC.shape[1], device=z_NC.device).repeat(layout.batch_size)
        return z_BSC.flatten(0, 1), offset_S

    def without_history(self, x_SHd: Tensor, layout: TokenLayout) -> Tensor:
        """Undo :meth:`with_history` on what was computed from its rows: (B*(L+T), ...) to (N, ...)."""
        history = self.z_history_BLC.shape[1]
        return x_SHd.unflatten(0, (layout.batch_size, -1))[:, history:].flatten(0, 1)

    def previous_values(self, delayed_source_NV: Tensor, layout: TokenLayout) -> Tensor:
        """The delayed value projection one token late, continued from the last call; (N, V)."""
        source_BTV = delayed_source_NV.view(layout.batch_size, layout.row_length, -1)
        shifted_BTV = torch.cat((self.last_delayed_B1V.to(source_BTV.dtype), source_BTV[:, :-1]), dim=1)
        self.last_delayed_B1V = source_BTV[:, -1:].float().clone()
        return shifted_BTV.flatten(0, 1)

    def append(self, keys_BKTd: Tensor, values_BKTd: Tensor, start: int) -> tuple[Tensor, Tensor]:
        """Write T new keys and values behind ``start`` and return all up to there, (B, K, start + T, d)."""
        end = start + keys_BKTd.shape[2]
        self.keys_BKSd[:, :, start:end] = keys_BKTd
        self.values_BKSd[:, :, start:end] = values_BKTd
        return self.keys_BKSd[:, :, :end], self.values_BKSd[:, :, :end]


@dataclass(frozen=True)
class Snapshot:
    """A point to roll back to: how many tokens there were, and each layer's CCA state at that point."""

    length: int
    layers: list[tuple[Tensor, Tensor]]
    marker: tuple[int, object]
    """Which step of which history of the cache this is: another history's keys must not be mixed in."""


class DecodeCache:
    """Decoding state of ``batch_size`` rows of equal length (shorter prompts are padded on the left)."""

    def __init__(
        self,
        config: ZayaConfig,
        batch_size: int,
        capacity: int,
        *,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ):
        device = torch.device(device)
        self.capacity = capacity
        self.length = 0
        self.layers = [LayerCache(config, batch_size, capacity, device, dtype) for _ in range(config.num_hidden_layers)]
        self.is_token_BS = torch.ones(batch_size, capacity, dtype=torch.bool, device=device)
        self.has_padding = False
        # One mark a forward pass on the way to the present content; see restore.
        self._history: list[object] = [object()]

    def begin(self, layout: TokenLayout) -> None:
        """Check that the tokens of ``layout`` fit and note which of them are padding."""
        rows = self.is_token_BS.shape[0]
        if layout.batch_size != rows:
            raise DataError(f"the cache holds {rows} rows, the batch {layout.batch_size}; make them equal")
        if self.length + layout.row_length > self.capacity:
            raise DataError(
                f"{self.length} tokens are cached and {layout.row_length} more do not fit its capacity of "
                f"{self.capacity}; create the cache with a larger capacity"
            )
        if layout.is_token_BT is not None:
            if self.length and bool((self.is_token_BS[:, self.length - 1] & ~layout.is_token_BT[:, 0]).any()):
                raise DataError(
                    f"attention_mask has padding behind the {self.length} cached tokens of a row; "
                    "pad rows on the left only, before their first token"
                )
            self.is_token_BS[:, self.length : self.length + layout.row_length] = layout.is_token_BT
            self.has_padding = True

    def advance(self, row_length: int) -> None:
        """All layers have appended ``row_length`` tokens."""
        self.length += row_length
        self._history.append(object())

    def snapshot(self) -> Snapshot:
        """Remember this point; cheap, because keys and values before it never change."""
        states = [(layer.z_history_BLC.clone(), layer.last_delayed_B1V.clone()) for layer in self.layers]
        return Snapshot(self.length, states, (len(self._history) - 1, self._history[-1]))

    def restore(self, snapshot: Snapshot) -> None:
        """Roll back to a snapshot of this cache, as often as wanted; raises :class:`DataError` for a stale one."""
        step, mark = snapshot.marker
        if step >= len(self._history) or self._history[step] is not mark:
            raise DataError(
                f"the snapshot at {snapshot.length} tokens is no point on the way to this cache's {self.length} "
                "tokens: it was rolled back behind it, its rows were changed, or it is another cache's; take a new one"
            )
        del self._history[step + 1 :]
        self.is_token_BS[:, snapshot.length :] = True
        self.length = snapshot.length
        for layer, (z_history, last_delayed) in zip(self.layers, snapshot.layers, strict=True):
            layer.z_history_BLC, layer.last_delayed_B1V = z_history.clone(), last_delayed.clone()

    def select(self, rows: Tensor) -> None:
        """Keep ``rows`` (int64), in that order; a row named several times is forked. Earlier snapshots end here."""
        self._history = [object()]
        self.is_token_BS = self.is_token_BS[rows]
        for layer in self.layers:
            layer.keys_BKSd, layer.values_BKSd = layer.keys_BKSd[rows], layer.values_BKSd[rows]
            layer.z_history_BLC, layer.last_delayed_B1V = layer.z_history_BLC[rows], layer.last_delayed_B1V[rows]
