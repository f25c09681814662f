"""Estimates are bounds, and the cap holds with everything in flight."""

from __future__ import annotations

import asyncio
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from openzaya.data.aggregation import aggregation_prompt
from openzaya.errors import RSAError
from openzaya.ttc.completer import Usage
from openzaya.ttc.config import PRESETS, RSAConfig
from openzaya.ttc.cost import Budget, BudgetExceeded, Price, estimate, estimate_text, prompt_bound, total_estimate

PRICE = Price(prompt_usd=1.0, completion_usd=10.0, cached_usd=0.1)
K = 1024


def test_the_headline_settings_are_bounded_as_the_report_counts():
    one = estimate(PRESETS["high"], 200)
    assert one.completion_tokens == 3 * 16 * 40 * K, "1.92M with K = 1000"
    assert (one.num_rollouts, one.num_rounds) == (48, 3)
    # |q| + c * tau + a constant, and no more than a constant.
    assert 200 + 4 * 4096 < one.longest_prompt < 200 + 4 * 4096 + 1000
    assert one.prompt_tokens == 16 * 200 + 2 * 16 * one.longest_prompt
    assert one.usd is one.seconds is one.expected_completion_tokens is None


def test_money_and_time_come_from_prices_and_a_measured_rate():
    config = RSAConfig(n=2, c=2, t=0, beta=100, final_budget=100)
    one = estimate(config, 50, PRICE, rate=20.0, realised=0.5)
    assert (one.prompt_tokens, one.completion_tokens) == (100, 200)
    assert one.usd == pytest.approx((100 * 1 + 200 * 10) / 1e6)
    assert one.expected_usd == pytest.approx((100 * 1 + 100 * 10) / 1e6)
    assert (one.seconds, one.expected_seconds, one.expected_completion_tokens) == (10.0, 5.0, 100)
    assert PRICE.usd(Usage(prompt=10, cached=4, completion=1)) == pytest.approx((6 + 0.4 + 10) / 1e6)
    assert Price(1.0, 2.0).usd(Usage(prompt=10, cached=10)) == pytest.approx(10 / 1e6)


def test_special_cases_cost_what_they_are():
    base = RSAConfig(n=4, c=2, t=1, beta=1000, tau=100, final_budget=500)
    assert estimate(base.model_copy(update={"t": 0}), 10).completion_tokens == 4 * 500
    assert estimate(base.model_copy(update={"final_n": 1}), 10).completion_tokens == 4 * 1000 + 500
    assert estimate(RSAConfig(widths=(8, 2, 1), beta=10, final_budget=5), 1).completion_tokens == 80 + 20 + 5
    full = base.model_copy(update={"compaction": "full"})
    assert prompt_bound(full, 10, 1) - prompt_bound(base, 10, 1) == 2 * 900
    aggregate = estimate(base.model_copy(update={"select": "aggregate"}), 10)
    assert (aggregate.num_rollouts, aggregate.num_rounds) == (9, 3)
    delethink = base.model_copy(update={"c": 1, "continuation": "prefill", "kept_head": 30})
    assert prompt_bound(delethink, 10, 1) == 10 + 30 + 100


@given(
    c=st.integers(1, 8),
    task=st.sampled_from(["general", "math", "code", "multiple_choice"]),
    style=st.sampled_from(["full", "short"]),
    tails=st.lists(st.text(max_size=20), min_size=8, max_size=8),
)
def test_no_aggregation_prompt_is_longer_than_the_bound(c, task, style, tails):
    """With the longest tokenization there is: a token a byte."""
    longest = max(len(text.encode(errors="surrogatepass")) for text in tails)
    config = RSAConfig(n=8, c=c, t=1, beta=longest + 1, tau=longest, task=task, prompt_style=style)
    prompt = aggregation_prompt("question", tails[:c], task, style=style)
    assert len(prompt.encode(errors="surrogatepass")) <= prompt_bound(config, len("question"), 1)


def test_several_runs_are_added():
    one = estimate(RSAConfig(n=2, t=0, final_budget=10), 5, PRICE, realised=0.5)
    other = estimate(RSAConfig(n=1, t=2, beta=10, final_budget=10), 7, PRICE)
    both = total_estimate([one, other])
    assert (both.num_runs, both.num_rollouts, both.num_rounds) == (2, 5, 3)
    assert both.completion_tokens == 20 + 30
    assert both.usd == pytest.approx((one.usd or 0) + (other.usd or 0))
    assert both.expected_usd is None, "not known of one"
    assert total_estimate([]).num_rollouts == 0


def test_the_text_names_every_number():
    text = estimate_text(estimate(RSAConfig(n=2, t=0, final_budget=36_000), 50, PRICE, rate=20.0, realised=0.5))
    for part in ("2 rollouts in 1 round\n", "at most 72,000 new tokens, about 36,000 expected", "prompts at most 100"):
        assert part in text
    assert "at most 1:00:00, about 30:00 expected" in text and "at most $0.72, about $0.36 expected" in text
    assert "$" not in estimate_text(estimate(RSAConfig(), 50))


