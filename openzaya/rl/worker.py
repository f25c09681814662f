"""What runs in a rollout process: an engine with environments of its own, fed through a channel.

    in     ("setup", WorkerSetup), then ("orders", [Order])
    out    ("ready",), ("group", Group), ("beat",), ("failed", what, is_final)

Between two steps of the engine the newest weights are taken, rollouts in flight go on with them. Orders that arrive
are begun after that: weights that were published before an order was given are always there.

A beat means progress: the process has judged a rollout, waits for a judge (whose attempts have limits of their own),
its reward model or its engine has made a step, or there is nothing to do.
The process ignores SIGINT and SIGTERM, which are the learner's business, and ends with the learner, however that ended;
it leads a process group, so what its environments have started goes with it.
"""

from __future__ import annotations

import contextlib
import os
import queue
import signal
import socket
import threading
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from openzaya.environments.base import Environment, Task
from openzaya.environments.registry import EnvironmentSpec, make_environments
from openzaya.errors import OpenZayaError
from openzaya.model.config import ZayaConfig
from openzaya.model.hf_survey import empty_model
from openzaya.model.transformer import Zaya
from openzaya.problems.base import Verdict
from openzaya.rl.behaviour import BehaviourConfig, make_reward
from openzaya.rl.channel import WorkerChannel
from openzaya.rl.pool import RolloutEngine, WeightTransport
from openzaya.rl.rollout import Order, RolloutConfig

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

POLL_S = 0.02
"""Between looks for orders and weights while rollouts run."""
IDLE_POLL_S = 0.2
BEAT_S = 0.5


@dataclass(frozen=True)
class WorkerSetup:
    """All that a rollout process needs beside weights and orders."""

    model: ZayaConfig
    tokenizer: PreTrainedTokenizerFast
    environments: Mapping[str, Sequence[EnvironmentSpec]]
    """Source -> its specifications."""
    rollout: RolloutConfig
    behaviour: BehaviourConfig | None
    stages: Path
    """Where earlier stages' directories lie, a reward model's among them."""
    threads: int
    """CPU threads."""
    device: str = "cpu"
    """The engine's and a reward model's, as PyTorch names it."""


def make_engine(
    setup: WorkerSetup, step: int, weights: Mapping[str, Tensor], on_verdict: Callable[[], None] = lambda: None
) -> RolloutEngine:
    """The engine of one rollout process, with ``weights`` of learner step ``step`` and environments of its own.

    ``on_verdict`` is called after each verdict, and again and again while a judge is being asked or a reward model
    scores.
    """
    torch.set_num_threads(setup.threads)
    environments = {
        source: {name: _Watched(one, on_verdict) for name, one in make_environments(specifications).items()}
        for source, specifications in setup.environments.items()
    }
    reward = make_reward(setup.behaviour, environments, setup.stages, setup.device, on_verdict)
    model = model_of(setup.model, weights, setup.device)
    return RolloutEngine(model, setup.tokenizer, environments, setup.rollout, step=step, reward=reward)


def model_of(config: ZayaConfig, weights: Mapping[str, Tensor], device: str = "cpu") -> Zaya:
    """A model with copies of ``weights`` on ``device``."""
    model = empty_model(config)
    model.load_state_dict({name: tensor.to(device, copy=True) for name, tensor in weights.items()}, assign=True)
    return model.eval().requires_grad_(False)


class _Watched(Environment):
    """An environment whose every verdict is a sign of life."""

    def __init__(self, environment: Environment, on_verdict: Callable[[], None]) -> None:
        self.name = environment.name
        self._environment, self._on_verdict = environment, on_verdict

    def task(self, difficulty: int, number: int) -> Task:
        return self._environment.task(difficulty, number)

    def verify(self, task: Task, response: str) -> Verdict:
        try:
            return self._environment.verify(task, response)
        finally:
            self._on_verdict()

    def close(self) -> None:
        self._environment.close()


def run_worker(sock: socket.socket, transport: WeightTransport, learner_pid: int) -> None:
    """Work until the learner is gone; never returns."""
    os.setsid()
    for number in (signal.SIGINT, signal.SIGTERM):
        # A handler that does nothing, not SIG_IGN: programs that an environment starts would inherit that.
        signal.signal(number, lambda *_: None)
    # The learner's thread that starts processes has them blocked: they could hit a process before this line.
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT, signal.SIGTERM})
    inbox: queue.SimpleQueue[Any] = queue.SimpleQueue()
    channel = WorkerChannel(sock)
    threading.Thread(target=_receive, args=(channel, inbox, learner_pid), daemon=True).start()
    try:
        _Worker(channel, inbox, transport).run()
    except BaseException as error:
        is_final = isinstance(error, OpenZayaError)
        try:
            channel.send(("failed", str(error) if is_final else traceback.format_exc(), is_final))
        finally:
            # Neither threads of the engine nor environments may hold up the end.
            os._exit(1)


def _receive(channel: WorkerChannel, inbox: queue.SimpleQueue[Any], learner_pid: int) -> None:
    try:
        while os.getppid() == learner_pid:
            for message in channel.receive(timeout_s=1):
                inbox.put(message)
    finally:
        os.killpg(0, signal.SIGKILL)


class _Worker:
    """The process's main loop."""

    def __init__(self, channel: WorkerChannel, inbox: queue.SimpleQueue[Any], transport: WeightTransport) -> None:
        self._channel, self._inbox, self._transport = channel, inbox, transport
        _, setup = inbox.get()
        found = transport.pull(-1)
        if found is None:
            raise RuntimeError("no weights were published before rollout processes were started")
        self._step, weights = found
        self._engine = make_engine(setup, self._step, weights, self._beat)
        self._num_steps = -1
        self._last_beat_s = 0.0
        channel.send(("ready",))

    def run(self) -> None:
        """Work for ever."""
        while True:
            orders = self._orders()
            newer = self._transport.pull(self._step)
            if newer is not None:
                self._step, weights = newer
                self._engine.update_weights(self._step, weights)
            if orders:
                self._engine.start(orders)
            if self._engine.num_in_flight:
                for group in self._engine.finished(POLL_S):
                    self._channel.send(("group", group))
            self._beat_if_alive()

    def _orders(self) -> list[Order]:
        """Those that have arrived; with nothing else to do, waits for some."""
        orders: list[Order] = []
        with contextlib.suppress(queue.Empty):
            if not self._engine.num_in_flight:
                orders += self._inbox.get(timeout=IDLE_POLL_S)[1]
            while True:
                orders += self._inbox.get_nowait()[1]
        return orders

    def _beat_if_alive(self) -> None:
        num_steps = self._engine.num_steps
        if not self._engine.num_in_flight or num_steps != self._num_steps:
            self._num_steps = num_steps
            self._beat()

    def _beat(self) -> None:
        if time.monotonic() - self._last_beat_s >= BEAT_S:
            self._last_beat_s = time.monotonic()
            self._channel.send(("beat",))
