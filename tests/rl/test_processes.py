"""Rollout processes: whatever happens to them, every group comes back once, and nothing is left behind."""

from __future__ import annotations

import os
import signal
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from openzaya.errors import TrainingError
from openzaya.rl import loop as loop_module
from openzaya.rl import orders as orders_module
from openzaya.rl import processes as processes_module
from openzaya.rl.behaviour import BehaviourConfig, make_reward
from openzaya.rl.channel import Channel, WorkerChannel, encode
from openzaya.rl.judge import JudgeConfig
from openzaya.rl.pool import LocalPool, RolloutEngine
from openzaya.rl.processes import ProcessPool
from openzaya.rl.rollout import Order, RolloutConfig, order_seed
from openzaya.rl.worker import WorkerSetup, make_engine, model_of
from tests.rl.letters import (
    ROOT,
    LettersEnvironment,
    LettersSpec,
    is_alive,
    learner,
    make_config,
    make_model,
    tokenizer,
    wait_until,
)

ROLLOUT = RolloutConfig(group_size=4, max_new_tokens=24, max_running=8)


@pytest.fixture(autouse=True)
def _importable(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT))


def make_orders(num):
    environment = LettersEnvironment()
    return [Order(number, "a", "plain", environment.task(0, number), 4, order_seed(0, number)) for number in range(num)]


def make_pool(model, workers=1, trouble="", **settings):
    specs = {"a": [LettersSpec(trouble=trouble)]}
    setup = WorkerSetup(model.config, tokenizer(), specs, ROLLOUT, behaviour=None, stages=ROOT, threads=1)
    return ProcessPool(setup, workers, step=0, weights=model.state_dict(), **settings)


def collect_all(pool, wanted, limit_s=240):
    """All groups; fails where one comes twice."""
    groups, until = {}, time.monotonic() + limit_s
    while len(groups) < wanted:
        assert time.monotonic() < until
        for group in pool.collect(timeout_s=5):
            assert group.order.number not in groups
            groups[group.order.number] = group
    return groups


def assert_same(groups, expected):
    assert groups.keys() == expected.keys()
    for number, group in groups.items():
        for one, other in zip(group.rollouts, expected[number].rollouts, strict=True):
            assert one.text == other.text and one.reward == other.reward
            for name in ("tokens", "logprobs", "versions", "experts"):
                assert np.array_equal(getattr(one, name), getattr(other, name)), name


@pytest.fixture(scope="module")
def expected():
    engine = RolloutEngine(make_model(), tokenizer(), {"a": {"letters": LettersEnvironment()}}, ROLLOUT)
    pool = LocalPool(engine)
    pool.submit(make_orders(24))
    groups = {group.order.number: group for group in pool.collect()}
    pool.close()
    return groups


def test_killed_and_stopped_processes_cost_no_group_and_no_bit(expected, capfd):
    pool = make_pool(make_model(), workers=2, trouble="slow", hang_limit_s=15)
    try:
        pool.submit(make_orders(24))
        groups = collect_all(pool, 2)
        os.kill(pool.process_ids[0], signal.SIGKILL)
        # These are the learner's business.
        os.kill(pool.process_ids[1], signal.SIGINT)
        os.kill(pool.process_ids[1], signal.SIGTERM)
        stopped = pool.process_ids[1]
        groups |= collect_all(pool, 2)
        os.kill(stopped, signal.SIGSTOP)
        groups |= collect_all(pool, 24 - len(groups))
        assert pool.outstanding() == [] and pool.collect() == []
        assert_same(groups, expected)
        metrics = pool.metrics()
        assert metrics["rollout/restarts"] >= 1 and metrics["rollout/reissued_orders"] >= 1
        assert metrics["rollout/duplicate_groups"] == 0
        ids = pool.process_ids
    finally:
        pool.close()
    assert not any(map(is_alive, [*ids, stopped]))
    assert "SIGKILL" in capfd.readouterr().err


def test_weights_change_in_flight_and_tokens_say_so(expected):
    model = make_model()
    pool = make_pool(model, trouble="slow")
    try:
        pool.submit(make_orders(24))
        groups = collect_all(pool, 4)
        pool.publish(5, {name: tensor * 1.01 for name, tensor in model.state_dict().items()})
        groups |= collect_all(pool, 20)
        seen = {number: set(np.concatenate([r.versions for r in group.rollouts])) for number, group in groups.items()}
        assert set.union(*seen.values()) == {0, 5}
        old = {number for number, versions in seen.items() if versions == {0}}
        assert_same({n: groups[n] for n in old}, {n: expected[n] for n in old})
        # A process that is started now begins with the weights of now.
        os.kill(pool.process_ids[0], signal.SIGKILL)
        pool.submit([Order(99, "a", "plain", LettersEnvironment().task(0, 1), 4, 7)])
        assert collect_all(pool, 1)[99].oldest_version == 5
    finally:
        pool.close()


def test_process_that_can_never_start_ends_the_run_with_its_own_words(monkeypatch):
    monkeypatch.setattr(processes_module, "MAX_FAILED_STARTS", 2)
    pool = make_pool(make_model(), trouble="never")
    try:
        pool.submit(make_orders(1))
        with pytest.raises(TrainingError, match=r"(?s)2 rollout processes in a row.*planted: no environment"):
            pool.collect(timeout_s=240)
        with pytest.raises(TrainingError):
            pool.collect()
    finally:
        pool.close()
    assert pool.process_ids == []


