"""A tokenizer trained once, an engine that recites, the application in this process, and one behind a real port."""

from __future__ import annotations

import threading
import time

import httpx
import pytest
import uvicorn

from openzaya.data.tokenizer import train_tokenizer
from openzaya.serve.server import create_app
from openzaya.serve.settings import ServerSettings

from .fake_engine import FakeEngine


@pytest.fixture(scope="session")
def tokenizer():
    return train_tokenizer(["The answer is 42. Hello there, so what is the weather in Paris? Fine and sunny."] * 4, 320)


class LiveServer:
    """The application on a port of this machine, in a thread."""

    def __init__(self, engine, settings: ServerSettings):
        self.engine = engine
        self.app = create_app(engine, settings)
        self.service = self.app.state.service
        config = uvicorn.Config(self.app, port=0, log_config=None, access_log=False, ws="none")
        self._server = uvicorn.Server(config)
        self._thread = threading.Thread(target=self._server.run, daemon=True)
        self._thread.start()
        wait_until(lambda: self._server.started)
        port = self._server.servers[0].sockets[0].getsockname()[1]
        self.url = f"http://127.0.0.1:{port}"

    def close(self) -> None:
        self._server.should_exit = True
        self._thread.join(10)


def wait_until(condition, seconds: float = 10.0) -> None:
    end_s = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end_s, "what was waited for did not come"
        time.sleep(0.01)


@pytest.fixture
def serve(tokenizer):
    """``serve(script, pause_s=..., **settings)`` starts a server; it ends with the test."""
    servers = []

    def begin(script="<think>so so</think>Fine.", *, pause_s: float = 0.0, engine=None, **settings):
        engine = engine or FakeEngine(tokenizer, script, pause_s=pause_s)
        servers.append(LiveServer(engine, ServerSettings(**settings)))
        return servers[-1]

    yield begin
    for server in servers:
        server.close()


@pytest.fixture
def ask(tokenizer):
    """``ask(method, path, script=..., settings={...}, **request)``: one request to the application in this process."""
    import asyncio

    def begin(method, path, *, script="<think>so so</think>Fine.", settings=None, engine=None, **request):
        engine = engine or FakeEngine(tokenizer, script)
        app = create_app(engine, ServerSettings(**(settings or {})))

        async def send():
            transport = httpx.ASGITransport(app, raise_app_exceptions=True)
            async with httpx.AsyncClient(transport=transport, base_url="http://testserver") as client:
                return await client.request(method, path, **request)

        response = asyncio.run(send())
        response.engine = engine
        return response

    return begin
