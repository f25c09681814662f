"""Between endpoints and engine: admission, time limits, and the end of whatever was begun.

A *job* is one HTTP request in the engine: one or more prompts, ``n`` candidates each. The engine's thread puts its
deltas into the service's mailbox, which the event loop empties into the queues of the jobs; the endpoint reads its
own with :meth:`Job.events`. A job ends in one of four ways, and each of them frees what it holds in the engine: all
candidates finished, the client went away (``close``), the time limit, or the server's own end (``fail``).
"""

from __future__ import annotations

import asyncio
import functools
import time
from collections import deque
from collections.abc import AsyncIterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from openzaya.errors import EngineError, OpenZayaError, QueueFull
from openzaya.infer.outputs import Delta, RequestOutput
from openzaya.infer.sampling import SamplingParams
from openzaya.serve.errors import ApiError, bad_request, from_user_error, internal_error
from openzaya.serve.logs import log_exception
from openzaya.serve.metrics import ServerMetrics
from openzaya.serve.service import BaseService, Record, fail_late
from openzaya.serve.settings import ServerSettings
from openzaya.serve.tokens import TokenTexts
from openzaya.ttc.engine_completer import EngineCompleter

if TYPE_CHECKING:
    from openzaya.infer.engine import Engine


Item = tuple[int, Delta] | ApiError
"""What a job's queue holds: the number of a prompt and a piece of one of its candidates, or what ends the job."""


class Service(BaseService):
    """The service of an engine: everything that its endpoints share."""

    def __init__(self, engine: Engine, settings: ServerSettings) -> None:
        if engine.tokenizer is None:
            raise EngineError("the engine has no tokenizer, which a server needs; give one to Engine(tokenizer=...)")
        super().__init__(settings, ServerMetrics(engine))
        self.engine, self.tokenizer = engine, engine.tokenizer
        self.token_texts = TokenTexts(engine.tokenizer)
        self.mailbox = Mailbox()
        # One worker: texts are tokenized one request at a time, away from the event loop.
        self.worker = ThreadPoolExecutor(1, thread_name_prefix="openzaya-tokenizer")

    @functools.cached_property
    def completer(self) -> EngineCompleter:
        """What runs of RSA ask."""
        return EngineCompleter(self.engine, model=self.settings.model_name)

    @property
    def fingerprint(self) -> str:
        return f"weights-{self.engine.version}"

    @property
    def context(self) -> int:
        """Most tokens of prompt and answer together."""
        largest = self.engine.max_sequence_tokens
        return min(largest, self.settings.context or largest)

    @functools.cached_property
    def longest_token(self) -> int:
        """Characters of the vocabulary's longest token."""
        return max(len(token) for token in self.tokenizer.get_vocab())

    def check_length(self, num_characters: int) -> None:
        """Refuse at once what cannot fit however it is cut: to tokenize megabytes takes seconds."""
        if num_characters > self.context * self.longest_token:
            raise bad_request(
                f"the prompt has {num_characters} characters, and the context is {self.context} tokens with the "
                "answer; shorten the prompt",
                "prompt",
                code="context_length_exceeded",
            )

    def room(self, num_prompt_tokens: int, wanted: int | None) -> int:
        """How many tokens an answer may have, at least 1; raises ``ApiError`` where the prompt fills the context."""
        if num_prompt_tokens == 0:
            raise bad_request("the prompt has no tokens; send some text", "prompt")
        left = self.context - num_prompt_tokens
        if left < 1:
            raise bad_request(
                f"the prompt has {num_prompt_tokens} tokens, and the context is {self.context} with the answer; "
                "shorten the prompt",
                code="context_length_exceeded",
            )
        return min(left, *(limit for limit in (wanted, self.settings.max_tokens_limit) if limit is not None), left)

    async def in_worker(self, function: Any, *arguments: Any) -> Any:
        """Run ``function`` off the event loop; its ``OpenZayaError`` becomes a 400."""
        try:
            return await asyncio.get_running_loop().run_in_executor(self.worker, function, *arguments)
        except OpenZayaError as error:
            raise from_user_error(error) from None

    def check_candidates(self, num_prompts: int, n: int) -> None:
        limit = self.settings.max_candidates
        if num_prompts * n > limit:
            raise bad_request(
                f"{num_prompts} prompts with n={n} are {num_prompts * n} candidates, above the limit of {limit}; "
                "send several requests",
                "n",
            )

    async def aclose(self) -> None:
        await super().aclose()
        self.worker.shutdown(wait=False, cancel_futures=True)


