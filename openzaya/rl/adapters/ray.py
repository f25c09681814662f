"""Rollout workers as Ray actors, on as many machines as the Ray cluster has (extra ``ray``).

    weights   an actor of its own, the board, holds the reference of the newest; Ray's object store moves them
    orders    handed out and taken back as in a pool of processes (orders.py)
    beats     an actor that is judging says so on the board: a call may take long, a single verdict may not
    deaths    an actor that is gone, neither answers nor beats for ``hang_limit_s``, or has an engine that makes no step
              while that long is waited for it, is replaced; its orders go out again

An actor is asked to advance, again and again: it takes orders and the newest weights, waits a moment for groups, and
returns those that are finished; its engine goes on between two calls. The learner asks whenever it submits, publishes
or collects. ``RAY_ADDRESS`` names the cluster; without it one is started on this machine, and ended with the pool.
"""

from __future__ import annotations

import contextlib
import math
import os
import pickle
import signal
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from openzaya.errors import ConfigError, OpenZayaError, TrainingError
from openzaya.rl.orders import OrderBook
from openzaya.rl.pool import RolloutEngine
from openzaya.rl.rollout import Group, Order
from openzaya.rl.worker import BEAT_S, WorkerSetup, make_engine

try:
    import ray
except ImportError as error:
    raise ConfigError(f"pipeline.pool='ray' needs Ray ({error}); pip install 'openzaya[ray]'") from None

HANG_LIMIT_S = 300.0
"""Longest time that a call to an actor may take without a beat, its start included, and that calls may wait for an
engine's next step."""
ADVANCE_S = 0.5
"""How long an actor waits for a group in one call."""
MAX_FAILED_STARTS = 5
"""Actors that end before they have answered once, with no group finished in between."""


class _Board:
    """Holds the reference of the newest weights and the time of each worker's last beat; an actor."""

    def __init__(self) -> None:
        self._step, self._reference = -1, None
        self._beats_s: dict[int, float] = {}

    def post(self, step: int, reference: list[Any]) -> None:
        self._step, self._reference = step, reference[0]

    def newest(self, newer_than: int) -> tuple[int, list[Any]] | None:
        return (self._step, [self._reference]) if self._step > newer_than else None

    def beat(self, number: int) -> None:
        self._beats_s[number] = time.monotonic()

    def silence_s(self, number: int) -> float:
        return time.monotonic() - self._beats_s.get(number, -math.inf)


class RayTransport:
    """A :class:`openzaya.rl.pool.WeightTransport` through Ray's object store; copies in actors pull."""

    def __init__(self) -> None:
        self._board: Any = ray.remote(num_cpus=0)(_Board).remote()

    def publish(self, step: int, weights: Mapping[str, Tensor]) -> None:
        """Copy the weights into the object store and announce them."""
        # In a list: a bare reference would be resolved, and the board would hold weights instead.
        ray.get(self._board.post.remote(step, [ray.put({name: tensor.cpu() for name, tensor in weights.items()})]))

    def pull(self, newer_than: int) -> tuple[int, Mapping[str, Tensor]] | None:
        found = ray.get(self._board.newest.remote(newer_than))
        return None if found is None else (found[0], ray.get(found[1][0]))

    def beat(self, number: int) -> None:
        """Actor ``number`` makes progress; returns at once."""
        self._board.beat.remote(number)

    def silence_s(self, number: int) -> float:
        """Seconds since the last beat of actor ``number``."""
        return ray.get(self._board.silence_s.remote(number))

    def close(self) -> None:
        """End the board."""
        ray.kill(self._board)


