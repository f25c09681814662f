"""Where each token of a batch stands: its document, its position, what came before it.

Inside the model a batch is one row of N = B*T tokens. A *document* is a run of tokens that may see
each other: a row of the batch, or, in packed windows, one of several runs in a row. Attention, RoPE
positions, both CCA convolutions and the CCA value shift all ask this one object about boundaries, so
a packed forward equals the separate forwards (tests/model/test_packing.py).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from openzaya.errors import DataError
from openzaya.model.cache import DecodeCache

if TYPE_CHECKING:
    from openzaya.model.paged import PagedCache


@dataclass(frozen=True)
class TokenLayout:
    """The layout of one forward pass; N = batch_size * row_length."""

    batch_size: int
    row_length: int
    positions_N: Tensor
    """int64 positions for RoPE."""
    document_lengths: list[int] | None
    """Lengths of the documents in row order; None where every row is one document."""
    offset_N: Tensor
    """int64 index of each token inside its document."""
    is_token_BT: Tensor | None
    """bool, False at left padding; None where there is none."""
    cache: DecodeCache | PagedCache | None

    @property
    def is_token_N(self) -> Tensor | None:
        return None if self.is_token_BT is None else self.is_token_BT.reshape(-1)


def make_layout(
    tokens_BT: Tensor,
    *,
    document_ids: Tensor | None = None,
    positions: Tensor | None = None,
    attention_mask: Tensor | None = None,
    cache: DecodeCache | None = None,
) -> TokenLayout:
    """Check the arguments of a forward pass against each other and derive the layout.

    Args:
        tokens_BT: int64 (B, T).
        document_ids: int (B, T); equal ids side by side in a row form a document. Positions restart at each.
        positions: int (B, T), overrides the RoPE positions.
        attention_mask: bool or 0/1 (B, T); 0 marks padding, allowed at the left end of a row only.
        cache: decoding state; the tokens continue the rows that it holds.

    Raises:
        DataError: shapes that differ, padding that is not on the left, documents together with a cache or padding.
    """
    batch_size, row_length = tokens_BT.shape
    device = tokens_BT.device
    for name, value in (("document_ids", document_ids), ("positions", positions), ("attention_mask", attention_mask)):
        if value is not None and value.shape != tokens_BT.shape:
            raise DataError(f"{name} has shape {tuple(value.shape)}, tokens {tuple(tokens_BT.shape)}; make them equal")

    if document_ids is not None:
        if cache is not None or attention_mask is not None:
            raise DataError("document_ids cannot be combined with a cache or an attention mask; pass one of them")
        lengths, offset_N = _document_runs(document_ids)
        position_N = offset_N if positions is None else positions.reshape(-1)
        return TokenLayout(batch_size, row_length, position_N, lengths, offset_N, None, None)

    is_token_BT = None
    if attention_mask is not None:
        is_token_BT = attention_mask.bool()
        if bool((is_token_BT[:, :-1] & ~is_token_BT[:, 1:]).any()):
            raise DataError("attention_mask has padding to the right of a token; pad rows on the left only")
        if bool(is_token_BT.all()):
            is_token_BT = None
    start = 0 if cache is None else cache.length
    offset_N = torch.arange(row_length, device=device).repeat(batch_size)
    position_N = offset_N + start if positions is None else positions.reshape(-1)
    return TokenLayout(batch_size, row_length, position_N, None, offset_N, is_token_BT, cache)


def _document_runs(document_ids_BT: Tensor) -> tuple[list[int], Tensor]:
    """Lengths of the runs of equal ids, row by row, and each token's index inside its run (N)."""
    starts_BT = torch.ones_like(document_ids_BT, dtype=torch.bool)
    starts_BT[:, 1:] = document_ids_BT[:, 1:] != document_ids_BT[:, :-1]
    starts_N = starts_BT.reshape(-1)
    first_of_run = starts_N.nonzero()[:, 0]
    end = torch.tensor([starts_N.numel()], device=first_of_run.device)
    lengths = torch.diff(torch.cat((first_of_run, end)))
    index_N = torch.arange(starts_N.numel(), device=starts_N.device)
    offset_N = index_N - first_of_run.repeat_interleave(lengths)
    return lengths.tolist(), offset_N
