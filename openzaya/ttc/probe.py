"""What an endpoint can do, found out once with a few small requests.

    GET  /models      the name of the model, its context
    POST /tokenize    exact counting, in one of two forms (counting_server.py)
    three samples     chat or plain completions; streams; whether it reasons visibly; the same seed twice, and another
    n = 2             two choices?
    thinking budget   each known field with a budget of 1 token: does the reasoning end early, or was it ignored?
    begun turns       does it write "8" after "1, 2, 3, 4, 5, 6, 7,"?

A probe that fails means "not available". Errors are: an endpoint that cannot be reached, a key that is refused, a
model that is not named and not to be found, and an endpoint that refuses even the first sample.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from openzaya.errors import RSAError
from openzaya.ttc.completer import Usage
from openzaya.ttc.config import RSASampling
from openzaya.ttc.connection import Connection, EndpointFailed, Refused, Unavailable
from openzaya.ttc.counting import EstimateCounter, TokenCounter
from openzaya.ttc.counting_server import ServerCounter
from openzaya.ttc.replies import BrokenReply, Parts, Reply, split_tags
from openzaya.ttc.wire import Found, Means, Wire

THINKING_FIELDS = ("thinking_token_budget", "thinking_budget", "thinking_budget_tokens")
"""vLLM and our own server; our own server; llama.cpp."""
PROBE_TOKENS = 16
PROBE_RETRIES = 3
PROBE_TIMEOUT_S = 120.0
SMALL_BUDGET = 1
CONTEXT_FIELDS = ("max_model_len", "context_length", "max_context_length", "context_window", "context_size")

_SAMPLE = [{"role": "user", "content": "Write ten random words. Think first about what random means."}]
_COUNTING = [{"role": "user", "content": "Count from 1 to 30. Write only the numbers, with commas."}]
_NUMBERS = "1, 2, 3, 4, 5, 6, 7,"
_GREEDY = RSASampling(temperature=0.0)


async def probe(
    connection: Connection,
    *,
    model: str | None,
    kind: str,
    counter: TokenCounter | None,
    tags: tuple[str, str],
    streams: bool,
    extra: Mapping[str, Any],
) -> Found:
    """Find out what the endpoint can do.

    Args:
        model: None: the only one that it lists.
        kind: ``chat``, ``completions`` or ``auto``.
        counter: the model's own tokenizer, where it was given.

    Raises:
        RSAError: as the file's head says.
    """
    name, context = await find_model(connection, model)
    if counter is None:
        counter = await ServerCounter.detect(connection, name)
        context = context or (counter.context if counter is not None else None)
    wire = Wire(name, counter or EstimateCounter(), tags=tags, streams=streams, extra=extra)
    return await _Prober(connection, wire).run(kind, context)


async def without_probe(
    connection: Connection,
    *,
    model: str | None,
    kind: str,
    counter: TokenCounter | None,
    tags: tuple[str, str],
    streams: bool,
    extra: Mapping[str, Any],
) -> Found:
    """What holds for every endpoint; only the model's name is asked for, where it was not given."""
    context = None
    if model is None:
        model, context = await find_model(connection, None)
    is_plain = kind == "completions"
    wire = Wire(
        model, counter or EstimateCounter(), "completions" if is_plain else "chat", tags, streams=streams, extra=extra
    )
    means: Means = "completions" if is_plain else "none"
    return Found(wire, "two_calls", means, context=context, notes=("not probed",))


async def find_model(connection: Connection, model: str | None) -> tuple[str, int | None]:
    """The model's name and its context, where the endpoint tells it. Raises ``RSAError``."""
    try:
        body = await _models(connection)
    except Refused as error:
        if error.status in (401, 403):
            raise key_refused(connection, error.status, str(error)) from None
        body = None
    listed = body.get("data") if isinstance(body, Mapping) else None
    models = [one for one in listed or () if isinstance(one, Mapping) and isinstance(one.get("id"), str)]
    if model is None:
        if len(models) != 1:
            names = ", ".join(str(one["id"]) for one in models[:20])
            raise RSAError(f"{connection.url} lists {len(models)} models ({names}); name the model")
        return str(models[0]["id"]), _context(models[0])
    return model, next((_context(one) for one in models if one["id"] == model), None)


def key_refused(connection: Connection, status: int, message: str) -> RSAError:
    return RSAError(
        f"{connection.url} refuses the key (HTTP {status}): {connection.hide(message)}; give the key that it expects"
    )