class _Actor:
    """One rollout worker; ``number`` is nobody else's."""

    def __init__(self, setup: bytes, transport: RayTransport, number: int, hang_limit_s: float) -> None:
        self._transport, self._number, self._hang_limit_s = transport, number, hang_limit_s
        self._num_steps, self._waited_s = -1, 0.0
        self._last_beat_s = 0.0
        self._setup: WorkerSetup = pickle.loads(setup)
        self._step = -1
        self._engine: RolloutEngine | None = None

    def advance(self, orders: Sequence[Order], timeout_s: float) -> list[Group]:
        """Begin ``orders``, with the newest weights; groups that are finished, after ``timeout_s`` none."""
        newer = self._transport.pull(self._step)
        if newer is not None:
            self._step, weights = newer
            if self._engine is None:
                self._engine = make_engine(self._setup, self._step, weights, self._beat)
            else:
                self._engine.update_weights(self._step, weights)
        assert self._engine is not None
        self._engine.start(orders)
        if not self._engine.num_in_flight:
            return []
        began_s = time.monotonic()
        groups = self._engine.finished(timeout_s)
        self._watch(self._engine.num_steps, bool(groups), time.monotonic() - began_s)
        return groups

    def _watch(self, num_steps: int, has_groups: bool, seconds: float) -> None:
        """Raises ``TimeoutError`` for an engine that stands still: the calls themselves keep returning."""
        # Only time spent waiting counts: between two calls the learner may be busy for long.
        self._waited_s = self._waited_s + seconds if num_steps == self._num_steps and not has_groups else 0.0
        self._num_steps = num_steps
        if self._waited_s > self._hang_limit_s:
            raise TimeoutError(f"its engine made no step in {self._waited_s:.0f} s")

    def _beat(self) -> None:
        if time.monotonic() - self._last_beat_s >= BEAT_S:
            self._last_beat_s = time.monotonic()
            self._transport.beat(self._number)


@dataclass
class _Place:
    """One of the pool's actors and its successors."""

    index: int
    actor: Any = None
    number: int = -1
    """The actor's."""
    call: Any = None
    """The reference of what :meth:`_Actor.advance` is to return."""
    called_at_s: float = 0.0
    has_answered: bool = False


