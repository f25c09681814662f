"""The engine from outside: many callers at once, each gets its own tokens, and everything is free afterwards.

Most of it runs on a runner that foretells all tokens and checks every page (memory_runner.py).
"""

from __future__ import annotations

import asyncio
import random
import threading
from collections.abc import Iterator

import pytest

from openzaya.errors import EngineError, QueueFull
from openzaya.infer import engine as engine_module
from openzaya.infer import loop as loop_module
from openzaya.infer.engine import Engine
from openzaya.infer.outputs import Delta, RequestOutput
from openzaya.infer.sampling import SamplingParams
from openzaya.model.transformer import Zaya
from tests.infer.memory_runner import CONFIG, MemoryRunner, completion_of

GREEDY = SamplingParams(temperature=0, max_new_tokens=20)


def make_engine(monkeypatch: pytest.MonkeyPatch, num_blocks: int = 60, **settings) -> Engine:
    monkeypatch.setattr(
        engine_module,
        "make_runner",
        lambda model, max_running, **others: MemoryRunner(num_blocks, max_running),
    )
    return Engine(Zaya(CONFIG), **settings)


@pytest.fixture
def engine(monkeypatch) -> Iterator[Engine]:
    with make_engine(monkeypatch, max_running=8, chunk_tokens=64) as made:
        yield made


def text_of(seed: int, longest: int = 200) -> list[int]:
    draw = random.Random(seed)
    return [draw.randrange(5, 64) for _ in range(draw.randint(1, longest))]


def long_winded(num_tokens: int) -> list[int]:
    """A prompt whose completion does not end before so many tokens."""
    return next(text for text in map(text_of, range(999)) if completion_of(text, num_tokens)[1] == "length")


def assert_all_is_free(engine: Engine) -> None:
    """After whatever was posted before."""
    engine._loop.call(lambda: None)
    stats = engine.stats()
    assert (stats.num_running, stats.num_waiting) == (0, 0)
    assert stats.blocks_free == stats.blocks_total
    assert not engine._loop._requests


def test_outputs_come_in_the_order_of_the_prompts(engine: Engine) -> None:
    prompts = [text_of(seed) for seed in range(30)]
    calls: list[tuple[int, int]] = []
    outputs = engine.generate(prompts, GREEDY, n=2, progress=lambda *counts: calls.append(counts))
    for prompt, output in zip(prompts, outputs, strict=True):
        assert output.prompt_tokens == prompt
        assert [completion.index for completion in output.completions] == [0, 1]
        for completion in output.completions:
            assert (completion.tokens, completion.finish_reason) == completion_of(prompt, 20)
            assert completion.versions == [0] * len(completion.tokens)
            assert completion.logprobs is None and completion.experts is None and completion.text == ""
    assert [done for done, _ in calls] == list(range(1, 31))
    assert calls[-1][1] == sum(len(completion.tokens) for output in outputs for completion in output.completions)
    assert_all_is_free(engine)


def test_each_prompt_may_have_its_own_settings(engine: Engine) -> None:
    prompts = [long_winded(9)] * 3
    each = [GREEDY.model_copy(update={"max_new_tokens": number, "logprobs": 1}) for number in (1, 5, 9)]
    outputs = engine.generate(prompts, each)
    assert [len(output.completions[0].tokens) for output in outputs] == [1, 5, 9]
    for output in outputs:
        completion = output.completions[0]
        assert completion.logprobs is not None
        assert [chosen.token for chosen in completion.logprobs] == completion.tokens
    with pytest.raises(EngineError, match="3 prompts but 2 params"):
        engine.generate(prompts, each[:2])
    assert engine.generate([]) == []


