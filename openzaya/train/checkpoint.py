"""Training checkpoints: one file a checkpoint, whole or absent, and the last few kept.

A checkpoint holds everything that decides the rest of the run: weights and balancing biases, both
optimisers, the balancer, the position in the data, counters and the random state. It is written beside its
final name, flushed to the disk and renamed, so a kill at any moment leaves either no trace of it or all of
it; older ones are removed only afterwards. The format carries a version. What other programs load is the
exported model (openzaya.save), not this file.
"""

from __future__ import annotations

import os
import pickle
import re
from pathlib import Path
from typing import Any

import torch

from openzaya.errors import CheckpointError

CHECKPOINT_FORMAT = 1
_NAME = re.compile(r"step-(\d{8})\.pt\Z")


def save_checkpoint(directory: Path, step: int, state: dict[str, Any], *, keep: int) -> Path:
    """Write ``state`` as the checkpoint of ``step`` and drop all but the last ``keep``."""
    directory.mkdir(parents=True, exist_ok=True)
    for leftover in directory.glob("*.tmp"):
        leftover.unlink()
    path = directory / f"step-{step:08d}.pt"
    temporary = path.with_suffix(".tmp")
    with temporary.open("wb") as file:
        torch.save({"openzaya_checkpoint_format": CHECKPOINT_FORMAT, "step": step, **state}, file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
    # The rename itself must survive a power cut before anything older goes.
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    for old in list_checkpoints(directory)[:-keep]:
        old.unlink()
    return path


def list_checkpoints(directory: Path) -> list[Path]:
    """Whole checkpoints, oldest first."""
    return sorted(path for path in directory.glob("step-*.pt") if _NAME.match(path.name))


def load_latest(directory: Path) -> dict[str, Any] | None:
    """The newest checkpoint's state, or None where there is none yet."""
    paths = list_checkpoints(directory)
    if not paths:
        return None
    try:
        state: dict[str, Any] = torch.load(paths[-1], map_location="cpu", weights_only=True)
    except Exception as error:
        # What torch says of an unreadable pickle is long, and advises to load it unsafely.
        is_foreign = isinstance(error, pickle.UnpicklingError)
        reason = "it holds more than tensors and plain values" if is_foreign else (str(error).splitlines() or ["?"])[0]
        raise CheckpointError(
            f"{paths[-1]} cannot be read ({type(error).__name__}: {reason}); remove it to resume from the one before"
        ) from None
    found = state.get("openzaya_checkpoint_format") if isinstance(state, dict) else None
    if found != CHECKPOINT_FORMAT:
        raise CheckpointError(
            f"{paths[-1]} has checkpoint format {found}, this version reads {CHECKPOINT_FORMAT}; "
            "resume with the version that wrote it"
        )
    return state
