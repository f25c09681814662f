"""HTTP to an endpoint: keys kept out of sight, a limit on calls at the same time, retries, timeouts, streams.

Attempts that may succeed later are repeated with exponential backoff and jitter, or after the time that the endpoint
names in ``Retry-After``: connection errors, timeouts, HTTP 408, 409, 425, 429 and 5xx, and answers that are broken or
empty. Any other refusal is final. Answers are streamed where the endpoint can: a stream that stalls is noticed within
``idle_timeout_s``, gateways do not end it for being silent, and leaving it frees the endpoint.

Credentials in the URL (``user:password@``, ``?key=``) are sent and never shown: :attr:`Connection.url` has none, and
every text that leaves this file has them blotted out.
"""

from __future__ import annotations

import asyncio
import base64
import email.utils
import json
import logging
import random
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qsl, quote, unquote, urlsplit, urlunsplit

from openzaya.errors import CompletionFailed, RSAError
from openzaya.ttc.clients import Clients, Lease
from openzaya.ttc.completer import Usage
from openzaya.ttc.replies import Assembled, BrokenReply, Reply, error_message, read_reply

if TYPE_CHECKING:
    import httpx
    from tenacity import RetryCallState

RETRIED = frozenset({408, 409, 425, 429})
LONGEST_WAIT_S = 60.0
LONGEST_RETRY_AFTER_S = 600.0
CONNECT_TIMEOUT_S = 30.0
SMALL_REQUEST_S = 60.0
"""For requests that generate nothing; they do not wait for those that do."""
MESSAGE_CHARACTERS = 500
MAX_ANSWER_CHARACTERS = 256 * 1024 * 1024
SHORTEST_SECRET = 4
"""Shorter values are not blotted out: they would take half of every message with them."""


