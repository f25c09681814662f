"""What a run may cost before it begins, and a cap that it does not exceed.

Worst case of a round with w rollouts of budget b:

    new tokens      w * b                              the report's D(q) is their sum over all rounds
    prompt tokens   w * |q|                            round 0
                    w * (|q| + c * tau + scaffold)     later; the scaffold is the prompt's own wording

Headline setting (n=16, beta=40K, t=2, 40K in the final round): 3 * 16 * 40K = 1.92M new tokens; rollouts that stop by
themselves use less. A scaffold is bounded by its bytes, since no token is shorter than one.

A :class:`Budget` reserves the worst case of each call and takes back what the call did not use, so that the cap holds
with everything in flight. A call that does not fit waits as long as others may give back.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass
from types import TracebackType
from typing import Self

from openzaya.data.aggregation import aggregation_prompt
from openzaya.errors import RSAError
from openzaya.runlog import format_duration
from openzaya.ttc.completer import Usage
from openzaya.ttc.config import RSAConfig

BORDER_TOKENS = 16
"""Room for tokens that would span the borders between the parts of a prompt."""


class BudgetExceeded(RSAError):
    """The next call might exceed the cap on tokens or money."""


@dataclass(frozen=True)
class Price:
    """US dollars for a million tokens. Cached prompt tokens cost as much as others where nothing else is said."""

    prompt_usd: float
    completion_usd: float
    cached_usd: float | None = None

    def __post_init__(self) -> None:
        for name in ("prompt_usd", "completion_usd", "cached_usd"):
            value = getattr(self, name)
            if value is not None and not 0 <= value < float("inf"):
                raise RSAError(f"price {name}={value} per million tokens; give a number of 0 or more")

    def usd(self, usage: Usage) -> float:
        cached_usd = self.prompt_usd if self.cached_usd is None else self.cached_usd
        new = usage.prompt - usage.cached
        return (new * self.prompt_usd + usage.cached * cached_usd + usage.completion * self.completion_usd) / 1e6


@dataclass(frozen=True)
class Estimate:
    """Bounds for a run, or for several together. Nothing of it is a promise about the quality of answers."""

    num_runs: int
    num_rollouts: int
    """Without retries and without rollouts that are drawn again."""
    num_rounds: int
    """One after another: of several runs, the most."""
    prompt_tokens: int
    """Worst case, as if nothing came from a cache."""
    longest_prompt: int
    """Worst case of one prompt; with its budget it must fit the model's context."""
    completion_tokens: int
    """Worst case of newly generated tokens."""
    expected_completion_tokens: int | None = None
    """With the share of the budgets that earlier runs used."""
    usd: float | None = None
    expected_usd: float | None = None
    seconds: float | None = None
    expected_seconds: float | None = None


def estimate(
    config: RSAConfig,
    num_prompt_tokens: int,
    price: Price | None = None,
    rate: float | None = None,
    *,
    realised: float | None = None,
) -> Estimate:
    """The worst case of one run, and with ``realised`` what is to be expected.

    Args:
        num_prompt_tokens: of the question as it is sent in round 0, with system prompt, history and tools.
        rate: tokens a second that the model generates over all rollouts together.
        realised: share of their budgets that rollouts used in earlier runs, 0 .. 1; the report's headline run 0.39.
    """
    if rate is not None and not rate > 0:
        raise RSAError(f"a rate of {rate} tokens/s gives no time; measure one above 0")
    if realised is not None and not 0 <= realised <= 1:
        raise RSAError(f"realised={realised} is no share; give 0 to 1")
    num_rollouts = prompt = completion = 0
    longest = num_prompt_tokens
    for index in range(config.t + 1):
        width = config.width(index)
        one = prompt_bound(config, num_prompt_tokens, index)
        longest = max(longest, one)
        num_rollouts += width
        prompt += width * one
        completion += width * (config.final_budget if index == config.t else config.beta)
    if config.select == "aggregate":
        one = prompt_bound(config, num_prompt_tokens, config.t + 1)
        longest = max(longest, one)
        num_rollouts, prompt, completion = num_rollouts + 1, prompt + one, completion + config.final_budget
    expected = None if realised is None else round(realised * completion)
    return Estimate(
        num_runs=1,
        num_rollouts=num_rollouts,
        num_rounds=config.t + 1 + (config.select == "aggregate"),
        prompt_tokens=prompt,
        longest_prompt=longest,
        completion_tokens=completion,
        expected_completion_tokens=expected,
        usd=None if price is None else price.usd(Usage(prompt=prompt, completion=completion)),
        expected_usd=None if price is None or expected is None else price.usd(Usage(prompt, 0, expected)),
        seconds=None if rate is None else completion / rate,
        expected_seconds=None if rate is None or expected is None else expected / rate,
    )


