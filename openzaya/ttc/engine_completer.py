"""Markovian RSA on the engine in this process.

All rollouts of a round are queued together, so they run as one batch, and what their prompts have in common is
prefilled once. Budgets are exact: the engine closes the reasoning at its limit, and tails are counted in the model's
own tokens.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from openzaya.data.chat import render
from openzaya.data.tokenizer import THINK_CLOSE, THINK_OPEN, encode_batch, encode_plain
from openzaya.errors import CompletionFailed, EngineError, OpenZayaError, QueueFull, RSAError
from openzaya.infer.outputs import Completion, RequestOutput
from openzaya.infer.reasoning import ReasoningSplitter
from openzaya.infer.sampling import SamplingParams
from openzaya.infer.toolcalls import Content, ToolCallParser
from openzaya.infer.toolgrammar import tool_grammar
from openzaya.ttc.completer import Call, Capabilities, Rollout, Tail, Usage
from openzaya.ttc.counting import TokenizerCounter

if TYPE_CHECKING:
    from openzaya.infer.engine import Engine

QUEUE_PAUSE_S = 0.05
TAIL_TOKENS = 16


class EngineCompleter:
    """Runs calls on an :class:`openzaya.Engine`, which stays its owner's to close.

    Args:
        model: the name that is recorded.
        enable_thinking: False asks for answers without a think block.
    """

    def __init__(self, engine: Engine, *, model: str = "engine", enable_thinking: bool = True) -> None:
        if engine.tokenizer is None:
            raise RSAError("the engine has no tokenizer, which RSA needs; give one to Engine(tokenizer=...)")
        self._engine, self._tokenizer = engine, engine.tokenizer
        self._counter = TokenizerCounter(self._tokenizer)
        self._model, self._enable_thinking = model, enable_thinking

    async def capabilities(self) -> Capabilities:
        return Capabilities(
            kind="engine",
            model=self._model,
            token_counting="tokenizer",
            thinking_budget="engine",
            seeds=True,
            n=True,
            prefill="engine",
            context=self._engine.max_sequence_tokens,
        )

    async def complete(self, call: Call) -> Rollout:
        began = time.perf_counter()
        try:
            # A round's prompts are rendered one after another: the engine waits for all, and runs what they share once.
            with self._engine.together():
                prompt, params = await asyncio.to_thread(self._prepare, call)
                ended, request_id = self._submit(prompt, params)
            output = await self._end_of(prompt, params, ended, request_id)
        except OpenZayaError as error:
            raise CompletionFailed(str(error)) from None
        return self._rollout(call, prompt, output, time.perf_counter() - began)

    async def tails(self, texts: Sequence[str], tau: int) -> list[Tail]:
        return await self._counter.tails(texts, tau)

    async def heads(self, texts: Sequence[str], num_tokens: int) -> list[str]:
        return await self._counter.heads(texts, num_tokens)

    async def count(self, messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]]) -> int:
        return len(await asyncio.to_thread(self._render, messages, tools))

    async def close(self) -> None:
        """Nothing: the engine is the caller's."""

    def _encode(self, texts: Sequence[str]) -> list[list[int]]:
        return encode_plain(self._tokenizer, list(texts)) if texts else []

    def _render(self, messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]]) -> list[int]:
        return render(
            messages,
            self._tokenizer,
            tools=list(tools) or None,
            add_generation_prompt=True,
            enable_thinking=self._enable_thinking,
        ).tokens

    def _prepare(self, call: Call) -> tuple[list[int], SamplingParams]:
        prompt = self._render(call.messages, call.tools)
        if call.prefill:
            if not self._opens_think_block(prompt):
                prompt = prompt + encode_batch(self._tokenizer, [THINK_OPEN])[0]
            prompt = prompt + self._encode([call.prefill])[0]
        sampling = call.sampling.model_dump(exclude_none=True)
        return prompt, SamplingParams(
            max_new_tokens=call.max_tokens,
            seed=call.seed,
            thinking_budget=call.thinking_budget,
            **sampling,
            **self._constraint(call),
        )

    def _opens_think_block(self, prompt: list[int]) -> bool:
        return str(self._tokenizer.decode(prompt[-TAIL_TOKENS:])).rstrip().endswith(THINK_OPEN)

    def _constraint(self, call: Call) -> dict[str, Any]:
        """The engine's settings for what only the final call is held to."""
        response_format = call.final.get("response_format") or {}
        if response_format.get("type") == "json_object":
            return {"json_schema": True}
        if response_format.get("type") == "json_schema":
            schema = (response_format.get("json_schema") or {}).get("schema")
            if schema is None:
                raise RSAError("response_format.json_schema has no schema; give {'name', 'schema'}")
            return {"json_schema": schema}
        choice = call.final.get("tool_choice", "auto")
        if choice in ("auto", "none", None) or not call.tools:
            return {}
        name = choice["function"]["name"] if isinstance(choice, Mapping) else None
        parallel = call.final.get("parallel_tool_calls") is not False
        return {"grammar": tool_grammar(call.tools, name, tokenizer=self._tokenizer, parallel=parallel)}

    def _submit(self, prompt: list[int], params: SamplingParams) -> tuple[asyncio.Future[RequestOutput], str | None]:
        """Queue a request; without an id where the queue is full."""
        loop = asyncio.get_running_loop()
        ended: asyncio.Future[RequestOutput] = loop.create_future()

        def settle(outcome: RequestOutput | EngineError) -> None:
            if ended.done():
                return
            if isinstance(outcome, EngineError):
                ended.set_exception(outcome)
            else:
                ended.set_result(outcome)

        def on_end(outcome: RequestOutput | EngineError) -> None:
            loop.call_soon_threadsafe(settle, outcome)

        try:
            return ended, self._engine.submit(prompt, params, on_end=on_end)
        except QueueFull:
            return ended, None

    async def _end_of(
        self,
        prompt: list[int],
        params: SamplingParams,
        ended: asyncio.Future[RequestOutput],
        request_id: str | None,
    ) -> RequestOutput:
        """Wait for a request's end; a full queue is waited for, and a cancelled task ends the request."""
        while request_id is None:
            await asyncio.sleep(QUEUE_PAUSE_S)
            ended, request_id = self._submit(prompt, params)
        try:
            output = await ended
        except asyncio.CancelledError:
            self._engine.cancel(request_id)
            raise
        if output.completions[0].finish_reason == "cancelled":
            raise EngineError("the request was cancelled by the engine's owner")
        return output

    def _rollout(self, call: Call, prompt: list[int], output: RequestOutput, seconds: float) -> Rollout:
        completion = output.completions[0]
        reasoning, content, is_closed = self._split(call, prompt, completion.text)
        tool_calls: list[dict[str, Any]] = []
        if call.tools and is_closed:
            parser = ToolCallParser(call.tools)
            events = parser.feed(content) + parser.finish()
            content = "".join(event.text for event in events if isinstance(event, Content))
            for event in events:
                if not isinstance(event, Content):
                    function = {"name": event.name, "arguments": event.arguments}
                    tool_calls.append({"id": event.id, "type": "function", "function": function})
        finish = completion.finish_reason
        return Rollout(
            reasoning=reasoning,
            content=content,
            is_closed=is_closed,
            finish_reason="length" if finish == "length" else "tool_calls" if tool_calls else "stop",
            usage=Usage(
                prompt=len(prompt),
                cached=output.num_cached_tokens,
                completion=len(completion.tokens),
                reasoning=self._reasoning_tokens(completion, reasoning, is_closed),
            ),
            tool_calls=tuple(tool_calls),
            seconds=seconds,
        )

    def _split(self, call: Call, prompt: list[int], text: str) -> tuple[str, str, bool]:
        """Reasoning, content, and whether the reasoning has ended."""
        if call.prefill:
            # A line break right behind an opening tag belongs to the tag; here it is the model's own.
            splitter = ReasoningSplitter(starts_inside=True)
            splitter.feed("\0")
        else:
            splitter = ReasoningSplitter.after_prompt(str(self._tokenizer.decode(prompt[-TAIL_TOKENS:])))
        pieces = splitter.feed(text)
        is_closed = not splitter.is_reasoning
        pieces += splitter.finish()
        parts = {kind: "".join(p.text for p in pieces if p.kind == kind) for kind in ("reasoning", "content")}
        return parts["reasoning"], parts["content"], is_closed

    def _reasoning_tokens(self, completion: Completion, reasoning: str, is_closed: bool) -> int:
        """Tokens up to the closing tag, tags included; all of them where it never came."""
        if not is_closed:
            return len(completion.tokens)
        if not reasoning:
            return 0
        closing = encode_batch(self._tokenizer, [THINK_CLOSE])[0]
        if len(closing) == 1 and closing[0] in completion.tokens:
            return completion.tokens.index(closing[0]) + 1
        return min(len(completion.tokens), len(self._encode([reasoning])[0]))