class Mailbox:
    """From the engine's thread to the event loop, with one wake-up for all that has come until it is emptied."""

    def __init__(self) -> None:
        self._items: deque[tuple[Job, Item]] = deque()
        self._is_scheduled = False

    def post(self, loop: asyncio.AbstractEventLoop, job: Job, item: Item) -> None:
        """Called in any thread."""
        self._items.append((job, item))
        if not self._is_scheduled:
            self._is_scheduled = True
            loop.call_soon_threadsafe(self._deliver)

    def _deliver(self) -> None:
        # The flag first: whoever posts from here on schedules another delivery.
        self._is_scheduled = False
        while self._items:
            job, item = self._items.popleft()
            job.queue.put_nowait(item)


@dataclass(eq=False)
class Job:
    """One request in the engine. Begin it with :func:`start`; read :meth:`events` to the end, or :meth:`close` it."""

    service: Service
    n: int
    record: Record
    num_open: int
    """Candidates that have not finished."""
    queue: asyncio.Queue[Item] = field(default_factory=asyncio.Queue)
    request_ids: list[str] = field(default_factory=list)
    begun_s: float = field(default_factory=time.perf_counter)
    timer: asyncio.TimerHandle | None = None
    time_limit_s: float = 0.0
    _num_candidates: int = 0
    _seen: set[int] = field(default_factory=set)

    def __post_init__(self) -> None:
        self._num_candidates = self.num_open
        self.time_limit_s = self.service.settings.request_timeout_s

    def fail(self, error: ApiError) -> None:
        """End the job with ``error``, at once."""
        self._cancel()
        self.queue.put_nowait(error)

    async def close(self) -> None:
        """Free what the job holds in the engine; harmless when it has ended."""
        if self.timer is not None:
            self.timer.cancel()
        if self.num_open:
            self._cancel()
        if self in self.service.jobs:
            self.service.jobs.discard(self)
            seconds = time.perf_counter() - self.begun_s
            record = self.record
            self.service.metrics.finished(
                record.seconds_to_first, record.completion_tokens, self._num_candidates, seconds
            )

    async def events(self, *, keepalive: bool = False) -> AsyncIterator[tuple[int, Delta] | None]:
        """(Prompt, delta) pairs until each candidate has finished; with ``keepalive``, None after each silence.

        Raises ``ApiError`` where the request fails or runs out of time.
        """
        pause = self.service.settings.keepalive_s if keepalive else None
        while self.num_open:
            try:
                item = await self._next(pause)
            except TimeoutError:
                yield None
                continue
            if isinstance(item, ApiError):
                raise item
            self._count(*item)
            yield item

    async def _next(self, pause: float | None) -> Item:
        if not self.queue.empty():
            return self.queue.get_nowait()
        async with asyncio.timeout(pause):
            return await self.queue.get()

    def _count(self, prompt: int, delta: Delta) -> None:
        if delta.finish_reason == "cancelled":
            raise ApiError(503, "the request was cancelled by the server", code="cancelled")
        record = self.record
        if record.seconds_to_first is None:
            record.seconds_to_first = time.perf_counter() - self.begun_s
        if prompt not in self._seen:
            self._seen.add(prompt)
            record.cached_tokens += delta.num_cached_tokens
        record.completion_tokens += len(delta.tokens)
        self.num_open -= delta.finish_reason is not None

    def _cancel(self) -> None:
        for request_id in self.request_ids:
            self.service.engine.cancel(request_id)


async def start(
    service: Service, prompts: Sequence[list[int]], params: Sequence[SamplingParams], n: int, record: Record
) -> Job:
    """Queue a request in the engine; raises ``ApiError``: 400 for what it refuses, 429 where its queue is full."""
    job = Job(service, n, record, num_open=n * len(prompts))
    record.prompt_tokens = sum(len(prompt) for prompt in prompts)
    service.jobs.add(job)
    loop = asyncio.get_running_loop()

    def put_delta(index: int, delta: Delta) -> None:
        service.mailbox.post(loop, job, (index, delta))

    def put_end(outcome: RequestOutput | EngineError) -> None:
        if isinstance(outcome, EngineError):
            service.mailbox.post(loop, job, engine_failed(outcome))

    def submit(index: int) -> str:
        on_delta = functools.partial(put_delta, index)
        return service.engine.submit(prompts[index], params[index], n, on_delta=on_delta, on_end=put_end)

    try:
        for index in range(len(prompts)):
            # A grammar takes time to prepare: not on the event loop.
            job.request_ids.append(await asyncio.to_thread(submit, index))
    except QueueFull as error:
        await job.close()
        after = str(service.settings.retry_after_s)
        raise ApiError(429, str(error), code="queue_full", headers={"Retry-After": after}) from None
    except OpenZayaError as error:
        await job.close()
        raise from_user_error(error) from None
    except BaseException:
        await job.close()
        raise
    job.timer = fail_late(job, "ask for fewer tokens")
    return job


def engine_failed(error: EngineError) -> ApiError:
    """A request that was accepted ended in an error: not the client's fault."""
    log_exception("the engine failed", error)
    return internal_error()
