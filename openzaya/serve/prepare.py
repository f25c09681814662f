"""The checkpoint that a server is to load: downloaded, and quantised once into the cache, if asked for.

A quantised copy lies in ``$OPENZAYA_CACHE/models`` (default ``~/.cache/openzaya/models``) under the model's name, the
scheme and a digest of the files it was made from, so that a checkpoint that was trained further gets a copy of its
own. A copy appears under its name only when it is whole.
"""

from __future__ import annotations

import contextlib
import hashlib
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

from openzaya.errors import ConfigError
from openzaya.kernels.build import cache_directory
from openzaya.model import hf
from openzaya.model.hub import resolve
from openzaya.model.quantised import QuantScheme

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

Progress = Callable[[int, int, float], None]


def quantised_path(model: str, directory: Path, scheme: QuantScheme) -> Path:
    """Where the quantised copy of a checkpoint belongs, whether it is there or not."""
    digest = hashlib.sha256()
    # What a snapshot of the hub holds are links; the files behind them tell when it changes.
    for file in sorted(directory.iterdir()):
        if file.suffix in (".safetensors", ".json"):
            facts = file.stat()
            digest.update(f"{file.name} {facts.st_size} {facts.st_mtime_ns}\n".encode())
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", model).strip("-.") or "model"
    form = re.sub(r"[^a-z0-9]+", "-", str(scheme))
    try:
        home = cache_directory()
    except RuntimeError as error:
        raise ConfigError(f"no cache directory ({error}); name one in OPENZAYA_CACHE") from None
    return home / "models" / f"{name[-80:]}-{form}-{digest.hexdigest()[:16]}"


def prepare(model: str, quantize: str | None, progress: Progress | None = None) -> Path:
    """The directory to load: the checkpoint itself, or its quantised copy, made now unless it is there.

    Raises:
        CheckpointError, ConfigError: no such checkpoint, an unknown scheme, or one that is quantised already.
    """
    scheme = None if quantize is None else QuantScheme.parse(quantize)
    directory = resolve(model)
    if scheme is None:
        return directory
    copy = quantised_path(model, directory, scheme)
    if not (copy / "config.json").is_file():
        with _alone(copy):
            if not (copy / "config.json").is_file():
                hf.convert(directory, copy, quantize=scheme, progress=progress)
    return copy


@contextlib.contextmanager
def _alone(copy: Path) -> Iterator[None]:
    """One process at a time makes ``copy``; the others wait. What a killed one left behind is removed."""
    try:
        copy.parent.mkdir(parents=True, exist_ok=True)
        lock = (copy.parent / f".{copy.name}.lock").open("w")
    except OSError as error:
        raise ConfigError(
            f"{copy.parent}: cannot be written ({error.strerror}); name another directory in OPENZAYA_CACHE"
        ) from None
    with lock:
        if fcntl is not None:
            # The system lets go of it when the process ends, however it ends.
            fcntl.flock(lock, fcntl.LOCK_EX)
            for left in copy.parent.glob(f".{copy.name}.writing-*"):
                shutil.rmtree(left, ignore_errors=True)
        yield
