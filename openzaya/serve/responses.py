"""/v1/responses: the newer of OpenAI's two ways to ask; text, reasoning and functions, whole or as typed events."""

from __future__ import annotations

import secrets
import time
from collections.abc import AsyncGenerator, Iterator
from dataclasses import dataclass, field
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from openzaya.data.tokenizer import THINK_CLOSE
from openzaya.infer.outputs import Delta
from openzaya.infer.sampling import SamplingParams
from openzaya.serve.answer import Answer, chat_logprobs
from openzaya.serve.errors import ApiError, bad_request
from openzaya.serve.jobs import Job, Service, start
from openzaya.serve.messages import plain_messages
from openzaya.serve.middleware import record_of
from openzaya.serve.prompts import (
    Prompt,
    chat_prompt,
    sampling_params,
    schema_constraint,
    thinking,
    tool_constraint,
)
from openzaya.serve.responses_items import Event, OutputItems
from openzaya.serve.responses_schema import ResponsesRequest
from openzaya.serve.service import Record
from openzaya.serve.streaming import KEEPALIVE, EventStream, NoResponse, event, finish_or_leave

LOGPROBS = "message.output_text.logprobs"


@dataclass
class Exchange:
    """One request to responses, on its way."""

    service: Service
    request: ResponsesRequest
    model: str
    prompt: Prompt
    params: SamplingParams
    record: Record
    id: str = field(default_factory=lambda: "resp_" + secrets.token_hex(12))
    created: int = field(default_factory=lambda: int(time.time()))
    output: OutputItems = field(default_factory=OutputItems)
    answer: Answer = field(init=False)
    pending: list[dict[str, Any]] = field(default_factory=list)
    """Log probabilities of tokens whose text is still held back."""

    def __post_init__(self) -> None:
        parallel = self.request.parallel_tool_calls is not False
        self.answer = Answer(self.service, self.prompt, 0, parallel_calls=parallel)

    def feed(self, delta: Delta) -> Iterator[Event]:
        """The events of a delta; the last ones close what is open."""
        if self.params.logprobs is not None:
            for one in chat_logprobs(self.service.token_texts, delta.logprobs or [], self.params.logprobs):
                # What is before the end of the reasoning is no token of the answer.
                self.pending = [] if one["token"] == THINK_CLOSE and not self.answer.content else [*self.pending, one]
        for part in self.answer.feed(delta):
            yield from self.output.add(part, self.pending)
            self.pending = []
        if delta.finish_reason is not None:
            yield from self.output.close("incomplete" if delta.finish_reason == "length" else "completed")

    @property
    def status(self) -> str:
        completion = self.answer.completion
        if completion is None:
            return "in_progress"
        return "incomplete" if completion.finish_reason == "length" else "completed"

    def object(self, error: ApiError | None = None) -> dict[str, Any]:
        """The response object, as it is now."""
        request = self.request
        status = "failed" if error is not None else self.status
        is_final = status not in ("in_progress", "failed")
        return {
            "id": self.id,
            "object": "response",
            "created_at": self.created,
            "completed_at": int(time.time()) if is_final else None,
            "status": status,
            "background": False,
            "error": None if error is None else {"code": "server_error", "message": error.message},
            "incomplete_details": {"reason": "max_output_tokens"} if status == "incomplete" else None,
            "instructions": request.instructions,
            "max_output_tokens": request.max_output_tokens,
            "metadata": request.metadata or {},
            "model": self.model,
            "output": self.output.items,
            "parallel_tool_calls": request.parallel_tool_calls is not False,
            "previous_response_id": None,
            "reasoning": {"effort": request.reasoning.effort if request.reasoning else None, "summary": None},
            "store": False,
            "temperature": self.params.temperature,
            "text": {"format": self._format()},
            "tool_choice": self._choice(),
            "tools": [self._tool(tool.model_dump()) for tool in request.tools or []],
            "top_logprobs": request.top_logprobs or 0,
            "top_p": self.params.top_p,
            "truncation": "disabled",
            "usage": self._usage() if is_final else None,
            "user": request.user,
        }

    def _format(self) -> dict[str, Any]:
        chosen = self.request.text.format if self.request.text else None
        if chosen is None:
            return {"type": "text"}
        if chosen.type != "json_schema":
            return {"type": chosen.type}
        return {"type": "json_schema", "name": chosen.name or "schema", "schema": chosen.schema_, "strict": True}

    def _choice(self) -> Any:
        choice = self.request.tool_choice or "auto"
        return choice if isinstance(choice, str) else choice.model_dump()

    @staticmethod
    def _tool(tool: dict[str, Any]) -> dict[str, Any]:
        return tool | {"parameters": tool["parameters"] or {}, "strict": bool(tool["strict"])}

    def _usage(self) -> dict[str, Any]:
        generated, reasoning = self.answer.count_tokens()
        prompt = len(self.prompt.tokens)
        return {
            "input_tokens": prompt,
            "input_tokens_details": {"cached_tokens": self.record.cached_tokens, "cache_write_tokens": 0},
            "output_tokens": generated,
            "output_tokens_details": {"reasoning_tokens": reasoning},
            "total_tokens": prompt + generated,
        }


