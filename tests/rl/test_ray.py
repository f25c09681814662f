"""Rollout workers as Ray actors, two of them on this machine: the same groups, deaths included."""

from __future__ import annotations

import os
import signal

import pytest

pytest.importorskip("ray")

from openzaya.rl.rollout import Order
from openzaya.rl.worker import WorkerSetup
from tests.rl.letters import ROOT, LettersEnvironment, LettersSpec, make_model, tokenizer
from tests.rl.test_processes import ROLLOUT, assert_same, collect_all, expected, make_orders

__all__ = ["expected"]


@pytest.fixture
def pool(monkeypatch):
    from openzaya.rl.adapters.ray import RayPool

    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.syspath_prepend(str(ROOT))
    specs = [LettersSpec(trouble="slow")]
    model = make_model()
    setup = WorkerSetup(model.config, tokenizer(), specs, ROLLOUT, behaviour=None, stages=ROOT, threads=1)
    one = RayPool(setup, 2, step=0, weights=model.state_dict())
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