@pytest.mark.parametrize(
    "make",
    [
        lambda: Price(-1, 1),
        lambda: Price(1, float("nan")),
        lambda: estimate(RSAConfig(), 1, rate=0),
        lambda: estimate(RSAConfig(), 1, realised=1.5),
        lambda: Budget(max_tokens=0),
        lambda: Budget(max_usd=0.0, price=PRICE),
        lambda: Budget(max_usd=1.0),
    ],
)
def test_wrong_numbers_are_named(make):
    with pytest.raises(RSAError, match=r"give|measure"):
        make()


# --- the cap ----------------------------------------------------------------------------------------


async def call(budget: Budget, worst: int, used: int | None, log: list[int]) -> bool:
    """One rollout; None: it fails."""
    try:
        async with budget.admit(10, worst) as reservation:
            log.append(worst)
            await asyncio.sleep(0)
            if used is not None:
                reservation.settle(Usage(prompt=10, completion=used))
    except BudgetExceeded:
        return False
    return True


@pytest.mark.parametrize("seed", range(20))
def test_the_cap_holds_whatever_is_in_flight(seed):
    rng = random.Random(seed)
    cap = rng.randrange(100, 2000)
    calls = [(worst := rng.randrange(1, 200), rng.choice([None, rng.randrange(worst + 1)])) for _ in range(40)]

    async def run() -> tuple[Budget, list[bool]]:
        budget = Budget(max_tokens=cap)
        results = await asyncio.gather(*(call(budget, worst, used, []) for worst, used in calls))
        return budget, results

    budget, results = asyncio.run(run())
    assert budget.spent.completion <= cap
    admitted = sum(used or 0 for (_, used), ok in zip(calls, results, strict=True) if ok)
    assert budget.spent.completion == admitted
    assert not budget._reserved and not budget._waiting
    for (worst, _), ok in zip(calls, results, strict=True):
        assert ok or budget.spent.completion + worst > cap, "nobody is refused who would have fitted in the end"


def test_a_call_waits_for_what_others_give_back():
    async def run() -> list[bool]:
        budget = Budget(max_tokens=100)
        # Only one at a time fits in the worst case, and all fit in the end.
        return await asyncio.gather(*(call(budget, 90, 1, []) for _ in range(10)))

    assert asyncio.run(run()) == [True] * 10


def test_calls_are_admitted_in_order():
    log: list[int] = []

    async def run() -> None:
        budget = Budget(max_tokens=100)
        await asyncio.gather(*(call(budget, worst, 0, log) for worst in (60, 90, 20, 30)))

    asyncio.run(run())
    assert log == [60, 90, 20, 30], "a small call does not overtake a large one for ever"


def test_money_counts_prompts_too():
    async def run() -> list[bool]:
        budget = Budget(max_usd=0.0021, price=Price(1.0, 1.0))
        # Worst case of a call: prompt 10 twice, 1000 generated, and these read once more.
        return [await call(budget, 1000, 1000, []), await call(budget, 1000, 1000, [])]

    assert asyncio.run(run()) == [True, False]


def test_a_refusal_says_cap_spent_and_next():
    async def run() -> None:
        budget = Budget(max_tokens=1000)
        budget.count(Usage(completion=900))
        async with budget.admit(1, 200):
            pass

    with pytest.raises(BudgetExceeded, match=r"cap of 1,000 tokens is reached: 900 are spent.* may take 200; raise"):
        asyncio.run(run())

    async def run_usd() -> None:
        async with Budget(max_usd=0.001, price=PRICE).admit(1, 200):
            pass

    with pytest.raises(BudgetExceeded, match=r"cap of \$0.001 is reached: \$0.00 are spent"):
        asyncio.run(run_usd())


def test_a_cancelled_call_counts_in_full_and_a_failed_one_not():
    async def run() -> Budget:
        budget = Budget(max_tokens=1000)

        async def hang() -> None:
            async with budget.admit(1, 300):
                await asyncio.Event().wait()

        task = asyncio.create_task(hang())
        await asyncio.sleep(0)
        waiting = asyncio.create_task(call(budget, 900, 0, []))
        await asyncio.sleep(0)
        waiting.cancel()
        task.cancel()
        await asyncio.gather(task, waiting, return_exceptions=True)
        for reported in ({}, {"usage": Usage(completion=5)}):
            with pytest.raises(RSAError, match="planned"):
                async with budget.admit(1, 100):
                    error = RSAError("planned")
                    vars(error).update(reported)
                    raise error
        assert not budget._reserved and not budget._waiting
        return budget

    assert asyncio.run(run()).spent.completion == 300 + 5


def test_a_waiter_that_is_cancelled_as_it_is_admitted_gives_back():
    async def run() -> list[bool]:
        budget = Budget(max_tokens=100)
        reservation = budget.admit(1, 100)
        await reservation.__aenter__()
        waiting = asyncio.create_task(call(budget, 100, 0, []))
        await asyncio.sleep(0)
        await reservation.__aexit__(None, None, None)  # admits the waiter, which has not run yet
        waiting.cancel()
        await asyncio.gather(waiting, return_exceptions=True)
        return [await call(budget, 100, 0, [])]

    assert asyncio.run(run()) == [True]