class Refused(RSAError):
    """The endpoint said no, and would say it again."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


class Unavailable(RSAError):
    """An attempt that failed and may succeed later."""

    def __init__(self, message: str, *, status: int = 0, wait_s: float | None = None) -> None:
        super().__init__(message)
        self.status, self.wait_s = status, wait_s


class EndpointFailed(CompletionFailed):
    """A call that failed for good.

    Attributes:
        status: of the last attempt, 0 where it had none.
        usage: tokens of its attempts, as far as the endpoint told.
    """

    def __init__(self, message: str, *, status: int = 0, usage: Usage | None = None) -> None:
        super().__init__(message)
        self.status, self.usage = status, usage or Usage()


@dataclass(frozen=True)
class Outcome:
    """A reply and what it took."""

    reply: Reply
    failed_usage: Usage
    """Tokens of attempts that failed and had a usage all the same."""
    num_requests: int


class Connection:
    """One endpoint.

    Args:
        base_url: with or without ``/v1``; may hold credentials.
        timeout_s: longest time of one attempt, queueing at the endpoint included.
        idle_timeout_s: longest pause inside a stream that has begun.
        retry_wait_s: about the first wait between attempts; it doubles each time.
        client: used instead of one of our own, and left open.
    """

    def __init__(
        self,
        base_url: str,
        *,
        api_key: str | None = None,
        headers: Mapping[str, str] | None = None,
        timeout_s: float = 3600.0,
        idle_timeout_s: float = 300.0,
        max_retries: int = 6,
        retry_wait_s: float = 0.5,
        concurrency: int = 64,
        client: httpx.AsyncClient | None = None,
    ) -> None:
        parts = urlsplit(base_url.strip())
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise RSAError("the endpoint's URL is not http(s)://host[:port][/v1]; give it in this form")
        path = parts.path.rstrip("/") or "/v1"
        host = parts.netloc.rpartition("@")[2]
        self.url = urlunsplit((parts.scheme, host, path, "", ""))
        """Without credentials: fit for messages and records."""
        self.root = self.url.removesuffix("/v1")
        self._query = dict(parse_qsl(parts.query, keep_blank_values=True))
        self._headers = {"Accept": "application/json, text/event-stream", **(headers or {})}
        secrets = [api_key, parts.password, *self._query.values(), *(headers or {}).values()]
        if parts.username is not None:
            pair = f"{unquote(parts.username)}:{unquote(parts.password or '')}"
            self._headers["Authorization"] = "Basic " + base64.b64encode(pair.encode()).decode()
            secrets += [parts.username, self._headers["Authorization"].partition(" ")[2]]
        if api_key:
            self._headers["Authorization"] = f"Bearer {api_key}"
        self._secrets = _spellings(secret for secret in secrets if secret)
        self._timeout_s, self._idle_timeout_s = timeout_s, idle_timeout_s
        self._max_retries, self._retry_wait_s = max_retries, retry_wait_s
        self._limit = asyncio.Semaphore(concurrency)
        self._clients = Clients(concurrency + 8, client)
        self._jitter = random.Random()

    def __repr__(self) -> str:
        return f"Connection({self.url!r})"

    @property
    def num_attempts(self) -> int:
        return self._max_retries + 1

    def hide(self, text: str) -> str:
        """``text`` without any of the credentials, shortened."""
        for secret in self._secrets:
            text = text.replace(secret, "***")
        return text[:MESSAGE_CHARACTERS]

    async def close(self) -> None:
        await self._clients.close()

    # --- single requests, for probing and counting -----------------------------------------------------

    async def get(self, url: str) -> Any:
        """The JSON body; one attempt. Raises :class:`Refused`, :class:`Unavailable` or :class:`BrokenReply`."""
        return await self._json("GET", url, None, SMALL_REQUEST_S)

    async def post(self, url: str, body: Mapping[str, Any]) -> Any:
        """The JSON body; one attempt. Raises :class:`Refused`, :class:`Unavailable` or :class:`BrokenReply`."""
        return await self._json("POST", url, body, SMALL_REQUEST_S)

    async def pause(self, attempt: int) -> None:
        """The wait after attempt 0, 1, ... of something that is tried again."""
        await asyncio.sleep(self._backoff_s(attempt + 1))

    # --- completions ----------------------------------------------------------------------------------

    async def ask(
        self, path: str, body: Mapping[str, Any], *, max_retries: int | None = None, timeout_s: float | None = None
    ) -> Outcome:
        """A completion, retried as the file's head says.

        Args:
            max_retries: fewer than the connection's.
            timeout_s: less than the connection's.

        Raises:
            EndpointFailed: refused, or not to be had.
        """
        from tenacity import AsyncRetrying, retry_if_exception_type, stop_after_attempt

        used, num_requests = Usage(), 0
        retrying = AsyncRetrying(
            stop=stop_after_attempt(min(self._max_retries, max_retries or self._max_retries) + 1),
            wait=self._wait,
            retry=retry_if_exception_type((Unavailable, BrokenReply)),
            reraise=True,
        )
        try:
            async for attempt in retrying:
                with attempt:
                    num_requests += 1
                    try:
                        async with self._limit:
                            reply = read_reply(await self._json("POST", self.url + path, body, timeout_s))
                    except BrokenReply as error:
                        used += error.usage or Usage()
                        raise
        except Refused as error:
            message = f"{self.url} refused the call (HTTP {error.status}): {self.hide(str(error))}"
            raise EndpointFailed(message, status=error.status, usage=used) from None
        except (Unavailable, BrokenReply) as error:
            message = (
                f"{self.url} gave no answer in {num_requests} attempts; at last: {self.hide(str(error))}; check the "
                "endpoint, or raise max_retries or timeout_s"
            )
            raise EndpointFailed(message, status=getattr(error, "status", 0), usage=used) from None
        return Outcome(reply, used, num_requests)

    def _wait(self, state: RetryCallState) -> float:
        error = state.outcome.exception() if state.outcome is not None else None
        if isinstance(error, Unavailable) and error.wait_s is not None:
            return error.wait_s
        return self._backoff_s(state.attempt_number)

    def _backoff_s(self, attempt_number: int) -> float:
        longest = min(LONGEST_WAIT_S, self._retry_wait_s * 2.0 ** min(attempt_number, 32))
        return longest * (0.5 + 0.5 * self._jitter.random())

    # --- one attempt ----------------------------------------------------------------------------------

    async def _json(self, method: str, url: str, body: Mapping[str, Any] | None, timeout_s: float | None = None) -> Any:
        import httpx

        longest = min(self._timeout_s, timeout_s or self._timeout_s)
        try:
            async with asyncio.timeout(longest) as limit:
                with self._lease() as client:
                    return await self._exchange(client, method, url, body, limit)
        except TimeoutError:
            raise Unavailable(
                f"no answer in time (timeout_s={longest:g}, idle_timeout_s={self._idle_timeout_s:g})"
            ) from None
        except httpx.TransportError as error:
            text = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
            raise Unavailable(self.hide(text)) from None
        except (httpx.HTTPError, httpx.InvalidURL, httpx.StreamError) as error:
            raise Unavailable(self.hide(f"{type(error).__name__}: {error}")) from None

    async def _exchange(
        self, client: httpx.AsyncClient, method: str, url: str, body: Mapping[str, Any] | None, limit: asyncio.Timeout
    ) -> Any:
        request = client.build_request(
            method,
            url,
            params=self._query or None,
            headers=self._headers,
            content=None if body is None else _encoded(body),
            timeout=self._timeouts(),
        )
        if body is not None:
            request.headers["Content-Type"] = "application/json"
        response = await client.send(request, stream=True)
        try:
            if response.status_code == 200 and "event-stream" in response.headers.get("content-type", ""):
                return await self._streamed(response, limit)
            return self._whole(response, await _limited(response))
        finally:
            await response.aclose()

    async def _streamed(self, response: httpx.Response, limit: asyncio.Timeout) -> Any:
        assembled = Assembled()
        deadline = limit.when()
        now = asyncio.get_running_loop().time
        async for line in response.aiter_lines():
            limit.reschedule(min(deadline or float("inf"), now() + self._idle_timeout_s))
            assembled.feed(line)
            if assembled.is_done:
                break
            if assembled.num_characters > MAX_ANSWER_CHARACTERS:
                raise BrokenReply(f"the answer is longer than {MAX_ANSWER_CHARACTERS} characters")
        return assembled.body()

    def _whole(self, response: httpx.Response, raw: bytes) -> Any:
        try:
            body: Any = json.loads(raw)
        except (ValueError, RecursionError):
            body = None
        if 200 <= response.status_code < 300:
            if body is None:
                raise BrokenReply("the answer is broken JSON")
            return body
        told = error_message(body) if body else raw[: 4 * MESSAGE_CHARACTERS].decode(errors="replace")
        message = self.hide(told.strip() or response.reason_phrase)
        status = response.status_code
        if status in RETRIED or status >= 500:
            wait_s = _retry_after(response.headers.get("retry-after"))
            raise Unavailable(f"HTTP {status}: {message}", status=status, wait_s=wait_s)
        raise Refused(status, message)

    def _lease(self) -> Lease:
        if self._query:
            _hide_in_logs(self)
        return self._clients.lease()

    def _timeouts(self) -> httpx.Timeout:
        import httpx

        return httpx.Timeout(self._timeout_s, connect=min(CONNECT_TIMEOUT_S, self._timeout_s), pool=None)


class _HidingFilter(logging.Filter):
    """httpx logs the URL of each request, query included."""

    def __init__(self, secrets: frozenset[str]) -> None:
        super().__init__()
        self.secrets = secrets

    def filter(self, record: logging.LogRecord) -> bool:
        text = record.getMessage()
        if any(secret in text for secret in self.secrets):
            for secret in sorted(self.secrets, key=len, reverse=True):
                text = text.replace(secret, "***")
            record.msg, record.args = text, ()
        return True


def _hide_in_logs(connection: Connection) -> None:
    logger = logging.getLogger("httpx")
    secrets = frozenset(connection._secrets)
    if not any(isinstance(one, _HidingFilter) and one.secrets == secrets for one in logger.filters):
        logger.addFilter(_HidingFilter(secrets))


def _spellings(secrets: Any) -> list[str]:
    """Each secret as it stands and as it stands in a URL, the longest first."""
    found = set()
    for secret in secrets:
        whole = {secret, unquote(secret), quote(secret, safe=""), quote(secret)}
        # "Bearer abc" in a header of the user's own: the second word is the secret too.
        whole |= {word for word in secret.split() if len(word) >= 2 * SHORTEST_SECRET}
        found |= {text for text in whole if len(text) >= SHORTEST_SECRET}
    return sorted(found, key=len, reverse=True)


def _encoded(body: Mapping[str, Any]) -> bytes:
    # A lone surrogate, which UTF-8 cannot carry, goes as an escape; the endpoint may refuse it.
    return json.dumps(body, ensure_ascii=True, separators=(",", ":")).encode()


async def _limited(response: httpx.Response) -> bytes:
    pieces, size = [], 0
    async for piece in response.aiter_bytes():
        pieces.append(piece)
        size += len(piece)
        if size > MAX_ANSWER_CHARACTERS:
            raise BrokenReply(f"the answer is longer than {MAX_ANSWER_CHARACTERS} bytes")
    return b"".join(pieces)


def _retry_after(value: str | None) -> float | None:
    """Seconds of a Retry-After header, which is a number or a date."""
    if not value:
        return None
    try:
        seconds = float(value)
    except ValueError:
        try:
            seconds = email.utils.parsedate_to_datetime(value).timestamp() - time.time()
        except (ValueError, TypeError):
            return None
    return min(max(0.0, seconds), LONGEST_RETRY_AFTER_S) if seconds == seconds else None
