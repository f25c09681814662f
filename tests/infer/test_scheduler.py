"""What runs next: decoding first, prompts in chunks, forks, preemption, and every block accounted for."""

from __future__ import annotations

import itertools
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from openzaya.infer import scheduler as scheduler_module
from openzaya.infer.choosing import SequenceState, choose
from openzaya.infer.requests import Request
from openzaya.infer.sampling import SamplingParams
from openzaya.infer.scheduler import Scheduler
from tests.infer.memory_runner import CONFIG, MemoryRunner, completion_of

numbers = itertools.count()


def make_request(prompt: list[int], max_new_tokens: int = 8, n: int = 1) -> Request:
    params = SamplingParams(temperature=0, max_new_tokens=max_new_tokens, return_experts=True)
    states = [
        SequenceState(params, prompt, eos_token_id=CONFIG.eos_token_id, vocab_size=CONFIG.vocab_size, seed=index)
        for index in range(n)
    ]
    return Request(f"r{next(numbers)}", prompt, params, states, None, None)


def make_scheduler(num_blocks: int = 100, max_running: int = 8, chunk_tokens: int = 512, prefix_cache: bool = True):
    runner = MemoryRunner(num_blocks, max_running)
    return Scheduler(runner, max_running=max_running, chunk_tokens=chunk_tokens, prefix_cache=prefix_cache)


def run_step(scheduler: Scheduler) -> list[tuple[int, int]]:
    """One step of the engine's loop, in its plainest form; (tokens before, tokens run) of each share."""
    shares = scheduler.plan()
    found = [(share.candidate.num_run, share.num_tokens) for share in shares]
    result = scheduler.runner.step([share.sequence() for share in shares])
    experts, row = result.experts.numpy(), 0
    for share in shares:
        taken, experts = experts[: share.num_tokens], experts[share.num_tokens :]
        is_last = share.is_last
        scheduler.advance(share, taken)
        if is_last:
            for candidate in (share.candidate, *scheduler.fork(share.candidate)):
                token = choose(result.logits[row : row + 1], [candidate.state])[0]
                if candidate.accept(token, scheduler.version).finish_reason is not None:
                    scheduler.finish(candidate)
            row += 1
    return found


def run_all(scheduler: Scheduler) -> list[list[tuple[int, int]]]:
    steps = []
    while scheduler.has_work:
        steps.append(run_step(scheduler))
        check_books(scheduler)
        assert len(steps) < 5000
    return steps


def check_books(scheduler: Scheduler) -> None:
    """Every holder of a block is a running candidate, and every slot has one owner."""
    held = [block for candidate in scheduler.running for block in candidate.blocks]
    for block in range(scheduler.pool.num_blocks):
        assert scheduler.pool.holders(block) == held.count(block)
    slots = [candidate.slot for candidate in scheduler.running]
    assert sorted(slots + scheduler._slots) == list(range(scheduler.runner.num_slots))
    assert all(candidate.slot is None and not candidate.blocks for candidate in scheduler.waiting)


def check_results(requests: list[Request]) -> None:
    for request in requests:
        tokens, reason = completion_of(request.prompt, request.params.max_new_tokens)
        for candidate in request.candidates:
            assert (candidate.completion.tokens, candidate.completion.finish_reason) == (tokens, reason)
            # The last token of a full completion was never run; the end of turn is no part of it.
            text = [*request.prompt, *tokens][: None if reason == "stop" else -1]
            experts = candidate.completion.experts
            assert experts is not None and experts.tolist() == [[token % 3, (token + 1) % 3] for token in text]


def text_of(length: int, seed: int = 0) -> list[int]:
    draw = random.Random(seed)
    return [draw.randrange(5, 64) for _ in range(length)]


def long_winded(length: int, num_tokens: int) -> list[list[int]]:
    """Prompts whose completion does not end before so many tokens."""
    texts = [text_of(length, seed) for seed in range(99)]
    return [text for text in texts if completion_of(text, num_tokens)[1] == "length"]


def test_decoding_comes_first_and_prompts_fill_the_chunk() -> None:
    scheduler = make_scheduler(chunk_tokens=50)
    requests = [make_request(text_of(3, 1), 30), make_request(text_of(120, 2), 5), make_request(text_of(40, 3), 5)]
    for request in requests:
        scheduler.add(request)
    steps = run_all(scheduler)
    assert steps[:4] == [
        [(0, 3), (0, 47)],
        [(3, 1), (47, 50)],
        [(4, 1), (97, 23), (0, 27)],
        [(5, 1), (120, 1), (27, 13)],
    ]
    check_results(requests)


def test_a_request_in_the_queue_does_not_overtake() -> None:
    scheduler = make_scheduler(num_blocks=6, prefix_cache=False)
    requests = [make_request(text_of(length, length), 4) for length in (200, 250, 5)]
    for request in requests:
        scheduler.add(request)
    first = run_step(scheduler)
    assert first == [(0, 200)], "the second does not fit beside the first, and the third waits for the second"
    run_all(scheduler)
    check_results(requests)


def test_a_prompt_is_found_in_the_cache_up_to_its_last_full_block_but_one_token() -> None:
    scheduler = make_scheduler()
    for length, expected in ((200, 0), (200, 192), (128, 64), (129, 128), (64, 0), (65, 64)):
        request = make_request(text_of(200)[:length], 1)
        scheduler.add(request)
        run_all(scheduler)
        check_results([request])
        assert request.num_cached_tokens == expected
    assert scheduler.num_cached_tokens == 192 + 64 + 128 + 64


