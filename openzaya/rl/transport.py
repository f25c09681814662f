"""Weights from the learner to rollout processes of the same machine, through anonymous shared memory.

    publish   writes a snapshot (safetensors, with its step) into memory of its own and announces it
    pull      opens the newest snapshot and maps it; no copy is made

A snapshot is never written again: whoever has opened one holds a whole one, however long it takes, and waits for
nobody. No lock can be left behind by a process that was killed, and no name in /dev/shm: the memory goes when the last
process that holds it has ended, however it ended.
"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import safetensors.torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from openzaya.errors import ConfigError, TrainingError

if TYPE_CHECKING:
    from multiprocessing.context import BaseContext

KEPT_SNAPSHOTS = 2
"""A reader that is about to open the one before the newest still finds it."""
OPEN_TRIES = 100
OPEN_PAUSE_S = 0.05


class SharedMemoryTransport:
    """A :class:`openzaya.rl.pool.WeightTransport` between a process and its children.

    The side that was made by the constructor publishes; the copies that child processes receive pull.

    Raises:
        ConfigError: a system without anonymous shared memory (Linux has it).
    """

    def __init__(self, context: BaseContext) -> None:
        if not hasattr(os, "memfd_create"):
            raise ConfigError("rollout processes share weights as Linux does; set pipeline.workers=0 on this system")
        self._announced: Any = context.RawArray("q", [-1, -1])
        """Step and descriptor of the newest snapshot."""
        self._owner = os.getpid()
        self._snapshots: list[int] = []

    @property
    def newest_step(self) -> int:
        """Of the newest snapshot; -1 before the first."""
        return int(self._announced[0])

    def publish(self, step: int, weights: Mapping[str, Tensor]) -> None:
        """Offer the weights of learner step ``step``; they may be changed when this returns."""
        descriptor = os.memfd_create("openzaya-weights")
        contiguous = {name: tensor.detach().contiguous().cpu() for name, tensor in weights.items()}
        with open(descriptor, "wb", closefd=False) as file:
            file.write(safetensors.torch.save(contiguous, metadata={"step": str(step)}))
        self._snapshots.append(descriptor)
        self._announced[1], self._announced[0] = descriptor, step
        for old in self._snapshots[:-KEPT_SNAPSHOTS]:
            os.close(old)
        del self._snapshots[:-KEPT_SNAPSHOTS]

    def pull(self, newer_than: int) -> tuple[int, dict[str, Tensor]] | None:
        """The newest snapshot's step and weights, if it is newer; the tensors must not be written to.

        Raises:
            TrainingError: what was announced cannot be read, again and again.
        """
        problem: Exception | None = None
        for _ in range(OPEN_TRIES):
            if self.newest_step <= newer_than:
                return None
            # Between reading the announcement and opening it the snapshot may have been replaced, and its descriptor
            # even given to something else: a snapshot says by itself what it is.
            try:
                return self._open(int(self._announced[1]))
            except (OSError, SafetensorError) as error:
                problem = error
            time.sleep(OPEN_PAUSE_S)
        raise TrainingError(f"published weights cannot be read in process {os.getpid()}: {problem}")

    def _open(self, descriptor: int) -> tuple[int, dict[str, Tensor]]:
        own = os.open(f"/proc/{self._owner}/fd/{descriptor}", os.O_RDONLY)
        try:
            with safe_open(f"/proc/self/fd/{own}", framework="pt") as snapshot:
                step = (snapshot.metadata() or {}).get("step")
                if step is None:
                    raise OSError("what was opened is no snapshot of weights")
                return int(step), {name: snapshot.get_tensor(name) for name in snapshot.keys()}  # noqa: SIM118
        finally:
            os.close(own)

    def close(self) -> None:
        """Let go of all snapshots."""
        self._announced[0] = -1
        for descriptor in self._snapshots:
            os.close(descriptor)
        self._snapshots.clear()

    def __getstate__(self) -> dict[str, Any]:
        return {"_announced": self._announced, "_owner": self._owner, "_snapshots": []}
