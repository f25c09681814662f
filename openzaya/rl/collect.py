"""Which groups a step trains on: dynamic sampling, staleness, a bounded buffer.

    ahead      as many orders are under way as may be used before they are too old
    buffer     finished groups wait here, first in, first out; when it is full the oldest goes
    too old    a group whose oldest token is more than ``max_staleness`` learner steps behind is dropped
    no signal  a group whose rewards are all equal is dropped and replaced, up to ``max_draws`` groups a step

Whole groups move. Synchronous runs (staleness 0) order exactly what a step needs, wait for it, and use it in the order
of its numbers.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Mapping
from typing import Any

import numpy as np

from openzaya.rl.canaries import rare_token_shares
from openzaya.rl.learner import source_key
from openzaya.rl.pool import RolloutPool
from openzaya.rl.prompts import PromptStream
from openzaya.rl.recipe import RLConfig
from openzaya.rl.rollout import Group, Order, Rollout
from openzaya.runlog import Metric


class Collector:
    """Keeps the pool busy and hands out each step's groups; ``state_dict`` is part of a checkpoint."""

    def __init__(self, config: RLConfig, prompts: PromptStream, pool: RolloutPool) -> None:
        self._config, self._prompts, self._pool = config, prompts, pool
        self._buffer: deque[Group] = deque()
        self._capacity = max(1, round(config.pipeline.buffer_batches * config.prompts_per_step))
        self._drawn: list[Group] = []
        self._counts: Counter[str] = Counter()

    @property
    def drawn(self) -> list[Group]:
        """All groups that were drawn for the last step, dropped ones included."""
        return self._drawn

    def resubmit(self, orders: list[Order]) -> None:
        """Orders that were outstanding when a checkpoint was written."""
        self._pool.submit(orders)

    def next_groups(self, step: int) -> list[Group]:
        """The groups to train on after ``step`` steps; fewer than ``prompts_per_step`` where ``max_draws`` ends it."""
        config = self._config
        self._drawn, self._counts = [], Counter()
        chosen: list[Group] = []
        max_draws = round(config.algorithm.max_draws * config.prompts_per_step)
        while len(chosen) < config.prompts_per_step and len(self._drawn) < max_draws:
            wanted = min(config.prompts_per_step - len(chosen), max_draws - len(self._drawn))
            self._fill(wanted, is_start=not self._drawn and not self._counts["stale"])
            while self._buffer and len(chosen) < config.prompts_per_step and len(self._drawn) < max_draws:
                group = self._buffer.popleft()
                if step - group.oldest_version > config.pipeline.max_staleness:
                    self._counts["stale"] += 1
                    continue
                self._drawn.append(group)
                if config.algorithm.drop_equal_groups and is_without_signal(group):
                    self._counts["equal"] += 1
                    continue
                chosen.append(group)
        return chosen

    def _fill(self, wanted: int, *, is_start: bool) -> None:
        """Order what is missing and wait until something can be drawn; a step starts with ``start_batches``."""
        config = self._config
        if config.pipeline.is_synchronous:
            self._order(wanted - len(self._buffer) - len(self._pool.outstanding()))
            groups: list[Group] = []
            while self._pool.outstanding():
                groups += self._pool.collect()
            # Several processes finish in any order; what is learnt from a group must not depend on it.
            self._receive(sorted(groups, key=lambda group: group.order.number))
            self._buffer = deque(sorted(self._buffer, key=lambda group: group.order.number))
            return
        batch = config.prompts_per_step
        enough = min(self._capacity, max(1, round(config.pipeline.start_batches * batch))) if is_start else 1
        while True:
            # What is ordered now is used about so many steps later.
            ahead = batch * config.pipeline.max_staleness - len(self._buffer)
            self._order(max(ahead, 1) - len(self._pool.outstanding()))
            if len(self._buffer) >= enough:
                break
            self._receive(self._pool.collect())

    def _order(self, num: int) -> None:
        if num > 0:
            self._pool.submit([self._prompts.next() for _ in range(num)])

    def _receive(self, groups: list[Group]) -> None:
        for group in groups:
            self._prompts.finished(group)
            self._buffer.append(group)
            if len(self._buffer) > self._capacity:
                self._buffer.popleft()
                self._counts["evicted"] += 1

    # --- what is logged ---------------------------------------------------------------------------

    def drawn_rates(self) -> dict[str, float]:
        """Mean solve rate of the groups drawn for the last step, by source and form."""
        rates: dict[str, list[float]] = {}
        for group in self._drawn:
            if group.verdicts:
                rates.setdefault(source_key(group), []).append(group.solve_rate)
        return {key: float(np.mean(values)) for key, values in rates.items()}

    def metrics(self, step: int, vocab_size: int) -> dict[str, Metric]:
        """What was drawn for step ``step``: rewards, lengths, staleness, canaries."""
        groups = self._drawn
        rollouts = [rollout for group in groups for rollout in group.rollouts]
        metrics: dict[str, Metric] = {
            "rl/drawn_groups": len(groups),
            "rl/dropped_equal": self._counts["equal"],
            "rl/dropped_stale": self._counts["stale"],
            "rl/evicted": self._counts["evicted"],
            "rl/buffered_groups": len(self._buffer),
        }
        metrics |= {f"solve_rate/{key}": rate for key, rate in self.drawn_rates().items()}
        if not rollouts:
            return metrics
        staleness = [step - group.oldest_version for group in groups]
        rewards = [reward for group in groups for reward in group.rewards]
        lengths = np.array([len(rollout.tokens) for rollout in rollouts])
        right = [len(rollout.tokens) for rollout in rollouts if rollout.verdict == 1]
        return metrics | {
            "rl/reward": float(np.mean(rewards)) if rewards else 0.0,
            "rl/solved_groups": float(np.mean([any(verdict == 1 for verdict in group.verdicts) for group in groups])),
            "rl/length_tokens": float(lengths.mean()),
            "rl/length_right_tokens": float(np.mean(right)) if right else 0.0,
            "rl/truncated": _mean(rollout.is_truncated for rollout in rollouts),
            "rl/no_verdict": _mean(rollout.verdict is None for rollout in rollouts),
            "rl/repetition_rate": _mean(rollout.is_short_loop for rollout in rollouts),
            "rl/long_loop_rate": _mean(rollout.is_long_loop for rollout in rollouts),
            "rl/staleness_mean": float(np.mean(staleness)),
            "rl/staleness_max": max(staleness),
            "rl/difficulty": float(np.mean([group.order.task.difficulty for group in groups])),
            **_rare_tokens(rollouts, vocab_size),
            "rl/sampled_tokens": int(lengths.sum()),
        }

    def state_dict(self) -> dict[str, Any]:
        """Groups that wait, and the orders that are under way: they are given out again."""
        outstanding = [order.to_json() for order in self._pool.outstanding()]
        return {"buffer": [pack_group(group) for group in self._buffer], "outstanding": outstanding}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._buffer = deque(unpack_group(values) for values in state["buffer"])
        self.resubmit([Order.from_json(values) for values in state["outstanding"]])


