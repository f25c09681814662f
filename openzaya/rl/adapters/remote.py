"""Rollouts from servers: SGLang, our own ``openzaya serve``, or any server of completions that gives tokens back.

    rollout   one request an order, prompts as token ids, the log probability of every token that was sampled
    weights   a checkpoint in a directory that learner and servers share, and a call to load it (SGLang)

Servers make rollouts, the learner's process judges them. What a server cannot do is refused at the beginning:

    experts   ours returns them; others do not: rollout.replay_experts=false
    weights   ours and plain completions servers keep those that they began with: max_staleness must cover all steps
    versions  SGLang says which weights answered; else it is taken for that of the request's beginning

An order whose request fails is asked again, elsewhere where there is an elsewhere, with its own seed.
"""

from __future__ import annotations

import contextlib
import queue
import shutil
import threading
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import httpx
import numpy as np
from torch import Tensor

from openzaya.environments.base import Environment
from openzaya.errors import ConfigError, TrainingError
from openzaya.infer.outputs import Completion
from openzaya.model import hf
from openzaya.model.config import ZayaConfig
from openzaya.model.hf_survey import empty_model
from openzaya.rl.adapters.servers import Refused, Server, find_server
from openzaya.rl.pool import GroupJudge
from openzaya.rl.rollout import Group, GroupReward, Order, RolloutConfig, VersionLog, prompt_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

KEPT_CHECKPOINTS = 2
CONNECTIONS = 64
"""Requests under way at each server."""
RETRY_LIMIT_S = 300.0
"""A server that is away for longer ends the run."""
LONGEST_PAUSE_S = 10.0


class CheckpointTransport:
    """Publishes weights as checkpoints in a directory that the servers see too, under the same path."""

    def __init__(
        self, directory: Path, config: ZayaConfig, tokenizer: PreTrainedTokenizerFast, servers: Sequence[Server]
    ) -> None:
        self._directory, self._config, self._tokenizer, self._servers = directory, config, tokenizer, servers

    def publish(self, step: int, weights: Mapping[str, Tensor]) -> None:
        """Write the checkpoint of ``step`` and have every server load it."""
        model = empty_model(self._config)
        model.load_state_dict(dict(weights), assign=True)
        path = self._directory / f"step-{step:08d}"
        layout = "native" if self._config.is_released_architecture else "openzaya"
        hf.save(model, path, layout=layout, tokenizer=self._tokenizer)  # type: ignore[arg-type]
        for server in self._servers:
            server.load_weights(path, step)
        for old in sorted(self._directory.glob("step-*"))[:-KEPT_CHECKPOINTS]:
            shutil.rmtree(old)

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
        fixed_weights: accept servers that cannot take weights; versions stay at ``step``.

    Raises:
        ConfigError: no endpoint, or one that cannot do what is asked of it.
        TrainingError: one that does not answer.
    """

    def __init__(
        self,
        endpoints: Sequence[str],
        config: ZayaConfig,
        tokenizer: PreTrainedTokenizerFast,
        environments: Mapping[str, Environment],
        rollout: RolloutConfig,
        *,
        reward: GroupReward | None = None,
        step: int,
        weights: Mapping[str, Tensor],
        directory: Path,
        fixed_weights: bool = False,
        retry_limit_s: float = RETRY_LIMIT_S,
    ) -> None:
        if not endpoints:
            raise ConfigError("pipeline.endpoints is empty; name a rollout server's base URL, or choose another pool")
        self._tokenizer, self._rollout, self._retry_limit_s = tokenizer, rollout, retry_limit_s
        self._judge = GroupJudge(environments, reward, rollout)
        self._client = httpx.Client(
            limits=httpx.Limits(max_connections=CONNECTIONS * len(endpoints)), timeout=httpx.Timeout(30, read=None)
        )
        try:
            self._servers = [find_server(self._client, url, tokenizer) for url in endpoints]
            self._check(fixed_weights)
            self._takes_weights = not fixed_weights
            self._step = step
            self._transport = CheckpointTransport(directory, config, tokenizer, self._servers)
            if self._takes_weights:
                self._transport.publish(step, weights)
        except BaseException:
            self._client.close()
            raise
        self._lock = threading.Lock()
        self._orders: dict[int, Order] = {}
        self._busy = [0] * len(self._servers)
        self._answers: queue.SimpleQueue[_Answer | Exception] = queue.SimpleQueue()
        self._num_retries = 0
        self._is_closed = threading.Event()
        self._executor = ThreadPoolExecutor(CONNECTIONS * len(self._servers), thread_name_prefix="rollout request")

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
            self._executor.submit(self._work, order)

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
        self._executor.shutdown(wait=False, cancel_futures=True)

    # --- one order --------------------------------------------------------------------------------

    def _group(self, answer: _Answer | Exception) -> Group:
        if isinstance(answer, Exception):
            raise answer
        versions = [VersionLog([step]) for step in answer.steps]
        rollouts = self._judge(answer.order.task, answer.completions, versions)
        with self._lock:
            del self._orders[answer.order.number]
        return Group(answer.order, np.array(answer.prompt_tokens, dtype=np.int32), rollouts, answer.seconds)

    def _work(self, order: Order) -> None:
        try:
            self._answers.put(self._ask(order))
        except Exception as error:
            failed = error if isinstance(error, (TrainingError, ConfigError)) else TrainingError(f"rollouts: {error!r}")
            self._answers.put(failed)

    def _ask(self, order: Order) -> _Answer:
        begun, pause_s, tried = time.monotonic(), 0.25, -1
        prompt = prompt_of(order.task, self._tokenizer)
        while True:
            tried = self._take(tried)
            server, step = self._servers[tried], self._step
            try:
                completions, served = server.sample(prompt, order, self._rollout)
                steps = [step if one is None else one for one in served]
                return _Answer(order, prompt, completions, steps, time.monotonic() - begun)
            except Refused as error:
                raise TrainingError(f"order {order.number} ({order.task.environment}): {error}") from None
            except (httpx.HTTPError, OSError) as error:
                if time.monotonic() - begun > self._retry_limit_s or self._is_closed.is_set():
                    raise TrainingError(
                        f"{server.url} has failed for {time.monotonic() - begun:.0f} s "
                        f"({type(error).__name__}: {error}); see whether it still runs, then resume"
                    ) from None
                self._num_retries += 1
                self._is_closed.wait(pause_s)
                pause_s = min(LONGEST_PAUSE_S, 2 * pause_s)
            finally:
                with self._lock:
                    self._busy[tried] -= 1

    def _take(self, but_not: int) -> int:
        """The server with the fewest requests, another one than that which has just failed."""
        with self._lock:
            indices = [index for index in range(len(self._servers)) if index != but_not] or [0]
            chosen = min(indices, key=lambda index: self._busy[index])
            self._busy[chosen] += 1
            return chosen
