"""The HTTP application on top of an engine. Each endpoint's work is in a file of its own.

endpoint -> Job (jobs.py) -> engine
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from fastapi import FastAPI, Request
from starlette.responses import JSONResponse, Response

from openzaya.serve.application import PLAIN, make_application
from openzaya.serve.chat import chat_completions
from openzaya.serve.completions import completions
from openzaya.serve.jobs import Service
from openzaya.serve.responses import responses
from openzaya.serve.responses_schema import ResponsesRequest
from openzaya.serve.schemas import ChatRequest, CompletionRequest, DetokenizeRequest, TokenizeRequest
from openzaya.serve.settings import ServerSettings
from openzaya.serve.tokenizing import detokenize, tokenize

if TYPE_CHECKING:
    from openzaya.infer.engine import Engine


def create_app(engine: Engine, settings: ServerSettings | None = None) -> FastAPI:
    """The application that serves ``engine``; ``app.state.service`` holds what its endpoints share.

    The engine stays the caller's: the application does not close it.
    """
    service = Service(engine, settings or ServerSettings())
    app = make_application(service, "OpenAI-compatible server for ZAYA models.")

    @app.post("/v1/chat/completions", **PLAIN)
    async def _chat(body: ChatRequest, request: Request) -> Response:
        """The assistant's next turn, whole or streamed."""
        return await chat_completions(service, body, request)

    @app.post("/v1/completions", **PLAIN)
    async def _completions(body: CompletionRequest, request: Request) -> Response:
        """Texts or tokens, continued."""
        return await completions(service, body, request)

    @app.post("/v1/responses", **PLAIN)
    async def _responses(body: ResponsesRequest, request: Request) -> Response:
        """The assistant's next turn as output items, whole or as typed events."""
        return await responses(service, body, request)

    @app.post("/tokenize", **PLAIN)
    async def _tokenize(body: TokenizeRequest) -> Response:
        """The tokens of a text or of a conversation."""
        return await tokenize(service, body)

    @app.post("/detokenize", **PLAIN)
    async def _detokenize(body: DetokenizeRequest) -> Response:
        """The text of tokens."""
        return await detokenize(service, body)

    @app.get("/v1/models", **PLAIN)
    async def _models() -> Response:
        """What is served."""
        return JSONResponse(
            {"object": "list", "data": [_model(service, name) for name in service.settings.model_names]}
        )

    @app.get("/v1/models/{model:path}", **PLAIN)
    async def _one_model(model: str) -> Response:
        return JSONResponse(_model(service, service.check_model(model)))

    return app


def _model(service: Service, name: str) -> dict[str, Any]:
    return {
        "id": name,
        "object": "model",
        "created": service.started_unix_s,
        "owned_by": "openzaya",
        "max_model_len": service.context,
    }
