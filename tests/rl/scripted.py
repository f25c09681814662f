"""A pool that answers without an engine, for tests of what lies around it."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from openzaya.rl.rollout import Group, Order, Rollout


def rollout(reward: float | None, *, version: int = 0, num_tokens: int = 4, text: str = "<think>a</think>b") -> Rollout:
    return Rollout(
        tokens=np.arange(num_tokens, dtype=np.int32),
        logprobs=np.full(num_tokens, -0.5, dtype=np.float32),
        versions=np.full(num_tokens, version, dtype=np.int32),
        experts=None,
        text=text,
        is_truncated=False,
        verdict=reward,
        reward=reward,
    )


def group(order: Order, rewards: list[float | None], version: int = 0) -> Group:
    return Group(order, np.arange(3, dtype=np.int32), [rollout(reward, version=version) for reward in rewards])


class ScriptedPool:
    """``answer(order)`` gives the rewards; groups come back one a call, in the order of ``pick``."""

    def __init__(self, answer: Callable[[Order], list[float | None]], *, at_once: bool = True) -> None:
        self._answer, self._at_once = answer, at_once
        self.orders: list[Order] = []
        self.submitted: list[int] = []
        self.version = 0
        self.published: list[int] = []

    def publish(self, step, weights) -> None:
        self.version = step
        self.published.append(step)

    def submit(self, orders) -> None:
        self.orders += orders
        self.submitted += [order.number for order in orders]

    def collect(self, timeout_s=None) -> list[Group]:
        num = len(self.orders) if self._at_once else min(1, len(self.orders))
        done, self.orders = self.orders[:num], self.orders[num:]
        # Backwards: nothing may depend on who is finished first.
        return [group(order, self._answer(order), self.version) for order in reversed(done)]

    def outstanding(self) -> list[Order]:
        return list(self.orders)

    def metrics(self) -> dict[str, float]:
        return {}

    def close(self) -> None:
        pass
