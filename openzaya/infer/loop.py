"""The thread that runs steps while there is work.

All state of the scheduler and the runner belongs to this thread. Others post commands (a new request, a cancel,
new weights), which run between two steps. Without work the thread waits a little and ends; the next command starts
another, so an engine that is no longer used can be collected.

An exception inside a step ends the requests that were in it, with that exception's text, and no others.
"""

from __future__ import annotations

import atexit
import contextlib
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from typing import Any, TypeVar

import numpy as np
import torch

from openzaya.errors import EngineError
from openzaya.infer.choosing import choose
from openzaya.infer.outputs import Delta, RequestOutput, TokenLogprob
from openzaya.infer.requests import Candidate, Request
from openzaya.infer.runner import Runner
from openzaya.infer.scheduler import Scheduler, Share

IDLE_SECONDS = 1.0
MAX_HOLD_SECONDS = 0.5
"""Requests that are to begin together wait for each other no longer."""
Result = TypeVar("Result")

_loops: weakref.WeakSet[StepLoop] = weakref.WeakSet()


class StepLoop:
    """Runs the scheduler's steps through a runner."""

    def __init__(self, runner: Runner, scheduler: Scheduler):
        self.runner, self.scheduler = runner, scheduler
        self.num_steps = self.num_tokens_generated = self.num_prompt_tokens = 0
        self._requests: dict[str, Request] = {}
        self._condition = threading.Condition(threading.RLock())
        self._calls: set[Future[Any]] = set()
        self._commands: deque[Callable[[], None]] = deque()
        self._thread: threading.Thread | None = None
        self._is_closed = False
        self._num_submitted = 0
        """Requests that are still among the commands."""
        self._num_holds, self._held_until = 0, 0.0
        _loops.add(self)

    # --- from any thread --------------------------------------------------------------------------

    def post(self, command: Callable[[], None], *, num_submitted: int = 0) -> None:
        """Run ``command`` between two steps; it must not raise. Raises :class:`EngineError` when closed."""
        with self._condition:
            if self._is_closed:
                raise EngineError("the engine is closed; create another one")
            self._commands.append(command)
            self._num_submitted += num_submitted
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="openzaya-engine", daemon=True)
                self._thread.start()
            self._condition.notify()

    def call(self, function: Callable[[], Result]) -> Result:
        """Run ``function`` between two steps and wait for its result."""
        if threading.current_thread() is self._thread:
            raise EngineError("called from a callback of the engine itself; call it from another thread")
        future: Future[Result] = Future()

        def command() -> None:
            try:
                future.set_result(function())
            except BaseException as error:
                future.set_exception(error)

        self._calls.add(future)
        try:
            self.post(command)
            return future.result()
        finally:
            self._calls.discard(future)

    @property
    def num_unstarted(self) -> int:
        """Requests of which no candidate has begun."""
        return self._num_submitted + len(self.scheduler.waiting)

    def submit(self, requests: Sequence[Request]) -> None:
        """Queue requests together; raises :class:`EngineError` for an id in use, and then queues none."""
        if not requests:
            return

        def command() -> None:
            with self._condition:
                self._num_submitted -= len(requests)
            for request in requests:
                self.scheduler.add(request)

        with self._condition:
            for request in requests:
                if request.id in self._requests:
                    raise EngineError(
                        f"request id '{request.id}' is in use by a request that has not ended; choose another"
                    )
            self.post(command, num_submitted=len(requests))
            self._requests.update((request.id, request) for request in requests)

    @contextlib.contextmanager
    def together(self) -> Iterator[None]:
        """Requests that come meanwhile wait; those of overlapping calls begin together, when the last one leaves."""
        with self._condition:
            self._num_holds += 1
            if self._num_holds == 1:
                self._held_until = time.monotonic() + MAX_HOLD_SECONDS
        try:
            yield
        finally:
            with self._condition:
                self._num_holds -= 1
                self._condition.notify()

    def cancel(self, request_id: str) -> None:
        """End a request; one that is unknown or has ended is left alone."""

        def command() -> None:
            request = self._requests.get(request_id)
            if request is not None:
                self._cancel(request)

        # A closed engine has ended it already.
        with contextlib.suppress(EngineError):
            self.post(command)

    def close(self) -> None:
        """End all requests with an error and the thread with them; waits for the step that is running."""
        with self._condition:
            self._is_closed = True
            thread = self._thread
            self._condition.notify()
        if thread is not None and thread is not threading.current_thread():
            thread.join()

    # --- in the loop's thread ---------------------------------------------------------------------

    def _run(self) -> None:
        try:
            while self._wait_for_work():
                commands = [self._commands.popleft() for _ in range(len(self._commands))]
                for command in commands:
                    command()
                if self._is_closed:
                    self._fail(list(self._requests.values()), EngineError("the engine was closed"))
                elif self.scheduler.has_work:
                    self._step()
        except BaseException as error:
            # A defect of ours in the bookkeeping: nobody may wait for ever on an engine that is gone.
            with self._condition:
                self._is_closed, self._thread = True, None
            reason = EngineError(f"the engine broke down: {error!r}")
            for request in list(self._requests.values()):
                self._end(request, reason)
            for call in list(self._calls):
                if not call.done():
                    call.set_exception(reason)
            raise

    def _wait_for_work(self) -> bool:
        """False when the thread has to end."""
        with self._condition:
            if not (self._commands or self.scheduler.has_work or self._is_closed):
                self._condition.wait(IDLE_SECONDS)
            if self._commands or self.scheduler.has_work:
                while not self.scheduler.running and not self._is_closed and (seconds := self._hold_seconds()) > 0:
                    self._condition.wait(seconds)
                return True
            self._thread = None
            return False

    def _hold_seconds(self) -> float:
        """How long from now nothing shall begin; 0 or less: it may."""
        return self._held_until - time.monotonic() if self._num_holds else 0

    @torch.inference_mode()
    def _step(self) -> None:
        shares: list[Share] = []
        try:
            shares = self.scheduler.plan(admit=not self.scheduler.running or self._hold_seconds() <= 0)
            result = self.runner.step([share.sequence() for share in shares])
            self.num_steps += 1
            candidates, rows = self._advance(shares, result.experts.numpy())
            if candidates:
                is_forked = rows != list(range(len(result.logits)))
                self._choose(candidates, result.logits[rows] if is_forked else result.logits)
        except Exception as error:
            running = [share.candidate for share in shares] or list(self.scheduler.running)
            self._fail([candidate.request for candidate in running], step_failed(error))

    def _choose(self, candidates: list[Candidate], logits_BV: torch.Tensor) -> None:
        """A token for each candidate; where that fails, one by one, so that only the culprit's request ends."""
        try:
            chosen = choose(logits_BV, [candidate.state for candidate in candidates])
        except Exception as error:
            if len(candidates) == 1:
                self._fail([candidates[0].request], step_failed(error))
            else:
                for row, candidate in enumerate(candidates):
                    self._choose([candidate], logits_BV[row : row + 1])
            return
        for candidate, token in zip(candidates, chosen, strict=True):
            if not candidate.request.is_ended:
                try:
                    self._accept(candidate, token)
                except Exception as error:
                    self._fail([candidate.request], step_failed(error))

    def _advance(self, shares: list[Share], experts_NL: np.ndarray) -> tuple[list[Candidate], list[int]]:
        """The candidates that get a token now, forks among them, and the row of logits of each."""
        candidates: list[Candidate] = []
        rows: list[int] = []
        begin, row = 0, 0
        for share in shares:
            begin, end = begin + share.num_tokens, begin + share.num_tokens
            is_last, candidate = share.is_last, share.candidate
            if candidate.num_run < (num_prompt := len(candidate.request.prompt)):
                self.num_prompt_tokens += min(share.num_tokens, num_prompt - candidate.num_run)
            self.scheduler.advance(share, experts_NL[end - share.num_tokens : end])
            if is_last:
                forks = self.scheduler.fork(candidate)
                candidates += (candidate, *forks)
                rows += [row] * (1 + len(forks))
                row += 1
        return candidates, rows

    def _accept(self, candidate: Candidate, chosen: TokenLogprob) -> None:
        request, progress = candidate.request, candidate.accept(chosen, self.scheduler.version)
        self.num_tokens_generated += 1
        if progress.finish_reason is not None:
            self.scheduler.finish(candidate)
        if request.on_delta is not None:
            self._tell(request, candidate.delta(progress))
        if progress.finish_reason is not None and all(other.is_done for other in request.candidates):
            self._end(request, request.output())

    def _cancel(self, request: Request) -> None:
        self.scheduler.remove(request)
        for candidate in request.candidates:
            if not candidate.is_done:
                self._tell(request, candidate.end("cancelled"))
        self._end(request, request.output())

    def _fail(self, requests: list[Request], reason: EngineError) -> None:
        for request in dict.fromkeys(requests):
            self.scheduler.remove(request)
            self._end(request, reason)

    def _tell(self, request: Request, delta: Delta) -> None:
        if request.on_delta is None or request.is_ended:
            return
        try:
            request.on_delta(delta)
        except Exception as error:
            self._fail([request], EngineError(f"the request's receiver failed: {error!r}"))

    def _end(self, request: Request, outcome: RequestOutput | EngineError) -> None:
        if request.is_ended:
            return
        request.is_ended = True
        with self._condition:
            self._requests.pop(request.id, None)
        if request.on_end is not None:
            # Whoever wants to hear of a failure of his own receiver would have to be that receiver.
            with contextlib.suppress(Exception):
                request.on_end(outcome)


def step_failed(error: Exception) -> EngineError:
    """What the requests of a failed step are told."""
    reason = EngineError(f"a step of the engine failed: {error!r}")
    reason.__cause__ = error
    return reason


def _close_all() -> None:
    # A daemon thread inside a kernel while the interpreter shuts down could crash it.
    for loop in list(_loops):
        loop.close()


atexit.register(_close_all)
