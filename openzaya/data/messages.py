"""Conversations as users give them, checked and brought to one form.

A message is ``{"role", "content"}`` with role system (first only), user, assistant or tool. Content is
a string or a list of text parts. An assistant message may carry ``reasoning_content`` (or
``reasoning``, or a content that begins with a think block) and ``tool_calls`` in OpenAI's form, whose
arguments are an object or its JSON.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from openzaya.data.tokenizer import THINK_CLOSE, THINK_OPEN
from openzaya.errors import DataError

Message = Mapping[str, Any]

ROLES = ("system", "user", "assistant", "tool")


def normalise(messages: Sequence[Message]) -> list[dict[str, Any]]:
    """Checked copies of ``messages`` in one form: content a string, reasoning in ``reasoning_content``.

    Raises ``DataError`` naming the message and what is wrong with it.
    """
    if isinstance(messages, (str, Mapping)) or not isinstance(messages, Sequence):
        raise DataError(f"messages is {type(messages).__name__}; give a list of {{'role', 'content'}} records")
    if not messages:
        raise DataError("messages is empty; give at least one message")
    result: list[dict[str, Any]] = []
    for i, message in enumerate(messages):
        if not isinstance(message, Mapping):
            raise DataError(f"messages[{i}] is {type(message).__name__}; give a record with 'role' and 'content'")
        role = message.get("role")
        if role not in ROLES:
            raise DataError(f"messages[{i}]: role {role!r} is unknown; use one of: {', '.join(ROLES)}")
        if role == "system" and i:
            raise DataError(f"messages[{i}]: a system message must come first; move it, or make it a user message")
        content = message.get("content")
        if role == "assistant":
            result.append(_normalise_assistant(i, message, content))
            continue
        if content is None:
            raise DataError(f"messages[{i}] ({role}) has no content; give a string")
        result.append({"role": role, "content": content if type(content) is str else _text_of(i, content)})
    return result


def _normalise_assistant(i: int, message: Message, content: Any) -> dict[str, Any]:
    text = "" if content is None else content if type(content) is str else _text_of(i, content)
    reasoning = message.get("reasoning_content")
    if reasoning is None:
        reasoning = message.get("reasoning")
    calls = message.get("tool_calls")
    if content is None and reasoning is None and not calls:
        raise DataError(f"messages[{i}] (assistant) has no content, reasoning_content or tool_calls; give one of them")
    if reasoning is None:
        reasoning, text = _split_think_block(i, text)
    elif type(reasoning) is not str:
        raise DataError(f"messages[{i}]: reasoning_content is {type(reasoning).__name__}; give a string")
    result: dict[str, Any] = {"role": "assistant", "content": text}
    if reasoning:
        result["reasoning_content"] = reasoning
    if calls:
        result["tool_calls"] = [_normalise_call(i, call) for call in calls]
    return result


def _split_think_block(i: int, text: str) -> tuple[str, str]:
    """Reasoning and answer of a content that begins with a think block; no reasoning otherwise."""
    if not text.lstrip().startswith(THINK_OPEN):
        return "", text
    start = text.index(THINK_OPEN) + len(THINK_OPEN)
    end = text.find(THINK_CLOSE, start)
    if end < 0:
        raise DataError(f"messages[{i}]: content opens {THINK_OPEN} and never closes it; add {THINK_CLOSE}")
    return text[start:end], text[end + len(THINK_CLOSE) :]


def _normalise_call(i: int, call: Any) -> dict[str, Any]:
    function = call.get("function", call) if isinstance(call, Mapping) else None
    name = function.get("name") if isinstance(function, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(name, str) or not name:
        raise DataError(
            f"messages[{i}]: a tool call has no function name; give {{'function': {{'name', 'arguments'}}}}"
        )
    arguments = function.get("arguments") or {}
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments)
        except json.JSONDecodeError as error:
            raise DataError(f"messages[{i}]: arguments of '{name}' are not JSON ({error}); give an object") from None
    if not isinstance(arguments, Mapping):
        raise DataError(f"messages[{i}]: arguments of '{name}' are {type(arguments).__name__}; give an object")
    return {"type": "function", "function": {"name": name, "arguments": dict(arguments)}}


def _text_of(i: int, content: Any) -> str:
    """The text of a content given as a list of text parts."""
    if isinstance(content, str):
        return str(content)
    parts = content if isinstance(content, list) else [content]
    if not all(isinstance(part, Mapping) and isinstance(part.get("text"), str) for part in parts):
        raise DataError(f"messages[{i}]: content is {type(content).__name__}; give a string, or a list of text parts")
    return "".join(part["text"] for part in parts)