async def _models(connection: Connection) -> Any:
    for attempt in range(PROBE_RETRIES + 1):
        try:
            return await connection.get(connection.url + "/models")
        except BrokenReply:
            return None
        except Unavailable as error:
            if attempt == PROBE_RETRIES:
                if error.status:
                    return None
                raise RSAError(
                    f"cannot reach {connection.url} ({connection.hide(str(error))}); check the URL, and that the "
                    "server is up"
                ) from None
            await connection.pause(attempt)
    raise AssertionError("not reached")


def _context(model: Mapping[str, Any]) -> int | None:
    meta = model.get("meta")
    found = [model.get(name) for name in CONTEXT_FIELDS]
    found.append(meta.get("n_ctx") if isinstance(meta, Mapping) else None)
    return next((value for value in found if isinstance(value, int) and value > 0), None)


class _Prober:
    """Runs the probes that generate."""

    def __init__(self, connection: Connection, wire: Wire) -> None:
        self._connection, self._wire = connection, wire
        self._usage = Usage()
        self._num_requests = 0
        self._notes: list[str] = []

    async def run(self, kind: str, context: int | None) -> Found:
        first = await self._first(kind)
        # Where the endpoint splits the reasoning off itself, its replies do not begin inside it.
        opens_in_prompt = not first.reasoning and await self._opens_in_prompt()
        shown = bool(first.reasoning) or first.content.lstrip().startswith(self._wire.tags[0])
        reasons = shown or opens_in_prompt
        seeds, n, thinking, (means, chat_means) = await asyncio.gather(
            self._seeds(first), self._n(), self._thinking(first, reasons, opens_in_prompt), self._means(reasons)
        )
        gap = await self._gap(first, means) if reasons else "\n"
        if self._wire.counter.kind == "estimate":
            self._notes.append("tokens of texts are estimated from usage")
        if first.usage is None:
            self._notes.append("the endpoint reports no usage: its tokens are counted here")
        self._notes.append(
            f"probing took {self._num_requests} requests, {self._usage.prompt} prompt and "
            f"{self._usage.completion} generated tokens"
        )
        return Found(
            self._wire,
            thinking,
            means,
            chat_means,
            opens_in_prompt=opens_in_prompt,
            gap=gap,
            seeds=seeds,
            n=n,
            context=context,
            notes=tuple(self._notes),
        )

    async def _try(
        self,
        messages: list[dict[str, Any]],
        *,
        max_tokens: int = PROBE_TOKENS,
        seed: int = 1,
        sampling: RSASampling | None = None,
        begun: str = "",
        means: Means = "none",
        more: Mapping[str, Any] | None = None,
        streams: bool = True,
    ) -> Reply:
        """One small request; ``more`` are further fields. Raises :class:`EndpointFailed`."""
        wire = self._wire if streams else replace(self._wire, streams=False)
        sampling = sampling or RSASampling()
        request = await wire.request(
            messages, max_tokens=max_tokens, seed=seed, sampling=sampling, begun=begun, means=means
        )
        if request is None:
            raise EndpointFailed("the conversation cannot be rendered")
        path, body = request[0], {**request[1], **(more or {})}
        try:
            outcome = await self._connection.ask(path, body, max_retries=PROBE_RETRIES, timeout_s=PROBE_TIMEOUT_S)
        except EndpointFailed as error:
            self._usage += error.usage
            raise
        self._num_requests += outcome.num_requests
        self._usage += outcome.failed_usage + (outcome.reply.usage or Usage())
        if outcome.reply.usage is not None:
            reply = outcome.reply
            self._wire.counter.observe(reply.reasoning + reply.content, outcome.reply.usage.completion)
        return outcome.reply

    async def _first(self, kind: str) -> Reply:
        """The first sample, with what the endpoint does not take left out one by one. Raises ``RSAError``."""
        self._wire = replace(self._wire, kind="completions" if kind == "completions" else "chat")
        while True:
            try:
                return await self._try(_SAMPLE)
            except EndpointFailed as error:
                message, status = str(error), error.status
            if status in (401, 403):
                raise key_refused(self._connection, status, message)
            wire = self._wire
            if status in (404, 405, 501) and kind == "auto" and wire.kind == "chat" and "model" not in message.lower():
                self._wire = replace(wire, kind="completions")
            elif status in (400, 422) and "max_completion_tokens" in message and wire.limit_field == "max_tokens":
                self._wire = replace(wire, limit_field="max_completion_tokens")
            elif status in (400, 422, 501) and wire.streams:
                self._wire = replace(wire, streams=False)
            else:
                raise RSAError(f"{message}; it was a first small request: check model name, URL and server")

    async def _opens_in_prompt(self) -> bool:
        counter = self._wire.counter
        tokens = await counter.prompt(_SAMPLE, [])
        return tokens is not None and await counter.ends_open(tokens, self._wire.tags[0])

    async def _seeds(self, first: Reply) -> bool | None:
        """True: the same seed gives the same text, another seed another. None where all are alike or empty."""
        try:
            same, other = [await self._try(_SAMPLE, seed=seed) for seed in (1, 2)]
        except EndpointFailed:
            return None
        texts = [reply.reasoning + reply.content for reply in (first, same, other)]
        if not all(texts):
            return None
        if texts[0] != texts[1]:
            return False
        return True if texts[2] != texts[0] else None

    async def _n(self) -> bool:
        try:
            return (await self._try(_SAMPLE, max_tokens=1, more={"n": 2}, streams=False)).num_choices == 2
        except EndpointFailed:
            return False

    async def _thinking(self, first: Reply, reasons: bool, opens_in_prompt: bool) -> str:
        if not reasons:
            return "none"
        if self._wire.kind == "completions":
            return "two_calls"
        # An estimate is generous, and some count the tags too.
        longest = SMALL_BUDGET if self._wire.counter.kind != "estimate" else 4 * SMALL_BUDGET
        sample = self._parts(first, opens_in_prompt)
        if sample.is_closed and await self._wire.counter.count_text(sample.reasoning) < 3 * longest:
            self._notes.append("a reasoning of the sample was too short to see whether a thinking budget holds")
            return "two_calls"
        for name in THINKING_FIELDS:
            # Where the sample's own reasoning was short, a second one must be cut too.
            if all(
                [await self._holds(name, seed, longest, opens_in_prompt) for seed in (1, 2)[: 1 + sample.is_closed]]
            ):
                return name
        return "two_calls"

    async def _holds(self, name: str, seed: int, longest: int, opens_in_prompt: bool) -> bool:
        """Whether a reasoning ends within a tiny budget that is given in this field."""
        try:
            reply = await self._try(_SAMPLE, seed=seed, more={name: SMALL_BUDGET})
        except EndpointFailed:
            return False
        parts = self._parts(reply, opens_in_prompt)
        return parts.is_closed and await self._wire.counter.count_text(parts.reasoning) <= longest

    def _parts(self, reply: Reply, opens_in_prompt: bool) -> Parts:
        if reply.reasoning:
            return Parts(reply.reasoning, reply.content, bool(reply.content))
        return split_tags(reply.content, self._wire.tags, "opening" if opens_in_prompt else "start")

    async def _gap(self, first: Reply, means: Means) -> str:
        """What stands between the opening tag and the reasoning, seen in a text that nobody took apart."""
        opening = self._wire.tags[0]
        text = first.content.lstrip()
        if first.reasoning and means == "completions":
            try:
                text = (await self._try(_SAMPLE, max_tokens=4, means=means)).content.lstrip()
            except EndpointFailed:
                return "\n"
        return "" if text.startswith(opening) and text[len(opening) :][:1] not in ("", "\n", "\r") else "\n"

    async def _means(self, reasons: bool) -> tuple[Means, Means]:
        chat_means: Means = "none"
        if self._wire.kind == "chat":
            ways: tuple[Means, ...] = ("continue_final_message", "assistant")
            for way in ways:
                if await self._continues(way, reasons):
                    chat_means = way
                    break
        return ("completions" if await self._takes_ids() else chat_means), chat_means

    async def _takes_ids(self) -> bool:
        """Whether /v1/completions takes a rendered conversation: nothing then stands between text and model."""
        opening = self._wire.tags[0] + "\n"
        request = await self._wire.request(
            _COUNTING, max_tokens=1, seed=1, sampling=_GREEDY, begun=opening + _NUMBERS, means="completions"
        )
        if request is None:
            return False
        try:
            reply = await self._try(
                _COUNTING, max_tokens=1, sampling=_GREEDY, begun=opening + _NUMBERS, means="completions"
            )
        except EndpointFailed:
            return False
        prompt = request[1]["prompt"]
        return isinstance(prompt, str) or reply.usage is None or reply.usage.prompt == len(prompt)

    async def _continues(self, way: Means, reasons: bool) -> bool:
        opening, closing = self._wire.tags
        beginnings = [f"{opening}\n{_NUMBERS}", f"{opening}\nI count.\n{closing}\n\n{_NUMBERS}"]
        for begun in beginnings if reasons else [_NUMBERS]:
            try:
                reply = await self._try(_COUNTING, sampling=_GREEDY, begun=begun, means=way)
            except EndpointFailed:
                return False
            if not re.match(r"\s*8\b", reply.reasoning or reply.content):
                return False
        return True
