"""Writing a checkpoint: which tensors go where, and a directory that appears whole or not at all."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from openzaya.errors import CheckpointError
from openzaya.model import hf_files
from openzaya.model.config import ZayaConfig
from openzaya.model.hf_config import LAYOUTS, Layout
from openzaya.model.hf_files import StoredTensor, TensorToWrite, file_chunks, tensor_chunks
from openzaya.model.hf_names import dtype_policy, tensor_table
from openzaya.model.hf_report import collapse_names
from openzaya.model.hf_survey import empty_model
from openzaya.model.quantised import QuantScheme

TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json")
_COPIED_SUFFIXES = (".json", ".jinja", ".model", ".txt", ".md")
_NOT_COPIED = ("config.json", hf_files.INDEX_NAME, "pytorch_model.bin.index.json")


def check_layout(layout: str, max_shard_bytes: int) -> None:
    """Refuse a layout that does not exist, and shards without room for anything."""
    if max_shard_bytes < 1:
        raise CheckpointError(f"max_shard_bytes={max_shard_bytes}, expected at least 1; the default is 5 GB")
    if layout not in LAYOUTS:
        raise CheckpointError(f"layout='{layout}', expected one of {', '.join(LAYOUTS)}")


def check_state(config: ZayaConfig, state: Mapping[str, torch.Tensor], scheme: QuantScheme | None = None) -> None:
    """Refuse a state dict that is not one of ``config`` with stored values."""
    empty = empty_model(config, scheme).state_dict()
    expected = {name: tuple(meta.shape) for name, meta in empty.items()}
    found = {name: tuple(tensor.shape) for name, tensor in state.items()}
    wrong = sorted(name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name))
    wrong += sorted(
        name
        for name, tensor in state.items()
        if hf_files.DTYPE_NAMES.get(tensor.dtype) not in hf_files.WEIGHT_DTYPES
        and not (dtype_policy(name) == "stored" and name in empty and tensor.dtype == empty[name].dtype)
    )
    wrong += sorted(name for name, tensor in state.items() if tensor.device.type == "meta")
    if wrong:
        raise CheckpointError(
            f"the model's tensors do not fit its configuration ({collapse_names(wrong)}): expected float weights "
            "of the configured shapes; save an unmodified, initialised model"
        )


@dataclass(frozen=True)
class Target:
    """One native tensor as a layout names it: one name, or one an expert, all of ``shape``."""

    native: str
    names: tuple[str, ...]
    shape: tuple[int, ...]


def targets(config: ZayaConfig, shapes: Mapping[str, tuple[int, ...]], layout: Layout) -> list[Target]:
    """Every tensor of ``shapes`` (native name -> shape) in the file order of a layout."""
    table = [spec for spec in tensor_table(config) if spec.native in shapes] if config.is_released_architecture else []
    if layout == "legacy":
        return [Target(spec.native, spec.legacy, spec.legacy_shape) for spec in table]
    names = [spec.native for spec in table] or sorted(shapes)
    return [Target(name, (name,), shapes[name]) for name in names]


def from_tensor(name: str, tensor: torch.Tensor, shape: tuple[int, ...] | None = None) -> TensorToWrite:
    """A tensor in memory under ``name``, in another shape if one is given."""
    if tensor.dtype not in hf_files.DTYPE_NAMES:
        raise CheckpointError(f"{name} has dtype {tensor.dtype}, which checkpoints cannot hold; cast it")
    dtype = hf_files.DTYPE_NAMES[tensor.dtype]
    return TensorToWrite(name, dtype, tuple(tensor.shape) if shape is None else shape, partial(tensor_chunks, tensor))


def from_state(tensor: torch.Tensor, target: Target) -> list[TensorToWrite]:
    """A native tensor in memory under the names of its target: as it is, or cut along the first dimension."""
    parts = [tensor] if len(target.names) == 1 else list(tensor)
    return [from_tensor(name, part, target.shape) for name, part in zip(target.names, parts, strict=True)]


def from_stored(sources: tuple[StoredTensor, ...], target: Target) -> list[TensorToWrite]:
    """The same bytes under the names of ``target``: renamed, concatenated or cut along the first dimension."""
    dtype, names, shape = sources[0].dtype, target.names, target.shape
    if len(sources) == len(names):
        return [
            TensorToWrite(name, stored.dtype, shape, partial(file_chunks, stored))
            for name, stored in zip(names, sources, strict=True)
        ]
    if len(names) == 1:
        return [TensorToWrite(names[0], dtype, shape, partial(_concatenated, sources))]
    size = sources[0].num_bytes // len(names)
    return [
        TensorToWrite(name, dtype, shape, partial(file_chunks, sources[0], i * size, size))
        for i, name in enumerate(names)
    ]


def _concatenated(sources: tuple[StoredTensor, ...]) -> Iterator[Any]:
    for stored in sources:
        yield from file_chunks(stored)


def generation_config(config: ZayaConfig) -> dict[str, Any]:
    """generation_config.json: the special tokens, and no opinion on sampling."""
    return {key: getattr(config, key) for key in ("bos_token_id", "eos_token_id", "pad_token_id")}


def copy_side_files(source: Path, target: Path) -> None:
    """Copy tokenizer, templates, generation settings and texts of a checkpoint; neither weights nor code."""
    for file in sorted(source.iterdir()):
        if file.is_file() and file.suffix in _COPIED_SUFFIXES and file.name not in _NOT_COPIED:
            shutil.copyfile(file, target / file.name)


def write_tokenizer(tokenizer: Any, directory: Path) -> None:
    """Save a tokenizer object, or copy tokenizer files from a directory or file, into ``directory``."""
    if tokenizer is None:
        return
    if not isinstance(tokenizer, str | Path):
        tokenizer.save_pretrained(str(directory))
        return
    source = Path(tokenizer).expanduser()
    known = {*TOKENIZER_FILES, "chat_template.jinja", "special_tokens_map.json", "added_tokens.json"}
    files = [source] if source.is_file() else [source / name for name in sorted(known) if (source / name).is_file()]
    if not files:
        raise CheckpointError(
            f"tokenizer={source}: no tokenizer files there ({', '.join(sorted(known))}); check the path"
        )
    for file in files:
        shutil.copyfile(file, directory / file.name)


class Replacing:
    """A directory beside ``path`` to write into, which takes its place when the block ends well.

    Until then an existing checkpoint stays as it is; on an error the new directory is removed.
    """

    def __init__(self, path: Path):
        self.path = path
        self.temporary = path.parent / f".{path.name}.writing-{os.getpid()}"

    def __enter__(self) -> Path:
        if self.path.exists():
            foreign = [
                entry.name
                for entry in (self.path.iterdir() if self.path.is_dir() else [self.path])
                if not entry.is_file()
                or not self.path.is_dir()
                or entry.suffix not in (*_COPIED_SUFFIXES, ".safetensors")
            ]
            named = self.path.is_dir() and (not any(self.path.iterdir()) or (self.path / "config.json").exists())
            if foreign or not named:
                raise CheckpointError(
                    f"{self.path} exists and is no checkpoint alone ({', '.join(sorted(foreign)) or 'no config.json'})"
                    ", and only a checkpoint is replaced; choose another directory"
                )
        try:
            shutil.rmtree(self.temporary, ignore_errors=True)
            self.temporary.mkdir(parents=True)
        except OSError as error:
            raise CheckpointError(
                f"{self.path}: cannot be written ({error.strerror}); choose another directory"
            ) from None
        return self.temporary

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is not None:
            shutil.rmtree(self.temporary, ignore_errors=True)
            return
        _sync_directory(self.temporary)
        previous = self.path.parent / f".{self.path.name}.replaced-{os.getpid()}"
        if self.path.exists():
            self.path.rename(previous)
        self.temporary.rename(self.path)
        _sync_directory(self.path.parent)
        shutil.rmtree(previous, ignore_errors=True)


def _sync_directory(directory: Path) -> None:
    handle = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
