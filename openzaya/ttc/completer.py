"""What Markovian RSA runs on: one rollout at a time from any model, and the records that it gives.

A *completer* turns a :class:`Call` into a :class:`Rollout`. Ours are the in-process engine (engine_completer.py) and
any OpenAI-compatible endpoint (endpoint.py). Each rollout is a call of its own, with its own seed: so it can be
retried, journaled and resumed by itself, whatever the endpoint makes of ``n``.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, Protocol

from openzaya.ttc.config import RSASampling

FinishReason = Literal["stop", "length", "tool_calls"]


@dataclass(frozen=True)
class Call:
    """One rollout that is asked for."""

    messages: tuple[Mapping[str, Any], ...]
    """The conversation, in OpenAI's form."""
    max_tokens: int
    """Most new tokens, reasoning and answer together."""
    sampling: RSASampling
    seed: int
    thinking_budget: int | None = None
    """Reasoning is closed after so many tokens, and the answer written then; None: it may take all of ``max_tokens``
    and is cut off there."""
    tools: tuple[Mapping[str, Any], ...] = ()
    """Functions that the model is shown."""
    prefill: str = ""
    """Text that the reasoning begins with; the rollout's reasoning is what comes after it."""
    final: Mapping[str, Any] = field(default_factory=dict)
    """``response_format``, ``tool_choice`` and ``parallel_tool_calls`` of the request; set in the final round only."""

    def digest(self) -> str:
        """A hash of all that decides the outcome: equal calls may share a journaled result."""
        record = asdict(self) | {"sampling": self.sampling.model_dump()}
        text = json.dumps(record, sort_keys=True, ensure_ascii=True, default=str)
        return hashlib.sha256(text.encode()).hexdigest()


@dataclass(frozen=True)
class Usage:
    """Tokens of one or more rollouts. ``completion`` is what was newly generated; carried text is part of prompts."""

    prompt: int = 0
    cached: int = 0
    """Of the prompt, served from a prefix cache."""
    completion: int = 0
    reasoning: int = 0
    """Of the completion."""

    def __add__(self, other: Usage) -> Usage:
        return Usage(
            self.prompt + other.prompt,
            self.cached + other.cached,
            self.completion + other.completion,
            self.reasoning + other.reasoning,
        )


@dataclass(frozen=True)
class Rollout:
    """What a model wrote."""

    reasoning: str
    content: str
    is_closed: bool
    """The reasoning ended, and ``content`` follows it. False for one that was cut off while it reasoned."""
    finish_reason: FinishReason
    usage: Usage
    tool_calls: tuple[Mapping[str, Any], ...] = ()
    """In OpenAI's form."""
    seconds: float = 0.0
    num_calls: int = 1
    """Requests that were made for it: retries, and the second call that closes a reasoning."""


@dataclass(frozen=True)
class Tail:
    """The end of a text, cut out of the text itself."""

    text: str
    num_tokens: int
    is_exact: bool
    """Counted with the model's own tokenizer; else estimated."""


@dataclass(frozen=True)
class Capabilities:
    """What a completer can do, found once; recorded with each run."""

    kind: str
    """``engine``, ``chat`` or ``completions``."""
    model: str
    token_counting: Literal["tokenizer", "server", "estimate"]
    thinking_budget: str
    """How reasoning is closed at its budget: ``engine``, a request field's name, ``two_calls``, or ``none``."""
    seeds: bool | None = None
    """Whether equal seeds give equal text; None: not known."""
    n: bool | None = None
    """Whether one request can give several candidates. Recorded only: each rollout is a request of its own."""
    prefill: str = "none"
    """How a reasoning is continued: ``engine``, ``continue_final_message``, ``completions``, ``assistant`` or none."""
    context: int | None = None
    """Most tokens of prompt and completion, where known."""
    notes: tuple[str, ...] = ()


class Completer(Protocol):
    """A model that RSA can run on. All methods may run at the same time for many rollouts."""

    async def capabilities(self) -> Capabilities:
        """Found at the first call, then remembered."""
        ...

    async def complete(self, call: Call) -> Rollout:
        """One rollout. Cancelling the task ends the work for it.

        Raises:
            CompletionFailed: after all retries.
        """
        ...

    async def tails(self, texts: Sequence[str], tau: int) -> list[Tail]:
        """The last ``tau`` tokens of each text."""
        ...

    async def heads(self, texts: Sequence[str], num_tokens: int) -> list[str]:
        """The first ``num_tokens`` tokens of each text (for Delethink's ``kept_head``)."""
        ...

    async def count(self, messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]]) -> int:
        """Tokens of a rendered conversation, exact or estimated as the capabilities say; for cost estimates."""
        ...

    async def close(self) -> None: ...
