"""Prompts that are queued together run as the tree of their beginnings, and nobody waits for nothing.

The runner (memory_runner.py) checks every page and state that a step starts from.
"""

from __future__ import annotations

import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from openzaya.infer import scheduler as scheduler_module
from openzaya.infer import sharing
from openzaya.infer.requests import Request
from openzaya.infer.scheduler import Scheduler
from tests.infer.test_scheduler import (
    check_books,
    check_results,
    long_winded,
    make_request,
    make_scheduler,
    run_all,
    run_step,
    text_of,
)


@pytest.fixture(autouse=True)
def each_token_counts(monkeypatch) -> None:
    monkeypatch.setattr(sharing, "MIN_SHARED_TOKENS", 1)


def num_prompt_tokens_run(steps: list[list[tuple[int, int]]], requests: list[Request]) -> int:
    """All tokens that were run but those of completions; the last one of a full completion never is."""
    num_run = sum(count for step in steps for _, count in step)
    completions = [candidate.completion for request in requests for candidate in request.candidates]
    return num_run - sum(len(c.tokens) - (c.finish_reason == "length") for c in completions)


def num_common(prompt: list[int], other: list[int]) -> int:
    pairs = list(zip(prompt, other, strict=False))
    return next((i for i, (mine, others) in enumerate(pairs) if mine != others), len(pairs))


def tree_size(prompts: list[list[int]]) -> int:
    """Tokens to be run when each prompt goes on where it leaves those before it; its last one is run in any case."""
    total = 0
    for index, prompt in enumerate(prompts):
        common = max((num_common(prompt, other) for other in prompts[:index]), default=0)
        total += len(prompt) - min(common, len(prompt) - 1)
    return total


def random_prompts(draw: random.Random, num: int, longest: int) -> list[list[int]]:
    """Each begins like one before it, for a while or as a whole."""
    prompts: list[list[int]] = []
    for _ in range(num):
        begin: list[int] = []
        if prompts and draw.random() < 0.9:
            other = draw.choice(prompts)
            begin = other[: draw.choice((len(other), draw.randint(0, len(other))))]
        own = [draw.randint(5, 63) for _ in range(draw.choice((0, 1, 60, 64, draw.randint(1, 150))))]
        prompts.append((begin + own)[:longest] or [5])
    return prompts


def add_all(scheduler: Scheduler, prompts: list[list[int]], num_tokens: int = 1) -> list[Request]:
    requests = [make_request(prompt, num_tokens) for prompt in prompts]
    for request in requests:
        scheduler.add(request)
    return requests


def test_prompts_queued_together_run_as_a_tree() -> None:
    question, left, right = text_of(70, 1), text_of(20, 2), text_of(30, 3)
    prompts = [question + left + text_of(9, 4), question + right, question + left + text_of(12, 5), question + left]
    scheduler = make_scheduler()
    requests = add_all(scheduler, prompts)
    assert run_step(scheduler) == [(0, 70)], "all wait for the question"
    assert run_step(scheduler) == [(70, 19), (70, 30)], "the second begins at once, two wait for what is left"
    # The last one ends where the first two part, and needs its own last token's logits.
    assert run_step(scheduler)[0] == (89, 1)
    run_all(scheduler)
    check_results(requests)
    assert [request.num_cached_tokens for request in requests] == [0, 70, 90, 89]


@settings(max_examples=80)
@given(
    seed=st.integers(0, 10**6),
    max_running=st.integers(1, 9),
    chunk_tokens=st.sampled_from([1, 7, 64, 100, 512]),
)
def test_each_common_token_is_run_once_whatever_fits_beside_each_other(seed, max_running, chunk_tokens) -> None:
    draw = random.Random(seed)
    prompts = random_prompts(draw, draw.randint(2, 12), 300)
    saved, sharing.MIN_SHARED_TOKENS = sharing.MIN_SHARED_TOKENS, 1
    try:
        scheduler = make_scheduler(400, max_running, chunk_tokens)
        requests = add_all(scheduler, prompts, draw.randint(1, 4))
        steps = run_all(scheduler)
        check_results(requests)
        assert num_prompt_tokens_run(steps, requests) == tree_size(prompts)
        num_cached = sum(request.num_cached_tokens or 0 for request in requests)
        assert num_cached == scheduler.num_cached_tokens == sum(map(len, prompts)) - tree_size(prompts)
        assert scheduler.pool.num_free == 400
    finally:
        sharing.MIN_SHARED_TOKENS = saved


@settings(max_examples=80)
@given(
    seed=st.integers(0, 10**6),
    num_blocks=st.integers(4, 16),
    max_running=st.integers(1, 8),
    chunk_tokens=st.sampled_from([1, 7, 64, 100, 512]),
    spare_blocks=st.sampled_from([0, 1]),
    min_shared=st.sampled_from([1, 8]),
)
def test_all_end_rightly_in_small_pools_with_cancels_forks_and_new_weights(
    seed, num_blocks, max_running, chunk_tokens, spare_blocks, min_shared
) -> None:
    draw = random.Random(seed)
    saved = scheduler_module.SPARE_BLOCKS, sharing.MIN_SHARED_TOKENS, sharing.LOOKAHEAD
    scheduler_module.SPARE_BLOCKS, sharing.MIN_SHARED_TOKENS, sharing.LOOKAHEAD = spare_blocks, min_shared, 5
    try:
        scheduler = make_scheduler(num_blocks, max_running, chunk_tokens)
        kept: list[Request] = []
        cancelled: list[Request] = []
        prompts = random_prompts(draw, draw.randint(2, 12), num_blocks * 64 - 70)
        while prompts:
            for prompt in [prompts.pop(0) for _ in range(min(len(prompts), draw.randint(1, 6)))]:
                forced = torch.zeros(len(prompt), 2, dtype=torch.uint8) if draw.random() < 0.1 else None
                request = make_request(prompt, draw.randint(1, 60), draw.randint(1, 3))
                request.prompt_experts = forced
                scheduler.add(request)
                (cancelled if draw.random() < 0.3 else kept).append(request)
            for _ in range(draw.randint(0, 12)):
                if scheduler.has_work:
                    run_step(scheduler)
                    check_books(scheduler)
                if cancelled and draw.random() < 0.2:
                    scheduler.remove(draw.choice(cancelled))
                    check_books(scheduler)
                if draw.random() < 0.03:
                    scheduler.new_version()
        for request in cancelled:
            scheduler.remove(request)
        run_all(scheduler)
        check_results(kept)
        assert scheduler.pool.num_free == num_blocks and scheduler.num_waiting == 0
    finally:
        scheduler_module.SPARE_BLOCKS, sharing.MIN_SHARED_TOKENS, sharing.LOOKAHEAD = saved