def prompt_bound(config: RSAConfig, num_prompt_tokens: int, round_index: int) -> int:
    """Most tokens of one prompt of a round; ``t + 1`` is the call of ``select="aggregate"``."""
    if round_index == 0:
        return num_prompt_tokens
    written = config.beta if round_index <= config.t else config.final_budget
    carried = written if config.compaction == "full" else min(config.tau, written)
    if config.continuation == "prefill" and round_index <= config.t:
        return num_prompt_tokens + min(config.kept_head, written) + carried
    population = config.width(round_index - 1)
    num_candidates = min(config.c, population)
    scaffold = aggregation_prompt("", [""] * num_candidates, config.task, style=config.prompt_style)
    return num_prompt_tokens + BORDER_TOKENS + num_candidates * carried + len(scaffold.encode())


def total_estimate(estimates: Iterable[Estimate]) -> Estimate:
    """Several runs together; what is not known of one is not known of all."""
    several = list(estimates)

    def added(name: str) -> float | None:
        values = [getattr(one, name) for one in several]
        return None if None in values else sum(values)

    expected = added("expected_completion_tokens")
    return Estimate(
        num_runs=sum(one.num_runs for one in several),
        num_rollouts=sum(one.num_rollouts for one in several),
        num_rounds=max((one.num_rounds for one in several), default=0),
        prompt_tokens=sum(one.prompt_tokens for one in several),
        longest_prompt=max((one.longest_prompt for one in several), default=0),
        completion_tokens=sum(one.completion_tokens for one in several),
        expected_completion_tokens=None if expected is None else int(expected),
        usd=added("usd"),
        expected_usd=added("expected_usd"),
        seconds=added("seconds"),
        expected_seconds=added("expected_seconds"),
    )


def estimate_text(one: Estimate) -> str:
    """A few lines for a person."""
    runs = f"{one.num_runs:,} problems: " if one.num_runs != 1 else ""
    lines = [f"{runs}{one.num_rollouts:,} rollouts in {one.num_rounds} round{'s' if one.num_rounds != 1 else ''}"]
    new = f"at most {one.completion_tokens:,} new tokens"
    if one.expected_completion_tokens is not None:
        new += f", about {one.expected_completion_tokens:,} expected"
    lines.append(f"{new}; prompts at most {one.prompt_tokens:,} (the longest {one.longest_prompt:,})")
    if one.seconds is not None:
        time = f"at most {format_duration(one.seconds)}"
        if one.expected_seconds is not None:
            time += f", about {format_duration(one.expected_seconds)} expected"
        lines.append(f"{time} at the rate measured")
    if one.usd is not None:
        money = f"at most {_dollars(one.usd)}"
        if one.expected_usd is not None:
            money += f", about {_dollars(one.expected_usd)} expected"
        lines.append(f"{money}, retries not counted")
    return "\n".join(lines)


def _dollars(usd: float) -> str:
    return f"${usd:,.2f}" if usd >= 0.1 or usd == 0 else f"${usd:.2g}"


class Reservation:
    """One call's part of a budget, held by ``async with``."""

    def __init__(self, budget: Budget, worst: Usage) -> None:
        self._budget = budget
        self.worst = worst
        self._used: Usage | None = None

    def settle(self, used: Usage) -> None:
        """What the call really used; the rest is given back."""
        self._used = used

    async def __aenter__(self) -> Self:
        await self._budget._take(self.worst)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        used = self._used
        if used is None:
            # Of a call that was cancelled nobody says what it had generated, so it counts in full. One that failed
            # delivered nothing, but its endpoint may have told what it took.
            used = self.worst if kind is asyncio.CancelledError else getattr(error, "usage", Usage())
        self._budget._give_back(self.worst, used)


