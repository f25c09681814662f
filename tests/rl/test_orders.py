"""Orders and groups of several workers: bounded hand-out, each group once, nothing lost."""

from __future__ import annotations

import pytest

from openzaya.environments.base import Task
from openzaya.errors import TrainingError
from openzaya.rl import orders as orders_module
from openzaya.rl.orders import OrderBook
from openzaya.rl.rollout import Order
from tests.rl.scripted import group


def make_orders(num):
    task = Task("letters", 0, 0, [{"role": "user", "content": "?"}], None)
    return [Order(number, "a", "plain", task, 4, number) for number in range(num)]


def numbers(entries):
    return [entry.number for entry in entries]


def test_a_bounded_even_share_is_handed_out_and_what_was_lost_comes_first():
    book = OrderBook(2, max_running=8)
    book.submit(make_orders(9))
    # Eight rollouts and a quarter more: two orders of four, and no third.
    assert numbers(book.hand_out([0])[0]) == [0, 1]
    assert book.hand_out([0]) == {} and book.hand_out([]) == {}
    assert numbers(book.hand_out([0, 1])[1]) == [2, 3]
    assert book.give_back(0, "ended") == 2
    assert numbers(book.hand_out([0])[0]) == [0, 1]
    assert len(book.outstanding()) == 9 and book.num_reissued == 2


def test_one_of_two_workers_does_not_take_all_before_the_other_is_ready():
    book = OrderBook(2, max_running=1000)
    book.submit(make_orders(6))
    assert numbers(book.hand_out([0])[0]) == [0, 1, 2]
    assert numbers(book.hand_out([0, 1])[1]) == [3, 4, 5]


def test_order_larger_than_the_bound_is_handed_out_alone():
    book = OrderBook(1, max_running=1)
    book.submit(make_orders(2))
    assert numbers(book.hand_out([0])[0]) == [0]


def test_group_is_delivered_once():
    book = OrderBook(2, max_running=8)
    first, second = make_orders(2)
    book.submit([first, second])
    book.hand_out([0])
    book.deliver(0, group(first, [1.0, 0.0]))
    # From a worker that was thought dead, before and after the first was collected; and one that nobody asked for.
    book.deliver(1, group(first, [1.0, 0.0]))
    assert numbers(entry.order for entry in book.collect()) == [0]
    book.deliver(1, group(first, [1.0, 0.0]))
    book.deliver(1, group(make_orders(9)[8], [1.0, 0.0]))
    assert book.collect() == [] and book.num_duplicates == 3
    assert numbers(book.outstanding()) == [1]
    with pytest.raises(ValueError, match="order 1 is outstanding already"):
        book.submit([second])


def test_late_group_of_an_order_that_waits_again_takes_it_out_of_the_queue():
    book = OrderBook(2, max_running=8)
    book.submit(make_orders(1))
    (order,) = book.hand_out([0])[0]
    book.give_back(0, "ended")
    book.deliver(0, group(order, [1.0, 0.0]))
    assert len(book.collect()) == 1
    assert book.hand_out([1]) == {} and book.outstanding() == []


def test_order_that_outlives_too_many_workers_ends_the_run(monkeypatch):
    monkeypatch.setattr(orders_module, "MAX_ATTEMPTS", 3)
    book = OrderBook(1, max_running=8)
    book.submit(make_orders(1))
    for _ in range(2):
        book.hand_out([0])
        book.give_back(0, "ended")
    book.hand_out([0])
    with pytest.raises(TrainingError, match=r"3 rollout workers ended .* order 0 \(letters\).*the last one was killed"):
        book.give_back(0, "was killed")
