"""Rollouts from servers: SGLang, our own ``openzaya serve``, or any server of completions that gives tokens back.

    rollout   one request an order, prompts as token ids, the log probability of every token that was sampled
    weights   a checkpoint in a directory that learner and servers share, and a call to load it (SGLang)

Servers make rollouts, the learner's process judges them. What a server cannot do is refused at the beginning:

    experts   ours returns them; others do not: rollout.replay_experts=false
    weights   ours and plain completions servers keep those that they began with: max_staleness must cover all steps
    versions  SGLang says which weights answered, else those of the request's beginning are taken for it; rollouts of
              servers that take no weights are those of step 0

An order whose request fails is asked again, elsewhere where there is an elsewhere, with its own seed; so is a server
that does not load weights. One that has been started anew answers with the weights that it was started with: that
answer is not used, and it is given the newest ones.
"""

from __future__ import annotations

import contextlib
import queue
import shutil
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import httpx
import numpy as np
from torch import Tensor

from openzaya.errors import ConfigError, TrainingError
from openzaya.infer.outputs import Completion
from openzaya.model import hf
from openzaya.model.config import ZayaConfig
from openzaya.model.hf_survey import empty_model
from openzaya.rl.adapters.servers import ANSWER_LIMIT_S, LostWeights, Refused, Server, find_server, make_client
from openzaya.rl.pool import GroupJudge
from openzaya.rl.rollout import Environments, Group, GroupReward, Order, RolloutConfig, VersionLog, prompt_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

KEPT_CHECKPOINTS = 2
CONNECTIONS = 64
"""Requests under way at each server."""
RETRY_LIMIT_S = 300.0
"""A server that is away for longer ends the run."""
MIN_FAILURES = 3
"""Of one request, before that: one may take long to fail."""
FIRST_PAUSE_S = 0.25
LONGEST_PAUSE_S = 10.0


class _Attempts:
    """Of one request: a longer pause after each failure, and an end where it has failed for ``limit_s``.

    ``pause`` waits so many seconds and returns whether to give up.
    """

    def __init__(self, limit_s: float, pause: Callable[[float], bool]) -> None:
        self._limit_s, self._pause = limit_s, pause
        self._next_pause_s = FIRST_PAUSE_S
        self._num_failures, self._failing_since_s = 0, 0.0

    def failed(self, server: Server, error: Exception) -> None:
        """Pause before the next attempt.

        Raises:
            TrainingError: there is to be none.
        """
        # From the first failure on, not from the beginning: a rollout may take longer than a server may be away.
        if self._num_failures == 0:
            self._failing_since_s = time.monotonic()
        self._num_failures += 1
        away_s = time.monotonic() - self._failing_since_s
        is_over = away_s > self._limit_s and self._num_failures >= MIN_FAILURES
        if is_over or self._pause(self._next_pause_s):
            raise TrainingError(
                f"{server.url} has failed for {away_s:.0f} s ({type(error).__name__}: {error}); see whether it still "
                "runs, then resume"
            ) from None
        self._next_pause_s = min(LONGEST_PAUSE_S, 2 * self._next_pause_s)