async def responses(service: Service, body: ResponsesRequest, request: Request) -> Response:
    """Answer a request; raises ``ApiError``."""
    exchange = await _prepare(service, body, record_of(request))
    job = await start(service, [exchange.prompt.tokens], [exchange.params], 1, exchange.record)
    if body.stream:
        return ResponseEvents(exchange, job)
    whole = await finish_or_leave(request, job, _gather(exchange, job))
    return NoResponse() if whole is None else JSONResponse(whole)


async def _prepare(service: Service, body: ResponsesRequest, record: Record) -> Exchange:
    model = service.check_model(body.model)
    body.check()
    messages = plain_messages(body.messages())
    if service.settings.log_prompts:
        record.prompt = messages
    effort = body.reasoning.effort if body.reasoning else None
    think = thinking(service, enabled=None, effort=effort, budget=None)
    choice = body.chat_choice()
    prompt = await chat_prompt(service, messages, body.chat_tools(), choice, think.enabled)
    forced = await service.in_worker(
        tool_constraint, prompt.tools, choice, service.tokenizer, body.parallel_tool_calls is not False
    )
    constraint = _constraint(body)
    if constraint and forced:
        raise bad_request("text.format and a forced tool_choice exclude each other; leave one out", "tool_choice")
    wants_logprobs = LOGPROBS in (body.include or []) or bool(body.top_logprobs)
    params = sampling_params(
        service,
        body.sampling(),
        len(prompt.tokens),
        body.max_output_tokens,
        thinking_budget=think.budget,
        logprobs=(body.top_logprobs or 0) if wants_logprobs else None,
        **constraint,
        **forced,
    )
    return Exchange(service, body, model, prompt, params, record)


def _constraint(body: ResponsesRequest) -> dict[str, Any]:
    chosen = body.text.format if body.text else None
    if chosen is None or chosen.type == "text":
        return {}
    if chosen.type == "json_object":
        return {"json_schema": True}
    if chosen.schema_ is None:
        raise bad_request("text.format.schema is missing; give a JSON schema", "text.format")
    return schema_constraint(chosen.schema_)


async def _gather(exchange: Exchange, job: Job) -> dict[str, Any]:
    async for item in job.events():
        if item is not None:
            for _ in exchange.feed(item[1]):
                pass
    return exchange.object()


class ResponseEvents(EventStream):
    """The typed events of a response; one that fails ends with ``response.failed``."""

    def __init__(self, exchange: Exchange, job: Job) -> None:
        super().__init__(job, self._events(exchange, job))
        self._exchange = exchange

    async def _events(self, exchange: Exchange, job: Job) -> AsyncGenerator[bytes, None]:
        output = exchange.output
        yield _written(output.event("created", response=exchange.object()))
        yield _written(output.event("in_progress", response=exchange.object()))
        async for item in job.events(keepalive=True):
            if item is None:
                yield KEEPALIVE
                continue
            for one in exchange.feed(item[1]):
                yield _written(one)
        yield _written(output.event(exchange.status, response=exchange.object()))

    def failure(self, error: ApiError) -> bytes:
        return _written(self._exchange.output.event("failed", response=self._exchange.object(error)))


def _written(one: Event) -> bytes:
    return event(one, one["type"])
