"""Checkpoints of quantised models: the "openzaya" layout with packed matrices, made by streaming, opened by mapping.

config.json holds ``quantisation``: a version and the format of each kind of matrix. A quantised matrix ``name`` is
stored as ``name.packed`` and ``name.scales`` (quantised_formats.py), everything else as in any checkpoint.

Writing reads some rows of a float matrix at a time, quantises them and writes their codes; the scales, a small
share, wait in memory until the codes of their matrix are out. Codes and scales come first in a file and begin at
multiples of 64 bytes, so that a mapped file has the alignment the kernels like.

Mapping is private: pages are read when they are touched, shared with other processes, and copied if written to; the
file never changes. A file that is replaced as ``save`` and ``convert`` do it stays intact for those who have it open.
"""

from __future__ import annotations

import mmap
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from torch import Tensor

from openzaya.errors import CheckpointError
from openzaya.model import hf_files
from openzaya.model.hf_files import StoredTensor, TensorToWrite
from openzaya.model.hf_names import dtype_policy
from openzaya.model.quantised import QuantScheme, Slot
from openzaya.model.quantised_formats import ROW_BLOCK, packed_shape, quantise_into, scales_dtype, scales_shape

QUANTISATION_VERSION = 1
"""Version of the formats that this code writes, and the newest that it reads."""
ALIGNMENT = 64
_PIECE_BYTES = 32 << 20
"""Float weights in memory at a time (as fp32)."""

Progress = Callable[[int, int, float], None]
"""Called with weights done, weights in all, and seconds since the start."""


def read_scheme(raw: Mapping[str, Any]) -> QuantScheme | None:
    """The scheme in a parsed config.json; None for a float model.

    Raises:
        CheckpointError: a newer version, or values that are not understood.
    """
    if "quantisation" not in raw:
        return None
    entry = raw["quantisation"]
    version = entry.get("version") if isinstance(entry, dict) else None
    if not isinstance(version, int) or isinstance(version, bool) or version < 1:
        raise CheckpointError(f"config.json: quantisation={entry!r:.80}, expected a 'version'; write it again")
    if version > QUANTISATION_VERSION:
        raise CheckpointError(
            f"config.json: quantisation version {version}, this version reads up to {QUANTISATION_VERSION}; "
            "upgrade openzaya"
        )
    try:
        scheme = QuantScheme(**{key: value for key, value in entry.items() if key != "version"})
    except (ValidationError, TypeError):
        raise CheckpointError(
            f"config.json: quantisation={entry!r:.200}, expected one of int8, int4, float for each of "
            f"{', '.join(QuantScheme.model_fields)}; upgrade openzaya, or convert the original again"
        ) from None
    if set(scheme.model_dump().values()) == {"float"}:
        raise CheckpointError("config.json: 'quantisation' quantises nothing; remove it")
    return scheme


def write_scheme(scheme: QuantScheme) -> dict[str, Any]:
    """The inverse of :func:`read_scheme`."""
    return {"version": QUANTISATION_VERSION, **scheme.model_dump()}


def already_quantised(scheme: QuantScheme) -> str:
    """Why a quantised checkpoint is not quantised again."""
    return (
        f"it is quantised already ({scheme}); quantising its rounded weights again would add error: take the original "
        "weights"
    )


def check_stored_types(state: Mapping[str, Tensor], stored: Mapping[str, StoredTensor]) -> list[str]:
    """Problems with the types of packed codes and scales."""
    problems = []
    for name, meta in state.items():
        found = stored.get(name)
        if dtype_policy(name) == "stored" and found is not None and found.dtype != hf_files.DTYPE_NAMES[meta.dtype]:
            problems.append(
                f"{name} is stored as {found.dtype}, its format asks for {hf_files.DTYPE_NAMES[meta.dtype]}; "
                "convert the original again"
            )
    return problems


# --- writing --------------------------------------------------------------------------------------


