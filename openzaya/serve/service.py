"""What every server has, whatever answers its requests: settings, metrics, and the work that is under way.

*Work* is one request that takes a while: a job in the engine (jobs.py), a run of Markovian RSA (rsa_run.py) or a
request that is passed on (relay.py). All work is known to its service, so that a time limit, a client who leaves and
a server that stops can end it.
"""

from __future__ import annotations

import asyncio
import random
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from openzaya.serve.errors import ApiError

if TYPE_CHECKING:
    from openzaya.serve.metrics import ServerMetrics
    from openzaya.serve.settings import ServerSettings
    from openzaya.ttc.journal import Journal


@dataclass
class Record:
    """What the log line and the metrics of a request say of its tokens."""

    prompt_tokens: int = 0
    cached_tokens: int = 0
    completion_tokens: int = 0
    seconds_to_first: float | None = None
    prompt: Any = None
    error: str | None = None


class Work(Protocol):
    """One request that takes a while."""

    record: Record
    time_limit_s: float

    def fail(self, error: ApiError) -> None:
        """End it with ``error``, at once."""

    async def close(self) -> None:
        """Free what it holds; harmless when it has ended."""


class BaseService:
    """What the endpoints and the layers around them share."""

    def __init__(self, settings: ServerSettings, metrics: ServerMetrics) -> None:
        self.settings, self.metrics = settings, metrics
        self.journal: Journal | None = None
        """Keeps the rollouts of RSA runs, so that a request with the same seed goes on where it was cut off."""
        self.draining = False
        self.jobs: set[Work] = set()
        self.num_requests = 0
        """Requests that have arrived and have no whole answer yet; health and metrics do not count."""
        self.started_unix_s = int(time.time())

    def check_model(self, name: str | None) -> str:
        """The name to answer with; raises ``ApiError`` (404) for a model that is not served here."""
        if name is None:
            return self.settings.model_name
        if name not in self.settings.model_names:
            served = ", ".join(self.settings.model_names)
            raise ApiError(
                404, f"model '{name[:200]}' is not served here; use {served}", param="model", code="model_not_found"
            )
        return name

    def metrics_text(self) -> bytes:
        """The metrics in Prometheus' form; only on the event loop."""
        self.metrics.jobs.set(len(self.jobs))
        self.metrics.tasks.set(len(asyncio.all_tasks()))
        return self.metrics.text()

    def fail_all(self) -> None:
        """End all work with a 503: the server leaves."""
        for job in list(self.jobs):
            job.fail(ApiError(503, "the server is shutting down", code="shutting_down"))

    async def aclose(self) -> None:
        """End everything; called once, when the application ends."""
        self.fail_all()
        await asyncio.gather(*(job.close() for job in list(self.jobs)), return_exceptions=True)
        if self.journal is not None:
            self.journal.close()


def fresh_seed() -> int:
    return random.SystemRandom().getrandbits(31)


def fail_late(work: Work, remedy: str) -> asyncio.TimerHandle:
    """End ``work`` with a 408 when its time is over. Cancel the handle when it has ended before."""
    return asyncio.get_running_loop().call_later(work.time_limit_s, work.fail, too_late(work.time_limit_s, remedy))


def too_late(seconds: float, remedy: str) -> ApiError:
    # The client's library must not send a request again by itself that took too long once.
    return ApiError(
        408,
        f"the request took longer than {seconds:g} s; {remedy}",
        code="timeout",
        headers={"x-should-retry": "false"},
    )