class CheckpointTransport:
    """Publishes weights as checkpoints in a directory that the servers see too, under the same path."""

    def __init__(
        self,
        directory: Path,
        config: ZayaConfig,
        tokenizer: PreTrainedTokenizerFast,
        servers: Sequence[Server],
        begin_attempts: Callable[[], _Attempts],
    ) -> None:
        self._directory, self._config, self._tokenizer, self._servers = directory, config, tokenizer, servers
        self._begin_attempts = begin_attempts
        self._loading = threading.Lock()
        self._newest: tuple[Path, int] | None = None
        self._num_loads: Counter[str] = Counter()

    def publish(self, step: int, weights: Mapping[str, Tensor]) -> None:
        """Write the checkpoint of ``step`` and have every server load it.

        Raises:
            TrainingError: one does not, or is away for too long.
        """
        model = empty_model(self._config)
        model.load_state_dict(dict(weights), assign=True)
        path = self._directory / f"step-{step:08d}"
        layout = "native" if self._config.is_released_architecture else "openzaya"
        hf.save(model, path, layout=layout, tokenizer=self._tokenizer)  # type: ignore[arg-type]
        with self._loading:
            self._newest = path, step
            for server in self._servers:
                attempts = self._begin_attempts()
                while True:
                    try:
                        self._load(server)
                        break
                    except (httpx.HTTPError, OSError) as error:
                        attempts.failed(server, error)
            # Later ones are of a run that was resumed from an earlier step.
            found = sorted(self._directory.glob("step-*"))
            kept = [one for one in found if one <= path][-KEPT_CHECKPOINTS:]
            for old in found:
                if old not in kept:
                    shutil.rmtree(old)

    def num_loads(self, server: Server) -> int:
        """How often ``server`` has loaded weights."""
        return self._num_loads[server.url]

    def load_again(self, server: Server, num_loads: int) -> None:
        """Have ``server`` load the newest weights, unless it has since its count of loads was ``num_loads``.

        Raises:
            Refused, httpx.HTTPError: as :meth:`Server.load_weights`; one attempt is made.
        """
        with self._loading:
            if self.num_loads(server) == num_loads:
                self._load(server)

    def _load(self, server: Server) -> None:
        assert self._newest is not None
        server.load_weights(*self._newest)
        self._num_loads[server.url] += 1

    def pull(self, newer_than: int) -> tuple[int, Mapping[str, Tensor]] | None:
        """The newest checkpoint and its weights, if it is newer."""
        newest = max(self._directory.glob("step-*"), default=None)
        if newest is None or (step := int(newest.name.removeprefix("step-"))) <= newer_than:
            return None
        return step, hf.load(newest).state_dict()


@dataclass(frozen=True)
class _Answer:
    order: Order
    prompt_tokens: list[int]
    completions: list[Completion]
    steps: list[int]
    """Of the weights that made each completion."""
    seconds: float


