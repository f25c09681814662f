"""/v1/completions: texts or tokens to continue. The text comes as the model wrote it, think tags included."""

from __future__ import annotations

import secrets
import time
from collections.abc import AsyncGenerator
from dataclasses import dataclass, field
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from openzaya.infer.outputs import Completion, TokenLogprob
from openzaya.infer.sampling import SamplingParams
from openzaya.serve.answer import experts_object, finite
from openzaya.serve.errors import bad_request
from openzaya.serve.jobs import Job, Service, start
from openzaya.serve.middleware import record_of
from openzaya.serve.prompts import sampling_params, text_prompts
from openzaya.serve.schemas import CompletionRequest
from openzaya.serve.service import Record, fresh_seed
from openzaya.serve.streaming import DONE, KEEPALIVE, EventStream, NoResponse, event, finish_or_leave


@dataclass
class Choice:
    """One candidate of one prompt, as it grows."""

    index: int
    text: str = ""
    logprobs: list[TokenLogprob] = field(default_factory=list)
    completion: Completion | None = None
    num_characters: int = 0
    """Of the tokens whose log probabilities were sent."""


@dataclass
class Continuation:
    """One request to completions, on its way."""

    service: Service
    request: CompletionRequest
    model: str
    prompts: list[list[int]]
    echoes: list[str]
    params: list[SamplingParams]
    record: Record
    id: str = field(default_factory=lambda: "cmpl-" + secrets.token_hex(12))
    created: int = field(default_factory=lambda: int(time.time()))
    choices: list[Choice] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.choices = [Choice(index) for index in range(len(self.prompts) * self.n)]

    @property
    def n(self) -> int:
        return self.request.n or 1

    def head(self) -> dict[str, Any]:
        return {
            "id": self.id,
            "object": "text_completion",
            "created": self.created,
            "model": self.model,
            "system_fingerprint": self.service.fingerprint,
        }

    def usage(self) -> dict[str, Any]:
        prompt = sum(len(tokens) for tokens in self.prompts)
        generated = sum(len(choice.completion.tokens) for choice in self.choices if choice.completion is not None)
        return {
            "prompt_tokens": prompt,
            "completion_tokens": generated,
            "total_tokens": prompt + generated,
            "prompt_tokens_details": {"cached_tokens": self.record.cached_tokens},
        }

    def logprobs(self, choice: Choice, logprobs: list[TokenLogprob]) -> dict[str, Any] | None:
        """In the form of completions; offsets count from the beginning of the generated text."""
        if self.request.logprobs is None:
            return None
        texts = self.service.token_texts
        tokens = [texts.text_of(one.token) for one in logprobs]
        offsets = []
        for token in tokens:
            offsets.append(choice.num_characters)
            choice.num_characters += len(token)
        return {
            "tokens": tokens,
            "token_logprobs": [finite(one.logprob) for one in logprobs],
            "top_logprobs": [{texts.text_of(token): finite(value) for token, value in one.top} for one in logprobs],
            "text_offset": offsets,
        }

    def extras(self, choice: Choice) -> dict[str, Any]:
        extras: dict[str, Any] = {}
        if choice.completion is not None and self.request.return_token_ids and not self.request.stream:
            extras["prompt_token_ids"] = self.prompts[choice.index // self.n]
            extras["token_ids"] = choice.completion.tokens
            end = choice.completion.end_token
            if end is not None and self.request.logprobs is not None:
                # It is not part of the text; training needs it, for the model chose it too.
                extras["end_token"] = {"id": end.token, "logprob": finite(end.logprob)}
        if choice.completion is not None and self.request.return_experts:
            extras["experts"] = experts_object(choice.completion)
        return extras


async def completions(service: Service, body: CompletionRequest, request: Request) -> Response:
    """Answer a request; raises ``ApiError``."""
    continuation = await _prepare(service, body, record_of(request))
    if body.max_tokens == 0:
        return JSONResponse(_echo_alone(continuation))
    job = await start(service, continuation.prompts, continuation.params, continuation.n, continuation.record)
    if body.stream:
        return EventStream(job, _chunks(continuation, job))
    whole = await finish_or_leave(request, job, _gather(continuation, job))
    return NoResponse() if whole is None else JSONResponse(whole)


async def _prepare(service: Service, body: CompletionRequest, record: Record) -> Continuation:
    model = service.check_model(body.model)
    if body.suffix:
        raise bad_request("suffix is not available: the model writes from left to right; leave it out", "suffix")
    if body.best_of is not None and body.best_of != (body.n or 1):
        raise bad_request("best_of is not available; ask for n candidates and choose among them", "best_of")
    if body.echo and body.logprobs is not None:
        raise bad_request("log probabilities of the prompt are not available; leave out echo or logprobs", "logprobs")
    if body.max_tokens == 0 and (not body.echo or body.stream):
        raise bad_request("max_tokens is 0; ask for at least 1 token", "max_tokens")
    if service.settings.log_prompts:
        record.prompt = body.prompt
    given: list[Any] = body.prompt if isinstance(body.prompt, list) else [body.prompt]
    if isinstance(given[0], int):
        given = [given]
    service.check_candidates(len(given), body.n or 1)
    if isinstance(given[0], str):
        prompts, echoes = await text_prompts(service, given), given
    else:
        prompts = given
        vocabulary = service.engine.config.vocab_size
        for tokens in prompts:
            if max(tokens) >= vocabulary:
                raise bad_request(f"prompt: token {max(tokens)} is beyond the vocabulary of {vocabulary}", "prompt")
        echoes = [service.tokenizer.decode(tokens) for tokens in prompts] if body.echo else [""] * len(prompts)
    wanted = None if body.max_tokens == 0 else body.max_tokens
    seed = fresh_seed() if body.seed is None else body.seed
    n = body.n or 1
    params = [
        # Candidates of different prompts draw from different seeds, as candidates of one prompt do.
        sampling_params(service, body, len(tokens), wanted, logprobs=body.logprobs, seed=seed + i * n)
        for i, tokens in enumerate(prompts)
    ]
    return Continuation(service, body, model, prompts, echoes, params, record)


def _echo_alone(continuation: Continuation) -> dict[str, Any]:
    choices = [
        {"index": choice.index, "text": continuation.echoes[choice.index // continuation.n], "logprobs": None}
        | {"finish_reason": "length"}
        for choice in continuation.choices
    ]
    return continuation.head() | {"choices": choices, "usage": continuation.usage()}


async def _gather(continuation: Continuation, job: Job) -> dict[str, Any]:
    async for item in job.events():
        if item is None:
            continue
        prompt, delta = item
        choice = continuation.choices[prompt * continuation.n + delta.index]
        choice.text += delta.text
        choice.logprobs += delta.logprobs or []
        choice.completion = delta.completion or choice.completion
    choices = []
    for choice in continuation.choices:
        echo = continuation.echoes[choice.index // continuation.n] if continuation.request.echo else ""
        choices.append(
            {
                "index": choice.index,
                "text": echo + choice.text,
                "logprobs": continuation.logprobs(choice, choice.logprobs),
                "finish_reason": choice.completion.finish_reason if choice.completion is not None else None,
            }
            | continuation.extras(choice)
        )
    return continuation.head() | {"choices": choices, "usage": continuation.usage()}


async def _chunks(continuation: Continuation, job: Job) -> AsyncGenerator[bytes, None]:
    request = continuation.request
    include_usage = bool(request.stream_options and request.stream_options.include_usage)
    head = continuation.head()

    def chunk(choice: Choice, text: str, **more: Any) -> bytes:
        one = {"index": choice.index, "text": text, "logprobs": None, "finish_reason": None} | more
        return event(head | {"choices": [one]} | ({"usage": None} if include_usage else {}))

    if request.echo:
        for choice in continuation.choices:
            yield chunk(choice, continuation.echoes[choice.index // continuation.n])
    async for item in job.events(keepalive=True):
        if item is None:
            yield KEEPALIVE
            continue
        prompt, delta = item
        choice = continuation.choices[prompt * continuation.n + delta.index]
        choice.completion = delta.completion or choice.completion
        more: dict[str, Any] = {}
        if delta.logprobs:
            more["logprobs"] = continuation.logprobs(choice, delta.logprobs)
        if request.return_token_ids and delta.tokens:
            more["token_ids"] = delta.tokens
        if delta.finish_reason is not None:
            more |= {"finish_reason": delta.finish_reason} | continuation.extras(choice)
        if delta.text or more:
            yield chunk(choice, delta.text, **more)
    if include_usage:
        yield event(head | {"choices": [], "usage": continuation.usage()})
    yield DONE
