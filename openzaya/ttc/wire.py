"""Requests to an endpoint as it takes them: chat or plain completions, and assistant turns that are already begun.

A begun turn (a reasoning to be continued, or one that is closed so that the answer follows) is put into the request
by one of these means:

    continue_final_message  last message is the assistant's, with vLLM's and SGLang's flags
    assistant               the same without flags: llama.cpp and some others continue it
    completions             the rendered conversation and the beginning, as token ids, to /v1/completions
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from openzaya.ttc.config import RSASampling
from openzaya.ttc.counting import Messages, TokenCounter

Kind = Literal["chat", "completions"]
Means = Literal["continue_final_message", "assistant", "completions", "none"]
LARGEST_SEED = 2**31 - 1


@dataclass(frozen=True)
class Wire:
    """How requests to one endpoint are written."""

    model: str
    counter: TokenCounter
    kind: Kind = "chat"
    tags: tuple[str, str] = ("<think>", "</think>")
    streams: bool = True
    limit_field: str = "max_tokens"
    extra: Mapping[str, Any] = field(default_factory=dict)
    """Fields of every request."""

    async def request(
        self,
        messages: Messages,
        *,
        max_tokens: int,
        seed: int | None,
        sampling: RSASampling,
        tools: Messages = (),
        begun: str = "",
        means: Means = "none",
        more: Mapping[str, Any] | None = None,
    ) -> tuple[str, dict[str, Any]] | None:
        """Path and body; None where the conversation cannot be rendered for ``means``.

        Args:
            seed: cut to 31 bits, which every endpoint takes.
            begun: what the assistant's turn begins with, opening tag included.
            more: further fields.
        """
        body: dict[str, Any] = {"model": self.model, self.limit_field: max_tokens}
        body |= sampling.model_dump(exclude_none=True)
        if seed is not None:
            body["seed"] = seed & LARGEST_SEED
        if self.streams:
            body |= {"stream": True, "stream_options": {"include_usage": True}}
        if self.kind == "completions" or means == "completions":
            if self.limit_field != "max_tokens":
                body["max_tokens"] = body.pop(self.limit_field)
            prompt = await self._prompt(messages, tools, begun)
            if prompt is None:
                return None
            # Tool fields mean nothing here, and response formats are for chat alone in most servers.
            return "/completions", body | {"prompt": prompt} | dict(self.extra)
        conversation = [dict(message) for message in messages]
        if begun:
            conversation.append({"role": "assistant", "content": begun})
            if means == "continue_final_message":
                body |= {"continue_final_message": True, "add_generation_prompt": False}
        if tools:
            body["tools"] = [dict(tool) for tool in tools]
        return "/chat/completions", body | {"messages": conversation} | dict(self.extra) | dict(more or {})

    async def _prompt(self, messages: Messages, tools: Messages, begun: str) -> list[int] | str | None:
        tokens = await self.counter.prompt(messages, tools)
        if tokens is None:
            # A base model without a template: the texts themselves.
            return plain_prompt(messages) + begun if self.kind == "completions" else None
        if not begun:
            return tokens
        opening = self.tags[0]
        if begun.startswith(opening) and await self.counter.ends_open(tokens, opening):
            begun = begun[len(opening) :].lstrip("\r\n")
        continued = await self.counter.continuation(begun, self.tags)
        return None if continued is None else tokens + continued


def plain_prompt(messages: Messages) -> str:
    """A conversation for a model without a chat template: the texts, a blank line apart."""
    texts = [content for message in messages if isinstance(content := message.get("content"), str) and content]
    return "\n\n".join(texts) + "\n\n"


def quoting(messages: Sequence[Mapping[str, Any]], reasoning: str, *, is_finished: bool = True) -> list[dict[str, Any]]:
    """The weakest way to go on from a reasoning: the question again, with the reasoning quoted.

    Put into the last user message, since some templates refuse two of one role in a row.

    Args:
        is_finished: the answer is asked for; else the reasoning is to be continued.
    """
    if is_finished:
        opening, closing = (
            "Your reasoning on this has reached its limit. It went:",
            "Reason no further. Write the final answer now, from what is there.",
        )
    else:
        opening, closing = (
            "The reasoning on this has begun. So far it goes:",
            "Take it up where it stops and go on, without repeating it.",
        )
    asked = f"\n\n{opening}\n\n{reasoning}\n\n(end of what is there)\n\n{closing}"
    conversation = [dict(message) for message in messages]
    last = conversation[-1] if conversation else {}
    content = last.get("content")
    if last.get("role") == "user" and isinstance(content, str):
        conversation[-1] = {**last, "content": content + asked}
    elif last.get("role") == "user" and isinstance(content, list):
        conversation[-1] = {**last, "content": [*content, {"type": "text", "text": asked}]}
    else:
        conversation.append({"role": "user", "content": asked.lstrip()})
    return conversation


@dataclass(frozen=True)
class Found:
    """What probing found out, besides :class:`Wire`."""

    wire: Wire
    thinking: str
    """A request field's name, ``two_calls``, or ``none`` for a model that shows no reasoning."""
    means: Means = "none"
    chat_means: Means = "none"
    """The means where tools are shown, which plain completions do not know."""
    opens_in_prompt: bool = False
    """The prompt ends with the opening tag, so a reply begins inside the reasoning."""
    gap: str = "\n"
    """What the model writes between the opening tag and its reasoning: a line break or nothing."""
    seeds: bool | None = None
    n: bool | None = None
    context: int | None = None
    notes: tuple[str, ...] = ()

    def begun(self, reasoning: str, content: str | None = None) -> str:
        """An assistant's turn up to the end of a reasoning, or of an answer that follows it."""
        opening, closing = self.wire.tags
        if content is None:
            return opening + self.gap + reasoning
        return f"{opening}{self.gap}{reasoning}{self.gap}{closing}{self.gap * 2}{content}"
