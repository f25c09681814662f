"""Clients whose calls are cancelled: given up, closed when the last call has ended, and nobody else's."""

from __future__ import annotations

import asyncio
import random

import httpx
import pytest
from starlette.applications import Starlette
from starlette.responses import Response
from starlette.routing import Route

from openzaya.ttc.clients import Clients
from openzaya.ttc.connection import Connection, Unavailable
from tests.ttc.scripted_endpoint import Script, ScriptedEndpoint


async def cancelled_call(clients: Clients) -> None:
    began = asyncio.Event()

    async def call() -> None:
        with clients.lease():
            began.set()
            await asyncio.sleep(60)

    task = asyncio.ensure_future(call())
    await began.wait()
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)


def test_a_client_is_shared_until_a_call_is_cancelled():
    async def check() -> None:
        clients = Clients(4)
        with clients.lease() as first:
            pass
        with clients.lease() as again:
            assert again is first and not first.is_closed
            await cancelled_call(clients)
            assert not first.is_closed, "this call still uses it"
            with clients.lease() as second:
                assert second is not first
        await asyncio.sleep(0.05)
        assert first.is_closed and not second.is_closed
        await cancelled_call(clients)
        await asyncio.sleep(0.05)
        assert second.is_closed
        with clients.lease() as third, pytest.raises(ValueError):
            raise ValueError
        with clients.lease() as fourth:
            assert fourth is third, "a call that fails is not a call that is cancelled"
        await clients.close()
        assert third.is_closed

    asyncio.run(check())


def test_a_client_that_was_given_is_left_alone():
    async def check() -> None:
        async with httpx.AsyncClient() as given:
            clients = Clients(4, given)
            await cancelled_call(clients)
            with clients.lease() as client:
                assert client is given
            await clients.close()
            assert not given.is_closed

    asyncio.run(check())


def test_a_lease_is_released_once():
    async def check() -> None:
        clients = Clients(4)
        lease, other = clients.lease(), clients.lease()
        lease.release(is_whole=False)
        lease.release(is_whole=False)
        assert not other.client.is_closed
        other.release(is_whole=True)
        await clients.close()
        assert other.client.is_closed

    asyncio.run(check())


def test_no_connection_is_left_by_cancelled_calls(monkeypatch):
    """Real sockets, cancelled at any moment of a call."""
    import uvicorn

    made: list[httpx.AsyncClient] = []
    make = Clients._made

    def recorded(self: Clients) -> httpx.AsyncClient:
        made.append(make(self))
        return made[-1]

    monkeypatch.setattr(Clients, "_made", recorded)

    async def check() -> None:
        app = ScriptedEndpoint(Script(reasoning_tokens=8)).app
        server = uvicorn.Server(uvicorn.Config(app, port=0, log_config=None, lifespan="off"))
        serving = asyncio.ensure_future(server.serve())
        while not server.started:
            await asyncio.sleep(0.01)
        url = f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
        connection, draw = Connection(url, max_retries=0), random.Random(0)
        body = {"messages": [{"role": "user", "content": "x"}], "max_tokens": 8, "stream": True}

        async def call() -> None:
            await connection.ask("/chat/completions", body)

        for _ in range(60):
            tasks = [asyncio.ensure_future(call()) for _ in range(2)]
            await asyncio.sleep(draw.random() * 0.02)
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
        await asyncio.sleep(0.2)
        held = [client._transport._pool.connections for client in made]
        assert sum(len(pool) for pool in held) <= 2, held
        await connection.close()
        assert all(client.is_closed for client in made)
        server.should_exit = True
        await serving

    asyncio.run(check())


def test_a_timeout_gives_the_client_up():
    async def hang(request) -> Response:
        await asyncio.sleep(60)
        return Response()

    async def check() -> None:
        transport = httpx.ASGITransport(Starlette(routes=[Route("/v1/models", hang)]))
        connection = Connection("http://x", timeout_s=0.05)
        connection._clients._made = lambda: httpx.AsyncClient(transport=transport)
        with connection._clients.lease() as first:
            pass
        with pytest.raises(Unavailable):
            await connection.get("http://x/v1/models")
        with connection._clients.lease() as second:
            assert second is not first
        await connection.close()
        assert first.is_closed and second.is_closed

    asyncio.run(check())
