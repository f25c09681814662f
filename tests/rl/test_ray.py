"""Rollout workers as Ray actors, two of them on this machine: the same groups, deaths included."""

from __future__ import annotations

import os
import pickle
import signal
import time

import pytest

pytest.importorskip("ray")

from openzaya.rl.rollout import Order
from openzaya.rl.worker import WorkerSetup
from tests.rl.letters import ROOT, LettersEnvironment, LettersSpec, make_model, tokenizer
from tests.rl.test_processes import ROLLOUT, assert_same, collect_all, expected, make_orders

__all__ = ["expected"]


def make_setup(model, **settings):
    specs = {"a": [LettersSpec(trouble="slow")], "b": [LettersSpec(trouble="very slow")]}
    return WorkerSetup(model.config, tokenizer(), specs, ROLLOUT, behaviour=None, stages=ROOT, threads=1, **settings)


@pytest.fixture
def pool(monkeypatch):
    from openzaya.rl.adapters.ray import RayPool

    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.syspath_prepend(str(ROOT))
    model = make_model()
    one = RayPool(make_setup(model), 2, step=0, weights=model.state_dict())
    yield one
    one.close()


def process_id_of(pool, index):
    import ray

    return ray.get(pool._places[index].actor.__ray_call__.remote(lambda actor: os.getpid()))


def test_actors_make_the_same_groups_and_may_die(pool, expected):
    # A learner saves when it is asked to end; Ray would end it.
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    pool.submit(make_orders(24))
    groups = collect_all(pool, 2)
    os.kill(process_id_of(pool, 0), signal.SIGKILL)
    groups |= collect_all(pool, 22)
    assert pool.outstanding() == [] and pool.collect() == []
    assert_same(groups, expected)
    assert pool.metrics()["rollout/restarts"] == 1
    # Weights that are published reach all that is ordered later.
    pool.publish(5, {name: tensor * 1.01 for name, tensor in make_model().state_dict().items()})
    pool.submit([Order(99, "a", "plain", LettersEnvironment().task(0, 1), 4, 7)])
    assert collect_all(pool, 1)[99].oldest_version == 5
    # Four verdicts take longer than an actor may be silent for, no single one does.
    pool._hang_limit_s = 2.0
    pool.submit([Order(100, "b", "plain", LettersEnvironment().task(0, 1), 4, 7)])
    assert collect_all(pool, 1)[100].seconds > 4 * 0.8
    assert pool.metrics()["rollout/restarts"] == 1
    silences = [pool._transport.silence_s(place.number) for place in pool._places]
    assert min(silences) < 60 and pool._transport.silence_s(-1) == float("inf")


class StuckEngine:
    """Has rollouts in flight, and steps only when it is told to."""

    num_in_flight, num_steps = 1, 7

    def start(self, orders):
        pass

    def finished(self, timeout_s):
        time.sleep(timeout_s)
        return []


def test_an_engine_that_stands_still_ends_its_actor():
    from openzaya.rl.adapters.ray import _Actor

    class NoNews:
        def pull(self, newer_than):
            return None

    actor = _Actor(pickle.dumps(None), NoNews(), 0, hang_limit_s=0.2)
    actor._engine = engine = StuckEngine()
    for _ in range(12):
        engine.num_steps += 1
        assert actor.advance([], 0.05) == [], "one that steps may take as long as it likes"
    time.sleep(0.3)  # the learner was busy
    assert actor.advance([], 0.05) == []
    with pytest.raises(TimeoutError, match="no step in"):
        for _ in range(12):
            actor.advance([], 0.05)


def test_actors_ask_for_what_they_need():
    from openzaya.rl.adapters.ray import resources_of

    assert resources_of(make_setup(make_model())) == {"num_cpus": 1}
    assert resources_of(make_setup(make_model(), device="cuda:1")) == {"num_cpus": 1, "num_gpus": 1}