def started_pair(scheduler: Scheduler) -> list[Request]:
    """Two prompts that begin alike; the second waits for the first, of which a chunk has been run."""
    begin = text_of(100)
    requests = add_all(scheduler, [begin + text_of(50, 1), begin + text_of(50, 2)])
    assert run_step(scheduler) == [(0, scheduler.chunk_tokens)]
    return requests


def test_who_waits_is_released_when_the_leader_is_cancelled() -> None:
    scheduler = make_scheduler(chunk_tokens=70)
    leader, other = started_pair(scheduler)
    scheduler.remove(leader)
    assert run_step(scheduler) == [(64, 70)]
    run_all(scheduler)
    check_results([other])


def test_who_waits_is_released_by_new_weights() -> None:
    scheduler = make_scheduler(chunk_tokens=70)
    leader, other = started_pair(scheduler)
    scheduler.new_version()
    assert run_step(scheduler) == [(70, 70)]
    assert run_step(scheduler) == [(140, 10), (0, 60)], "nothing of the old weights' is taken over"
    run_all(scheduler)
    check_results([leader, other])
    assert other.num_cached_tokens == 0


def test_others_pass_those_who_wait() -> None:
    scheduler = make_scheduler(chunk_tokens=70)
    begin = text_of(100)
    requests = add_all(scheduler, [[*begin, 5], [*begin, 6], text_of(30, 3)])
    assert run_step(scheduler) == [(0, 70)]
    assert run_step(scheduler) == [(70, 30), (0, 30)]
    assert run_step(scheduler) == [(100, 1), (100, 1)]
    check_results(requests)


def test_nobody_waits_for_what_the_cache_holds_already() -> None:
    scheduler = make_scheduler()
    known = text_of(200)
    add_all(scheduler, [known])
    run_all(scheduler)
    requests = add_all(scheduler, [known[:150] + [5] * 9, [*known, 6]])
    assert run_step(scheduler) == [(128, 22), (192, 9)]
    run_all(scheduler)
    check_results(requests)


def test_prompts_with_given_classes_neither_lead_nor_wait() -> None:
    scheduler = make_scheduler(chunk_tokens=300)
    requests = [make_request(text_of(100), 1) for _ in range(3)]
    requests[0].prompt_experts = requests[2].prompt_experts = torch.zeros(100, 2, dtype=torch.uint8)
    for request in requests:
        scheduler.add(request)
    assert run_step(scheduler) == [(0, 100)] * 3
    check_results(requests)


def test_without_prefix_cache_nobody_waits() -> None:
    scheduler = make_scheduler(prefix_cache=False)
    requests = add_all(scheduler, [text_of(100)] * 3)
    assert run_step(scheduler) == [(0, 100)] * 3
    check_results(requests)


def test_a_few_common_tokens_are_run_again(monkeypatch) -> None:
    monkeypatch.setattr(sharing, "MIN_SHARED_TOKENS", 8)
    scheduler = make_scheduler()
    requests = add_all(scheduler, [text_of(7) + text_of(20, seed) for seed in (1, 2)])
    assert run_step(scheduler) == [(0, 27)] * 2
    requests += add_all(scheduler, [text_of(8, 9) + text_of(20, seed) for seed in (1, 2)])
    assert run_step(scheduler)[-1] == (0, 8)
    run_all(scheduler)
    check_results(requests)


def test_a_pool_that_has_no_room_for_the_part_runs_its_tokens_again() -> None:
    scheduler = make_scheduler(num_blocks=2, max_running=2)
    begin = text_of(30)
    requests = add_all(scheduler, [begin + text_of(70, 1), begin + text_of(70, 2)])
    run_all(scheduler)
    check_results(requests)
    assert requests[1].num_cached_tokens == 0
    assert scheduler.pool.num_free == 2


def test_a_preempted_leader_leads_again(monkeypatch) -> None:
    monkeypatch.setattr(scheduler_module, "SPARE_BLOCKS", 0)
    scheduler = make_scheduler(num_blocks=4, chunk_tokens=16)
    old = add_all(scheduler, [long_winded(60, 60)[0]], 60)
    for _ in range(4):
        run_step(scheduler)
    begin = text_of(150)
    young = add_all(scheduler, [[*begin, 5], [*begin, 6]])
    while not scheduler.num_preemptions:
        run_step(scheduler)
        check_books(scheduler)
    leader, other = (request.candidates[0] for request in young)
    assert list(scheduler.waiting) == [leader, other]
    run_all(scheduler)
    check_results(old + young)
    assert young[1].num_cached_tokens == 128, "there is no room for the part beside both"
