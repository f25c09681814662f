"""A completer whose tokens are words and whose rollouts are a function of the call, for tests of the algorithm."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from openzaya.errors import CompletionFailed
from openzaya.ttc.completer import Call, Capabilities, Rollout, Tail, Usage

Script = Callable[[Call], Rollout]


def words(text: str) -> list[str]:
    return text.split()


def rollout_of(reasoning: str, content: str, call: Call, *, is_closed: bool = True) -> Rollout:
    """A rollout that fits the call's budget: what is beyond it is cut off."""
    thought, said = words(reasoning), words(content)
    if call.thinking_budget is not None and len(thought) > call.thinking_budget:
        thought, is_closed = thought[: call.thinking_budget], True
    if not is_closed or len(thought) >= call.max_tokens:
        thought, said, is_closed = thought[: call.max_tokens], [], False
    said = said[: call.max_tokens - len(thought)]
    prompt = sum(len(words(str(message["content"]))) for message in call.messages) + len(words(call.prefill))
    num_new = len(thought) + len(said)
    return Rollout(
        " " * bool(call.prefill) + " ".join(thought),
        " ".join(said),
        is_closed,
        "stop" if is_closed and len(said) == len(words(content)) else "length",
        Usage(prompt, 0, num_new, len(thought)),
        seconds=0.0,
    )


def steps(call: Call, num: int = 20) -> Rollout:
    """Reasoning of ``num`` words that name the call's seed and their position; the answer is a digit."""
    rng = random.Random(call.seed)
    reasoning = " ".join(f"s{call.seed}.{i}" for i in range(num))
    return rollout_of(reasoning, f"answer {rng.randrange(4)}", call)


@dataclass
class FakeCompleter:
    """Runs ``script``; fails for good where ``fails`` says so."""

    script: Script = steps
    fails: Callable[[Call], bool] = lambda call: False
    delay: Callable[[Call], float] = lambda call: 0.0
    calls: list[Call] = field(default_factory=list)
    num_running: int = 0
    most_running: int = 0

    async def capabilities(self) -> Capabilities:
        return Capabilities("engine", "fake", "tokenizer", "engine", seeds=True, prefill="engine")

    async def complete(self, call: Call) -> Rollout:
        self.calls.append(call)
        self.num_running += 1
        self.most_running = max(self.most_running, self.num_running)
        try:
            await asyncio.sleep(self.delay(call))
            if self.fails(call):
                raise CompletionFailed("the script says so")
            return self.script(call)
        finally:
            self.num_running -= 1

    async def tails(self, texts: Sequence[str], tau: int) -> list[Tail]:
        return [Tail(" ".join(cut), len(cut), True) for text in texts for cut in [words(text)[-tau:] if tau else []]]

    async def heads(self, texts: Sequence[str], num_tokens: int) -> list[str]:
        return [" ".join([*words(text)[:num_tokens], ""]) if words(text)[num_tokens:] else text for text in texts]

    async def count(self, messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]]) -> int:
        return sum(len(words(str(message["content"]))) for message in messages)

    async def close(self) -> None:
        pass
