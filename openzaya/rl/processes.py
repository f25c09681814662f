"""A pool of rollout processes on this machine (torch.multiprocessing, spawned).

One thread of the learner's process looks after them, also while the learner computes:

    orders     handed out as processes finish, groups back, each once (orders.py)
    weights    through shared memory, taken between two steps of an engine (transport.py, worker.py)
    deaths     a process that has ended, or shows no progress for ``hang_limit_s``, is killed with all that it has
               started, and replaced; what it sent in whole counts, its other orders go out again

What happens again and again ends the run: processes that fail before they are ready, an order that no process survives,
a mistake in the recipe.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import selectors
import signal
import socket
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch.multiprocessing
from torch import Tensor

from openzaya.errors import TrainingError
from openzaya.rl.channel import Channel, encode
from openzaya.rl.orders import OrderBook
from openzaya.rl.rollout import Group, Order
from openzaya.rl.transport import SharedMemoryTransport
from openzaya.rl.worker import WorkerSetup, run_worker

HANG_LIMIT_S = 300.0
"""Longest time without a sign of progress: a step of the engine or of a reward model, a verdict, a judge asked."""
START_LIMIT_S = 600.0
"""Longest time until a process is ready: its libraries and the model are loaded."""
MAX_FAILED_STARTS = 5
"""Processes that end before they are ready, with no group finished anywhere in between."""
LONGEST_PAUSE_S = 30.0
"""Before the next start in a place whose processes keep failing."""
TICK_S = 0.5


@dataclass
class _Place:
    """One of the pool's processes and its successors."""

    index: int
    process: Any = None
    channel: Channel | None = None
    is_ready: bool = False
    last_heard_s: float = 0.0
    failures: int = 0
    """Processes in a row that failed before they finished anything."""
    start_at_s: float = 0.0
    problem: str = ""
    """What the process said before it ended."""
    num_tokens: int = 0
    counted_since_s: float = 0.0


