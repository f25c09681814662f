"""Dynamic sampling, staleness, eviction, and that no group is used twice."""

from __future__ import annotations

import pytest

from openzaya.environments.base import Task
from openzaya.rl.collect import Collector, is_without_signal
from openzaya.rl.recipe import RLConfig
from openzaya.rl.rollout import Order
from tests.rl.scripted import ScriptedPool, group


class Prompts:
    """Numbers only."""

    def __init__(self):
        self.num = 0
        self.seen = []

    def next(self):
        self.num += 1
        return Order(self.num - 1, "a", "plain", Task("addition", 0, self.num, [], {}), 4, self.num)

    def finished(self, one):
        self.seen.append(one.order.number)


def config(**values):
    base = {
        "model": {"start_from": "x"},
        "prompts_per_step": 4,
        "sources": [{"name": "a", "environments": [{"kind": "problems"}]}],
        "rollout": {"group_size": 4},
        "algorithm": {"max_draws": 3},
    }
    return RLConfig(**(base | values))


def mixed(order):
    return [1, 0, 1, 0]


def equal_thirds(order):
    return [[1, 0, 1, 0], [0, 0, 0, 0], [1, 1, 1, 1]][order.number % 3]


def collector(pool, **values):
    prompts = Prompts()
    return Collector(config(**values), prompts, pool), prompts


def numbers(groups):
    return [one.order.number for one in groups]


def test_synchronous_orders_what_it_needs_in_order():
    pool = ScriptedPool(mixed)
    one, prompts = collector(pool)
    assert numbers(one.next_groups(0)) == [0, 1, 2, 3]
    assert numbers(one.next_groups(0)) == [4, 5, 6, 7]
    assert prompts.num == 8


def test_equal_groups_are_replaced():
    pool = ScriptedPool(equal_thirds)
    one, _ = collector(pool)
    assert numbers(one.next_groups(0)) == [0, 3, 6, 9]
    metrics = one.metrics(0, 100)
    assert metrics["rl/drawn_groups"] == len(one.drawn) and metrics["rl/dropped_equal"] == len(one.drawn) - 4
    assert one.drawn_rates() == {"a/plain": pytest.approx(sum(g.solve_rate for g in one.drawn) / len(one.drawn))}


def test_draws_are_bounded_and_an_empty_step_is_possible():
    pool = ScriptedPool(lambda order: [0, 0, 0, 0])
    one, prompts = collector(pool)
    assert one.next_groups(0) == [] and len(one.drawn) == 12 == prompts.num


def test_equal_groups_can_be_kept():
    one, _ = collector(ScriptedPool(equal_thirds), algorithm={"drop_equal_groups": False})
    assert numbers(one.next_groups(0)) == [0, 1, 2, 3]


def test_asynchronous_keeps_the_pool_busy_and_uses_each_group_once():
    pool = ScriptedPool(mixed, at_once=False)
    one, _ = collector(pool, pipeline={"workers": 1, "start_batches": 2, "buffer_batches": 3})
    used = []
    for step in range(5):
        used += numbers(one.next_groups(step))
        pool.publish(step + 1, {})
    assert len(used) == len(set(used)) == 20


def test_every_step_starts_with_start_batches():
    pool = ScriptedPool(mixed, at_once=False)
    one, _ = collector(pool, pipeline={"workers": 1, "start_batches": 2, "buffer_batches": 3})
    for step in range(3):
        one.next_groups(step)
        # Two batches of four were there, one was taken.
        assert one.metrics(step, 100)["rl/buffered_groups"] == 4


@pytest.mark.parametrize(("step", "num_stale"), [(2, 0), (3, 4)])
def test_stale_groups_are_dropped(step, num_stale):
    pool = ScriptedPool(mixed)
    one, _ = collector(pool, pipeline={"workers": 1, "start_batches": 2})
    first = numbers(one.next_groups(0))
    pool.publish(step, {})
    # Four groups, sampled by the weights of step 0, are waiting; the bound itself is not too old.
    last = numbers(one.next_groups(step))
    metrics = one.metrics(step, 100)
    assert metrics["rl/dropped_stale"] == num_stale
    assert metrics["rl/staleness_max"] == (0 if num_stale else 2)
    assert len(last) == 4 and not set(first) & set(last)


def test_a_full_buffer_loses_its_oldest_group():
    pool = ScriptedPool(mixed)
    one, _ = collector(pool, pipeline={"workers": 1, "max_staleness": 4, "buffer_batches": 1})
    groups = numbers(one.next_groups(0))
    # 16 orders were under way (4 batches), the buffer holds 4: the newest, which the scripted pool returns first-last.
    assert groups == [3, 2, 1, 0]
    assert one.metrics(0, 100)["rl/evicted"] == 12


def test_state_holds_waiting_groups_and_outstanding_orders():
    pool = ScriptedPool(mixed, at_once=False)
    settings = {"workers": 1, "start_batches": 2, "buffer_batches": 3}
    one, prompts = collector(pool, pipeline=settings)
    used = numbers(one.next_groups(0))
    state = one.state_dict()
    other_pool = ScriptedPool(mixed, at_once=False)
    other = Collector(config(pipeline=settings), prompts, other_pool)
    other.load_state_dict(state)
    assert other_pool.submitted == [order.number for order in pool.orders]
    following = numbers(other.next_groups(1))
    assert not set(used) & set(following) and len(following) == 4


def test_without_signal():
    order = Prompts().next()
    assert is_without_signal(group(order, [1, 1, None]))
    assert is_without_signal(group(order, [None, None]))
    assert is_without_signal(group(order, [1, None]))
    assert not is_without_signal(group(order, [1, 0, None]))
