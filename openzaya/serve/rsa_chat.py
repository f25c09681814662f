"""/v1/chat/completions with ``rsa``: one code path for our engine and for an upstream endpoint.

Streamed, the progress of the run comes as reasoning, then the reasoning of the rollout that was selected, then its
answer. The last chunk of the first choice has the ``rsa`` object with the whole account. Not streamed, the reasoning
is that of the selected rollout alone.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass, field
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from openzaya.errors import OpenZayaError, RSAError
from openzaya.serve.errors import ApiError, from_user_error
from openzaya.serve.middleware import record_of
from openzaya.serve.rsa import Wish, fitted, question_of
from openzaya.serve.rsa_run import Progress, RSARun, event_object, summary, usage_object
from openzaya.serve.schemas import ChatRequest
from openzaya.serve.service import BaseService
from openzaya.serve.streaming import DONE, KEEPALIVE, EventStream, NoResponse, event, finish_or_leave, unless_gone
from openzaya.ttc.completer import Completer, Rollout
from openzaya.ttc.config import RSAConfig
from openzaya.ttc.results import RSAResult


@dataclass
class RSAConversation:
    """One request with RSA, on its way."""

    request: ChatRequest
    wish: Wish
    model: str
    warnings: list[str]
    fingerprint: str | None
    id: str = field(default_factory=lambda: "chatcmpl-" + secrets.token_hex(12))
    created: int = field(default_factory=lambda: int(time.time()))

    def head(self, kind: str) -> dict[str, Any]:
        head = {"id": self.id, "object": kind, "created": self.created, "model": self.model}
        return head | {"system_fingerprint": self.fingerprint}

    def rollouts(self, result: RSAResult) -> list[Rollout]:
        """What is returned, by choice."""
        if result.selection is not None or result.config.select != "all":
            return [result.answer]
        return [candidate.rollout for candidate in result.selected if candidate.rollout is not None]

    def calls(self, rollout: Rollout) -> list[Any]:
        calls = [dict(call) for call in rollout.tool_calls]
        return calls[:1] if self.request.parallel_tool_calls is False else calls


async def rsa_completions(
    service: BaseService,
    body: ChatRequest,
    wish: Wish,
    messages: Sequence[dict[str, Any]],
    completer: Completer,
    model: str,
    request: Request,
    *,
    fingerprint: str | None = None,
) -> Response:
    """Answer a request with a run of RSA on ``completer``; raises ``ApiError``."""
    record = record_of(request)
    if service.settings.log_prompts:
        record.prompt = list(messages)
    question = question_of(list(messages), body)

    async def prepared() -> tuple[RSAConfig, list[str]]:
        return await fitted(wish, question, completer, service.settings)

    try:
        # An upstream is asked here what it can do: the client may leave meanwhile.
        found = await unless_gone(request, prepared())
    except RSAError as error:
        raise ApiError(502, str(error), code="upstream_failed") from None
    except OpenZayaError as error:
        raise from_user_error(error) from None
    if found is None:
        return NoResponse()
    config, warnings = found
    conversation = RSAConversation(body, wish, model, warnings, fingerprint)
    run = RSARun(service, record, question, completer, config, model)
    if body.stream:
        return EventStream(run, _chunks(conversation, run))
    whole = await finish_or_leave(request, run, _gather(conversation, run))
    return NoResponse() if whole is None else JSONResponse(whole)


async def _gather(conversation: RSAConversation, run: RSARun) -> dict[str, Any]:
    async for _ in run.events():
        pass
    result = run.result()
    choices = [_choice(conversation, index, rollout) for index, rollout in enumerate(conversation.rollouts(result))]
    return conversation.head("chat.completion") | {
        "choices": choices,
        "usage": usage_object(result),
        "rsa": summary(result, conversation.warnings),
    }


def _choice(conversation: RSAConversation, index: int, rollout: Rollout) -> dict[str, Any]:
    calls = conversation.calls(rollout)
    message: dict[str, Any] = {
        "role": "assistant",
        "content": rollout.content if rollout.content or not calls else None,
        "refusal": None,
    }
    if rollout.reasoning:
        message |= _reasoning(rollout.reasoning)
    if calls:
        message["tool_calls"] = calls
    return {"index": index, "message": message, "logprobs": None, "finish_reason": rollout.finish_reason}


def _reasoning(text: str) -> dict[str, str]:
    return {"reasoning_content": text, "reasoning": text}


async def _chunks(conversation: RSAConversation, run: RSARun) -> AsyncGenerator[bytes, None]:
    """The run and its answer as server-sent events."""
    request, wants_events = conversation.request, conversation.wish.wants_events
    include_usage = bool(request.stream_options and request.stream_options.include_usage)
    head = conversation.head("chat.completion.chunk")

    def chunk(index: int, delta: dict[str, Any], finish_reason: str | None = None, **more: Any) -> bytes:
        choice = {"index": index, "delta": delta, "logprobs": None, "finish_reason": finish_reason}
        return event(head | {"choices": [choice]} | more | ({"usage": None} if include_usage else {}))

    yield chunk(0, {"role": "assistant", "content": ""})
    progress = Progress(run.config)
    for warning in conversation.warnings:
        yield chunk(0, _reasoning(f"warning: {warning}\n"))
    async for item in run.events(keepalive=True):
        if item is None:
            yield KEEPALIVE
            continue
        line = progress.line(item)
        delta = {} if line is None else _reasoning(line + "\n")
        if wants_events:
            yield chunk(0, delta, rsa=event_object(item, conversation.warnings))
        elif delta:
            yield chunk(0, delta)
    result = run.result()
    for index, rollout in enumerate(conversation.rollouts(result)):
        if index:
            yield chunk(index, {"role": "assistant", "content": ""})
        if rollout.reasoning:
            # A blank line parts it from the progress.
            yield chunk(index, _reasoning(rollout.reasoning if index else "\n" + rollout.reasoning))
        if rollout.content:
            yield chunk(index, {"content": rollout.content})
        for number, call in enumerate(conversation.calls(rollout)):
            yield chunk(index, {"tool_calls": [{"index": number} | call]})
        account = {} if index else {"rsa": {"event": "finished"} | summary(result, conversation.warnings)}
        yield chunk(index, {}, rollout.finish_reason, **account)
    if include_usage:
        yield event(head | {"choices": [], "usage": usage_object(result)})
    yield DONE
