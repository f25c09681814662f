"""Whatever breaks inside a step ends the requests that were in it, and nothing else; nobody waits for ever."""

from __future__ import annotations

import asyncio
import gc
import queue
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Iterator

import pytest

from openzaya.errors import EngineError
from openzaya.infer import loop as loop_module
from openzaya.infer.choosing import SequenceState
from openzaya.infer.engine import Engine
from openzaya.infer.sampling import SamplingParams
from tests.infer.memory_runner import MemoryRunner, completion_of
from tests.infer.test_engine import GREEDY, assert_all_is_free, long_winded, make_engine

ENDLESS = SamplingParams(temperature=0, max_new_tokens=10**6, ignore_eos=True)


@pytest.fixture
def engine(monkeypatch) -> Iterator[Engine]:
    with make_engine(monkeypatch, max_running=4) as made:
        yield made


def works(engine: Engine) -> bool:
    return engine.generate([[7, 9]], GREEDY)[0].completions[0].tokens == completion_of([7, 9], 20)[0]


def test_a_runner_that_raises_fails_the_step_s_requests_and_no_others(engine: Engine) -> None:
    ends: queue.Queue[tuple[str, object]] = queue.Queue()
    running, hold = threading.Event(), threading.Event()

    def first_delta(delta) -> None:
        running.set()
        hold.wait(10)

    engine.submit([7], ENDLESS, 3, on_delta=first_delta, on_end=lambda outcome: ends.put(("in the step", outcome)))
    assert running.wait(10)
    engine._runner.fault = RuntimeError("broken kernel")
    engine.submit(long_winded(30), GREEDY, on_end=lambda outcome: ends.put(("later", outcome)))
    # The command that adds the second request runs before the step that fails, unless it comes after it.
    hold.set()
    first = ends.get(timeout=10)
    assert isinstance(first[1], EngineError) and "broken kernel" in str(first[1])
    assert isinstance(first[1].__cause__, RuntimeError)
    ends.get(timeout=10)
    assert works(engine)
    assert_all_is_free(engine)


def test_generate_and_stream_raise_what_failed(engine: Engine) -> None:
    engine._runner.fault = RuntimeError("broken kernel")
    with pytest.raises(EngineError, match="broken kernel"):
        engine.generate([[7, 8, 9]] * 3, GREEDY)
    assert_all_is_free(engine)
    engine._runner.fault = RuntimeError("broken again")

    async def main() -> None:
        async for _ in engine.stream([7], GREEDY):
            pass

    with pytest.raises(EngineError, match="broken again"):
        asyncio.run(main())
    assert works(engine)
    assert_all_is_free(engine)


@pytest.mark.parametrize("name", ["save_slot", "restore_slot", "copy_slot", "copy_block"])
def test_a_runner_that_cannot_copy(engine: Engine, monkeypatch, name: str) -> None:
    prompt = list(range(5, 63)) * 3
    engine.generate([prompt], GREEDY)

    def broken(self, source, target):
        raise RuntimeError(f"no {name}")

    with monkeypatch.context() as patch:
        patch.setattr(MemoryRunner, name, broken)
        with pytest.raises(EngineError, match=f"no {name}"):
            engine.generate([prompt, [*prompt[:100], 7], [*prompt[:100], 8]], GREEDY, n=3)
        assert_all_is_free(engine)
    assert works(engine)


def test_a_state_that_raises_fails_its_request_alone(engine: Engine, monkeypatch) -> None:
    plain = SequenceState.accept

    def picky(self, chosen):
        if self.params.seed == 13 and len(self.tokens) == 2:
            raise ValueError("unlucky")
        return plain(self, chosen)

    monkeypatch.setattr(SequenceState, "accept", picky)
    ends: queue.Queue[object] = queue.Queue()
    params = GREEDY.model_copy(update={"ignore_eos": True})
    for seed in (12, 13, 14):
        engine.submit([7], params.model_copy(update={"seed": seed}), on_end=ends.put)
    outcomes = [ends.get(timeout=10) for _ in range(3)]
    failed = [outcome for outcome in outcomes if isinstance(outcome, EngineError)]
    assert len(failed) == 1 and "unlucky" in str(failed[0])
    assert_all_is_free(engine)


def test_a_choice_that_raises_fails_its_request_alone(engine: Engine, monkeypatch) -> None:
    plain = loop_module.choose

    def picky(logits_BV, states):
        if any(state.params.seed == 13 for state in states):
            raise ValueError("unlucky")
        return plain(logits_BV, states)

    monkeypatch.setattr(loop_module, "choose", picky)
    ends: queue.Queue[object] = queue.Queue()
    hold = threading.Event()
    engine._loop.post(lambda: hold.wait(10) and None)
    for seed in (12, 13, 14):
        engine.submit([7], GREEDY.model_copy(update={"seed": seed}), on_end=ends.put)
    hold.set()
    outcomes = [ends.get(timeout=10) for _ in range(3)]
    failed = [outcome for outcome in outcomes if isinstance(outcome, EngineError)]
    assert len(failed) == 1 and "unlucky" in str(failed[0])
    assert_all_is_free(engine)


