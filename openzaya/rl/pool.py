"""Where rollouts are made: the interface, and the engine of one process behind it.

    WeightTransport   the learner publishes weights, a rollout process pulls what is new
    RolloutPool       orders go in, groups come out, in any order; publishing weights reaches rollouts in flight

:class:`RolloutEngine` is what runs in every rollout process; :class:`LocalPool` uses one in the learner's own
process, in turns with the learner. Other pools: processes.py, adapters/.
"""

from __future__ import annotations

import contextlib
import queue
import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from torch import Tensor

from openzaya.errors import EngineError, TrainingError
from openzaya.infer.engine import Engine
from openzaya.infer.outputs import Completion, RequestOutput
from openzaya.model.transformer import Zaya
from openzaya.problems.base import Verdict
from openzaya.rl.rollout import (
    Environments,
    Group,
    GroupReward,
    Order,
    Rollout,
    RolloutConfig,
    VersionLog,
    make_rollout,
    prompt_of,
    sampling_params,
)

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

MAX_WAITING = 1 << 16
"""Orders that an engine may hold; pools bound what they hand out themselves."""


class WeightTransport(Protocol):
    """Brings weights from the learner to rollout processes."""

    def publish(self, step: int, weights: Mapping[str, Tensor]) -> None:
        """Offer the weights of learner step ``step``; returns when they may be changed again."""

    def pull(self, newer_than: int) -> tuple[int, Mapping[str, Tensor]] | None:
        """The newest step and its weights, if it is newer; whole, never a mixture of two steps."""


class RolloutPool(Protocol):
    """Makes groups from orders."""

    def publish(self, step: int, weights: Mapping[str, Tensor]) -> None:
        """Sample with these weights from now on, rollouts in flight too."""

    def submit(self, orders: Sequence[Order]) -> None:
        """Take orders; returns at once."""

    def collect(self, timeout_s: float | None = None) -> list[Group]:
        """Groups that are finished, each once; waits for the first up to ``timeout_s`` (None: without limit).

        Raises:
            TrainingError: no rollout can be made any more.
        """

    def outstanding(self) -> list[Order]:
        """Orders whose groups were not collected yet."""

    def metrics(self) -> dict[str, float]:
        """Numbers for the run log, such as restarts."""

    def close(self) -> None:
        """End everything."""


class GroupJudge:
    """Makes rollouts of an order's completions: verdicts, rewards, canaries."""

    def __init__(self, environments: Environments, reward: GroupReward | None, config: RolloutConfig) -> None:
        self._environments, self._reward, self._config = environments, reward, config

    def __call__(
        self, order: Order, completions: Sequence[Completion], versions: Sequence[VersionLog]
    ) -> list[Rollout]:
        """The rollouts of ``completions``; ``versions`` says of each what its engine's versions stand for."""
        texts = [completion.text for completion in completions]
        verdicts = [self._verify(order, text) for text in texts]
        rewards = [verdict.reward for verdict in verdicts]
        if self._reward is not None:
            rewards = self._reward.score_group(order.task, texts, rewards)
        return [
            make_rollout(completion, log, verdict, reward, self._config.canary)
            for completion, log, verdict, reward in zip(completions, versions, verdicts, rewards, strict=True)
        ]

    def _verify(self, order: Order, response: str) -> Verdict:
        try:
            return self._environments[order.source][order.task.environment].verify(order.task, response)
        except Exception as error:  # whatever goes wrong in an environment is no verdict
            return Verdict(None, f"verifier failed: {type(error).__name__}: {error}")


class RolloutEngine:
    """An engine that works on orders and judges what comes back."""

    def __init__(
        self,
        model: Zaya,
        tokenizer: PreTrainedTokenizerFast,
        environments: Environments,
        config: RolloutConfig,
        *,
        step: int = 0,
        reward: GroupReward | None = None,
        engine_settings: Mapping[str, Any] | None = None,
    ) -> None:
        settings = {"max_running": config.max_running, "max_waiting": MAX_WAITING, **(engine_settings or {})}
        self._engine = Engine(model, tokenizer, **settings)
        self._config, self._tokenizer = config, tokenizer
        self._judge = GroupJudge(environments, reward, config)
        self._versions = VersionLog()
        self._versions.add(self._engine.version, step)
        self._ended: queue.SimpleQueue[tuple[Order, float, RequestOutput | EngineError]] = queue.SimpleQueue()
        self.num_in_flight = 0

    def start(self, orders: Sequence[Order]) -> None:
        """Begin to work on ``orders``."""
        with self._engine.together():
            for order in orders:
                self._start(order)

    def _start(self, order: Order) -> None:
        begun = time.monotonic()

        def put(outcome: RequestOutput | EngineError) -> None:
            self._ended.put((order, begun, outcome))

        prompt = prompt_of(order.task, self._tokenizer)
        try:
            self._engine.submit(prompt, sampling_params(order, self._config), order.num_rollouts, on_end=put)
        except EngineError as error:
            raise _failed(order, error) from None
        self.num_in_flight += 1

    def finished(self, timeout_s: float | None = None) -> list[Group]:
        """Groups that are finished and judged; waits for the first up to ``timeout_s``."""
        ended = []
        with contextlib.suppress(queue.Empty):
            ended.append(self._ended.get(timeout=timeout_s))
            while True:
                ended.append(self._ended.get_nowait())
        return [self._group(*entry) for entry in ended]

    def _group(self, order: Order, begun: float, outcome: RequestOutput | EngineError) -> Group:
        self.num_in_flight -= 1
        if isinstance(outcome, EngineError):
            raise _failed(order, outcome)
        versions = [self._versions] * len(outcome.completions)
        rollouts = self._judge(order, outcome.completions, versions)
        prompt_tokens = np.array(outcome.prompt_tokens, dtype=np.int32)
        return Group(order, prompt_tokens, rollouts, time.monotonic() - begun)

    def update_weights(self, step: int, weights: Mapping[str, Tensor]) -> None:
        """Go on with the weights of learner step ``step``, rollouts in flight too."""
        self._versions.add(self._engine.version + 1, step)
        self._engine.update_weights(weights)

    @property
    def num_steps(self) -> int:
        """Steps that the engine has made: it grows as long as rollouts in flight go on."""
        return self._engine.stats().steps

    def close(self) -> None:
        self._engine.close()


def _failed(order: Order, error: EngineError) -> TrainingError:
    return TrainingError(f"order {order.number} ({order.task.environment}) could not be rolled out: {error}")


class LocalPool:
    """Rollouts in the learner's process, made when they are collected: synchronous and deterministic."""

    def __init__(self, engine: RolloutEngine) -> None:
        self._engine = engine
        self._orders: list[Order] = []

    def publish(self, step: int, weights: Mapping[str, Tensor]) -> None:
        self._engine.update_weights(step, weights)

    def submit(self, orders: Sequence[Order]) -> None:
        self._orders += orders

    def collect(self, timeout_s: float | None = None) -> list[Group]:
        """All that was submitted, in the order of its numbers."""
        orders, self._orders = self._orders, []
        self._engine.start(orders)
        groups: list[Group] = []
        while len(groups) < len(orders):
            groups += self._engine.finished()
        return sorted(groups, key=lambda group: group.order.number)

    def outstanding(self) -> list[Order]:
        return list(self._orders)

    def metrics(self) -> dict[str, float]:
        return {}

    def close(self) -> None:
        self._engine.close()
