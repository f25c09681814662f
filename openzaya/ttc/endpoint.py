"""Markovian RSA on any OpenAI-compatible endpoint: vLLM, SGLang, llama.cpp, Ollama, hosted ones, our own server.

Each rollout is a request of its own with its own seed. What the endpoint can do is probed once (probe.py), and each
thing is then done by the best means there is:

    thinking budget  a request field that was seen to hold; else two calls: the first may take the budget, and where it
                     stopped inside the reasoning, the second is given the reasoning, closed, and writes the answer
    begun turns      by token ids, by an unfinished assistant message, or, last and weakest, quoted in the question
    tails            the model's tokenizer; else the endpoint's /tokenize; else an estimate from its usage

Tokens are those that the endpoint reports, of failed attempts too where they reported any.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal

from openzaya.errors import CompletionFailed, RSAError
from openzaya.ttc.completer import Call, Capabilities, FinishReason, Rollout, Tail, Usage
from openzaya.ttc.connection import Connection, EndpointFailed
from openzaya.ttc.counting import TokenCounter, TokenizerCounter
from openzaya.ttc.probe import find_model, probe, without_probe
from openzaya.ttc.replies import Parts, Place, Reply, split_tags
from openzaya.ttc.wire import Found, Means, quoting

if TYPE_CHECKING:
    import httpx
    from transformers import PreTrainedTokenizerFast

__all__ = ["EndpointCompleter", "find_model"]


@dataclass
class _Account:
    """Tokens and requests of one rollout."""

    usage: Usage = field(default_factory=Usage)
    num_requests: int = 0


class EndpointCompleter:
    """Runs calls on an endpoint.

    Args:
        base_url: such as ``http://localhost:8000/v1``; credentials in it are used and never shown.
        model: the endpoint's name for it; None: the only one that it lists.
        api_key: sent as a bearer token.
        kind: ``chat``, ``completions``, or ``auto``: chat where it is served.
        tokenizer: the model's own, as an object, a folder or a hub id; makes tails exact without asking the endpoint.
        timeout_s: longest time of one request, its waiting at the endpoint included.
        idle_timeout_s: longest pause inside a stream that has begun.
        max_retries: further attempts of a request.
        retry_wait_s: about the first wait between attempts; it doubles each time.
        concurrency: requests at the same time.
        headers: sent with each request.
        think_tags: the model's tags around its reasoning.
        opens_in_prompt: whether prompts end with the opening tag; None: as probed, or as replies show.
        probe: False sends nothing but the calls themselves, and uses what works everywhere.
        stream: answers as streams where the endpoint can.
        extra: fields of every request, such as ``{"chat_template_kwargs": {...}}``.
        client: an HTTP client to use; it is left open.

    Raises:
        RSAError: a URL of another form, or no usable tokenizer.
    """

    def __init__(
        self,
        base_url: str,
        model: str | None = None,
        *,
        api_key: str | None = None,
        kind: Literal["auto", "chat", "completions"] = "auto",
        tokenizer: PreTrainedTokenizerFast | str | None = None,
        timeout_s: float = 3600.0,
        idle_timeout_s: float = 300.0,
        max_retries: int = 6,
        retry_wait_s: float = 0.5,
        concurrency: int = 64,
        headers: Mapping[str, str] | None = None,
        think_tags: tuple[str, str] = ("<think>", "</think>"),
        opens_in_prompt: bool | None = None,
        probe: bool = True,
        stream: bool = True,
        extra: Mapping[str, Any] | None = None,
        client: httpx.AsyncClient | None = None,
    ) -> None:
        if kind not in ("auto", "chat", "completions"):
            raise RSAError(f"kind='{kind}' is none of auto, chat, completions; choose one")
        if concurrency < 1 or max_retries < 0 or timeout_s <= 0:
            raise RSAError(
                f"concurrency={concurrency}, max_retries={max_retries}, timeout_s={timeout_s}: give at least 1, 0, "
                "and more than 0"
            )
        self._connection = Connection(
            base_url,
            api_key=api_key,
            headers=headers,
            timeout_s=timeout_s,
            idle_timeout_s=idle_timeout_s,
            max_retries=max_retries,
            retry_wait_s=retry_wait_s,
            concurrency=concurrency,
            client=client,
        )
        self._model, self._kind, self._tokenizer = model, kind, tokenizer
        self._tags, self._extra, self._streams = think_tags, dict(extra or {}), stream
        self._opens_in_prompt, self._probes = opens_in_prompt, probe
        self._found: Found | None = None
        self._finding = asyncio.Lock()
        self._shows_reasoning: bool | None = None

    def __repr__(self) -> str:
        return f"EndpointCompleter({self._connection.url!r}, model={self._model!r})"

    @property
    def url(self) -> str:
        """The endpoint's, without credentials."""
        return self._connection.url

    async def capabilities(self) -> Capabilities:
        """Probed at the first call. Raises ``RSAError`` where the endpoint cannot be used at all."""
        found = await self._findings()
        return Capabilities(
            kind=found.wire.kind,
            model=found.wire.model,
            token_counting=found.wire.counter.kind,
            thinking_budget=found.thinking,
            seeds=found.seeds,
            n=found.n,
            prefill=found.means,
            context=found.context,
            notes=found.notes,
        )

    async def complete(self, call: Call) -> Rollout:
        """One rollout.

        Raises:
            EndpointFailed: refused, or failed after all retries (a ``CompletionFailed``).
        """
        found = await self._findings()
        if call.tools and found.wire.kind == "completions":
            raise CompletionFailed("plain completions know no tools; use an endpoint with chat completions")
        began = time.perf_counter()
        account = _Account()
        budget = call.thinking_budget
        fields: dict[str, Any] = {}
        if budget is not None and found.thinking not in ("two_calls", "none"):
            fields, budget = {found.thinking: budget}, None
        if budget is not None and (
            budget >= call.max_tokens or found.thinking == "none" or self._shows_reasoning is False
        ):
            budget = None
        limit = call.max_tokens if budget is None else max(1, budget)
        try:
            reply, parts = await self._turn(call, found, account, limit, fields)
            if budget is not None and reply.finish_reason == "length":
                reply, parts = await self._closed(call, found, account, reply, parts)
        except EndpointFailed as error:
            error.usage += account.usage
            raise
        if parts.reasoning:
            self._shows_reasoning = True
        return Rollout(
            reasoning=parts.reasoning,
            content=parts.content,
            is_closed=parts.is_closed,
            finish_reason=_finish_reason(reply),
            usage=account.usage,
            tool_calls=reply.tool_calls,
            seconds=time.perf_counter() - began,
            num_calls=account.num_requests,
        )

    async def tails(self, texts: Sequence[str], tau: int) -> list[Tail]:
        return await (await self._counter()).tails(texts, tau)

    async def heads(self, texts: Sequence[str], num_tokens: int) -> list[str]:
        return await (await self._counter()).heads(texts, num_tokens)

    async def count(self, messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]]) -> int:
        return await (await self._counter()).count(messages, tools)

    async def close(self) -> None:
        await self._connection.close()

    # --- what the endpoint can do ---------------------------------------------------------------------

    async def _findings(self) -> Found:
        async with self._finding:
            if self._found is None:
                counter: TokenCounter | None = None
                if self._tokenizer is not None:
                    counter = await asyncio.to_thread(TokenizerCounter, self._tokenizer)
                found = await (probe if self._probes else without_probe)(
                    self._connection,
                    model=self._model,
                    kind=self._kind,
                    counter=counter,
                    tags=self._tags,
                    streams=self._streams,
                    extra=self._extra,
                )
                if self._opens_in_prompt is not None:
                    found = replace(found, opens_in_prompt=self._opens_in_prompt)
                self._found = found
            return self._found

    async def _counter(self) -> TokenCounter:
        return (await self._findings()).wire.counter

    # --- one rollout ----------------------------------------------------------------------------------

    async def _turn(
        self, call: Call, found: Found, account: _Account, limit: int, fields: Mapping[str, Any]
    ) -> tuple[Reply, Parts]:
        """The call itself, with its reasoning begun where it has a prefill."""
        if not call.prefill:
            place: Place = "opening" if found.opens_in_prompt else "start"
            return await self._ask(call, found, account, limit, place, fields)
        means = _means(call, found)
        if found.thinking == "none" and means != "none":
            return await self._ask(call, found, account, limit, "start", fields, begun=call.prefill)
        if means == "none":
            quoted = replace(call, messages=tuple(quoting(call.messages, call.prefill, is_finished=False)))
            place = "opening" if found.opens_in_prompt else "start"
            return await self._ask(quoted, found, account, limit, place, fields)
        return await self._ask(call, found, account, limit, "reasoning", fields, begun=found.begun(call.prefill))

    async def _closed(
        self, call: Call, found: Found, account: _Account, first: Reply, parts: Parts
    ) -> tuple[Reply, Parts]:
        """The answer to a reasoning that has used up its budget; or more of an answer that was cut off."""
        if not parts.reasoning and not call.prefill:
            # It reasons out of sight or not at all: there is no reasoning to close, so the whole is asked for.
            if not self._probes:
                self._shows_reasoning = False
            return await self._turn(call, found, account, call.max_tokens, {})
        left = max(1, call.max_tokens - (await self._generated(first)))
        reasoning = call.prefill + parts.reasoning
        means = _means(call, found)
        if means == "none":
            quoted = replace(call, messages=tuple(quoting(call.messages, reasoning)))
            place: Place = "opening" if found.opens_in_prompt else "start"
            reply, answer = await self._ask(quoted, found, account, left, place, {})
            return reply, Parts(parts.reasoning, answer.content, answer.is_closed)
        written = parts.content if parts.is_closed else ""
        begun = found.begun(reasoning, written)
        reply, answer = await self._ask(call, found, account, left, "closing", {}, begun=begun)
        # Some reasoning parsers take the answer for reasoning, since they saw no closing tag.
        content = answer.content or answer.reasoning
        return reply, Parts(parts.reasoning, written + content, True)

    async def _ask(
        self,
        call: Call,
        found: Found,
        account: _Account,
        limit: int,
        place: Place,
        fields: Mapping[str, Any],
        begun: str = "",
    ) -> tuple[Reply, Parts]:
        """One request, and its reply taken apart."""
        means = _means(call, found) if begun else "none"
        request = await found.wire.request(
            call.messages,
            max_tokens=limit,
            seed=call.seed,
            sampling=call.sampling,
            tools=call.tools,
            begun=begun,
            means=means,
            more={**call.final, **fields},
        )
        if request is None:
            raise CompletionFailed(f"{self.url}: the conversation cannot be rendered for completions")
        outcome = await self._connection.ask(*request)
        reply = outcome.reply
        parts = _parts(reply, self._tags, place)
        if place == "start" and parts.reasoning and not reply.reasoning and self._tags[0] not in reply.content:
            # A closing tag without an opening one: prompts of this model end with it, and now that is known.
            self._learn_opening(found)
        usage = await self._usage(call, found, reply, parts, begun)
        account.usage += usage + outcome.failed_usage
        account.num_requests += outcome.num_requests
        return reply, parts

    def _learn_opening(self, found: Found) -> None:
        if self._opens_in_prompt is None:
            thinking = "two_calls" if found.thinking == "none" else found.thinking
            self._found = replace(found, opens_in_prompt=True, thinking=thinking)

    async def _usage(self, call: Call, found: Found, reply: Reply, parts: Parts, begun: str) -> Usage:
        """The reply's tokens as the endpoint counts them; what it does not tell is counted here."""
        counter = found.wire.counter
        usage = reply.usage
        text = reply.reasoning + reply.content
        if usage is None:
            prompt = await counter.count(call.messages, call.tools)
            prompt += await counter.count_text(begun) if begun else 0
            usage = Usage(prompt=prompt, completion=await counter.count_text(text) if text else 0)
        elif not reply.tool_calls:
            hidden = usage.reasoning if not parts.reasoning else 0
            counter.observe(text, usage.completion - hidden)
        if self._tags[1] in begun:
            return replace(usage, reasoning=0)
        if parts.reasoning and not usage.reasoning:
            counted = usage.completion if not parts.is_closed else await counter.count_text(parts.reasoning)
            usage = replace(usage, reasoning=min(usage.completion, counted))
        return usage

    async def _generated(self, reply: Reply) -> int:
        if reply.usage is not None:
            return reply.usage.completion
        return await (await self._counter()).count_text(reply.reasoning + reply.content)


def _means(call: Call, found: Found) -> Means:
    """How a begun turn is sent; plain completions know neither tools nor response formats."""
    return found.chat_means if call.tools or call.final else found.means


def _parts(reply: Reply, tags: tuple[str, str], place: Place) -> Parts:
    if reply.reasoning:
        content = split_tags(reply.content, tags, "closing").content
        is_cut = not content and not reply.tool_calls
        return Parts(reply.reasoning, content, not is_cut)
    if reply.finish_reason == "length" and not reply.content:
        return Parts("", "", False)
    return split_tags(reply.content, tags, place)


def _finish_reason(reply: Reply) -> FinishReason:
    if reply.tool_calls:
        return "tool_calls"
    return "length" if reply.finish_reason in ("length", "max_tokens") else "stop"
