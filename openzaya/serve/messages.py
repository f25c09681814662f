"""Conversations as clients send them, in the form that templates and other endpoints take."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from openzaya.serve.errors import bad_request
from openzaya.serve.schemas import ChatMessage, TextPart


def plain_messages(messages: Sequence[ChatMessage]) -> list[dict[str, Any]]:
    """Messages as the template takes them: text alone, one system message, no reasoning of earlier turns.

    ``developer`` is another name for ``system``; system messages at the beginning are joined. Reasoning is left out
    whether it came in a field of its own (which is not read) or in the content, closed or not.
    """
    result: list[dict[str, Any]] = []
    for i, message in enumerate(messages):
        role = "system" if message.role == "developer" else message.role
        text = text_of(message.content)
        if role == "system" and len(result) == 1 and result[0]["role"] == "system":
            result[0]["content"] += "\n\n" + (text or "")
            continue
        one: dict[str, Any] = {"role": role, "content": text}
        if role == "assistant":
            one["content"] = answer_of(text or "")
            if message.tool_calls:
                one["tool_calls"] = [call.model_dump(exclude={"id"}) for call in message.tool_calls]
            elif text is None:
                raise bad_request(f"messages.{i}: an assistant message needs content or tool_calls", f"messages.{i}")
        result.append(one)
    return result


def text_of(content: str | list[TextPart] | None) -> str | None:
    return "".join(part.text for part in content) if isinstance(content, list) else content


def answer_of(text: str) -> str:
    """An earlier turn's text without the think block that it begins with."""
    start = text.lstrip()
    if not start.startswith("<think>"):
        return text
    _, closed, answer = start.partition("</think>")
    return answer.lstrip("\r\n") if closed else ""
