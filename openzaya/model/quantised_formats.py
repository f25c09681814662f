"""Quantised numbers: int8 or int4 weights with scales, in the memory order that the CPU kernels read.

A matrix W (N, K), or a stack of them (E, N, K), is padded with zeros to a multiple of 16 rows and 64 columns.

    int8    q = round(W / s), one fp32 scale s a row; stored as q + 128
            packed (N/16, K/4, 16, 4): one cache line holds 16 rows x 4 columns
    int4    q in -8..7, one bf16 scale for 64 columns of a row; stored as q + 8, two codes a byte
            packed (N/16, K/8, 16, 4): byte j of a row's four holds column 8c + j (low half) and 8c + 4 + j (high half)

The scale of an int4 group may be negative, so that the largest value, whatever its sign, can take the code -8. It
is the best of a few candidates by squared error, improved once by least squares; codes are rounded against the
scale as it is stored. Activations are quantised too: symmetric int8, one scale for 64 columns of a token. Integer
kernels then need only

    y_n = sum over groups g of  s_ng * a_g * (q_ng . p_g)

and :class:`QuantisedMatrix` (quantised.py) computes the same sum in fp32, on any device.

Shape suffixes: E experts, N rows, K columns, R = N/16 blocks of rows, G = K/64 groups.
"""

from __future__ import annotations

from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from openzaya.errors import CheckpointError

Format = Literal["int8", "int4"]
FORMATS: tuple[Format, ...] = get_args(Format)
ROW_BLOCK = 16
GROUP = 64

_COLUMNS_PER_LINE: dict[Format, int] = {"int8": 4, "int4": 8}
_CHUNK_WEIGHTS = 1 << 18
"""Weights quantised at a time: the temporaries stay in the second-level cache."""
_SHRINKING = (1.0, 0.92, 0.84, 0.76)
"""Candidate int4 scales, as shares of the one that just reaches the group's largest value."""
_TINY = 1e-30
"""Activations below it in a whole group count as zeros: the inverse of their scale would overflow."""