def test_the_classes_of_all_tokens_that_were_run_come_back_also_from_the_cache(engine: Engine) -> None:
    prompt = text_of(3) + text_of(4) + text_of(5)
    params = GREEDY.model_copy(update={"return_experts": True})
    for expected_hits in (0, (len(prompt) - 1) // 64 * 64):
        output = engine.generate([prompt], params)[0]
        completion = output.completions[0]
        text = [*prompt, *completion.tokens][: None if completion.finish_reason == "stop" else -1]
        assert completion.experts is not None
        assert completion.experts.tolist() == [[token % 3, (token + 1) % 3] for token in text]
        assert output.num_cached_tokens == expected_hits


@pytest.mark.parametrize(
    ("prompt", "n", "problem"),
    [
        ([], 1, "the prompt has 0 tokens; it needs at least 1"),
        ([5] * 1024, 1, "1024 tokens; it needs at least 1 and fewer than the model's 1024 positions"),
        ([5, 64], 1, "token id 64, the vocabulary holds 64"),
        ([5, -1], 1, "token id -1, the vocabulary holds 64"),
        ([5], 0, "n=0, expected 1 to 4096"),
        ([5], 10**9, "n=1000000000, expected 1 to 4096"),
        ([5, 6.5], 1, "neither text nor a list of token ids"),
        ([5, None], 1, "neither text nor a list of token ids"),
        ("text", 1, "no tokenizer"),
    ],
)
def test_what_can_not_be_served_is_refused_at_once(engine: Engine, prompt, n: int, problem: str) -> None:
    with pytest.raises(EngineError, match=problem):
        engine.submit(prompt, GREEDY, n)
    with pytest.raises(EngineError, match=problem):
        engine.generate([[7], prompt], GREEDY, n)

    async def stream() -> None:
        async for _ in engine.stream(prompt, GREEDY, n):
            pass

    with pytest.raises(EngineError, match=problem):
        asyncio.run(stream())
    assert_all_is_free(engine)


def test_a_prompt_that_the_cache_can_not_hold_is_refused_and_a_completion_ends_there(monkeypatch) -> None:
    with make_engine(monkeypatch, num_blocks=3) as engine:
        assert engine.max_sequence_tokens == 192
        with pytest.raises(EngineError, match=r"192 tokens.*fewer than 192.*cache_bytes"):
            engine.submit([5] * 192)
        params = SamplingParams(temperature=0, max_new_tokens=10**9, ignore_eos=True)
        completion = engine.generate([[5] * 150], params)[0].completions[0]
        assert (len(completion.tokens), completion.finish_reason) == (42, "length")


def test_a_full_queue_refuses_but_a_long_list_is_generated(monkeypatch) -> None:
    with make_engine(monkeypatch, max_running=2, max_waiting=3) as engine:
        prompts = [text_of(seed, 50) for seed in range(40)]
        outputs = engine.generate(prompts, GREEDY)
        assert [output.completions[0].tokens for output in outputs] == [completion_of(p, 20)[0] for p in prompts]
        hold, ids = threading.Event(), []
        engine._loop.post(lambda: hold.wait(10) and None)
        try:
            with pytest.raises(QueueFull, match="3 requests are waiting, max_waiting is 3; try again later"):
                for _ in range(9):
                    ids.append(engine.submit([7], GREEDY))
            assert len(ids) == 3
        finally:
            hold.set()
        assert engine.generate([[7]], GREEDY)[0].completions[0].tokens == completion_of([7], 20)[0]


def test_threads_share_an_engine(engine: Engine) -> None:
    wrong: list[str] = []

    def work(seed: int) -> None:
        for round_number in range(6):
            prompt = text_of(100 * seed + round_number)
            found = engine.generate([prompt], GREEDY)[0].completions[0].tokens
            if found != completion_of(prompt, 20)[0]:
                wrong.append(f"{seed} {round_number}")

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
    assert_all_is_free(engine)


def test_pieces_join_to_the_completion(engine: Engine) -> None:
    prompt = long_winded(30)
    params = GREEDY.model_copy(update={"max_new_tokens": 30, "logprobs": 2})

    async def main() -> list[Delta]:
        return [delta async for delta in engine.stream(prompt, params, n=3)]

    deltas = asyncio.run(main())
    for index in range(3):
        own = [delta for delta in deltas if delta.index == index]
        tokens = [token for delta in own for token in delta.tokens]
        assert tokens == completion_of(prompt, 30)[0]
        assert [delta.finish_reason for delta in own] == [None] * 29 + ["length"]
        assert own[-1].completion is not None and own[-1].completion.tokens == tokens
        assert all(delta.logprobs is not None and len(delta.logprobs[0].top) == 2 for delta in own)
    assert_all_is_free(engine)


def test_many_streams_with_disconnects_lose_and_mix_nothing(engine: Engine) -> None:
    draw = random.Random(0)
    counts = {"whole": 0, "left": 0, "cancelled": 0}

    async def client(seed: int) -> None:
        prompt, num_tokens = text_of(seed % 40), draw.randint(1, 40)
        expected, _ = completion_of(prompt, num_tokens)
        leave_after = draw.choice((None, None, 0, 3))
        found: list[int] = []
        pieces = engine.stream(prompt, SamplingParams(temperature=0, max_new_tokens=num_tokens))
        async for delta in pieces:
            found += delta.tokens
            if leave_after is not None and len(found) > leave_after:
                await pieces.aclose()
                counts["left"] += 1
                break
        else:
            assert found == expected
            counts["whole"] += 1
        assert found == expected[: len(found)]

    async def impatient(seed: int) -> None:
        task = asyncio.ensure_future(client(seed))
        if seed % 5 == 0:
            await asyncio.sleep(draw.random() * 0.1)
            task.cancel()
        try:
            await task
        except asyncio.CancelledError:
            counts["cancelled"] += 1

    async def main() -> None:
        await asyncio.gather(*(impatient(seed) for seed in range(150)))
        await asyncio.sleep(0.05)

    asyncio.run(main())
    assert all(counts.values()), counts
    assert_all_is_free(engine)


def test_cancel_ends_what_runs_and_what_waits(monkeypatch) -> None:
    with make_engine(monkeypatch, max_running=1) as engine:
        ends: dict[str, RequestOutput | EngineError] = {}
        done = threading.Event()
        begun = threading.Event()

        def start(name: str) -> str:
            def on_end(outcome) -> None:
                ends[name] = outcome
                if len(ends) == 2:
                    done.set()

            params = SamplingParams(temperature=0, max_new_tokens=800, ignore_eos=True)
            return engine.submit([7, 8], params, 2, on_delta=lambda delta: begun.set(), on_end=on_end, request_id=name)

        assert [start("first"), start("second")] == ["first", "second"]
        assert begun.wait(10)
        engine.cancel("second")
        engine.cancel("first")
        engine.cancel("nobody")
        assert done.wait(10)
        for name, outcome in ends.items():
            assert isinstance(outcome, RequestOutput)
            assert [completion.finish_reason for completion in outcome.completions] == ["cancelled"] * 2
            assert (len(outcome.completions[0].tokens) > 0) == (name == "first")
        assert_all_is_free(engine)
        engine.cancel("first")


def test_settings_are_checked(monkeypatch) -> None:
    for name in ("max_running", "max_waiting", "chunk_tokens"):
        with pytest.raises(EngineError, match=f"{name}=0, expected at least 1"):
            make_engine(monkeypatch, **{name: 0})
    with pytest.raises(EngineError, match=r"one block of 64 tokens needs [\d,]+; raise cache_bytes"):
        monkeypatch.undo()
        Engine(Zaya(CONFIG), cache_bytes=100)


def test_requests_that_begin_together_share_to_the_token(engine: Engine) -> None:
    begin, ended = text_of(3)[:50], threading.Semaphore(0)
    barrier = threading.Barrier(6)

    def send(last: int) -> None:
        with engine.together():
            barrier.wait()
            engine.submit([*begin, last, 9], GREEDY, on_end=lambda outcome: ended.release())

    threads = [threading.Thread(target=send, args=(10 + index,)) for index in range(6)]
    for thread in threads:
        thread.start()
    assert all(ended.acquire(timeout=10) for _ in range(6))
    assert engine.stats().cached_tokens == 5 * len(begin) and engine.stats().prompt_tokens == len(begin) + 6 * 2
    assert_all_is_free(engine)


def test_nothing_begins_while_requests_gather_but_not_for_long(engine: Engine, monkeypatch) -> None:
    monkeypatch.setattr(loop_module, "MAX_HOLD_SECONDS", 3600)
    ended = threading.Event()
    with engine.together(), engine.together():
        engine.submit([7], GREEDY, on_end=lambda outcome: ended.set())
        assert not ended.wait(0.05) and engine.stats().tokens_generated == 0
    assert ended.wait(10)
    monkeypatch.setattr(loop_module, "MAX_HOLD_SECONDS", 0.01)
    with engine.together():
        assert engine.generate([[7]], GREEDY)[0].completions[0].tokens == completion_of([7], 20)[0]


def test_what_runs_goes_on_while_others_gather(engine: Engine, monkeypatch) -> None:
    monkeypatch.setattr(loop_module, "MAX_HOLD_SECONDS", 3600)
    prompt = long_winded(200)
    begun, ends = threading.Event(), {name: threading.Event() for name in ("first", "second")}

    def start(name: str, num_tokens: int, on_delta=None) -> None:
        params = SamplingParams(temperature=0, max_new_tokens=num_tokens)
        engine.submit(prompt, params, on_delta=on_delta, on_end=lambda outcome: ends[name].set())

    start("first", 200, lambda delta: begun.set())
    assert begun.wait(10)
    with engine.together():
        start("second", 1)
        assert ends["first"].wait(10) and not ends["second"].is_set()
    assert ends["second"].wait(10)


def test_an_engine_closes_while_requests_gather(monkeypatch) -> None:
    monkeypatch.setattr(loop_module, "MAX_HOLD_SECONDS", 3600)
    outcomes: list[object] = []
    with make_engine(monkeypatch) as engine, engine.together():
        engine.submit([7], GREEDY, on_end=outcomes.append)
        engine.close()
    assert isinstance(outcomes[0], EngineError)


def test_a_request_id_may_not_be_in_use(engine: Engine) -> None:
    hold, ended = threading.Event(), threading.Event()
    engine._loop.post(lambda: hold.wait(10) and None)
    engine.submit([7], GREEDY, request_id="mine", on_end=lambda outcome: ended.set())
    try:
        with pytest.raises(EngineError, match="request id 'mine' is in use"):
            engine.submit([7], GREEDY, request_id="mine")
    finally:
        hold.set()
    assert ended.wait(10)
    assert_all_is_free(engine)
    assert engine.submit([7], GREEDY, request_id="mine") == "mine"
