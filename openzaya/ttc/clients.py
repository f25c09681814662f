"""HTTP clients that do not lose connections when calls are cancelled.

The pool of connections under an ``httpx.AsyncClient`` is shielded against the cancellation of anyio, and not against
``Task.cancel()``, which ``asyncio.timeout`` uses too: a call that is cancelled between two steps of its own leaves
its connection in the pool, neither closed nor ever used again. So a client in which a call was cancelled gets no
further calls; it is closed, with all that it still holds, when its last call has ended. Calls that end by themselves
share one client and its connections.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from functools import lru_cache
from types import TracebackType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import ssl

    import httpx


@dataclass(eq=False)
class _Shared:
    client: httpx.AsyncClient
    num_calls: int = 0
    is_retired: bool = False


class Lease:
    """One call's use of a client; a ``with`` block, or :meth:`release` at its end."""

    def __init__(self, clients: Clients, shared: _Shared) -> None:
        self._clients, self._shared = clients, shared
        self._is_released = False
        self.client = shared.client

    def release(self, *, is_whole: bool) -> None:
        """The call has ended; ``is_whole``: its answer was read to the end, or its connection was never made."""
        if not self._is_released:
            self._is_released = True
            self._clients._release(self._shared, is_whole)

    def __enter__(self) -> httpx.AsyncClient:
        return self.client

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release(is_whole=kind is None or not issubclass(kind, asyncio.CancelledError))


class Clients:
    """The clients of one endpoint.

    Args:
        max_connections: of each client.
        client: used for all calls instead, and left open.
    """

    def __init__(self, max_connections: int, client: httpx.AsyncClient | None = None) -> None:
        self._max_connections = max_connections
        self._is_own = client is None
        self._current = None if client is None else _Shared(client)
        self._closing: set[asyncio.Task[Any]] = set()

    def lease(self) -> Lease:
        """A client for one call."""
        if self._current is None:
            self._current = _Shared(self._made())
        self._current.num_calls += 1
        return Lease(self, self._current)

    async def close(self) -> None:
        """Close what is open; calls that are still under way fail."""
        if self._is_own and self._current is not None:
            self._retire(self._current)
        await asyncio.gather(*self._closing, return_exceptions=True)

    def _release(self, shared: _Shared, is_whole: bool) -> None:
        shared.num_calls -= 1
        if self._is_own and not is_whole:
            self._retire(shared)
        elif shared.is_retired and shared.num_calls == 0:
            self._close(shared)

    def _retire(self, shared: _Shared) -> None:
        shared.is_retired = True
        if self._current is shared:
            self._current = None
        if shared.num_calls == 0:
            self._close(shared)

    def _close(self, shared: _Shared) -> None:
        # A task of its own: whoever was cancelled must not wait, and must not break this off.
        task = asyncio.ensure_future(shared.client.aclose())
        self._closing.add(task)
        task.add_done_callback(self._closing.discard)

    def _made(self) -> httpx.AsyncClient:
        import httpx

        limits = httpx.Limits(max_connections=self._max_connections, max_keepalive_connections=self._max_connections)
        return httpx.AsyncClient(limits=limits, trust_env=True, verify=_certificates())


@lru_cache(maxsize=1)
def _certificates() -> ssl.SSLContext:
    """Read once: it takes longer than to make a client."""
    import httpx

    return httpx.create_ssl_context()
