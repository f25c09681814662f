"""The HTTP application: FastAPI on top of an engine. Each endpoint's work is in a file of its own.

client -> RequestScope -> CORS -> Guard (middleware.py) -> endpoint -> Job (jobs.py) -> engine
"""

from __future__ import annotations

import base64
import hashlib
import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import HTMLResponse, JSONResponse, Response

from openzaya.errors import OpenZayaError
from openzaya.serve.chat import chat_completions
from openzaya.serve.completions import completions
from openzaya.serve.errors import ApiError, from_http, from_user_error, from_validation
from openzaya.serve.jobs import Service
from openzaya.serve.middleware import Guard, RequestScope
from openzaya.serve.parsing import StrictRoute
from openzaya.serve.responses import responses
from openzaya.serve.responses_schema import ResponsesRequest
from openzaya.serve.schemas import ChatRequest, CompletionRequest, DetokenizeRequest, TokenizeRequest
from openzaya.serve.settings import ServerSettings
from openzaya.serve.tokenizing import detokenize, tokenize

if TYPE_CHECKING:
    from openzaya.infer.engine import Engine

PAGE_PATH = Path(__file__).with_name("page.html")
_SCRIPT = re.compile(r"<script>(.*?)</script>", re.DOTALL)
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


def create_app(engine: Engine, settings: ServerSettings | None = None) -> FastAPI:
    """The application that serves ``engine``; ``app.state.service`` holds what its endpoints share.

    The engine stays the caller's: the application does not close it.
    """
    service = Service(engine, settings or ServerSettings())

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        yield
        service.close()

    app = FastAPI(
        title="OpenZAYA",
        description="OpenAI-compatible server for ZAYA models.",
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
    _add_endpoints(app, service)
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


def _add_endpoints(app: FastAPI, service: Service) -> None:
    # `response_model=None`: answers are built as plain objects, and a second validation of each would cost time.
    plain: dict[str, Any] = {"response_model": None, "responses": _ERRORS}

    @app.post("/v1/chat/completions", **plain)
    async def _chat(body: ChatRequest, request: Request) -> Response:
        """The assistant's next turn, whole or streamed."""
        return await chat_completions(service, body, request)

    @app.post("/v1/completions", **plain)
    async def _completions(body: CompletionRequest, request: Request) -> Response:
        """Texts or tokens, continued."""
        return await completions(service, body, request)

    @app.post("/v1/responses", **plain)
    async def _responses(body: ResponsesRequest, request: Request) -> Response:
        """The assistant's next turn as output items, whole or as typed events."""
        return await responses(service, body, request)

    @app.post("/tokenize", **plain)
    async def _tokenize(body: TokenizeRequest) -> Response:
        """The tokens of a text or of a conversation."""
        return await tokenize(service, body)

    @app.post("/detokenize", **plain)
    async def _detokenize(body: DetokenizeRequest) -> Response:
        """The text of tokens."""
        return await detokenize(service, body)

    @app.get("/v1/models", **plain)
    async def _models() -> Response:
        """What is served."""
        return JSONResponse(
            {"object": "list", "data": [_model(service, name) for name in service.settings.model_names]}
        )

    @app.get("/v1/models/{model:path}", **plain)
    async def _one_model(model: str) -> Response:
        return JSONResponse(_model(service, service.check_model(model)))

    @app.get("/health", **plain)
    async def _health() -> Response:
        """The process answers."""
        return JSONResponse({"status": "ok"})

    @app.get("/ready", **plain)
    async def _ready() -> Response:
        """Requests are taken: 503 while the server drains."""
        if service.draining:
            raise ApiError(503, "the server is shutting down", code="draining")
        return JSONResponse({"status": "ready", "model": service.settings.model_name})

    @app.get("/metrics", **plain)
    async def _metrics() -> Response:
        """Counters and gauges for Prometheus."""
        return Response(service.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    page = PAGE_PATH.read_text(encoding="utf-8") if PAGE_PATH.is_file() else None

    @app.get("/", include_in_schema=False)
    async def _page() -> Response:
        """The chat page."""
        if page is None:
            raise ApiError(404, "this installation has no chat page", code="not_found")
        return HTMLResponse(page, headers={"Content-Security-Policy": page_policy(page)})


def page_policy(page: str) -> str:
    """A content security policy that runs the page's own scripts and reaches this server alone."""
    hashes = [base64.b64encode(hashlib.sha256(script.encode()).digest()).decode() for script in _SCRIPT.findall(page)]
    scripts = " ".join(f"'sha256-{value}'" for value in hashes) or "'none'"
    return (
        f"default-src 'none'; script-src {scripts}; style-src 'unsafe-inline'; connect-src 'self'; img-src data:; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )


def _model(service: Service, name: str) -> dict[str, Any]:
    return {
        "id": name,
        "object": "model",
        "created": service.started_unix_s,
        "owned_by": "openzaya",
        "max_model_len": service.context,
    }
