"""A server as a process: its socket, its signals, and its end.

The port is taken before the model is loaded, so that a taken port is known at once. On SIGTERM or SIGINT the server
*drains*: /ready and new requests answer 503, running ones may finish for ``drain_s`` seconds, and the process ends
with exit code 0. A second signal ends it at once.
"""

from __future__ import annotations

import asyncio
import errno
import ipaddress
import os
import socket
import sys
import time
from collections.abc import Callable
from types import FrameType
from typing import TYPE_CHECKING

import uvicorn

from openzaya.errors import ConfigError
from openzaya.serve.logs import log_event, set_up_logging
from openzaya.serve.service import BaseService

if TYPE_CHECKING:
    from fastapi import FastAPI

LAST_WORDS_S = 2.0
"""For the answers that tell clients that the server leaves."""
BACKLOG = 2048


class DrainingServer(uvicorn.Server):
    """Uvicorn's server with a gentle end."""

    def __init__(self, config: uvicorn.Config, service: BaseService) -> None:
        super().__init__(config)
        self._service = service
        self._drains_until_s: float | None = None
        self._leaves_at_s: float | None = None

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Begin to drain; at the second signal, end without a word."""
        if self._drains_until_s is not None:
            os._exit(128 + sig)
        self._service.draining = True
        self._drains_until_s = time.monotonic() + self._service.settings.drain_s
        print(f"stopping: waits for {self._service.num_requests} running requests", file=sys.stderr, flush=True)

    async def on_tick(self, counter: int) -> bool:
        if self._drains_until_s is not None:
            now = time.monotonic()
            if self._service.num_requests == 0:
                self.should_exit = True
            elif self._leaves_at_s is not None:
                self.should_exit = now >= self._leaves_at_s
            elif now >= self._drains_until_s:
                log_event("drain limit reached", requests=self._service.num_requests)
                self._service.fail_all()
                self._leaves_at_s = now + LAST_WORDS_S
        return await super().on_tick(counter)


def open_socket(host: str, port: int) -> socket.socket:
    """A bound socket; ``port`` 0 takes a free one. Raises ``ConfigError`` where it cannot be had."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, kind, protocol)
    except OSError as error:
        raise ConfigError(f"host '{host}' is no address of this machine ({error.strerror}); try 127.0.0.1") from None
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        return listener
    except OSError as error:
        listener.close()
        remedy = "choose another with --port" if error.errno == errno.EADDRINUSE else "choose another --host or --port"
        raise ConfigError(f"cannot listen on {host}:{port} ({error.strerror}); {remedy}") from None


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches ``host``."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def run_server(app: FastAPI, listener: socket.socket, on_listening: Callable[[], None] | None = None) -> None:
    """Serve until a signal comes; returns when all is finished. Only in the main thread.

    Args:
        on_listening: called once, when connections to the socket are no longer refused.
    """
    set_up_logging()
    config = uvicorn.Config(
        app,
        log_config=None,
        access_log=False,
        server_header=False,
        lifespan="on",
        ws="none",
        timeout_graceful_shutdown=1,
    )
    listener.listen(BACKLOG)
    server = DrainingServer(config, app.state.service)
    if on_listening is not None:
        on_listening()
    asyncio.run(server.serve(sockets=[listener]))


def url_of(listener: socket.socket) -> str:
    """Where a bound socket is reached."""
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