class QuantisedSource:
    """Quantises one matrix, or a stack, from where its float form is stored, piece by piece, in file order.

    ``packed`` and ``scales`` describe the tensors to write, in this order: scales exist when codes have been made.
    """

    def __init__(self, slot: Slot, stored: Sequence[StoredTensor], on_weights: Callable[[int], None]):
        *leading, rows, columns = slot.shape
        self.slot, self.stored, self.columns = slot, stored, columns
        self.on_weights = on_weights
        self._scales: list[Tensor] = []
        shape = (slot.format, rows, columns, tuple(leading))
        scales_name = hf_files.DTYPE_NAMES[scales_dtype(slot.format)]
        self.packed = TensorToWrite(f"{slot.name}.packed", "U8", packed_shape(*shape), self._packed_chunks)
        self.scales = TensorToWrite(f"{slot.name}.scales", scales_name, scales_shape(*shape), self._scales_chunks)

    def _packed_chunks(self) -> Iterator[Any]:
        self._scales = []
        for piece in float_pieces(self.slot, self.stored):
            shape = (self.slot.format, piece.shape[0], self.columns)
            packed = torch.empty(packed_shape(*shape), dtype=torch.uint8)
            scales = torch.empty(scales_shape(*shape), dtype=scales_dtype(self.slot.format))
            _quantise_piece(self.slot, piece, packed, scales)
            self._scales.append(scales)
            self.on_weights(piece.numel())
            yield from hf_files.tensor_chunks(packed)

    def _scales_chunks(self) -> Iterator[Any]:
        scales, self._scales = self._scales, []
        for part in scales:
            yield from hf_files.tensor_chunks(part)