class RayPool:
    """A :class:`openzaya.rl.pool.RolloutPool` of ``num_workers`` actors.

    Raises:
        ConfigError: no Ray, or a cluster that does not answer.
    """

    def __init__(
        self,
        setup: WorkerSetup,
        num_workers: int,
        *,
        step: int,
        weights: Mapping[str, Tensor],
        hang_limit_s: float = HANG_LIMIT_S,
    ) -> None:
        self._owns_cluster = not ray.is_initialized()
        if self._owns_cluster:
            try:
                with _own_signals():
                    ray.init(**_cluster(num_workers * setup.threads))
            except Exception as error:
                raise ConfigError(f"Ray does not start ({error}); see RAY_ADDRESS, or choose another pool") from None
        self._resources = resources_of(setup)
        # Ray shows an actor its own GPU alone, as the first one.
        self._setup = pickle.dumps(replace(setup, device=torch.device(setup.device).type))
        self._hang_limit_s = hang_limit_s
        self._book = OrderBook(num_workers, setup.rollout.max_running)
        self._places = [_Place(index) for index in range(num_workers)]
        self._failed_starts = self._num_restarts = self._num_actors = 0
        self._is_closed = False
        self._transport = RayTransport()
        self._transport.publish(step, weights)
        for place in self._places:
            self._start(place)

    def publish(self, step: int, weights: Mapping[str, Tensor]) -> None:
        self._transport.publish(step, weights)
        self._look(0)

    def submit(self, orders: Sequence[Order]) -> None:
        self._book.submit(orders)
        self._look(0)

    def collect(self, timeout_s: float | None = None) -> list[Group]:
        """See :class:`openzaya.rl.pool.RolloutPool`; nothing at once where no order is outstanding."""
        until_s = float("inf") if timeout_s is None else time.monotonic() + timeout_s
        while self._book.outstanding():
            self._look(min(ADVANCE_S, max(0.0, until_s - time.monotonic())))
            if self._book.has_arrivals or time.monotonic() >= until_s:
                break
        return self._book.collect()

    def outstanding(self) -> list[Order]:
        return self._book.outstanding()

    def metrics(self) -> dict[str, float]:
        """Restarts and orders issued again since the pool was made."""
        return {
            "rollout/restarts": float(self._num_restarts),
            "rollout/reissued_orders": float(self._book.num_reissued),
            "rollout/duplicate_groups": float(self._book.num_duplicates),
        }

    def close(self) -> None:
        """End the actors, and the cluster where this pool has started it."""
        if self._is_closed:
            return
        self._is_closed = True
        for place in self._places:
            ray.kill(place.actor)
        self._transport.close()
        if self._owns_cluster:
            ray.shutdown()

    # --- actors -----------------------------------------------------------------------------------

    def _start(self, place: _Place) -> None:
        settings: dict[str, Any] = {**self._resources, "max_restarts": 0, "max_task_retries": 0}
        place.number = self._num_actors
        self._num_actors += 1
        place.actor = ray.remote(**settings)(_Actor).remote(
            self._setup, self._transport, place.number, self._hang_limit_s
        )
        place.has_answered = False
        self._call(place, [])

    def _call(self, place: _Place, orders: list[Order]) -> None:
        place.call = place.actor.advance.remote(orders, ADVANCE_S)
        place.called_at_s = time.monotonic()

    def _look(self, timeout_s: float) -> None:
        """Take what actors have returned, replace those that are gone, and ask all of them to go on."""
        ray.wait([place.call for place in self._places], num_returns=1, timeout=timeout_s)
        for place in self._places:
            if ray.wait([place.call], timeout=0)[0]:
                self._answered(place)
            elif (silence_s := self._silence_s(place)) > self._hang_limit_s:
                self._lost(place, f"showed no progress for {silence_s:.0f} s")
        idle = [place for place in self._places if place.call is None]
        given = self._book.hand_out([place.index for place in idle])
        for place in idle:
            self._call(place, given.get(place.index, []))

    def _silence_s(self, place: _Place) -> float:
        """Since the actor was called, or since its last beat; the board is asked only where that decides."""
        waited_s = time.monotonic() - place.called_at_s
        return waited_s if waited_s <= self._hang_limit_s else min(waited_s, self._transport.silence_s(place.number))

    def _answered(self, place: _Place) -> None:
        try:
            groups = ray.get(place.call)
        except ray.exceptions.RayTaskError as error:
            cause = error.cause
            if isinstance(cause, OpenZayaError):
                raise TrainingError(f"rollout worker {place.index}: {cause}") from None
            self._lost(place, f"failed: {cause!r}")
        except ray.exceptions.RayError as error:
            self._lost(place, f"ended: {str(error).strip().splitlines()[0]}")
        else:
            place.has_answered, place.call = True, None
            for group in groups:
                self._failed_starts = 0
                self._book.deliver(place.index, group)

    def _lost(self, place: _Place, how: str) -> None:
        ray.kill(place.actor)
        self._num_restarts += 1
        num_orders = self._book.give_back(place.index, how)
        print(f"rollout worker {place.index} {how}; {num_orders} orders are issued again", file=sys.stderr, flush=True)
        self._failed_starts += not place.has_answered
        if self._failed_starts >= MAX_FAILED_STARTS:
            raise TrainingError(
                f"{self._failed_starts} Ray actors in a row ended before they were ready (limit {MAX_FAILED_STARTS}); "
                f"the last one {how}"
            )
        self._start(place)


@contextlib.contextmanager
def _own_signals() -> Iterator[None]:
    """Keep the handler of SIGTERM: Ray puts its own in place, and the learner would end without saving."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def resources_of(setup: WorkerSetup) -> dict[str, int]:
    """What an actor asks Ray for: its threads, and a GPU of its own where it is to use one."""
    return {"num_cpus": setup.threads} | ({"num_gpus": 1} if torch.device(setup.device).type == "cuda" else {})


def _cluster(num_cpus: int) -> dict[str, Any]:
    """What Ray is started with: the cluster of RAY_ADDRESS, or one of this pool's own without a network face."""
    if os.environ.get("RAY_ADDRESS"):
        return {"address": "auto"}
    # By default Ray's workers give way to everything else; here they do what everything else waits for.
    os.environ.setdefault("RAY_worker_niceness", "0")
    return {"num_cpus": num_cpus, "include_dashboard": False}
