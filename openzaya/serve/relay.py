"""Requests that are passed on to an upstream endpoint, and its answers that are passed back.

The body goes and comes unchanged; of the headers only those that belong to it. The upstream's key is put in here and
the client's own left out. Events are passed on as they come; other answers are read whole first, so that an answer
that breaks off becomes an error and not half a document. When the client leaves, the upstream's connection is closed.

What goes wrong becomes an error in OpenAI's form: the upstream's status and message where it gave one, 502 where it
is not reached or breaks off, 504 where it takes too long.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator
from typing import Any

import httpx
from starlette.datastructures import Headers
from starlette.requests import Request
from starlette.responses import Response

from openzaya.serve.errors import ApiError
from openzaya.serve.middleware import record_of
from openzaya.serve.service import BaseService, Record, fail_late
from openzaya.serve.streaming import KEEPALIVE, EventStream, NoResponse, unless_gone
from openzaya.ttc.clients import Lease
from openzaya.ttc.connection import Connection
from openzaya.ttc.replies import error_message

SENT_HEADERS = ("accept", "content-type", "openai-beta")
RETURNED_HEADERS = ("content-type", "retry-after", "x-should-retry")
CONNECT_TIMEOUT_S = 10.0
MAX_ANSWER_BYTES = 256 * 2**20
MAX_ERROR_BYTES = 2**20


class Upstream(Connection):
    """The endpoint behind a proxy, for requests that are passed on."""

    def lease(self) -> Lease:
        """A client for one request."""
        return self._lease()

    async def open(
        self, client: httpx.AsyncClient, method: str, url: str, body: bytes, headers: dict[str, str], timeout_s: float
    ) -> httpx.Response:
        """The answer's beginning; the caller closes it. Raises ``ApiError``."""
        sent = httpx.Headers(self._headers)
        sent.update(headers)
        request = client.build_request(
            method,
            url,
            params=self._query or None,
            headers=sent,
            content=body or None,
            timeout=httpx.Timeout(timeout_s, connect=min(CONNECT_TIMEOUT_S, timeout_s)),
        )
        try:
            return await client.send(request, stream=True)
        except (httpx.HTTPError, httpx.StreamError, OSError) as error:
            raise broken(error) from None


class RelayJob:
    """One request that is passed on."""

    def __init__(self, service: BaseService, record: Record, lease: Lease) -> None:
        self.service, self.record, self.lease = service, record, lease
        self.time_limit_s = service.settings.request_timeout_s
        self.response: httpx.Response | None = None
        self.is_whole = False
        """The answer was read to its end."""
        self.failure: asyncio.Future[ApiError] = asyncio.get_running_loop().create_future()
        service.jobs.add(self)
        self._timer = fail_late(self, "ask for fewer tokens")

    def fail(self, error: ApiError) -> None:
        if not self.failure.done():
            self.failure.set_result(error)

    async def until(self, work: Any) -> Any:
        """The result of ``work``, unless the job fails first. Raises ``ApiError``."""
        task = asyncio.ensure_future(work)
        try:
            await asyncio.wait({task, self.failure}, return_when=asyncio.FIRST_COMPLETED)
            if not task.done():
                raise self.failure.result()
            return task.result()
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

    async def close(self) -> None:
        self._timer.cancel()
        self.service.jobs.discard(self)
        is_whole, self.is_whole = self.is_whole, False
        try:
            if self.response is not None:
                await self.response.aclose()
                self.is_whole = is_whole
        finally:
            self.lease.release(is_whole=self.is_whole)


async def relay(service: BaseService, upstream: Upstream, url: str, request: Request, body: bytes) -> Response:
    """Pass a request on and its answer back; raises ``ApiError``."""
    given = Headers(scope=request.scope)
    headers = {name: given[name] for name in SENT_HEADERS if name in given}
    # Compressed events would come in lumps.
    headers["accept-encoding"] = "identity"
    job = RelayJob(service, record_of(request), upstream.lease())
    answer: Response | None = None

    async def begin() -> Response:
        client, limit_s = job.lease.client, service.settings.request_timeout_s
        job.response = response = await upstream.open(client, request.method, url, body, headers, limit_s)
        if response.status_code >= 400:
            refusal = await _refusal(response, upstream)
            job.is_whole = True
            raise refusal
        if "event-stream" in response.headers.get("content-type", ""):
            return RelayedEvents(job)
        content = await _whole(response, MAX_ANSWER_BYTES)
        job.is_whole = True
        return Response(content, response.status_code, _returned(response))

    try:
        answer = await unless_gone(request, job.until(begin()))
        return NoResponse() if answer is None else answer
    except ApiError as error:
        job.record.error = error.message
        raise
    finally:
        # A stream closes its job itself, when it has been sent.
        if not isinstance(answer, RelayedEvents):
            await job.close()