def float_pieces(slot: Slot, stored: Sequence[StoredTensor]) -> Iterator[Tensor]:
    """A stored float matrix, or the matrices of a stack in order, cut into whole blocks of rows."""
    rows, columns = slot.shape[-2:]
    step = max(1, _PIECE_BYTES // (4 * columns * ROW_BLOCK)) * ROW_BLOCK
    for source in stored:
        dtype = hf_files.DTYPES[source.dtype]
        row_bytes = columns * dtype.itemsize
        for first in range(0, source.num_bytes, rows * row_bytes):
            for begin in range(0, rows, step):
                count = min(step, rows - begin)
                piece = replace(
                    source,
                    shape=(count, columns),
                    offset=source.offset + first + begin * row_bytes,
                    num_bytes=count * row_bytes,
                )
                tensor = torch.empty(piece.shape, dtype=dtype)
                hf_files.read_into(piece, tensor)
                yield tensor


def quantise_stored(slot: Slot, stored: Sequence[StoredTensor], packed: Tensor, scales: Tensor) -> None:
    """Quantise a stored float matrix, or a stack, into ``packed`` and ``scales``, a piece at a time.

    Raises:
        CheckpointError: weights that are not finite, or a file that ends early.
    """
    num_leading = len(slot.shape) - 2
    blocks, block_scales = (
        tensor.view(-1, *tensor.shape[num_leading + 1 :]) for tensor in (packed, scales)
    )  # (all row blocks of all matrices, ...): pieces end where blocks end, so they follow one another
    begin = 0
    for piece in float_pieces(slot, stored):
        end = begin + -(-piece.shape[0] // ROW_BLOCK)
        _quantise_piece(slot, piece.to(packed.device), blocks[begin:end], block_scales[begin:end])
        begin = end


def _quantise_piece(slot: Slot, piece: Tensor, packed: Tensor, scales: Tensor) -> None:
    try:
        quantise_into(piece, packed, scales, slot.format)
    except CheckpointError as error:
        raise CheckpointError(f"{slot.source}: {error}") from None


class Counting:
    """Adds up weights and reports them, at most a few times a second."""

    def __init__(self, total: int, progress: Progress | None):
        self.done, self.total, self.progress = 0, total, progress
        self.start = self.last = time.monotonic()

    def __call__(self, weights: int) -> None:
        self.done += weights
        now = time.monotonic()
        if self.progress is not None and (now - self.last > 0.3 or self.done == self.total):
            self.last = now
            self.progress(self.done, self.total, now - self.start)


def quantised_pair(
    slot: Slot, sources: Mapping[str, tuple[StoredTensor, ...]], on_weights: Callable[[int], None]
) -> tuple[TensorToWrite, TensorToWrite]:
    """Codes and scales of one matrix to write: copied where ``sources`` holds them, else made from its float form."""
    names = (f"{slot.name}.packed", f"{slot.name}.scales")
    if names[0] not in sources:
        made = QuantisedSource(slot, sources[slot.source], on_weights)
        return made.packed, made.scales
    packed, scales = (
        TensorToWrite(name, stored.dtype, stored.shape, partial(hf_files.file_chunks, stored))
        for name, stored in ((name, sources[name][0]) for name in names)
    )
    return packed, scales


def write_tensors(
    directory: Path,
    pairs: Sequence[tuple[TensorToWrite, TensorToWrite]],
    others: Sequence[TensorToWrite],
    max_shard_bytes: int,
) -> None:
    """Write the tensors of a checkpoint; where there are ``pairs`` (codes and scales), aligned and they first.

    Behind them comes what else fills whole lines of 64 bytes, then the rest, wide types first.
    """
    if not pairs:
        hf_files.write_sharded(directory, list(others), max_shard_bytes)
        return
    first = [tensor for pair in pairs for tensor in pair if not tensor.num_bytes % ALIGNMENT]
    rest = [*others, *(scales for _, scales in pairs if scales.num_bytes % ALIGNMENT)]
    rest.sort(key=lambda tensor: (tensor.num_bytes % ALIGNMENT != 0, -hf_files.DTYPES[tensor.dtype].itemsize))
    hf_files.write_sharded(directory, [*first, *rest], max_shard_bytes, alignment=ALIGNMENT)


# --- opening --------------------------------------------------------------------------------------


class Mapper:
    """Stored tensors as views into privately mapped files; each file is mapped once."""

    def __init__(self) -> None:
        self._files: dict[Path, mmap.mmap] = {}

    def tensor(self, stored: StoredTensor) -> Tensor:
        """The tensor without a copy: pages are read when they are touched."""
        dtype = hf_files.DTYPES[stored.dtype]
        if stored.offset % dtype.itemsize or not stored.num_bytes:
            tensor = torch.empty(stored.shape, dtype=dtype)
            hf_files.read_into(stored, tensor)
            return tensor
        mapped = self._files.get(stored.file)
        if mapped is None:
            try:
                with stored.file.open("rb") as file:
                    mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
            except OSError as error:
                raise CheckpointError(
                    f"{stored.file.name}: cannot be mapped into memory ({error.strerror}); copy it to a local disk"
                ) from None
            self._files[stored.file] = mapped
        if stored.offset + stored.num_bytes > len(mapped):
            raise CheckpointError(f"{stored.file.name}: ended inside {stored.name}; the file changed while it was read")
        return torch.frombuffer(mapped, dtype=dtype, count=stored.num_elements, offset=stored.offset).view(stored.shape)


def describe(slots: Sequence[Slot], scheme: QuantScheme, stored: Mapping[str, StoredTensor]) -> dict[str, Any]:
    """What ``inspect`` says of a quantised checkpoint: formats, bits a weight with scales and padding, bytes."""

    def num_bytes(slot: Slot) -> int:
        names = (f"{slot.name}.packed", f"{slot.name}.scales")
        return sum(stored[name].num_bytes for name in names if name in stored)

    formats: dict[str, dict[str, Any]] = {}
    for slot in slots:
        entry = formats.setdefault(slot.format, {"matrices": 0, "weights": 0, "bytes": 0})
        entry["matrices"] += 1
        entry["weights"] += torch.Size(slot.shape).numel()
        entry["bytes"] += num_bytes(slot)
    for entry in formats.values():
        entry["bits_per_weight"] = round(8 * entry["bytes"] / max(1, entry["weights"]), 3)
    return {"version": QUANTISATION_VERSION, "scheme": str(scheme), **scheme.model_dump(), "formats": formats}