def test_generated_blocks_are_found_too() -> None:
    scheduler = make_scheduler()
    prompt = long_winded(30, 60)[0]
    first = make_request(prompt, 60)
    scheduler.add(first)
    run_all(scheduler)
    second = make_request([*prompt, *first.candidates[0].completion.tokens, 7, 8], 3)
    scheduler.add(second)
    run_all(scheduler)
    check_results([first, second])
    assert second.num_cached_tokens == 64


def test_forks_share_full_blocks_and_copy_the_last() -> None:
    scheduler = make_scheduler()
    request = make_request(text_of(150), 4, n=5)
    scheduler.add(request)
    run_step(scheduler)
    running = scheduler.running
    assert len(running) == 5 and len({candidate.slot for candidate in running}) == 5
    assert len({tuple(candidate.blocks[:2]) for candidate in running}) == 1
    assert len({candidate.blocks[2] for candidate in running}) == 5
    assert scheduler.pool.num_blocks - scheduler.pool.num_free == 2 + 5
    run_all(scheduler)
    check_results([request])
    assert sum(len(sequence.tokens) for step in scheduler.runner.steps for sequence in step) < 150 + 5 * 4


def test_more_candidates_than_slots_wait_and_fork_again() -> None:
    scheduler = make_scheduler(max_running=4)
    request = make_request(text_of(150), 6, n=11)
    scheduler.add(request)
    assert scheduler.num_waiting == 11
    run_step(scheduler)
    assert (len(scheduler.running), scheduler.num_waiting) == (4, 7)
    run_all(scheduler)
    check_results([request])


@pytest.mark.parametrize("prefix_cache", [True, False])
def test_the_youngest_is_preempted_and_nobody_notices(monkeypatch, prefix_cache: bool) -> None:
    monkeypatch.setattr(scheduler_module, "SPARE_BLOCKS", 0)
    scheduler = make_scheduler(num_blocks=4, prefix_cache=prefix_cache)
    requests = [make_request(text, 100) for text in long_winded(60, 100)[:3]]
    for request in requests:
        scheduler.add(request)
    for _ in range(5):
        run_step(scheduler)
    assert len(scheduler.running) == 3
    run_step(scheduler)
    assert [candidate.request for candidate in scheduler.running] == requests[:2]
    run_all(scheduler)
    assert scheduler.num_preemptions > 0
    check_results(requests)


def test_new_weights_end_the_cache_and_what_runs_enters_it_no_more() -> None:
    scheduler = make_scheduler()
    prompt = long_winded(130, 70)[0]
    old = make_request(prompt, 70)
    scheduler.add(old)
    run_step(scheduler)
    assert scheduler.pool.num_cached == 2
    assert scheduler.new_version() == 1 and scheduler.pool.num_cached == 0
    run_all(scheduler)
    assert scheduler.pool.num_cached == 0
    again = make_request(prompt, 1)
    scheduler.add(again)
    run_all(scheduler)
    assert again.num_cached_tokens == 0 and scheduler.pool.num_cached == 2


def test_without_a_prefix_cache_nothing_is_kept() -> None:
    scheduler = make_scheduler(prefix_cache=False)
    for _ in range(2):
        request = make_request(text_of(200), 3)
        scheduler.add(request)
        run_all(scheduler)
        assert request.num_cached_tokens == 0
    assert scheduler.pool.num_cached == 0


@settings(max_examples=60)
@given(
    seed=st.integers(0, 10**6),
    num_blocks=st.integers(4, 14),
    max_running=st.integers(1, 6),
    chunk_tokens=st.sampled_from([1, 7, 64, 100, 512]),
    prefix_cache=st.booleans(),
    spare_blocks=st.sampled_from([0, 1]),
)
def test_any_mix_of_requests_and_cancels(
    seed, num_blocks, max_running, chunk_tokens, prefix_cache, spare_blocks
) -> None:
    """The runner checks every page it reads; here: right tokens, and all blocks free at the end."""
    draw = random.Random(seed)
    saved, scheduler_module.SPARE_BLOCKS = scheduler_module.SPARE_BLOCKS, spare_blocks
    try:
        scheduler = make_scheduler(num_blocks, max_running, chunk_tokens, prefix_cache)
        shared = text_of(150, seed)
        kept: list[Request] = []
        cancelled: list[Request] = []
        for _ in range(draw.randint(1, 8)):
            length = draw.randint(1, 150)
            own = text_of(draw.randint(1, 40), draw.randrange(99)) if draw.random() < 0.5 else []
            request = make_request(
                (shared[:length] + own)[: num_blocks * 64 - 70], draw.randint(1, 60), draw.randint(1, 4)
            )
            scheduler.add(request)
            (cancelled if draw.random() < 0.2 else kept).append(request)
            for _ in range(draw.randint(0, 12)):
                if scheduler.has_work:
                    run_step(scheduler)
                    check_books(scheduler)
                if cancelled and draw.random() < 0.1:
                    scheduler.remove(draw.choice(cancelled))
                    check_books(scheduler)
        for request in cancelled:
            scheduler.remove(request)
        run_all(scheduler)
        check_results(kept)
        assert scheduler.pool.num_free == num_blocks and scheduler.num_waiting == 0
    finally:
        scheduler_module.SPARE_BLOCKS = saved
