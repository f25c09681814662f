"""Which orders are outstanding, who works on them, and which groups have come back: for pools of several workers.

    hand out   a worker holds a bounded number of orders and gets more as it finishes; the rest waits here
    deliver    the first group of an order counts, any other is dropped
    return     the orders of a worker that is gone wait again, before all others, with the same numbers and seeds

An order whose workers end again and again ends the run.
"""

from __future__ import annotations

import threading
from collections import Counter, deque
from collections.abc import Sequence

from openzaya.errors import TrainingError
from openzaya.rl.rollout import Group, Order

MAX_ATTEMPTS = 8
"""Workers that may end while they work on the same order."""
SPARE_SHARE = 0.25
"""Of the rollouts that an engine runs together, those that lie ready in its worker."""


class OrderBook:
    """All orders of a pool; any thread may use it.

    Args:
        max_running: rollouts that a worker's engine runs together.
    """

    def __init__(self, num_workers: int, max_running: int) -> None:
        self.changed = threading.Condition()
        """Held for every change; notified when a group has arrived."""
        self._num_workers, self._max_rollouts = num_workers, int(max_running * (1 + SPARE_SHARE))
        self._orders: dict[int, Order] = {}
        self._waiting: deque[Order] = deque()
        self._arrived: list[Group] = []
        self._held: list[dict[int, Order]] = [{} for _ in range(num_workers)]
        self._attempts: Counter[int] = Counter()
        self.num_reissued = 0
        self.num_duplicates = 0

    @property
    def has_arrivals(self) -> bool:
        return bool(self._arrived)

    def submit(self, orders: Sequence[Order]) -> None:
        """Take new orders."""
        with self.changed:
            for order in orders:
                if order.number in self._orders:
                    raise ValueError(f"order {order.number} is outstanding already")
                self._orders[order.number] = order
                self._waiting.append(order)

    def outstanding(self) -> list[Order]:
        """Those whose groups were not collected yet."""
        with self.changed:
            return list(self._orders.values())

    def collect(self) -> list[Group]:
        """The groups that have arrived, each once."""
        with self.changed:
            groups, self._arrived = self._arrived, []
            for group in groups:
                del self._orders[group.order.number]
            return groups

    def hand_out(self, ready: Sequence[int]) -> dict[int, list[Order]]:
        """Orders for the workers that can take some; they belong to them from now on."""
        given: dict[int, list[Order]] = {}
        with self.changed:
            # An even share, also for those that are not ready yet.
            fair = -(-len(self._orders) // self._num_workers)
            while self._waiting and ready:
                load = {index: sum(order.num_rollouts for order in self._held[index].values()) for index in ready}
                index = min(ready, key=load.__getitem__)
                held, order = self._held[index], self._waiting[0]
                if held and (load[index] + order.num_rollouts > self._max_rollouts or len(held) >= fair):
                    break
                held[order.number] = self._waiting.popleft()
                given.setdefault(index, []).append(order)
        return given

    def deliver(self, index: int, group: Group) -> None:
        """Worker ``index`` has finished a group."""
        number = group.order.number
        with self.changed:
            self._held[index].pop(number, None)
            is_new = number in self._orders and all(one.order.number != number for one in self._arrived)
            if not is_new:
                self.num_duplicates += 1
                return
            self._arrived.append(group)
            self._waiting = deque(order for order in self._waiting if order.number != number)
            self._attempts.pop(number, None)
            self.changed.notify_all()

    def give_back(self, index: int, how: str) -> int:
        """Worker ``index`` is gone; returns how many orders wait again.

        Raises:
            TrainingError: one of them has outlived too many workers; ``how`` says what became of this one.
        """
        with self.changed:
            orders = sorted(self._held[index].values(), key=lambda order: order.number)
            self._held[index].clear()
            self._waiting.extendleft(reversed(orders))
            self._attempts.update(order.number for order in orders)
            self.num_reissued += len(orders)
        for order in orders:
            if self._attempts[order.number] >= MAX_ATTEMPTS:
                raise TrainingError(
                    f"{MAX_ATTEMPTS} rollout workers ended while they worked on order {order.number} "
                    f"({order.task.environment}): leave that environment out, or give them more memory; the last one "
                    f"{how}"
                )
        return len(orders)