def padded_size(rows: int, columns: int) -> tuple[int, int]:
    """Rows and columns as stored."""
    return -(-rows // ROW_BLOCK) * ROW_BLOCK, -(-columns // GROUP) * GROUP


def packed_shape(format: Format, rows: int, columns: int, leading: tuple[int, ...] = ()) -> tuple[int, ...]:
    """Shape of ``packed`` (uint8) of a matrix."""
    padded_rows, padded_columns = padded_size(rows, columns)
    return (*leading, padded_rows // ROW_BLOCK, padded_columns // _COLUMNS_PER_LINE[format], ROW_BLOCK, 4)


def scales_shape(format: Format, rows: int, columns: int, leading: tuple[int, ...] = ()) -> tuple[int, ...]:
    """Shape of ``scales`` of a matrix."""
    padded_rows, padded_columns = padded_size(rows, columns)
    groups = (padded_columns // GROUP,) if format == "int4" else ()
    return (*leading, padded_rows // ROW_BLOCK, *groups, ROW_BLOCK)


def scales_dtype(format: Format) -> torch.dtype:
    """fp32 for int8 rows, bf16 for int4 groups."""
    return torch.float32 if format == "int8" else torch.bfloat16


def pack(codes_NK: Tensor, format: Format) -> Tensor:
    """int8 codes (N, K), padded already, in storage order; leading dimensions are kept."""
    *leading, rows, columns = codes_NK.shape
    shape = packed_shape(format, rows, columns, tuple(leading))
    if format == "int8":
        stored = codes_NK.contiguous().view(torch.uint8) ^ 128
    else:
        low, high = (codes_NK + 8).view(torch.uint8).unflatten(-1, (-1, 2, 4)).unbind(-2)
        stored = (low | (high << 4)).flatten(-2)
    # Four bytes travel together: move them as one number.
    lines = stored.contiguous().view(torch.int32).view(*leading, shape[-4], ROW_BLOCK, shape[-3])
    return lines.transpose(-1, -2).contiguous().view(torch.uint8).view(shape)


def unpack(packed: Tensor, format: Format) -> Tensor:
    """int8 codes (N, K), padding included, of ``packed``; the inverse of :func:`pack`."""
    by_row = packed.transpose(-3, -2)  # (..., R, 16, lines, 4)
    if format == "int8":
        codes = (by_row.contiguous() ^ 128).view(torch.int8)
    else:
        codes = torch.stack((by_row & 15, by_row >> 4), dim=-2).view(torch.int8) - 8
        codes = codes.flatten(-3, -2)
    return codes.flatten(-2).flatten(-3, -2)


def quantise_int8(weights_NK: Tensor) -> tuple[Tensor, Tensor]:
    """Codes int8 (N, K) and scales fp32 (N) of an fp32 matrix: each row's largest value becomes +-127."""
    scales_N = weights_NK.abs().amax(dim=-1) / 127
    codes_NK = (weights_NK / torch.where(scales_N > 0, scales_N, 1)[:, None]).round_().clamp_(-127, 127)
    return codes_NK.to(torch.int8), scales_N


def quantise_int4(weights_NK: Tensor) -> tuple[Tensor, Tensor]:
    """Codes int8 (N, K) and scales bf16 (N, G) of an fp32 matrix whose columns fill whole groups."""
    groups_NG64 = weights_NK.unflatten(-1, (-1, GROUP))
    low, high = groups_NG64.aminmax(dim=-1, keepdim=True)
    extreme = torch.where(high > -low, high, low)
    best_error, best_scale = _int4_error(groups_NG64, extreme / -8)
    for share in _SHRINKING[1:]:
        error, scale = _int4_error(groups_NG64, extreme * (share / -8))
        best_scale = torch.where(error < best_error, scale, best_scale)
        best_error = torch.minimum(error, best_error)
    codes = _int4_codes(groups_NG64, best_scale)
    fitted = (groups_NG64 * codes).sum(-1, keepdim=True) / codes.square().sum(-1, keepdim=True).clamp_min_(1)
    error, fitted = _int4_error(groups_NG64, fitted)
    best_scale = torch.where(error < best_error, fitted, best_scale)
    codes = _int4_codes(groups_NG64, best_scale)
    return codes.to(torch.int8).flatten(-2), best_scale[..., 0].bfloat16()


def _inverse(scale: Tensor) -> Tensor:
    return torch.where(scale.abs() > _TINY, 1 / scale, 0)


def _int4_codes(groups: Tensor, scale: Tensor) -> Tensor:
    return (groups * _inverse(scale)).round_().clamp_(-8, 7)


def _int4_error(groups: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """Root of each group's squared error under a scale, and the scale as bf16 stores it."""
    scale = scale.bfloat16().float()
    scaled = groups * _inverse(scale)
    difference = scaled.round().clamp_(-8, 7).sub_(scaled)
    return torch.linalg.vector_norm(difference, dim=-1, keepdim=True).mul_(scale.abs()), scale


def quantise_activations(x: Tensor) -> tuple[Tensor, Tensor]:
    """int8 codes (..., G, 64) and fp32 scales (..., G) of activations (..., K), padded with zeros to whole groups."""
    columns = x.shape[-1]
    padded = F.pad(x.float(), (0, -columns % GROUP)).unflatten(-1, (-1, GROUP))
    largest = padded.abs().amax(dim=-1)
    largest = torch.where(largest < _TINY, 0, largest)
    inverse = torch.where(largest == 0, 0, 127 / largest)
    codes = (padded * inverse[..., None]).round_().clamp_(-127, 127)
    return codes.to(torch.int8), largest / 127


def quantise_into(weights_NK: Tensor, packed: Tensor, scales: Tensor, format: Format) -> None:
    """Quantise one float matrix into ``packed`` and ``scales``, some rows at a time."""
    rows, columns = weights_NK.shape
    padded_rows, padded_columns = padded_size(rows, columns)
    step = max(1, _CHUNK_WEIGHTS // (ROW_BLOCK * padded_columns)) * ROW_BLOCK
    for begin in range(0, padded_rows, step):
        end = min(begin + step, padded_rows)
        chunk = weights_NK[begin:end].detach().to(device=packed.device, dtype=torch.float32)
        if chunk.shape != (end - begin, padded_columns):
            chunk = F.pad(chunk, (0, padded_columns - columns, 0, end - begin - chunk.shape[0]))
        quantise = quantise_int8 if format == "int8" else quantise_int4
        codes, chunk_scales = quantise(chunk)
        if not bool(chunk_scales.isfinite().all()):
            raise CheckpointError(
                f"weights in rows {begin} to {end - 1} are not finite or beyond the range of their scales; "
                "take an intact checkpoint"
            )
        blocks = slice(begin // ROW_BLOCK, end // ROW_BLOCK)
        packed[blocks] = pack(codes, format)
        # (rows, groups) -> (blocks, groups, 16), and (rows) -> (blocks, 16).
        by_block = chunk_scales.unflatten(0, (-1, ROW_BLOCK))
        scales[blocks] = by_block if format == "int8" else by_block.transpose(1, 2)
