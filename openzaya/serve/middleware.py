"""What happens to every request before and after its endpoint, as plain ASGI layers.

    RequestScope    outermost: request id, log line, metrics, and an OpenAI error body for whatever goes wrong
    Guard           host, API key, draining, and the body: its size, its type, and the time it takes to arrive

Between the two stands the CORS layer, where it is switched on: its answers to preflights need no key.
"""

from __future__ import annotations

import asyncio
import hmac
import time
from typing import TYPE_CHECKING

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from openzaya.serve.errors import ApiError, internal_error
from openzaya.serve.logs import MAX_PATH_CHARACTERS, log_event, log_exception, request_id
from openzaya.serve.service import BaseService, Record

if TYPE_CHECKING:
    from starlette.requests import Request

OPEN_PATHS = ("/", "/health", "/ready")
"""Answered without a key: the page holds no secret, and probes have none."""
WATCHING_PATHS = ("/health", "/ready", "/metrics")
"""Answered while the server drains."""
RECORD = "openzaya.record"


def record_of(request: Request) -> Record:
    """The record that the request's log line is made of."""
    record: Record = request.scope[RECORD]
    return record


class RequestScope:
    """Gives each request its id, its log line and its metrics; turns an exception into a 500."""

    def __init__(self, app: ASGIApp, service: BaseService) -> None:
        self.app, self.service = app, service

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        begun_s = time.perf_counter()
        identity = request_id(Headers(scope=scope).get("x-request-id"))
        record = scope[RECORD] = Record()
        status: int | None = None

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                headers = MutableHeaders(scope=message)
                headers["X-Request-Id"] = identity
                headers.setdefault("X-Content-Type-Options", "nosniff")
            await send(message)

        counts = scope["path"] not in WATCHING_PATHS
        self._count(counts)
        try:
            await self.app(scope, receive, send_with_id)
        except Exception as error:
            log_exception("request failed", error, request_id=identity)
            record.error = "internal"
            if status is None:
                await internal_error().response()(scope, receive, send_with_id)
        finally:
            self._count(-counts)
            seconds = time.perf_counter() - begun_s
            self._write(scope, record, identity, status, seconds)

    def _count(self, change: int) -> None:
        self.service.num_requests += change
        self.service.metrics.open_requests.set(self.service.num_requests)

    def _write(self, scope: Scope, record: Record, identity: str, status: int | None, seconds: float) -> None:
        route = scope.get("route")
        # 499, as nginx has it: the client left before there was an answer.
        code = 499 if status is None else status
        self.service.metrics.answered(getattr(route, "path", "other"), code, seconds)
        fields = {
            "request_id": identity,
            "method": scope["method"],
            "path": scope["path"][:MAX_PATH_CHARACTERS],
            "status": code,
            "ms": round(1000 * seconds, 1),
        }
        if record.prompt_tokens:
            fields |= {
                "prompt_tokens": record.prompt_tokens,
                "cached_tokens": record.cached_tokens,
                "completion_tokens": record.completion_tokens,
            }
        if record.seconds_to_first is not None:
            fields["ms_to_first_token"] = round(1000 * record.seconds_to_first, 1)
        if record.error is not None:
            fields["error"] = record.error
        if record.prompt is not None:
            fields["prompt"] = record.prompt
        log_event("request", **fields)


class Guard:
    """Lets through what may go on to an endpoint, with its whole body in memory."""

    def __init__(self, app: ASGIApp, service: BaseService) -> None:
        self.app, self.service = app, service

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        try:
            self._check(scope, headers)
            body = await self._body(headers, receive)
        except ApiError as error:
            await error.response()(scope, receive, send)
            return
        if body is None:
            return
        delivered = False

        async def receive_again() -> Message:
            nonlocal delivered
            if delivered:
                return await receive()
            delivered = True
            return {"type": "http.request", "body": body, "more_body": False}

        await self.app(scope, receive_again, send)

    def _check(self, scope: Scope, headers: Headers) -> None:
        settings, path = self.service.settings, scope["path"]
        if settings.allowed_hosts is not None and _host_name(headers.get("host", "")) not in settings.allowed_hosts:
            raise ApiError(
                403,
                "this server has no API key and answers only to the names of this machine; start it with --api-key, or "
                "with --allowed-host NAME",
                code="host_not_allowed",
            )
        if settings.api_key is not None and path not in OPEN_PATHS:
            key = headers.get("authorization", "")
            scheme, _, given = key.partition(" ")
            expected = settings.api_key.get_secret_value()
            # In constant time: how long it takes must not tell how much of a guess is right.
            same = hmac.compare_digest(given.strip().encode("utf-8", "replace"), expected.encode())
            if scheme.lower() != "bearer" or not same:
                raise ApiError(
                    401,
                    "the API key is missing or wrong; send 'Authorization: Bearer KEY'",
                    code="invalid_api_key",
                    headers={"WWW-Authenticate": "Bearer"},
                )
        if self.service.draining and path not in WATCHING_PATHS:
            after = {"Retry-After": str(self.service.settings.retry_after_s)}
            raise ApiError(503, "the server is shutting down; try later", code="draining", headers=after)

    async def _body(self, headers: Headers, receive: Receive) -> bytes | None:
        """The whole body; None where the client went away before its end."""
        limit = self.service.settings.max_body_bytes
        length = headers.get("content-length", "0")
        if length.isdecimal() and int(length[:20]) > limit:
            raise self._too_large(limit)
        parts: list[bytes] = []
        size = 0
        try:
            async with asyncio.timeout(self.service.settings.body_timeout_s):
                while True:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        return None
                    part = message.get("body", b"")
                    size += len(part)
                    if size > limit:
                        raise self._too_large(limit)
                    parts.append(part)
                    if not message.get("more_body", False):
                        break
        except TimeoutError:
            seconds = self.service.settings.body_timeout_s
            raise ApiError(
                408, f"the body did not arrive within {seconds:g} s; send it faster", headers={"Connection": "close"}
            ) from None
        if size and not _is_json(headers.get("content-type", "")):
            raise ApiError(
                415,
                "the body's Content-Type is not application/json; set that header",
                param="Content-Type",
            )
        return b"".join(parts)

    def _too_large(self, limit: int) -> ApiError:
        return ApiError(
            413,
            f"the body is larger than {limit} bytes; send less, or raise --max-body-mb",
            code="body_too_large",
            headers={"Connection": "close"},
        )


def _is_json(content_type: str) -> bool:
    kind = content_type.partition(";")[0].strip().lower()
    return kind == "application/json" or (kind.startswith("application/") and kind.endswith("+json"))


def _host_name(host: str) -> str:
    """The name of a Host header, without the port."""
    if host.startswith("["):
        return host.partition("]")[0].lstrip("[").lower()
    return host.partition(":")[0].lower()