def test_a_receiver_that_raises_ends_its_request(engine: Engine) -> None:
    ends: queue.Queue[object] = queue.Queue()

    def broken(delta) -> None:
        raise RuntimeError("receiver gone")

    engine.submit([7], ENDLESS, 2, on_delta=broken, on_end=ends.put)
    outcome = ends.get(timeout=10)
    assert isinstance(outcome, EngineError) and "receiver gone" in str(outcome)
    engine.submit([7], GREEDY, on_end=lambda outcome: 1 / 0)
    assert works(engine)
    assert_all_is_free(engine)


def test_a_closed_event_loop_ends_its_streams(engine: Engine) -> None:
    async def main() -> None:
        pieces = engine.stream([7], ENDLESS)
        await anext(pieces)
        # The loop ends without closing the generator.
        globals()["_left_open"] = pieces

    loop = asyncio.new_event_loop()
    loop.run_until_complete(main())
    loop.close()
    deadline = time.monotonic() + 10
    while engine.stats().num_running and time.monotonic() < deadline:
        time.sleep(0.01)
    assert_all_is_free(engine)


def test_close_ends_what_waits_with_an_error(monkeypatch) -> None:
    engine = make_engine(monkeypatch, max_running=1)
    outcome: list[object] = []

    def work() -> None:
        try:
            engine.generate([[7], [8], [9]], ENDLESS)
        except EngineError as error:
            outcome.append(str(error))

    thread = threading.Thread(target=work)
    thread.start()
    deadline = time.monotonic() + 10
    while not engine.stats().num_running and time.monotonic() < deadline:
        time.sleep(0.01)
    engine.close()
    thread.join(10)
    assert outcome == ["the engine was closed"]
    engine.close()
    with pytest.raises(EngineError, match="the engine is closed"):
        engine.submit([7], GREEDY)
    engine.cancel("anything")


def test_an_engine_closed_in_its_own_callback_does_not_hang(monkeypatch) -> None:
    engine = make_engine(monkeypatch)
    with pytest.raises(EngineError, match="closed"):
        ends: queue.Queue[object] = queue.Queue()
        engine.submit([7], ENDLESS, on_delta=lambda delta: engine.close(), on_end=ends.put)
        raise ends.get(timeout=10)


def test_waiting_for_the_engine_inside_its_callback_is_refused(engine: Engine) -> None:
    ends: queue.Queue[object] = queue.Queue()
    engine.submit([7], ENDLESS, on_delta=lambda delta: engine.update_weights({}), on_end=ends.put)
    assert "callback" in str(ends.get(timeout=10))


def test_bookkeeping_that_breaks_down_leaves_nobody_waiting(engine: Engine, monkeypatch) -> None:
    def broken(request):
        raise MemoryError("books")

    monkeypatch.setattr(engine._scheduler, "remove", broken)
    monkeypatch.setattr(threading, "excepthook", lambda arguments: None)
    engine._runner.fault = RuntimeError("broken kernel")
    ends: queue.Queue[object] = queue.Queue()
    hold = threading.Event()
    engine._loop.post(lambda: hold.wait(10) and None)
    for _ in range(3):
        engine.submit([7], GREEDY, on_end=ends.put)
    hold.set()
    for _ in range(3):
        outcome = ends.get(timeout=10)
        assert isinstance(outcome, EngineError) and "broke down" in str(outcome) and "books" in str(outcome)
    with pytest.raises(EngineError, match="closed"):
        engine.submit([7], GREEDY)


def test_an_idle_engine_ends_its_thread_and_can_be_collected(monkeypatch) -> None:
    monkeypatch.setattr(loop_module, "IDLE_SECONDS", 0.05)
    engine = make_engine(monkeypatch)
    assert works(engine)
    thread = engine._loop._thread
    if thread is not None:
        thread.join(10)
    assert engine._loop._thread is None
    assert works(engine)
    gone = weakref.ref(engine._runner)
    del engine
    deadline = time.monotonic() + 10
    while gone() is not None and time.monotonic() < deadline:
        gc.collect()
        time.sleep(0.02)
    assert gone() is None


def test_a_program_that_leaves_while_a_request_runs_ends_cleanly() -> None:
    code = """
import threading
from openzaya import Engine, SamplingParams
from tests.infer.miniature import make_model
begun = threading.Event()
engine = Engine(make_model(0))
engine.submit([7], SamplingParams(max_new_tokens=10**6, ignore_eos=True), 4, on_delta=lambda delta: begun.set())
begun.wait(60)
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert (result.returncode, result.stderr) == (0, "")