def is_without_signal(group: Group) -> bool:
    """Whether no reward differs from another, or fewer than two have a verdict."""
    return len(set(group.rewards)) < 2


def pack_group(group: Group) -> dict[str, Any]:
    """A group as tensors and plain values, for checkpoints and queues."""
    import torch

    def tensor(array: np.ndarray | None) -> Any:
        return None if array is None else torch.from_numpy(np.ascontiguousarray(array))

    arrays = ("tokens", "logprobs", "versions", "experts")
    rollouts = [
        {name: tensor(value) if name in arrays else value for name, value in vars(rollout).items()}
        for rollout in group.rollouts
    ]
    prompt = tensor(group.prompt_tokens)
    return {"order": group.order.to_json(), "prompt_tokens": prompt, "rollouts": rollouts, "seconds": group.seconds}


def unpack_group(values: Mapping[str, Any]) -> Group:
    """The group that :func:`pack_group` packed."""
    rollouts = []
    for entry in values["rollouts"]:
        plain = {name: value.numpy() if hasattr(value, "numpy") else value for name, value in entry.items()}
        rollouts.append(Rollout(**plain))
    return Group(Order.from_json(values["order"]), values["prompt_tokens"].numpy(), rollouts, values["seconds"])


def _mean(flags: Any) -> float:
    return float(np.mean(list(flags)))


def _rare_tokens(rollouts: list[Rollout], vocab_size: int) -> dict[str, Metric]:
    tokens = np.concatenate([rollout.tokens for rollout in rollouts])
    return {
        f"rl/rare_tokens_top{round(100 * part)}": share for part, share in rare_token_shares(tokens, vocab_size).items()
    }
