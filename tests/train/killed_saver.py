"""Saves checkpoints in child processes that are killed while they write; prints what each kill left, as JSON lines.

Run as a program with a directory. Each child goes on from the newest checkpoint, as a training process would, and
is killed with SIGKILL at a chosen point of its second save (by itself, so that the point is exact) or at a random
moment (by the parent).
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from openzaya.train import checkpoint

NUM_VALUES = 400_000
KEEP = 2


def state_of(step: int) -> dict[str, Any]:
    """A state in which every value says which step it belongs to."""
    return {"weights": {"a": torch.full((NUM_VALUES,), float(step)), "b": torch.full((NUM_VALUES,), float(step))}}


def is_whole(state: dict[str, Any]) -> bool:
    weights, step = state["weights"], state["step"]
    return all(weights[name].shape == (NUM_VALUES,) and bool((weights[name] == step).all()) for name in "ab")


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


class KillingFile:
    """A file that kills its process once ``limit`` bytes have been written."""

    def __init__(self, file: Any, limit: int):
        self.file, self.left = file, limit

    def write(self, data: bytes) -> int:
        if len(data) >= self.left:
            self.file.write(memoryview(data)[: self.left])
            self.file.flush()
            die()
        self.left -= len(data)
        return int(self.file.write(data))

    def __getattr__(self, name: str) -> Any:
        return getattr(self.file, name)


def killed_after(share: float) -> Callable[[], None]:
    """Kills inside torch.save when this share of the file is written."""

    def plant() -> None:
        plain_save = torch.save
        size = 2 * 4 * NUM_VALUES
        torch.save = lambda value, file: plain_save(value, KillingFile(file, max(1, int(share * size))))

    return plant


def killed_at(owner: Any, name: str) -> Callable[[], None]:
    """Kills in place of the call ``owner.name``."""
    return lambda: setattr(owner, name, lambda *args, **kwargs: die())


def run_child(directory: Path, plant: Callable[[], None] | None) -> None:
    state = checkpoint.load_latest(directory)
    step = 0 if state is None else state["step"]
    checkpoint.save_checkpoint(directory, step + 1, state_of(step + 1), keep=KEEP)
    if plant is not None:
        plant()
    while True:
        step += 1
        checkpoint.save_checkpoint(directory, step + 1, state_of(step + 1), keep=KEEP)


def main(directory: Path) -> None:
    # A pool of threads does not survive a fork.
    torch.set_num_threads(1)
    draw = random.Random(0)
    kills: list[tuple[str, Callable[[], None] | None]] = [
        (f"inside torch.save at {share}", killed_after(share))
        for share in (0.0, 0.01, 0.1, 0.25, 0.4, 0.5, 0.6, 0.75, 0.9, 0.99, 1.0)
    ]
    kills += [("before fsync", killed_at(os, "fsync")), ("before the rename", killed_at(os, "replace"))]
    kills += [("before the removal", killed_at(Path, "unlink"))]
    kills += [("at a random moment", None)] * 8
    for name, plant in kills:
        child = os.fork()
        if child == 0:
            try:
                run_child(directory, plant)
            finally:
                os._exit(3)
        if plant is None:
            newest = checkpoint.list_checkpoints(directory)[-1].name
            while checkpoint.list_checkpoints(directory)[-1].name == newest:
                time.sleep(0.001)
            time.sleep(draw.uniform(0.0, 0.03))
            os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        state = checkpoint.load_latest(directory)
        result = {
            "kill": name,
            "was_killed": os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL,
            "step": None if state is None else state["step"],
            "is_whole": state is not None and is_whole(state),
            "num_checkpoints": len(checkpoint.list_checkpoints(directory)),
            "leftover_bytes": [path.stat().st_size for path in directory.glob("*.tmp")],
        }
        print(json.dumps(result), flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
