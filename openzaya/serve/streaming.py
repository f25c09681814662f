"""Answers that take a while: server-sent events, and the client who may leave at any time.

Both helpers listen for the disconnect while they work, and close the job when it comes: what the client no longer
wants is not computed. An error in a stream that has begun is sent as an event in OpenAI's error form, and ends it.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, Coroutine
from typing import Any, TypeVar

from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from openzaya.serve.errors import ApiError, internal_error
from openzaya.serve.logs import log_exception
from openzaya.serve.service import Work

T = TypeVar("T")

DONE = b"data: [DONE]\n\n"
KEEPALIVE = b": still working\n\n"
WRITE_GRACE_S = 60.0
"""A client that reads nothing may block its stream so much longer than the request may take."""

_dumps = json.JSONEncoder(ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode


def event(data: Any, name: str | None = None) -> bytes:
    """One server-sent event; JSON has no raw line break, so one data line is enough."""
    head = f"event: {name}\n" if name is not None else ""
    return f"{head}data: {_dumps(data)}\n\n".encode()


async def unless_gone(request: Request, work: Coroutine[Any, Any, T]) -> T | None:
    """The result of ``work``; None where the client left first, and ``work`` was cancelled."""
    task = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(_disconnected(request.receive))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        return task.result() if task.done() else None
    finally:
        gone.cancel()
        task.cancel()
        await asyncio.gather(task, gone, return_exceptions=True)


async def finish_or_leave(request: Request, job: Work, work: Coroutine[Any, Any, T]) -> T | None:
    """As :func:`unless_gone`; the job is closed in any case."""
    try:
        return await unless_gone(request, work)
    finally:
        await job.close()


class NoResponse(Response):
    """Nothing at all: there is nobody to read it."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        return


class EventStream(Response):
    """Sends the events that ``source`` yields; closes ``job`` when they end, fail, or the client leaves."""

    media_type = "text/event-stream"

    def __init__(self, job: Work, source: AsyncGenerator[bytes, None]) -> None:
        super().__init__(headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        del self.headers["content-length"]
        self.job, self.source = job, source

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        writing = asyncio.ensure_future(self._write(send))
        gone = asyncio.ensure_future(_disconnected(receive))
        limit = self.job.time_limit_s + WRITE_GRACE_S
        try:
            await asyncio.wait({writing, gone}, return_when=asyncio.FIRST_COMPLETED, timeout=limit)
            if writing.done():
                # A broken connection is the client's leaving too.
                error = writing.exception()
                if error is not None and not isinstance(error, OSError):
                    raise error
            else:
                self.job.record.error = "client left"
        finally:
            gone.cancel()
            writing.cancel()
            await asyncio.gather(writing, gone, return_exceptions=True)
            await self.source.aclose()
            await self.job.close()

    async def _write(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        try:
            async for piece in self.source:
                await send({"type": "http.response.body", "body": piece, "more_body": True})
        except ApiError as error:
            self.job.record.error = error.message
            await send({"type": "http.response.body", "body": self.failure(error), "more_body": True})
        except Exception as error:
            if isinstance(error, OSError):
                raise
            log_exception("a stream failed", error)
            self.job.record.error = "internal"
            await send({"type": "http.response.body", "body": self.failure(internal_error()), "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    def failure(self, error: ApiError) -> bytes:
        """The last event of a stream that failed."""
        return event(error.body()) + DONE


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