class ProcessPool:
    """A :class:`openzaya.rl.pool.RolloutPool` of ``num_workers`` processes.

    Args:
        step, weights: what the processes begin with.
        hang_limit_s: a process that is ready and makes no progress for so long is killed and replaced.
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
        # Two processes whose idle OpenMP threads spin take each other's time; read when a child loads its libraries.
        os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
        self._context = torch.multiprocessing.get_context("spawn")
        self._setup = encode(("setup", setup))
        self._hang_limit_s = hang_limit_s
        self._transport = SharedMemoryTransport(self._context)
        self._transport.publish(step, weights)

        self._book = OrderBook(num_workers, setup.rollout.max_running)
        self._error: TrainingError | None = None
        self._is_closed = False
        # Of the thread; others only read numbers:
        self._places = [_Place(index) for index in range(num_workers)]
        self._failed_starts = 0
        self._num_restarts = 0
        self._selector = selectors.DefaultSelector()
        self._wake, self._woken = socket.socketpair()
        self._wake.setblocking(False)
        self._woken.setblocking(False)
        self._selector.register(self._woken, selectors.EVENT_READ)
        self._thread = threading.Thread(target=self._run, name="rollout processes", daemon=True)
        self._thread.start()
        atexit.register(self.close)

    # --- the learner's side -----------------------------------------------------------------------

    def publish(self, step: int, weights: Mapping[str, Tensor]) -> None:
        self._transport.publish(step, weights)

    def submit(self, orders: Sequence[Order]) -> None:
        self._book.submit(orders)
        self._awake()

    def collect(self, timeout_s: float | None = None) -> list[Group]:
        """See :class:`openzaya.rl.pool.RolloutPool`; nothing at once where no order is outstanding."""
        book = self._book
        if book.outstanding():
            with book.changed:
                book.changed.wait_for(lambda: book.has_arrivals or self._error or self._is_closed, timeout_s)
        if self._error is not None:
            raise self._error
        return book.collect()

    def outstanding(self) -> list[Order]:
        return self._book.outstanding()

    def metrics(self) -> dict[str, float]:
        """Restarts and orders issued again since the pool was made; tokens/s of each process since the last call."""
        now = time.monotonic()
        metrics = {
            "rollout/restarts": float(self._num_restarts),
            "rollout/reissued_orders": float(self._book.num_reissued),
            "rollout/duplicate_groups": float(self._book.num_duplicates),
        }
        for place in self._places:
            seconds = now - place.counted_since_s
            metrics[f"rollout/worker{place.index}_tokens_per_s"] = place.num_tokens / seconds if seconds > 0 else 0.0
            place.num_tokens, place.counted_since_s = 0, now
        return metrics

    @property
    def process_ids(self) -> list[int]:
        """Of the processes that are alive now."""
        return [process.pid for place in self._places if (process := place.process) is not None and process.pid]

    def close(self) -> None:
        """Kill the processes; safe to call twice."""
        with self._book.changed:
            if self._is_closed:
                return
            self._is_closed = True
            self._book.changed.notify_all()
        atexit.unregister(self.close)
        self._awake()
        self._thread.join()
        self._transport.close()

    def _awake(self) -> None:
        with contextlib.suppress(OSError):  # full, or closed after an error
            self._wake.send(b"x")

    # --- the thread -------------------------------------------------------------------------------

    def _run(self) -> None:
        # Inherited by the processes: a Ctrl-C reaches the learner alone, from a process's first moment on.
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})
        try:
            for place in self._places:
                self._start(place)
            last_look_s = time.monotonic()
            while not self._is_closed:
                last_look_s = self._look(last_look_s)
        except Exception as error:
            problem = error if isinstance(error, TrainingError) else TrainingError(f"rollout processes: {error!r}")
            problem.__cause__ = None if problem is error else error
            with self._book.changed:
                self._error = problem
                self._book.changed.notify_all()
        finally:
            for place in self._places:
                self._end(place)
            self._selector.close()
            self._wake.close()
            self._woken.close()

    def _look(self, last_look_s: float) -> float:
        """Wait for something to happen and deal with all of it; returns when it looked."""
        for place in self._places:
            if place.channel is not None:
                events = selectors.EVENT_READ | (selectors.EVENT_WRITE if place.channel.has_unsent else 0)
                self._selector.modify(place.channel.socket, events)
        self._selector.select(TICK_S)
        with contextlib.suppress(BlockingIOError):
            while self._woken.recv(4096):
                pass
        now = time.monotonic()
        for place in self._places:
            if place.process is None:
                if now >= place.start_at_s:
                    self._start(place)
                continue
            if now - last_look_s > 10 * TICK_S:
                # Not the process was away, but this one: stopped, or the machine asleep.
                place.last_heard_s = now
            self._attend(place, now)
        self._hand_out()
        return now

    def _start(self, place: _Place) -> None:
        ours, theirs = socket.socketpair()
        place.channel = Channel(ours)
        place.is_ready, place.problem = False, ""
        place.process = self._context.Process(
            target=run_worker,
            args=(theirs, self._transport, os.getpid()),
            name=f"rollout worker {place.index}",
            daemon=False,
        )
        place.process.start()
        theirs.close()
        place.channel.send(self._setup)
        place.last_heard_s = time.monotonic()
        self._selector.register(ours, selectors.EVENT_READ)
        self._selector.register(place.process.sentinel, selectors.EVENT_READ)

    def _end(self, place: _Place) -> None:
        """Kill a process with all that it has started, and forget it."""
        process, channel = place.process, place.channel
        if process is None or channel is None:
            return
        place.process = place.channel = None
        self._selector.unregister(channel.socket)
        self._selector.unregister(process.sentinel)
        # Before it is waited for: until then nobody else can have its id.
        for kill in (os.killpg, os.kill):
            with contextlib.suppress(ProcessLookupError):
                kill(process.pid, signal.SIGKILL)
        process.join()
        process.close()
        channel.close()

    def _attend(self, place: _Place, now: float) -> None:
        assert place.channel is not None
        place.channel.flush()
        # First whether it has ended, then what it has said: an ended process says nothing more.
        how = _end_of(place.process)
        for message in place.channel.receive():
            place.last_heard_s = now
            self._heard(place, message)
        silence_s = now - place.last_heard_s
        if how is None and place.channel.is_ended:
            how = _end_of(place.process, wait_s=0.5) or "closed its channel"
        if how is not None:
            self._lost(place, now, how)
        elif silence_s > (self._hang_limit_s if place.is_ready else START_LIMIT_S):
            self._lost(place, now, f"showed no progress for {silence_s:.0f} s")

    def _heard(self, place: _Place, message: tuple[Any, ...]) -> None:
        match message:
            case ("group", group):
                place.failures = self._failed_starts = 0
                place.num_tokens += group.num_tokens
                self._book.deliver(place.index, group)
            case ("ready",):
                place.is_ready = True
            case ("failed", problem, is_final):
                place.problem = problem
                if is_final:
                    raise TrainingError(f"rollout worker {place.index}: {problem}")

    def _lost(self, place: _Place, now: float, how: str) -> None:
        """A process is gone or has to go: issue its orders again, start another."""
        process_id, was_ready, problem = place.process.pid, place.is_ready, place.problem
        self._end(place)
        self._num_restarts += 1
        num_orders = self._book.give_back(place.index, how)
        said = f": {problem.strip().splitlines()[-1]}" if problem else ""
        print(
            f"rollout worker {place.index} (process {process_id}) {how}{said}; {num_orders} orders are issued again",
            file=sys.stderr,
            flush=True,
        )
        place.failures += 1
        place.start_at_s = now + (0 if place.failures == 1 else min(LONGEST_PAUSE_S, 0.5 * 2 ** (place.failures - 2)))
        self._failed_starts += not was_ready
        if self._failed_starts >= MAX_FAILED_STARTS:
            raise TrainingError(
                f"{self._failed_starts} rollout processes in a row failed before they were ready (limit "
                f"{MAX_FAILED_STARTS}); the last one {how}"
                + (f":\n{problem}" if problem else "; what it printed says why, if anything does")
            )

    def _hand_out(self) -> None:
        ready = [place.index for place in self._places if place.is_ready and place.process is not None]
        for index, orders in self._book.hand_out(ready).items():
            channel = self._places[index].channel
            assert channel is not None
            channel.send(encode(("orders", orders)))


def _end_of(process: Any, wait_s: float = 0) -> str | None:
    """How a process has ended; None while it lives. Its exit code is not taken: its id stays its own."""
    until = time.monotonic() + wait_s
    while True:
        try:
            found = os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
        except ChildProcessError:
            return "ended"
        if found is not None or time.monotonic() >= until:
            break
        time.sleep(0.01)
    if found is None:
        return None
    if found.si_code == os.CLD_EXITED:
        return f"ended with exit code {found.si_status}"
    return f"was ended by signal {signal.Signals(found.si_status).name}"