class RemotePool:
    """A :class:`openzaya.rl.pool.RolloutPool` of rollout servers.

    Args:
        endpoints: base URLs, with or without ``/v1``.
        environments, reward: they judge, in the thread that collects.
        step, weights: those of the learner's beginning; servers that take weights are given them at once.
        directory: where checkpoints are published, on a file system that the servers share.
        fixed_weights: accept servers that cannot take weights.
        retry_limit_s: a server that is away for longer ends the run.
        answer_limit_s: a request that gets no answer for so long has failed.

    Raises:
        ConfigError: no endpoint, or one that cannot do what is asked of it.
        TrainingError: one that does not answer.
    """

    def __init__(
        self,
        endpoints: Sequence[str],
        config: ZayaConfig,
        tokenizer: PreTrainedTokenizerFast,
        environments: Environments,
        rollout: RolloutConfig,
        *,
        reward: GroupReward | None = None,
        step: int,
        weights: Mapping[str, Tensor],
        directory: Path,
        fixed_weights: bool = False,
        retry_limit_s: float = RETRY_LIMIT_S,
        answer_limit_s: float = ANSWER_LIMIT_S,
    ) -> None:
        if not endpoints:
            raise ConfigError("pipeline.endpoints is empty; name a rollout server's base URL, or choose another pool")
        self._tokenizer, self._rollout, self._retry_limit_s = tokenizer, rollout, retry_limit_s
        self._judge = GroupJudge(environments, reward, rollout)
        self._is_closed = threading.Event()
        self._client = make_client(answer_limit_s, CONNECTIONS * len(endpoints))
        try:
            self._servers = [find_server(self._client, url, tokenizer) for url in endpoints]
            self._check(fixed_weights)
            takers = [server for server in self._servers if server.takes_weights]
            self._takes_weights = bool(takers)
            self._transport = CheckpointTransport(directory, config, tokenizer, takers, self._begin_attempts)
            self.publish(step, weights)
        except BaseException:
            self._client.close()
            raise
        self._lock = threading.Lock()
        self._orders: dict[int, Order] = {}
        self._busy = [0] * len(self._servers)
        self._answers: queue.SimpleQueue[_Answer | Exception] = queue.SimpleQueue()
        self._num_retries = 0
        self._waiting: queue.SimpleQueue[Order | None] = queue.SimpleQueue()
        self._num_threads = CONNECTIONS * len(self._servers)
        for _ in range(self._num_threads):
            # Daemons: a server that does not answer holds up nobody's end.
            threading.Thread(target=self._work, name="rollout request", daemon=True).start()

    def _check(self, fixed_weights: bool) -> None:
        for server in self._servers:
            if self._rollout.replay_experts and not server.returns_experts:
                raise ConfigError(f"{server.url} does not return experts; set rollout.replay_experts=false")
            if not fixed_weights and not server.takes_weights:
                raise ConfigError(
                    f"{server.url} takes no weights while it runs, so rollouts would be those of the first ones; use "
                    "SGLang or rollout processes, or set pipeline.max_staleness to at least the number of steps"
                )

    # --- RolloutPool ------------------------------------------------------------------------------

    def publish(self, step: int, weights: Mapping[str, Tensor]) -> None:
        """New requests sample with these weights; SGLang decides what becomes of those under way."""
        if self._takes_weights:
            self._transport.publish(step, weights)
        self._step = step

    def submit(self, orders: Sequence[Order]) -> None:
        with self._lock:
            self._orders |= {order.number: order for order in orders}
        for order in orders:
            self._waiting.put(order)

    def collect(self, timeout_s: float | None = None) -> list[Group]:
        """See :class:`openzaya.rl.pool.RolloutPool`; verdicts are made here."""
        if not self._orders:
            return []
        answers = []
        with contextlib.suppress(queue.Empty):
            answers.append(self._answers.get(timeout=timeout_s))
            while True:
                answers.append(self._answers.get_nowait())
        return [self._group(answer) for answer in answers]

    def outstanding(self) -> list[Order]:
        with self._lock:
            return list(self._orders.values())

    def metrics(self) -> dict[str, float]:
        return {"rollout/retries": float(self._num_retries)}

    def close(self) -> None:
        """Give up what is under way; the servers stay as they are."""
        self._is_closed.set()
        self._client.close()
        for _ in range(self._num_threads):
            self._waiting.put(None)

    # --- one order --------------------------------------------------------------------------------

    def _group(self, answer: _Answer | Exception) -> Group:
        if isinstance(answer, Exception):
            raise answer
        versions = [VersionLog([step]) for step in answer.steps]
        rollouts = self._judge(answer.order, answer.completions, versions)
        with self._lock:
            del self._orders[answer.order.number]
        return Group(answer.order, np.array(answer.prompt_tokens, dtype=np.int32), rollouts, answer.seconds)

    def _work(self) -> None:
        while (order := self._waiting.get()) is not None and not self._is_closed.is_set():
            try:
                self._answers.put(self._ask(order))
            except Exception as error:
                known = isinstance(error, (TrainingError, ConfigError))
                self._answers.put(error if known else TrainingError(f"rollouts: {error!r}"))

    def _ask(self, order: Order) -> _Answer:
        begun, attempts, tried = time.monotonic(), self._begin_attempts(), -1
        prompt = prompt_of(order.task, self._tokenizer)
        while True:
            tried = self._take(tried)
            server = self._servers[tried]
            try:
                completions, steps = self._sample(server, prompt, order)
                return _Answer(order, prompt, completions, steps, time.monotonic() - begun)
            except Refused as error:
                raise TrainingError(f"order {order.number} ({order.task.environment}): {error}") from None
            except (httpx.HTTPError, OSError, LostWeights) as error:
                self._num_retries += 1
                attempts.failed(server, error)
            finally:
                with self._lock:
                    self._busy[tried] -= 1

    def _begin_attempts(self) -> _Attempts:
        return _Attempts(self._retry_limit_s, self._is_closed.wait)

    def _sample(self, server: Server, prompt: list[int], order: Order) -> tuple[list[Completion], list[int]]:
        """The order's completions and the steps of their weights."""
        # Those that a server began with are the policy of the stage's beginning, also in a run that was resumed.
        step, num_loads = self._step if server.takes_weights else 0, self._transport.num_loads(server)
        try:
            completions, served = server.sample(prompt, order, self._rollout)
        except LostWeights:
            self._transport.load_again(server, num_loads)
            raise
        return completions, [step if one is None else one for one in served]

    def _take(self, but_not: int) -> int:
        """The server with the fewest requests, another one than that which has just failed."""
        with self._lock:
            indices = [index for index in range(len(self._servers)) if index != but_not] or [0]
            chosen = min(indices, key=lambda index: self._busy[index])
            self._busy[chosen] += 1
            return chosen
