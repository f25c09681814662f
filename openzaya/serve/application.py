"""The parts of the HTTP application that do not depend on what answers: an engine or an upstream endpoint.

client -> RequestScope -> CORS -> Guard (middleware.py) -> endpoint
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import HTMLResponse, JSONResponse, Response

from openzaya.errors import OpenZayaError
from openzaya.serve.errors import ApiError, from_http, from_user_error, from_validation
from openzaya.serve.middleware import Guard, RequestScope
from openzaya.serve.page import load_page, page_policy
from openzaya.serve.parsing import StrictRoute
from openzaya.serve.service import BaseService

_ERRORS: dict[int | str, dict[str, Any]] = {
    status: {"description": text}
    for status, text in {
        400: "Not a valid request",
        401: "Wrong API key",
        404: "No such model",
        408: "Took too long",
        413: "Too large",
        415: "Not JSON",
        429: "The queue is full",
        503: "Shutting down",
    }.items()
}
# `response_model=None`: answers are built as plain objects, and a second validation of each would cost time.
PLAIN: dict[str, Any] = {"response_model": None, "responses": _ERRORS}
"""Settings of every route."""


def make_application(service: BaseService, description: str) -> FastAPI:
    """An application with probes, metrics, the page and everything that happens around a request.

    ``app.state.service`` holds what its endpoints share; the caller adds the endpoints.
    """

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        yield
        await service.aclose()

    app = FastAPI(
        title="OpenZAYA",
        description=description,
        lifespan=lifespan,
        # The documentation pages load scripts from other hosts; the schema is at /openapi.json.
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,
        telemetry={"tracing": False, "metrics": False, "logs": False, "auto_configure": False},
    )
    app.state.service = service
    app.router.route_class = StrictRoute
    _add_errors(app)
    _add_probes(app, service)
    # The last one added is the outermost.
    app.add_middleware(Guard, service=service)
    if service.settings.cors_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=list(service.settings.cors_origins),
            allow_methods=["GET", "POST"],
            allow_headers=["*"],
            expose_headers=["X-Request-Id", "Retry-After"],
        )
    app.add_middleware(RequestScope, service=service)
    return app


def _add_errors(app: FastAPI) -> None:
    async def on_http(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        return from_http(error).response()

    async def on_validation(request: Request, error: Exception) -> Response:
        assert isinstance(error, RequestValidationError)
        return from_validation(error.errors(), prefix=1).response()

    async def on_user_error(request: Request, error: Exception) -> Response:
        assert isinstance(error, OpenZayaError)
        return from_user_error(error).response()

    app.add_exception_handler(HTTPException, on_http)
    app.add_exception_handler(RequestValidationError, on_validation)
    app.add_exception_handler(OpenZayaError, on_user_error)


def _add_probes(app: FastAPI, service: BaseService) -> None:
    @app.get("/health", **PLAIN)
    async def _health() -> Response:
        """The process answers."""
        return JSONResponse({"status": "ok"})

    @app.get("/ready", **PLAIN)
    async def _ready() -> Response:
        """Requests are taken: 503 while the server drains."""
        if service.draining:
            raise ApiError(503, "the server is shutting down", code="draining")
        return JSONResponse({"status": "ready", "model": service.settings.model_name})

    @app.get("/metrics", **PLAIN)
    async def _metrics() -> Response:
        """Counters and gauges for Prometheus."""
        return Response(service.metrics_text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    page = load_page()

    @app.get("/", include_in_schema=False)
    async def _page() -> Response:
        """The chat page."""
        if page is None:
            raise ApiError(404, "this installation has no chat page", code="not_found")
        return HTMLResponse(page, headers={"Content-Security-Policy": page_policy(page)})
