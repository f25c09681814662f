"""/v1/chat/completions: a conversation in, the assistant's next turn out, whole or as a stream of chunks."""

from __future__ import annotations

import secrets
import time
from collections.abc import AsyncGenerator
from dataclasses import dataclass, field
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from openzaya.infer.constraint import make_constraint
from openzaya.infer.outputs import Delta
from openzaya.infer.sampling import SamplingParams
from openzaya.infer.toolcalls import ToolCall
from openzaya.serve.answer import Answer, Part, chat_logprobs, experts_object, usage
from openzaya.serve.errors import bad_request
from openzaya.serve.jobs import Job, Service, start
from openzaya.serve.messages import plain_messages
from openzaya.serve.middleware import record_of
from openzaya.serve.prompts import (
    Prompt,
    chat_prompt,
    format_constraint,
    sampling_params,
    thinking,
    tool_constraint,
)
from openzaya.serve.rsa import Wish, wish_of
from openzaya.serve.rsa_chat import rsa_completions
from openzaya.serve.schemas import ChatRequest
from openzaya.serve.service import Record
from openzaya.serve.streaming import DONE, KEEPALIVE, EventStream, NoResponse, event, finish_or_leave


@dataclass
class Conversation:
    """One request to chat completions, on its way."""

    service: Service
    request: ChatRequest
    model: str
    prompt: Prompt
    params: SamplingParams
    record: Record
    id: str = field(default_factory=lambda: "chatcmpl-" + secrets.token_hex(12))
    created: int = field(default_factory=lambda: int(time.time()))
    answers: list[Answer] = field(default_factory=list)

    def __post_init__(self) -> None:
        parallel = self.request.parallel_tool_calls is not False
        self.answers = [
            Answer(self.service, self.prompt, index, parallel_calls=parallel) for index in range(self.request.n or 1)
        ]

    def head(self, kind: str) -> dict[str, Any]:
        return {
            "id": self.id,
            "object": kind,
            "created": self.created,
            "model": self.model,
            "system_fingerprint": self.service.fingerprint,
        }

    def logprobs(self, logprobs: list[Any]) -> dict[str, Any] | None:
        if self.params.logprobs is None:
            return None
        return {"content": chat_logprobs(self.service.token_texts, logprobs, self.params.logprobs), "refusal": None}

    def usage(self) -> dict[str, Any]:
        return usage(self.answers, len(self.prompt.tokens), self.record.cached_tokens)


async def chat_completions(service: Service, body: ChatRequest, request: Request) -> Response:
    """Answer a request; raises ``ApiError``."""
    wish = wish_of(body, service.settings)
    if wish is not None:
        return await _with_rsa(service, body, wish, request)
    conversation = await _prepare(service, body, record_of(request))
    job = await start(service, [conversation.prompt.tokens], [conversation.params], body.n or 1, conversation.record)
    if body.stream:
        return EventStream(job, _chunks(conversation, job))
    whole = await finish_or_leave(request, job, _gather(conversation, job))
    return NoResponse() if whole is None else JSONResponse(whole)


async def _with_rsa(service: Service, body: ChatRequest, wish: Wish, request: Request) -> Response:
    model = service.check_model(wish.model)
    await service.in_worker(_check_final, service, body)
    return await rsa_completions(
        service,
        body,
        wish,
        plain_messages(body.messages),
        service.completer,
        model,
        request,
        fingerprint=service.fingerprint,
    )


def _check_final(service: Service, body: ChatRequest) -> None:
    """Refuse at once what the final call, hours later, could not be held to."""
    tools = [tool.model_dump(exclude_none=True) for tool in body.tools or []]
    constraint = format_constraint(body.response_format)
    parallel = body.parallel_tool_calls is not False
    forced = tool_constraint(tools, body.tool_choice or "auto", service.tokenizer, parallel)
    if constraint and forced:
        raise bad_request("response_format and a forced tool_choice exclude each other; leave one out", "tool_choice")
    config = service.engine.config
    make_constraint(
        SamplingParams(**constraint, **forced),
        service.tokenizer,
        vocab_size=config.vocab_size,
        eos_token_id=config.eos_token_id,
    )


