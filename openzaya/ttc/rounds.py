"""What each rollout of Markovian RSA is asked: from a conversation and carried texts to a :class:`Call`.

The question is the conversation's last user message. Everything before it (system prompt, history) and the tools are
the same in every round; in an aggregation round the question's text is replaced by the aggregation prompt
(openzaya/data/aggregation.py), and other parts of it, such as images, stay.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from openzaya.data.aggregation import aggregation_prompt
from openzaya.errors import RSAError
from openzaya.ttc.completer import Call, Completer, Rollout, Tail
from openzaya.ttc.config import RSAConfig

GO_ON = "Go on with the conversation above."
"""The question of a conversation that ends with a tool's result."""
UNCOUNTED = 1 << 30


@dataclass(frozen=True)
class Question:
    """A conversation that is to be answered, checked once."""

    messages: tuple[Mapping[str, Any], ...]
    tools: tuple[Mapping[str, Any], ...] = ()
    final: Mapping[str, Any] = field(default_factory=dict)
    """What constrains the last call alone: ``response_format``, ``tool_choice``, ``parallel_tool_calls``."""

    @classmethod
    def of(
        cls,
        messages: str | Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] = (),
        final: Mapping[str, Any] | None = None,
    ) -> Question:
        """A problem as text, or a conversation that ends with the user or a tool. Raises ``RSAError``."""
        if isinstance(messages, str):
            messages = [{"role": "user", "content": messages}]
        if not messages:
            raise RSAError("the conversation has no messages; give at least one user message")
        last = messages[-1].get("role")
        if last not in ("user", "tool"):
            raise RSAError(f"the conversation ends with role '{last}'; end it with the user's question")
        question = cls(tuple(messages), tuple(tools), dict(final or {}))
        if last == "user" and not question.text.strip():
            raise RSAError("the last user message has no text; put the question there")
        return question

    @property
    def text(self) -> str:
        """The question itself."""
        last = self.messages[-1]
        return _text_of(last.get("content")) if last.get("role") == "user" else GO_ON

    @property
    def digest(self) -> str:
        """A hash of the whole question; seeds and run keys hang on it."""
        record = [list(self.messages), list(self.tools), dict(self.final)]
        text = json.dumps(record, sort_keys=True, ensure_ascii=True, default=str)
        return hashlib.sha256(text.encode()).hexdigest()

    def with_text(self, text: str) -> tuple[Mapping[str, Any], ...]:
        """The conversation with ``text`` as its question."""
        last = self.messages[-1]
        if last.get("role") != "user":
            return (*self.messages, {"role": "user", "content": text})
        content = last.get("content")
        new: Any = text
        if isinstance(content, list):
            others = [part for part in content if not _is_text(part)]
            new = [*others, {"type": "text", "text": text}] if others else text
        return (*self.messages[:-1], {**last, "content": new})


def _is_text(part: Any) -> bool:
    return isinstance(part, Mapping) and isinstance(part.get("text"), str)


def _text_of(content: Any) -> str:
    if isinstance(content, list):
        return "".join(part["text"] for part in content if _is_text(part))
    return content if isinstance(content, str) else ""


@dataclass(frozen=True)
class Carried:
    """What a candidate hands on to the next round."""

    tail: Tail
    head: str = ""
    """Delethink keeps the beginning of the first reasoning before each tail."""
    ended: Rollout | None = None
    """With ``prefill``: the chain has come to its end, and nothing is left to write."""

    @property
    def prefill(self) -> str:
        return self.head + self.tail.text


def first_call(question: Question, config: RSAConfig, seed: int) -> Call:
    """Round 0: the question alone."""
    return _call(question, config, 0, seed, question.messages)


def next_call(question: Question, config: RSAConfig, round_index: int, carried: Sequence[Carried], seed: int) -> Call:
    """Round 1 .. t: the question with what was carried, in this order."""
    if config.continuation == "prefill":
        one = carried[0]
        taken = one.tail.num_tokens + (config.kept_head if one.head else 0)
        return _call(question, config, round_index, seed, question.messages, prefill=one.prefill, taken=taken)
    texts = [one.tail.text for one in carried]
    text = aggregation_prompt(question.text, texts, config.task, style=config.prompt_style)
    return _call(question, config, round_index, seed, question.with_text(text))


def selection_call(question: Question, config: RSAConfig, carried: Sequence[Carried], seed: int) -> Call:
    """One more answer out of the final round's, for ``select="aggregate"``."""
    text = aggregation_prompt(question.text, [one.tail.text for one in carried], config.task, style=config.prompt_style)
    return _call(question, config, config.t, seed, question.with_text(text), is_last=True)


def _call(
    question: Question,
    config: RSAConfig,
    round_index: int,
    seed: int,
    messages: tuple[Mapping[str, Any], ...],
    *,
    prefill: str = "",
    taken: int = 0,
    is_last: bool = False,
) -> Call:
    is_final = round_index == config.t
    # Self-aggregation makes the answer by one call more: that one is constrained, and the final round is not.
    is_constrained = is_last or (is_final and config.select != "aggregate")
    return Call(
        messages=messages,
        # A chunk of Delethink holds what was carried into it as well.
        max_tokens=config.final_budget if is_final else max(1, config.beta - taken),
        sampling=config.round_sampling(round_index),
        seed=seed,
        thinking_budget=config.final_thinking if is_final else None,
        tools=question.tools,
        prefill=prefill,
        final=question.final if is_constrained else {},
    )


async def carry(completer: Completer, config: RSAConfig, rollout: Rollout, before: Sequence[Carried]) -> Carried | None:
    """What a rollout hands on; None where it has nothing of the kind that is carried.

    Args:
        before: what was in its own prompt; a reasoning that was continued goes on from there.
    """
    reasoning, answer = rollout.reasoning, rollout.content if rollout.is_closed else ""
    if config.continuation == "prefill":
        written = reasoning or rollout.content
        head = before[0].head if before else ""
        if not before and config.kept_head:
            [head] = await completer.heads([written], config.kept_head)
        so_far = before[0].tail.text + written if before else written[len(head) :]
        [tail] = await completer.tails([so_far], _limit(config))
        has_ended = rollout.is_closed and rollout.finish_reason != "length"
        return Carried(tail, head, rollout if has_ended else None)
    text = {
        # A model that does not mark its reasoning writes it as the answer.
        "reasoning": reasoning or rollout.content,
        "answer": answer,
        "answer_or_reasoning": answer or reasoning or rollout.content,
        "both": "\n\n".join(part for part in (reasoning, rollout.content) if part),
    }[config.carry]
    if config.carry == "answer" and not text.strip():
        return None
    [tail] = await completer.tails([text], _limit(config))
    return Carried(tail)


def _limit(config: RSAConfig) -> int:
    return UNCOUNTED if config.compaction == "full" else config.tau
