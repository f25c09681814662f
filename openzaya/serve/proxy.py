"""``openzaya serve --proxy``: Markovian RSA for any OpenAI-compatible endpoint.

    /v1/chat/completions with rsa     a run of RSA whose rollouts are calls of the upstream (rsa_chat.py)
    without, and the other paths      passed on unchanged (relay.py)
    /health, /ready, /metrics, /      this server's own

Only the paths below are passed on: a key for the upstream often opens more than its models.
"""

from __future__ import annotations

import asyncio
import json
from typing import Annotated, Any

from fastapi import FastAPI, Request
from pydantic import Field, ValidationError
from starlette.responses import Response

from openzaya.errors import RSAError
from openzaya.serve.application import PLAIN, make_application
from openzaya.serve.errors import ApiError, from_validation
from openzaya.serve.metrics import ServerMetrics
from openzaya.serve.parsing import parse_json
from openzaya.serve.relay import Upstream, relay
from openzaya.serve.rsa import Wish, split_name, wish_of
from openzaya.serve.rsa_chat import rsa_completions
from openzaya.serve.schemas import ChatRequest
from openzaya.serve.service import BaseService
from openzaya.serve.settings import ServerSettings
from openzaya.ttc.endpoint import EndpointCompleter

POSTED = ("completions", "responses", "embeddings", "rerank", "score")
"""Below /v1, passed on."""
POSTED_AT_ROOT = ("tokenize", "detokenize")
RELAYED_AT_A_TIME = 256
MAX_COMPLETERS = 16


class ProxyRequest(ChatRequest):
    """A chat request for an upstream that may understand more than text: its messages are left as they are."""

    messages: Annotated[list[dict[str, Any]], Field(min_length=1)]  # type: ignore[assignment]


class ProxyService(BaseService):
    """What the endpoints of a proxy share.

    Args:
        url: the upstream's, with or without /v1.
        model: its name there; None: the one that it lists first.
        tokenizer: directory or hub id of the model's tokenizer, for exact tails.
    """

    def __init__(
        self,
        url: str,
        settings: ServerSettings,
        *,
        api_key: str | None = None,
        model: str | None = None,
        tokenizer: str | None = None,
    ) -> None:
        super().__init__(settings, ServerMetrics())
        self.upstream = Upstream(url, api_key=api_key, concurrency=RELAYED_AT_A_TIME)
        self.model = model
        self._url, self._api_key, self._tokenizer = url, api_key, tokenizer
        self._completers: dict[str | None, EndpointCompleter] = {}

    async def completer(self, name: str | None) -> EndpointCompleter:
        """What asks the upstream's model ``name``. Raises ``ApiError`` where it has none of that name."""
        if name is None or name == self.model:
            name = self.model
        elif name not in self._completers:
            await self._check_listed(name)
        if name not in self._completers:
            if len(self._completers) >= MAX_COMPLETERS:
                raise ApiError(429, f"RSA runs on {MAX_COMPLETERS} models here already; use one of them", param="model")
            self._completers[name] = EndpointCompleter(
                self._url,
                name,
                api_key=self._api_key,
                tokenizer=self._tokenizer if name == self.model else None,
                concurrency=self.settings.rsa_concurrency,
                timeout_s=self.settings.request_timeout_s,
            )
        return self._completers[name]

    async def _check_listed(self, name: str) -> None:
        try:
            listed = await self.upstream.get(self.upstream.url + "/models")
        except RSAError as error:
            raise ApiError(502, self.upstream.hide(str(error)), code="upstream_failed") from None
        models = listed.get("data") if isinstance(listed, dict) else None
        names = [one.get("id") for one in models or [] if isinstance(one, dict)]
        if name not in names:
            raise ApiError(
                404, f"model '{name[:200]}' is not served by the upstream", param="model", code="model_not_found"
            )

    async def aclose(self) -> None:
        await super().aclose()
        await asyncio.gather(*(one.close() for one in self._completers.values()), self.upstream.close())


def create_proxy(service: ProxyService) -> FastAPI:
    """The application in front of an upstream."""
    app = make_application(service, "Markovian RSA in front of an OpenAI-compatible endpoint.")
    upstream = service.upstream

    @app.post("/v1/chat/completions", **PLAIN)
    async def _chat(request: Request) -> Response:
        """The assistant's next turn, by a run of RSA where the request asks for one."""
        raw = await request.body()
        value = parse_json(raw)
        if isinstance(value, dict):
            found = _wish(value, service.settings)
            if found is not None:
                body, wish = found
                completer = await service.completer(wish.model)
                name = wish.model or service.model or (await _capable(completer)).model
                return await rsa_completions(service, body, wish, value["messages"], completer, name, request)
            raw = _without_rsa(value, raw)
        return await relay(service, upstream, upstream.url + "/chat/completions", request, raw)

    def add(method: str, path: str, url: str) -> None:
        @app.api_route(path, methods=[method], name=path.strip("/"), **PLAIN)
        async def _passed_on(request: Request) -> Response:
            """Passed on to the upstream."""
            return await relay(service, upstream, url, request, await request.body())

    for name in POSTED:
        add("POST", f"/v1/{name}", f"{upstream.url}/{name}")
    for name in POSTED_AT_ROOT:
        add("POST", f"/{name}", f"{upstream.root}/{name}")
    add("GET", "/v1/models", f"{upstream.url}/models")
    return app


async def _capable(completer: EndpointCompleter) -> Any:
    try:
        return await completer.capabilities()
    except RSAError as error:
        raise ApiError(502, str(error), code="upstream_failed") from None


def _wish(value: dict[str, Any], settings: ServerSettings) -> tuple[ProxyRequest, Wish] | None:
    """The request and what it asks for; None where it is to be passed on. Raises ``ApiError`` (400)."""
    model = value.get("model")
    named = isinstance(model, str) and split_name(model, settings)[1] is not None
    asks = value.get("rsa") not in (None, False) or named
    if not asks and not (settings.effort_rsa and value.get("reasoning_effort")):
        return None
    try:
        body = ProxyRequest.model_validate(value)
    except ValidationError as error:
        if not asks:
            # The upstream may understand what this server does not.
            return None
        raise from_validation(error.errors(include_url=False)) from None
    wish = wish_of(body, settings)
    return None if wish is None else (body, wish)


def _without_rsa(value: dict[str, Any], raw: bytes) -> bytes:
    """The body without our own fields, which some upstreams refuse; as it came where it has none."""
    options = value.get("stream_options")
    own = options if isinstance(options, dict) and "include_rsa" in options else None
    if "rsa" not in value and own is None:
        return raw
    rest = {name: item for name, item in value.items() if name != "rsa"}
    if own is not None:
        rest["stream_options"] = {name: item for name, item in own.items() if name != "include_rsa"}
    return json.dumps(rest).encode()
