"""What OpenAI-compatible endpoints answer, whole or as a stream, brought to one form.

Endpoints differ in where the reasoning is: in ``reasoning_content`` or ``reasoning``, between think tags in the
content, or nowhere. Content may be null or a list of parts, and an error may come with status 200. A stream is put
together into the body that a plain request would have had, so both are read by the same code.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from openzaya.data.tokenizer import THINK_CLOSE, THINK_OPEN
from openzaya.errors import RSAError
from openzaya.infer.reasoning import ReasoningSplitter
from openzaya.ttc.completer import Usage

Place = Literal["start", "opening", "reasoning", "closing"]

MESSAGE_CHARACTERS = 4000

REASONING_FIELDS = ("reasoning_content", "reasoning")


class BrokenReply(RSAError):
    """An answer that cannot be used; another attempt may bring a better one."""

    def __init__(self, message: str, usage: Usage | None = None) -> None:
        super().__init__(message)
        self.usage = usage


@dataclass(frozen=True)
class Reply:
    """One choice of an answer."""

    content: str
    reasoning: str = ""
    """From a field of its own; think tags in the content are still there."""
    finish_reason: str = "stop"
    tool_calls: tuple[Mapping[str, Any], ...] = ()
    usage: Usage | None = None
    """As the endpoint counts; None where it does not say."""
    num_choices: int = 1

    @property
    def is_empty(self) -> bool:
        return not (self.content or self.reasoning or self.tool_calls)


@dataclass(frozen=True)
class Parts:
    """An assistant turn, or the rest of one, taken apart."""

    reasoning: str
    content: str
    is_closed: bool


def read_reply(body: Any) -> Reply:
    """The first choice of a chat completion or a completion. Raises :class:`BrokenReply`."""
    if not isinstance(body, Mapping):
        raise BrokenReply(f"the answer is no JSON object but {type(body).__name__}")
    usage = read_usage(body.get("usage"))
    if body.get("error"):
        raise BrokenReply(f"the endpoint reports an error: {error_message(body)}", usage)
    choices = body.get("choices")
    if not isinstance(choices, list) or not choices or not isinstance(choices[0], Mapping):
        raise BrokenReply("the answer has no choices", usage)
    choice = choices[0]
    message = choice.get("message", choice)
    if not isinstance(message, Mapping):
        raise BrokenReply("the first choice has no message", usage)
    finish = choice.get("finish_reason") or "stop"
    if finish in ("abort", "error"):
        raise BrokenReply(f"the endpoint broke off (finish_reason={finish})", usage)
    content = _text(message.get("content")) or _text(message.get("text")) or _text(message.get("refusal"))
    calls = message.get("tool_calls")
    reply = Reply(
        content=content,
        reasoning=next((text for name in REASONING_FIELDS if (text := _text(message.get(name)))), ""),
        finish_reason=str(finish),
        tool_calls=tuple(call for call in calls if isinstance(call, Mapping)) if isinstance(calls, list) else (),
        usage=usage,
        num_choices=len(choices),
    )
    if reply.is_empty and reply.finish_reason != "length":
        raise BrokenReply("the answer is empty", usage)
    return reply


def read_usage(usage: Any) -> Usage | None:
    """Token counts of an answer; None where it has none."""
    if not isinstance(usage, Mapping) or not isinstance(usage.get("completion_tokens"), int):
        return None
    prompt_details, details = usage.get("prompt_tokens_details"), usage.get("completion_tokens_details")
    completion = max(0, usage["completion_tokens"])
    return Usage(
        prompt=_integer(usage, "prompt_tokens") or 0,
        cached=_integer(prompt_details, "cached_tokens") or 0,
        completion=completion,
        reasoning=min(_integer(details, "reasoning_tokens") or 0, completion),
    )


def split_tags(text: str, tags: tuple[str, str], after: Place = "start") -> Parts:
    """Reasoning and answer of a text by its think tags, by the rules of openzaya/infer/reasoning.py.

    Args:
        after: what stands before the text: the ``start`` of the turn, an ``opening`` tag, ``reasoning``, or a
            ``closing`` tag. A closing tag without an opening one shows that the prompt has opened the block.
    """
    opening, closing = tags
    text = text.replace(opening, THINK_OPEN, 1) if opening != THINK_OPEN else text
    text = text.replace(closing, THINK_CLOSE, 1) if closing != THINK_CLOSE else text
    head, closed, _ = text.partition(THINK_CLOSE)
    if after == "start" and closed and THINK_OPEN not in head:
        after = "opening"
    splitter = ReasoningSplitter(starts_inside=after in ("opening", "reasoning"), enabled=after != "closing")
    # A line break that follows a tag belongs to the tag; one that follows reasoning is the model's own.
    marker = "\0" if after == "reasoning" else ""
    pieces = splitter.feed(marker + text)
    is_closed = not splitter.is_reasoning
    pieces += splitter.finish()
    reasoning = "".join(piece.text for piece in pieces if piece.kind == "reasoning").removeprefix(marker)
    return Parts(reasoning, "".join(piece.text for piece in pieces if piece.kind == "content"), is_closed)


def error_message(body: Any) -> str:
    """The text of an error body in any of the usual forms; shortened, but not so far as it is shown."""
    found = body
    for name in ("error", "message", "detail"):
        if isinstance(found, Mapping) and found.get(name):
            found = found[name]
    text = found if isinstance(found, str) else json.dumps(found, ensure_ascii=False, default=str)
    return " ".join(text.split())[:MESSAGE_CHARACTERS]


def _integer(values: Any, name: str) -> int | None:
    value = values.get(name) if isinstance(values, Mapping) else None
    return value if isinstance(value, int) and not isinstance(value, bool) and value >= 0 else None


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def _text(content: Any) -> str:
    """A content as text; halves of surrogate pairs, which no tokenizer takes, become U+FFFD."""
    if isinstance(content, str):
        return content.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    if isinstance(content, Sequence):
        return "".join(_text(part.get("text")) for part in content if isinstance(part, Mapping))
    return ""


@dataclass
class Assembled:
    """A stream of chunks on its way to becoming one body; only the first choice is kept."""

    texts: dict[str, list[str]] = field(default_factory=dict)
    calls: dict[int, dict[str, Any]] = field(default_factory=dict)
    finish_reason: str | None = None
    usage: Any = None
    error: Any = None
    is_done: bool = False
    num_characters: int = 0

    def feed(self, line: str) -> None:
        """One line of the event stream. Raises :class:`BrokenReply` for data that is no JSON object."""
        if not line.startswith("data:"):
            return
        data = line[len("data:") :].strip()
        if data == "[DONE]":
            self.is_done = True
            return
        try:
            chunk = json.loads(data)
        except (ValueError, RecursionError):
            raise BrokenReply("the stream holds broken JSON", self._usage()) from None
        if not isinstance(chunk, Mapping):
            raise BrokenReply("the stream holds data that is no object", self._usage())
        self.num_characters += len(data)
        self.usage = chunk.get("usage") or self.usage
        self.error = chunk.get("error") or self.error
        for choice in _list(chunk.get("choices")):
            if isinstance(choice, Mapping) and choice.get("index", 0) == 0:
                self._choice(choice)

    def body(self) -> dict[str, Any]:
        """The body of the whole answer. Raises :class:`BrokenReply` for a stream that broke off."""
        if self.error is not None:
            return {"error": self.error, "usage": self.usage}
        if self.finish_reason is None:
            raise BrokenReply("the stream ended before the answer did", self._usage())
        message: dict[str, Any] = {name: "".join(pieces) for name, pieces in self.texts.items()}
        if self.calls:
            message["tool_calls"] = [call for _, call in sorted(self.calls.items())]
        return {"choices": [{"message": message, "finish_reason": self.finish_reason}], "usage": self.usage}

    def _usage(self) -> Usage | None:
        return read_usage(self.usage)

    def _choice(self, choice: Mapping[str, Any]) -> None:
        self.finish_reason = choice.get("finish_reason") or self.finish_reason
        delta = choice.get("delta", choice)
        if not isinstance(delta, Mapping):
            return
        for name in ("content", "text", "refusal", *REASONING_FIELDS):
            if isinstance(delta.get(name), str):
                self.texts.setdefault(name, []).append(delta[name])
        for position, part in enumerate(_list(delta.get("tool_calls"))):
            if isinstance(part, Mapping):
                index = _integer(part, "index")
                self._call(part, position if index is None else index)

    def _call(self, part: Mapping[str, Any], index: int) -> None:
        empty = {"id": "", "type": "function", "function": {"name": "", "arguments": ""}}
        call = self.calls.setdefault(index, empty)
        call["id"] = part.get("id") or call["id"]
        function = part.get("function")
        if isinstance(function, Mapping):
            for name in ("name", "arguments"):
                value = function.get(name)
                # Some send the arguments as an object.
                call["function"][name] += json.dumps(value) if isinstance(value, Mapping) else _text(value)