class Budget:
    """A cap on newly generated tokens, on money, or on both, for all runs that share it in one event loop.

    What an endpoint generates for an attempt that then fails, and does not report, is not seen here.

    Args:
        max_tokens: newly generated tokens, the report's measure.
        max_usd: needs ``price``; prompts count too.
    """

    def __init__(self, max_tokens: int | None = None, max_usd: float | None = None, price: Price | None = None) -> None:
        if max_tokens is not None and max_tokens < 1:
            raise RSAError(f"a cap of {max_tokens} tokens allows nothing; give 1 or more")
        if max_usd is not None and not max_usd > 0:
            raise RSAError(f"a cap of ${max_usd} allows nothing; give more than 0")
        if max_usd is not None and price is None:
            raise RSAError(f"a cap of ${max_usd} needs prices; give those for prompt and generated tokens")
        self.max_tokens, self.max_usd, self.price = max_tokens, max_usd, price
        self.spent = Usage()
        """What finished calls used, and cancelled ones in full."""
        self._reserved: list[Usage] = []
        self._waiting: deque[tuple[Usage, asyncio.Future[bool]]] = deque()

    def admit(self, num_prompt_tokens: int, max_tokens: int) -> Reservation:
        """For a call: ``async with budget.admit(...) as reservation``, and in it ``reservation.settle(usage)``.

        It waits until the worst case fits, and raises :class:`BudgetExceeded` when it cannot fit any more. Closing
        the reasoning may need a second request that reads prompt and reasoning again: that is part of the worst case.
        """
        return Reservation(self, Usage(prompt=2 * num_prompt_tokens + max_tokens, completion=max_tokens))

    def count(self, used: Usage) -> None:
        """Adds what was used elsewhere, such as in the part of a run that is now resumed."""
        self.spent += used

    @property
    def spent_usd(self) -> float | None:
        return None if self.price is None else self.price.usd(self.spent)

    def _fits(self, worst: Usage) -> bool:
        total = sum(self._reserved, self.spent) + worst
        if self.max_tokens is not None and total.completion > self.max_tokens:
            return False
        return self.max_usd is None or self.price is None or self.price.usd(total) <= self.max_usd

    async def _take(self, worst: Usage) -> None:
        if not self._waiting and self._fits(worst):
            self._reserved.append(worst)
            return
        if not self._reserved:
            raise BudgetExceeded(self._refusal(worst))
        future: asyncio.Future[bool] = asyncio.get_running_loop().create_future()
        self._waiting.append((worst, future))
        try:
            admitted = await future
        except asyncio.CancelledError:
            if future.done() and not future.cancelled() and future.result():
                self._give_back(worst, Usage())
            raise
        if not admitted:
            raise BudgetExceeded(self._refusal(worst))

    def _give_back(self, worst: Usage, used: Usage) -> None:
        self._reserved.remove(worst)
        self.spent += used
        while self._waiting:
            wanted, future = self._waiting[0]
            if not future.done():
                fits = self._fits(wanted)
                if not fits and self._reserved:
                    return
                if fits:
                    self._reserved.append(wanted)
                future.set_result(fits)
            self._waiting.popleft()

    def _refusal(self, worst: Usage) -> str:
        if self.max_tokens is not None and self.spent.completion + worst.completion > self.max_tokens:
            return (
                f"the cap of {self.max_tokens:,} tokens is reached: {self.spent.completion:,} are spent, and the next "
                f"rollout may take {worst.completion:,}; raise the cap to go on"
            )
        assert self.max_usd is not None and self.price is not None
        return (
            f"the cap of {_dollars(self.max_usd)} is reached: {_dollars(self.price.usd(self.spent))} are spent, and "
            f"the next rollout may cost {_dollars(self.price.usd(worst))}; raise the cap to go on"
        )
