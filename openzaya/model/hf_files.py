"""Safetensors files read and written one tensor at a time, with every byte accounted for.

A safetensors file is an 8-byte little-endian header length, a JSON header (name -> dtype, shape,
byte range) and the data. Reading here parses headers only, checks them against the file's size
(so that a truncated download is seen before anything is allocated) and then copies byte ranges into
tensors that already exist: no second copy of the weights and no mapped pages. Writing streams in the
order that the safetensors library uses (wide types first, then by name), so files are equal byte for
byte to what it would write, but no shard is ever held in memory.
"""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from openzaya.errors import CheckpointError

DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
# Types that may occur in files of others; only their width is needed, to check the header.
_OTHER_WIDTHS = {"F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1, "U16": 2, "U32": 4, "U64": 8, "C64": 8}
# Alignment rank of the safetensors library where widths are equal.
_TYPE_RANK = {
    name: rank for rank, name in enumerate(["BOOL", "U8", "I8", "I16", "F16", "BF16", "I32", "F32", "F64", "I64"])
}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
WEIGHT_DTYPES = ("F32", "BF16", "F16")
"""Stored types that a ZAYA weight may have."""

INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"
_CHUNK_BYTES = 32 << 20
_MAX_HEADER_BYTES = 100 << 20


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in a file: what it is and where its bytes are."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: Path
    offset: int
    """Absolute byte offset in ``file``."""
    num_bytes: int

    @property
    def num_elements(self) -> int:
        return _product(self.shape)


@dataclass(frozen=True)
class TensorToWrite:
    """A tensor of a file to be: its description and a producer of its bytes, in order."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    chunks: Callable[[], Iterator[Any]]

    @property
    def num_bytes(self) -> int:
        return _product(self.shape) * _width(self.dtype)


def _product(shape: tuple[int, ...]) -> int:
    result = 1
    for size in shape:
        result *= size
    return result


def _width(dtype: str) -> int:
    return DTYPES[dtype].itemsize if dtype in DTYPES else _OTHER_WIDTHS[dtype]


def main_dtype(tensors: Sequence[StoredTensor | TensorToWrite]) -> str:
    """The stored type of most bytes ("F32" for no tensors)."""
    sizes: dict[str, int] = {}
    for tensor in tensors:
        sizes[tensor.dtype] = sizes.get(tensor.dtype, 0) + tensor.num_bytes
    return max(sizes, key=lambda name: (sizes[name], name), default="F32")


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from ``path``; raises :class:`CheckpointError` for anything else."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=_unique_keys)
    except OSError as error:
        raise CheckpointError(
            f"{path.name}: cannot be read ({error.strerror}); check the path and permissions"
        ) from None
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path.name}: not valid JSON ({error}); download or write it again") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{path.name}: holds a {type(value).__name__}, expected a JSON object; write it again")
    return value


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for key, value in pairs:
        if key in result:
            raise ValueError(f"key '{key}' occurs twice")
        result[key] = value
    return result


def read_header(path: Path) -> list[StoredTensor]:
    """The tensors of one safetensors file, without their data.

    Raises:
        CheckpointError: the file is truncated, has bytes left over, or its header is no valid one.
    """

    def refuse(problem: str) -> None:
        raise CheckpointError(f"{path.name}: {problem}; download or write the file again")

    try:
        file_bytes = path.stat().st_size
        with path.open("rb") as file:
            start = file.read(8)
            if len(start) < 8:
                refuse(f"holds {file_bytes} bytes, no room for a safetensors header")
            (header_bytes,) = struct.unpack("<Q", start)
            if header_bytes > min(_MAX_HEADER_BYTES, file_bytes - 8):
                refuse(f"truncated or no safetensors file (header of {header_bytes:,} bytes, file of {file_bytes:,})")
            raw = file.read(header_bytes)
    except OSError as error:
        raise CheckpointError(
            f"{path.name}: cannot be read ({error.strerror}); check the path and permissions"
        ) from None
    try:
        header = json.loads(raw, object_pairs_hook=_unique_keys)
        header.pop("__metadata__", None)
        entries: list[tuple[int, int, str, str, tuple[int, ...]]] = []
        for name, entry in header.items():
            begin, end = map(int, entry["data_offsets"])
            entries.append((begin, end, name, str(entry["dtype"]), tuple(map(int, entry["shape"]))))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{path.name}: damaged header ({error}); download or write the file again") from None

    tensors = []
    data_start = 8 + header_bytes
    position = 0
    for begin, end, name, dtype, shape in sorted(entries):
        if dtype not in DTYPES and dtype not in _OTHER_WIDTHS:
            refuse(f"{name} has the unknown dtype {dtype}")
        if begin != position or end - begin != _product(shape) * _width(dtype) or min(shape, default=0) < 0:
            refuse(f"{name}: bytes {begin}..{end} do not fit its shape {list(shape)} {dtype} behind byte {position}")
        position = end
        tensors.append(StoredTensor(name, dtype, shape, path, data_start + begin, end - begin))
    if data_start + position > file_bytes:
        refuse(f"truncated: holds {file_bytes:,} bytes, its header promises {data_start + position:,}")
    if data_start + position < file_bytes:
        refuse(f"{file_bytes - data_start - position:,} bytes behind the last tensor")
    return tensors


def read_tensor_list(directory: Path, problems: list[str]) -> dict[str, StoredTensor]:
    """Headers of a whole checkpoint directory (one file, or shards with an index).

    Findings are appended to ``problems``; what could be read is returned.
    """
    present = {path.name for path in directory.glob("*.safetensors")}
    weight_map: dict[str, str] | None = None
    if (directory / INDEX_NAME).exists():
        try:
            weight_map = read_json(directory / INDEX_NAME).get("weight_map")
        except CheckpointError as error:
            problems.append(str(error))
            return {}
        if not isinstance(weight_map, dict) or not all(isinstance(file, str) for file in weight_map.values()):
            problems.append(f"{INDEX_NAME}: has no weight_map of names to files; download or write it again")
            return {}
        files = sorted(set(weight_map.values()))
        outside = [file for file in files if Path(file).name != file]
        if outside:
            problems.append(f"{INDEX_NAME}: names files outside the checkpoint ({', '.join(outside)}); correct it")
            return {}
        absent = [file for file in files if file not in present]
        if absent:
            problems.append(
                f"{INDEX_NAME} names {', '.join(absent)}, absent from the directory; download the missing shards"
            )
        extra = sorted(present - set(files))
        if extra:
            problems.append(
                f"{', '.join(extra)}: not named by {INDEX_NAME}; remove what does not belong to the checkpoint"
            )
        files = [file for file in files if file in present]
    elif present == {SINGLE_NAME}:
        files = [SINGLE_NAME]
    elif present:
        problems.append(
            f"{', '.join(sorted(present))} without {INDEX_NAME}: expected the index, or {SINGLE_NAME} alone; "
            "download or write the checkpoint again"
        )
        files = []
    else:
        pickles = sorted(path.name for suffix in ("bin", "pt", "pth", "ckpt") for path in directory.glob(f"*.{suffix}"))
        problems.append(
            f"pickled weights only ({', '.join(pickles)}), which can run code when read; rewrite them as safetensors"
            if pickles
            else f"no weights: neither {SINGLE_NAME} nor {INDEX_NAME} in the directory; check the path"
        )
        files = []

    tensors: dict[str, StoredTensor] = {}
    for name in files:
        try:
            found = read_header(directory / name)
        except CheckpointError as error:
            problems.append(str(error))
            continue
        for tensor in found:
            if tensor.name in tensors:
                problems.append(
                    f"{tensor.name} is in {tensors[tensor.name].file.name} and in {name}; keep it in one shard"
                )
            elif weight_map is not None and weight_map.get(tensor.name) != name:
                problems.append(
                    f"{tensor.name} is in {name}, but the index says {weight_map.get(tensor.name)}; correct the index"
                )
            tensors[tensor.name] = tensor
    return tensors


# --- reading data -------------------------------------------------------------------------------


def read_into(stored: StoredTensor, destination: torch.Tensor) -> None:
    """Copy a stored tensor into ``destination`` (same number of elements, contiguous), casting if needed."""
    if destination.dtype == DTYPES[stored.dtype] and destination.device.type == "cpu":
        with stored.file.open("rb", buffering=0) as file:
            file.seek(stored.offset)
            view = memoryview(destination.view(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]
            _read_exactly(file, view, stored)
        return
    flat = destination.view(-1)
    position = 0
    for chunk in file_chunks(stored):
        piece = torch.frombuffer(chunk, dtype=DTYPES[stored.dtype])
        flat[position : position + piece.numel()].copy_(piece)
        position += piece.numel()


def file_chunks(stored: StoredTensor, begin: int = 0, num_bytes: int | None = None) -> Iterator[bytearray]:
    """The bytes of a stored tensor (or of ``num_bytes`` of it from ``begin``), in chunks of 32 MB at most.

    A chunk is overwritten by the next one.
    """
    remaining = stored.num_bytes if num_bytes is None else num_bytes
    buffer = bytearray(min(_CHUNK_BYTES, remaining))
    with stored.file.open("rb", buffering=0) as file:
        file.seek(stored.offset + begin)
        while remaining:
            if remaining < len(buffer):
                buffer = bytearray(remaining)
            _read_exactly(file, memoryview(buffer), stored)
            yield buffer
            remaining -= len(buffer)


def _read_exactly(file: Any, view: memoryview, stored: StoredTensor) -> None:
    done = 0
    while done < len(view):
        # One read call moves at most 2 GiB.
        count = file.readinto(view[done : done + (1 << 30)])
        if not count:
            raise CheckpointError(f"{stored.file.name}: ended inside {stored.name}; the file changed while it was read")
        done += count


def read_small(stored: StoredTensor) -> torch.Tensor:
    """A stored tensor as float32 on the CPU; meant for vectors."""
    tensor = torch.empty(stored.shape, dtype=torch.float32)
    read_into(stored, tensor)
    return tensor


def same_bytes(one: StoredTensor, other: StoredTensor) -> bool:
    """True where two stored tensors have equal type, shape and data."""
    if (one.dtype, one.shape) != (other.dtype, other.shape):
        return False
    pairs = zip(file_chunks(one), file_chunks(other), strict=True)
    return all(left == right for left, right in pairs)


# --- writing ------------------------------------------------------------------------------------


def tensor_chunks(tensor: torch.Tensor) -> Iterator[Any]:
    """The bytes of a tensor on any device, in order."""
    flat = tensor.detach().contiguous().view(-1)
    step = max(1, _CHUNK_BYTES // flat.element_size())
    for begin in range(0, flat.numel(), step):
        yield flat[begin : begin + step].cpu().view(torch.uint8).numpy().data


def write_file(path: Path, tensors: list[TensorToWrite], *, alignment: int | None = None) -> None:
    """Write one safetensors file, streaming; the data is on disk when this returns.

    With an ``alignment`` the order of ``tensors`` is kept and the first one's data begins at a multiple of it.
    """
    ordered = tensors
    if alignment is None:
        ordered = sorted(tensors, key=lambda tensor: (-_TYPE_RANK[tensor.dtype], tensor.name))
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    position = 0
    for tensor in ordered:
        end = position + tensor.num_bytes
        header[tensor.name] = {"dtype": tensor.dtype, "shape": list(tensor.shape), "data_offsets": [position, end]}
        position = end
    raw = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    raw += b" " * (-(8 + len(raw)) % (alignment or 8))
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(raw)) + raw)
        for tensor in ordered:
            written = 0
            for chunk in tensor.chunks():
                written += file.write(chunk)
            if written != tensor.num_bytes:
                raise CheckpointError(f"{tensor.name}: {written} bytes came, {tensor.num_bytes} expected; try again")
        file.flush()
        os.fsync(file.fileno())


def write_sharded(
    directory: Path, tensors: list[TensorToWrite], max_shard_bytes: int, *, alignment: int | None = None
) -> list[str]:
    """Write ``tensors`` as one file, or as shards of at most ``max_shard_bytes`` with an index.

    Shards are filled in the order given, so the same list always gives the same files. A tensor
    larger than the limit gets a shard of its own. Returns the names of the files. ``alignment`` as in
    :func:`write_file`.
    """
    shards: list[list[TensorToWrite]] = [[]]
    size = 0
    for tensor in tensors:
        if shards[-1] and size + tensor.num_bytes > max_shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(tensor)
        size += tensor.num_bytes
    if len(shards) == 1:
        write_file(directory / SINGLE_NAME, shards[0], alignment=alignment)
        return [SINGLE_NAME]
    names = [f"model-{i:05d}-of-{len(shards):05d}.safetensors" for i in range(1, len(shards) + 1)]
    for name, shard in zip(names, shards, strict=True):
        write_file(directory / name, shard, alignment=alignment)
    weight_map = {tensor.name: name for name, shard in zip(names, shards, strict=True) for tensor in shard}
    index = {
        "metadata": {"total_size": sum(tensor.num_bytes for tensor in tensors)},
        "weight_map": dict(sorted(weight_map.items())),
    }
    write_json(directory / INDEX_NAME, index)
    return names


def write_json(path: Path, value: dict[str, Any]) -> None:
    """Write a JSON object, sorted and indented, and flush it to disk."""
    with path.open("w", encoding="utf-8") as file:
        file.write(json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False) + "\n")
        file.flush()
        os.fsync(file.fileno())