def test_order_that_no_process_survives_ends_the_run(monkeypatch):
    monkeypatch.setattr(orders_module, "MAX_ATTEMPTS", 2)
    pool = make_pool(make_model(), trouble="exit")
    try:
        pool.submit(make_orders(1))
        with pytest.raises(
            TrainingError, match=r"2 rollout workers ended while they worked on order 0 \(letters.*exit code 7"
        ):
            pool.collect(timeout_s=240)
    finally:
        pool.close()


def test_order_that_cannot_be_served_ends_the_run_at_once():
    pool = make_pool(make_model())
    try:
        task = LettersEnvironment().task(0, 0)
        long = type(task)("letters", 0, 0, [{"role": "user", "content": "word " * 200}], None)
        pool.submit([Order(0, "a", "plain", long, 4, 0)])
        with pytest.raises(TrainingError, match=r"order 0 \(letters\) could not be rolled out: the prompt has "):
            pool.collect(timeout_s=240)
    finally:
        pool.close()


def test_killed_learner_takes_its_processes_along(tmp_path):
    before = set(os.listdir("/dev/shm"))
    with learner(tmp_path / "01-rl", steps=1000, pipeline={"workers": 1, "max_staleness": 0}) as process:
        assert wait_until((tmp_path / "01-rl/groups.jsonl").exists, process)
        from tests.rl.letters import children, last_step

        assert wait_until(lambda: last_step(tmp_path / "01-rl") >= 1, process)
        ids = children(process.pid)
        assert len(ids) == 1
        process.kill()
        process.wait()
        until = time.monotonic() + 60
        while any(map(is_alive, ids)):
            assert time.monotonic() < until, "a rollout process outlived its learner"
            time.sleep(0.05)
    assert not {name for name in set(os.listdir("/dev/shm")) - before if "torch" in name or "openzaya" in name}


def test_verdicts_and_a_judge_that_is_asked_are_signs_of_life(monkeypatch):
    class SlowJudge:
        def __init__(self, config, *, on_wait):
            self.on_wait = on_wait

        def score_group(self, messages, responses):
            self.on_wait()
            signs.append("judge")
            return [0.0] * len(responses)

    monkeypatch.setattr("openzaya.rl.judge.Judge", SlowJudge)
    signs = []
    model, specs = make_model(), {"a": [LettersSpec()]}
    behaviour = BehaviourConfig(judge=JudgeConfig(base_url="http://localhost:1/v1"), chat=["letters"])
    setup = WorkerSetup(model.config, tokenizer(), specs, ROLLOUT, behaviour=behaviour, stages=ROOT, threads=1)
    engine = make_engine(setup, 0, model.state_dict(), lambda: signs.append("beat"))
    engine.start(make_orders(1))
    assert len(engine.finished()) == 1
    engine.close()
    assert signs == ["beat"] * 5 + ["judge"]


def test_workers_use_the_recipe_s_device(monkeypatch):
    model, setups = make_model(), []
    monkeypatch.setattr(loop_module, "ProcessPool", lambda setup, *arguments, **named: setups.append(setup))
    learner = SimpleNamespace(model=model, step=0, weights=model.state_dict)
    config = make_config(device="cuda:1", pipeline={"workers": 1})
    loop_module.make_pool(config, learner, tokenizer(), None, ROOT)
    assert setups[0].device == "cuda:1"
    # No GPU here; this device shows all the same where a model is put.
    assert model_of(model.config, model.state_dict(), "meta").device.type == "meta"
    scorer = []
    monkeypatch.setattr("openzaya.rl.reward_model.RewardModel.load", lambda path, device, **_: scorer.append(device))
    make_reward(BehaviourConfig(reward_model="07-rm"), {"a": {"letters": None}}, ROOT, setups[0].device)
    assert scorer == ["cuda:1"]


def test_channel_puts_messages_together_and_never_blocks():
    import socket

    ours, theirs = socket.socketpair()
    channel, worker = Channel(ours), WorkerChannel(theirs)
    large = np.arange(300_000)
    whole = encode(("group", large))
    for piece in (whole[:3], whole[3:100_000]):
        theirs.sendall(piece)
        assert channel.receive() == []
    # More than the sockets hold, and nobody reads: what is left waits.
    channel.send(encode(("orders", large)))
    assert channel.has_unsent
    received = []
    while not received:
        received = worker.receive(timeout_s=1)
        channel.flush()
    assert np.array_equal(received[0][1], large) and not channel.has_unsent
    theirs.close()
    assert channel.receive() == [] and channel.is_ended


def test_transport_hands_out_whole_snapshots_only():
    from openzaya.rl.transport import SharedMemoryTransport

    transport = SharedMemoryTransport(torch.multiprocessing.get_context("spawn"))
    assert transport.pull(-1) is None
    for step in range(6):
        transport.publish(
            step, {"a": torch.full((1000,), float(step)), "b": torch.full((7,), step, dtype=torch.bfloat16)}
        )
        if step == 2:
            held = transport.pull(1)
    step, weights = held
    # Taken long ago, and still what it was.
    assert step == 2 and (weights["a"] == 2).all() and (weights["b"] == 2).all()
    assert transport.pull(4)[0] == 5 and transport.pull(5) is None
    transport.close()
    assert transport.pull(-1) is None