class RelayedEvents(EventStream):
    """The upstream's events, byte for byte."""

    def __init__(self, job: RelayJob) -> None:
        super().__init__(job, _pieces(job))
        assert job.response is not None
        self.status_code = job.response.status_code

    def failure(self, error: ApiError) -> bytes:
        # What came last may be half an event: a blank line ends it.
        return b"\n\n" + super().failure(error)


async def _pieces(job: RelayJob) -> AsyncGenerator[bytes, None]:
    """The body as it comes, comments in its silences. Raises ``ApiError``, which ends the stream as an event."""
    assert job.response is not None
    pieces = job.response.aiter_bytes()
    pause = job.service.settings.keepalive_s
    coming: asyncio.Task[Any] | None = None
    is_between_events = True
    try:
        while True:
            coming = coming or asyncio.ensure_future(anext(pieces, None))
            await asyncio.wait({coming, job.failure}, return_when=asyncio.FIRST_COMPLETED, timeout=pause)
            if job.failure.done():
                raise job.failure.result()
            if not coming.done():
                if is_between_events:
                    yield KEEPALIVE
                continue
            try:
                piece = coming.result()
            except (httpx.HTTPError, httpx.StreamError, OSError) as error:
                raise broken(error) from None
            coming = None
            if piece is None:
                job.is_whole = True
                return
            is_between_events = piece.endswith((b"\n\n", b"\r\n\r\n"))
            yield piece
    finally:
        if coming is not None:
            coming.cancel()
            await asyncio.gather(coming, return_exceptions=True)


def broken(error: BaseException) -> ApiError:
    """The upstream was not reached, or broke off. Says nothing of where it is."""
    if isinstance(error, httpx.TimeoutException):
        return ApiError(504, "the upstream endpoint took too long; try again later", code="upstream_timeout")
    if isinstance(error, httpx.ConnectError):
        return ApiError(502, "the upstream endpoint is not reached; is it running?", code="upstream_unreachable")
    kind = type(error).__name__
    return ApiError(502, f"the upstream endpoint broke off ({kind}); try again", code="upstream_broken")


async def _refusal(response: httpx.Response, upstream: Upstream) -> ApiError:
    status = response.status_code
    if status in (401, 403):
        # Its message may show parts of a key, and the client can do nothing about it.
        message = "the upstream endpoint refuses this proxy's key; its operator sets OPENZAYA_UPSTREAM_KEY"
        return ApiError(status, message, code="upstream_refused")
    try:
        raw = await _whole(response, MAX_ERROR_BYTES)
    except ApiError as error:
        return error
    param = code = None
    try:
        told: Any = json.loads(raw)
        message = error_message(told)
        inner = told.get("error") if isinstance(told, dict) else None
        if isinstance(inner, dict):
            param, code = (inner.get(name) if isinstance(inner.get(name), str) else None for name in ("param", "code"))
    except ValueError:
        message = raw[:300].decode("utf-8", "replace").strip() or response.reason_phrase
    headers = {name: response.headers[name] for name in RETURNED_HEADERS[1:] if name in response.headers}
    return ApiError(status, upstream.hide(message), param=param, code=code or "upstream_refused", headers=headers)


async def _whole(response: httpx.Response, limit: int) -> bytes:
    parts, size = [], 0
    try:
        async for piece in response.aiter_bytes():
            parts.append(piece)
            size += len(piece)
            if size > limit:
                raise ApiError(502, f"the upstream's answer is longer than {limit} bytes", code="upstream_broken")
    except (httpx.HTTPError, httpx.StreamError, OSError) as error:
        raise broken(error) from None
    return b"".join(parts)


def _returned(response: httpx.Response) -> dict[str, str]:
    return {name: response.headers[name] for name in RETURNED_HEADERS if name in response.headers}