async def _prepare(service: Service, body: ChatRequest, record: Record) -> Conversation:
    model = service.check_model(body.model)
    service.check_candidates(1, body.n or 1)
    if body.top_logprobs and not body.logprobs:
        raise bad_request("top_logprobs needs logprobs to be true; set it", "top_logprobs")
    messages = plain_messages(body.messages)
    if service.settings.log_prompts:
        record.prompt = messages
    switch = body.enable_thinking
    if switch is None and body.chat_template_kwargs is not None:
        switch = body.chat_template_kwargs.enable_thinking
    budget = body.thinking_budget if body.thinking_budget is not None else body.thinking_token_budget
    think = thinking(service, enabled=switch, effort=body.reasoning_effort, budget=budget)
    tools = body.tools or []
    choice = body.tool_choice or "auto"
    prompt = await chat_prompt(service, messages, tools, choice, think.enabled)
    constraint = format_constraint(body.response_format)
    forced = await service.in_worker(
        tool_constraint, prompt.tools, choice, service.tokenizer, body.parallel_tool_calls is not False
    )
    if constraint and forced:
        raise bad_request("response_format and a forced tool_choice exclude each other; leave one out", "tool_choice")
    wanted = body.max_completion_tokens if body.max_completion_tokens is not None else body.max_tokens
    params = sampling_params(
        service,
        body,
        len(prompt.tokens),
        wanted,
        thinking_budget=think.budget,
        logprobs=(body.top_logprobs or 0) if body.logprobs else None,
        **constraint,
        **forced,
    )
    return Conversation(service, body, model, prompt, params, record)


async def _gather(conversation: Conversation, job: Job) -> dict[str, Any]:
    """The whole answer as one object."""
    async for item in job.events():
        if item is not None:
            conversation.answers[item[1].index].feed(item[1])
    whole = conversation.head("chat.completion") | {
        "choices": [_choice(conversation, answer) for answer in conversation.answers],
        "usage": conversation.usage(),
    }
    if conversation.request.return_token_ids:
        whole["prompt_token_ids"] = conversation.prompt.tokens
    return whole


def _choice(conversation: Conversation, answer: Answer) -> dict[str, Any]:
    message: dict[str, Any] = {
        "role": "assistant",
        "content": answer.content if answer.content or not answer.calls else None,
        "refusal": None,
    }
    if answer.reasoning:
        message |= {"reasoning_content": answer.reasoning, "reasoning": answer.reasoning}
    if answer.calls:
        message["tool_calls"] = [_call_object(call) for call in answer.calls]
    choice: dict[str, Any] = {
        "index": answer.index,
        "message": message,
        "logprobs": conversation.logprobs(answer.logprobs),
        "finish_reason": answer.finish_reason,
    }
    return choice | _extras(conversation, answer)


def _extras(conversation: Conversation, answer: Answer) -> dict[str, Any]:
    """What only the finished candidate can tell, where it was asked for."""
    extras: dict[str, Any] = {}
    if answer.completion is not None and conversation.request.return_token_ids and not conversation.request.stream:
        extras["token_ids"] = answer.completion.tokens
    if answer.completion is not None and conversation.request.return_experts:
        extras["experts"] = experts_object(answer.completion)
    return extras


async def _chunks(conversation: Conversation, job: Job) -> AsyncGenerator[bytes, None]:
    """The answer as server-sent events."""
    request = conversation.request
    include_usage = bool(request.stream_options and request.stream_options.include_usage)
    head = conversation.head("chat.completion.chunk")

    def chunk(answer: Answer, delta: dict[str, Any], **more: Any) -> bytes:
        choice = {"index": answer.index, "delta": delta, "logprobs": None, "finish_reason": None} | more
        return event(head | {"choices": [choice]} | ({"usage": None} if include_usage else {}))

    for answer in conversation.answers:
        shows_prompt = request.return_token_ids and answer.index == 0
        first = {"prompt_token_ids": conversation.prompt.tokens} if shows_prompt else {}
        yield chunk(answer, {"role": "assistant", "content": ""}, **first)
    async for item in job.events(keepalive=True):
        if item is None:
            yield KEEPALIVE
            continue
        delta = item[1]
        answer = conversation.answers[delta.index]
        changes = [_delta_object(part) for part in answer.feed(delta)]
        more = _token_members(conversation, delta)
        if not changes and more and delta.finish_reason is None:
            changes = [{}]
        for change in changes:
            yield chunk(answer, change, **more)
            more = {}
        if delta.finish_reason is not None:
            last = more | {"finish_reason": answer.finish_reason} | _extras(conversation, answer)
            yield chunk(answer, {}, **last)
    if include_usage:
        yield event(head | {"choices": [], "usage": conversation.usage()})
    yield DONE


def _token_members(conversation: Conversation, delta: Delta) -> dict[str, Any]:
    """Log probabilities and ids of the delta's tokens, whose text may come with a later one."""
    members: dict[str, Any] = {}
    if conversation.params.logprobs is not None and delta.logprobs:
        members["logprobs"] = conversation.logprobs(delta.logprobs)
    if conversation.request.return_token_ids and delta.tokens:
        members["token_ids"] = delta.tokens
    return members


def _delta_object(part: Part) -> dict[str, Any]:
    if part.kind == "reasoning":
        return {"reasoning_content": part.text, "reasoning": part.text}
    if part.call is not None:
        return {"tool_calls": [{"index": part.call.index} | _call_object(part.call)]}
    return {"content": part.text}


def _call_object(call: ToolCall) -> dict[str, Any]:
    return {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}
