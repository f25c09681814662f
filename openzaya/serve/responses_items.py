"""The output items of /v1/responses, built from an answer's parts, with the event of each step.

Reasoning, message and function calls are items of their own, in the order in which the model wrote them. At most one
item is open; the next of another kind closes it. The events are those of OpenAI's schema, numbered from 0.
"""

from __future__ import annotations

import secrets
from collections.abc import Iterator
from typing import Any, Literal

from openzaya.serve.answer import Part

Event = dict[str, Any]
Status = Literal["in_progress", "completed", "incomplete"]


class OutputItems:
    """All items of one response."""

    def __init__(self) -> None:
        self.items: list[dict[str, Any]] = []
        self._open: dict[str, Any] | None = None
        self._sequence_number = -1

    def event(self, kind: str, **members: Any) -> Event:
        """An event with the next number."""
        self._sequence_number += 1
        return {"type": f"response.{kind}", "sequence_number": self._sequence_number} | members

    def add(self, part: Part, logprobs: list[dict[str, Any]]) -> Iterator[Event]:
        """Take a part in; ``logprobs`` belong to its text."""
        if part.call is not None:
            yield from self._add_call(part)
            return
        kind = "reasoning" if part.kind == "reasoning" else "message"
        if self._open is None or self._open["type"] != kind:
            yield from self.close()
            yield from self._begin(kind)
        assert self._open is not None
        piece = self._open["content"][0]
        piece["text"] += part.text
        place = self._place() | {"content_index": 0, "delta": part.text}
        if kind == "reasoning":
            yield self.event("reasoning_text.delta", **place)
        else:
            piece["logprobs"] += logprobs
            yield self.event("output_text.delta", **place, logprobs=logprobs)

    def close(self, status: Status = "completed") -> Iterator[Event]:
        """Close the item that is open, if any."""
        item = self._open
        if item is None:
            return
        piece, place = item["content"][0], self._place() | {"content_index": 0}
        if item["type"] == "reasoning":
            yield self.event("reasoning_text.done", **place, text=piece["text"])
        else:
            yield self.event("output_text.done", **place, text=piece["text"], logprobs=piece["logprobs"])
        yield self.event("content_part.done", **place, part=dict(piece))
        item["status"] = status
        yield self.event("output_item.done", output_index=len(self.items) - 1, item=_copy(item))
        self._open = None

    def _begin(self, kind: str) -> Iterator[Event]:
        item: dict[str, Any]
        if kind == "reasoning":
            item = {"type": "reasoning", "id": _fresh("rs"), "summary": [], "content": [], "status": "in_progress"}
            piece: dict[str, Any] = {"type": "reasoning_text", "text": ""}
        else:
            item = {"type": "message", "id": _fresh("msg"), "role": "assistant", "content": [], "status": "in_progress"}
            piece = {"type": "output_text", "text": "", "annotations": [], "logprobs": []}
        self.items.append(item)
        yield self.event("output_item.added", output_index=len(self.items) - 1, item=_copy(item))
        item["content"].append(piece)
        self._open = item
        yield self.event("content_part.added", **self._place(), content_index=0, part=_copy(piece))

    def _add_call(self, part: Part) -> Iterator[Event]:
        assert part.call is not None
        yield from self.close()
        call = part.call
        item = {
            "type": "function_call",
            "id": _fresh("fc"),
            "call_id": call.id,
            "name": call.name,
            "arguments": "",
            "status": "in_progress",
        }
        self.items.append(item)
        place = {"item_id": item["id"], "output_index": len(self.items) - 1}
        yield self.event("output_item.added", output_index=place["output_index"], item=dict(item))
        yield self.event("function_call_arguments.delta", **place, delta=call.arguments)
        item |= {"arguments": call.arguments, "status": "completed"}
        yield self.event("function_call_arguments.done", **place, name=call.name, arguments=call.arguments)
        yield self.event("output_item.done", output_index=place["output_index"], item=dict(item))

    def _place(self) -> dict[str, Any]:
        return {"item_id": self.items[-1]["id"], "output_index": len(self.items) - 1}


def _fresh(prefix: str) -> str:
    return f"{prefix}_{secrets.token_hex(12)}"


def _copy(item: dict[str, Any]) -> dict[str, Any]:
    """Events are written at once, but tests and clients in the same process may keep them."""
    return {key: [dict(one) for one in value] if isinstance(value, list) else value for key, value in item.items()}
