"""A run of Markovian RSA as work of the server: begun, watched, and ended with its client.

The run is one task; its events go into a queue, which the endpoint reads with :meth:`RSARun.events`. Closing the run
cancels the task and waits for it, so that no rollout outlives its request.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from typing import Any

from openzaya.errors import OpenZayaError, RSAError
from openzaya.serve.errors import ApiError, internal_error
from openzaya.serve.logs import log_exception
from openzaya.serve.service import BaseService, Record, fail_late
from openzaya.ttc.completer import Completer
from openzaya.ttc.config import RSAConfig
from openzaya.ttc.display import leading_answers
from openzaya.ttc.journal import make_run_key
from openzaya.ttc.results import Candidate, Event, Round, RSAResult
from openzaya.ttc.rounds import Question
from openzaya.ttc.rsa import markovian_rsa

MAX_SHOWN_CHARACTERS = 4000
"""Of a candidate's text in an event."""
LINES_A_ROUND = 16


class RSARun:
    """One request's run. Raises ``ApiError`` (429) where as many run as may."""

    def __init__(
        self,
        service: BaseService,
        record: Record,
        question: Question,
        completer: Completer,
        config: RSAConfig,
        model: str,
    ) -> None:
        num_running = sum(isinstance(job, RSARun) for job in service.jobs)
        if num_running >= service.settings.rsa_max_running:
            after = {"Retry-After": str(service.settings.retry_after_s)}
            raise ApiError(429, f"{num_running} RSA requests run already; try later", code="queue_full", headers=after)
        self.service, self.record, self.config = service, record, config
        self.time_limit_s = service.settings.rsa_timeout_s
        self._queue: asyncio.Queue[Event | None] = asyncio.Queue()
        self._error: ApiError | None = None
        self._began_s = time.perf_counter()
        limiter = asyncio.Semaphore(service.settings.rsa_concurrency)
        journal = service.journal
        run_key = "" if journal is None else make_run_key(config, question, model)
        service.jobs.add(self)
        self._task: asyncio.Task[RSAResult] = asyncio.create_task(
            markovian_rsa(
                question.messages,
                completer,
                config,
                tools=question.tools,
                final=question.final,
                journal=journal,
                run_key=run_key,
                on_event=self._take,
                limiter=limiter,
            )
        )
        self._task.add_done_callback(lambda task: self._queue.put_nowait(None))
        self._timer = fail_late(self, "ask for fewer rollouts or smaller budgets")

    def fail(self, error: ApiError) -> None:
        self._error = self._error or error
        self._task.cancel()

    async def close(self) -> None:
        self._timer.cancel()
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)
        self.service.jobs.discard(self)

    async def events(self, *, keepalive: bool = False) -> AsyncIterator[Event | None]:
        """What happens, until the run has ended; with ``keepalive``, None after each silence."""
        pause = self.service.settings.keepalive_s if keepalive else None
        while True:
            try:
                async with asyncio.timeout(pause):
                    item = await self._queue.get()
            except TimeoutError:
                yield None
                continue
            if item is None:
                return
            yield item

    def result(self) -> RSAResult:
        """What the ended run gave. Raises ``ApiError``."""
        if self._error is not None:
            raise self._error
        try:
            return self._task.result()
        except RSAError as error:
            raise ApiError(502, str(error), code="rollouts_failed") from None
        except (OpenZayaError, Exception) as error:
            log_exception("an RSA run failed", error)
            raise internal_error() from None

    def _take(self, event: Event) -> None:
        """Count what the run tells, and pass it on."""
        if event.kind == "candidate" and event.candidate is not None:
            candidate, record, metrics = event.candidate, self.record, self.service.metrics
            metrics.rollouts.labels(candidate.status).inc()
            if candidate.rollout is not None and not candidate.is_resumed:
                used = candidate.rollout.usage
                if record.seconds_to_first is None:
                    record.seconds_to_first = time.perf_counter() - self._began_s
                record.prompt_tokens += used.prompt
                record.cached_tokens += used.cached
                record.completion_tokens += used.completion
                metrics.rollout_tokens.inc(used.completion)
        self._queue.put_nowait(event)


# --- as text and as objects ---------------------------------------------------------------------------


class Progress:
    """The lines that tell of a run, in the order of its events."""

    def __init__(self, config: RSAConfig) -> None:
        self._config = config
        self._answers: dict[int, dict[str, int]] = {}
        self._ended: dict[int, int] = {}

    def line(self, event: Event) -> str | None:
        """A line for ``event``; None where there is nothing new to say."""
        config = self._config
        if event.kind == "started":
            one = f"{config.num_rollouts} rollouts in {config.t + 1} rounds"
            return f"Markovian RSA: {one}, {config.c} candidates in a prompt" if config.t else f"Markovian RSA: {one}"
        if event.kind == "candidate" and event.candidate is not None:
            return self._candidate_line(event.round_index, event.candidate)
        if event.kind == "round" and event.round is not None:
            return self._round_line(event.round)
        if event.kind == "selected":
            return "selected: " + ", ".join(f"candidate {slot + 1}" for slot in event.data["slots"])
        return None

    def _candidate_line(self, index: int, candidate: Candidate) -> str | None:
        ended = self._ended[index] = self._ended.get(index, 0) + 1
        answers = self._answers.setdefault(index, {})
        if candidate.answer is not None:
            answers[candidate.answer] = answers.get(candidate.answer, 0) + 1
        width = self._config.width(index)
        if ended % max(1, width // LINES_A_ROUND) and ended != width:
            return None
        return f"round {index + 1} of {self._config.t + 1}: {ended}/{width} done{_leading(answers)}"

    def _round_line(self, one: Round) -> str:
        parts = [f"{len(one.done)}/{len(one.candidates)} done"]
        if one.truncated:
            parts.append(f"{one.truncated} cut off")
        failed = sum(candidate.status == "failed" for candidate in one.candidates)
        if failed:
            parts.append(f"{failed} failed")
        parts += [f"{one.usage.completion} tokens", f"{one.seconds:.1f} s"]
        return f"round {one.index + 1} of {self._config.t + 1} ended: {', '.join(parts)}{_leading(one.answers())}"


def _leading(answers: dict[str, int]) -> str:
    return f"; leading: {leading_answers(answers)}" if answers else ""


def event_object(event: Event, warnings: list[str]) -> dict[str, Any]:
    """An event for whoever draws the run."""
    data: dict[str, Any] = {"event": event.kind}
    if event.kind == "started":
        config: RSAConfig = event.data["config"]
        widths = [config.width(index) for index in range(config.t + 1)]
        return data | {"config": config.model_dump(mode="json"), "widths": widths, "warnings": warnings}
    if event.kind == "selected":
        return data | {"slots": list(event.data["slots"])}
    data["round"] = event.round_index
    if event.round is not None:
        one = event.round
        names = {candidate.slot: candidate.answer for candidate in one.done}
        return data | _round_numbers(one) | {"slots": names}
    data |= {"slot": event.slot, "parents": list(event.parents)}
    if event.candidate is not None:
        data |= _candidate_object(event.candidate)
    return data


def _candidate_object(candidate: Candidate) -> dict[str, Any]:
    data: dict[str, Any] = {"status": candidate.status, "answer": candidate.answer, "error": candidate.error}
    rollout = candidate.rollout
    if rollout is not None:
        data |= {
            "tokens": rollout.usage.completion,
            "seconds": round(rollout.seconds, 3),
            "finish_reason": rollout.finish_reason,
            "is_closed": rollout.is_closed,
            "content": rollout.content[-MAX_SHOWN_CHARACTERS:],
            "reasoning": rollout.reasoning[-MAX_SHOWN_CHARACTERS:],
        }
    return data


def _round_numbers(one: Round) -> dict[str, Any]:
    return {
        "round": one.index,
        "seconds": round(one.seconds, 3),
        "tokens": one.usage.completion,
        "prompt_tokens": one.usage.prompt,
        "cached_tokens": one.usage.cached,
        "carried_tokens": one.carried_tokens,
        "answers": one.answers(),
        "done": len(one.done),
        "truncated": one.truncated,
        "failed": sum(candidate.status == "failed" for candidate in one.candidates),
        "resumed": sum(candidate.is_resumed for candidate in one.candidates),
    }


def summary(result: RSAResult, warnings: list[str]) -> dict[str, Any]:
    """The ``rsa`` object of an answer: what was run, round by round, and what was selected."""
    return {
        "config": result.config.model_dump(mode="json"),
        "rounds": [_round_numbers(one) for one in result.rounds],
        "selected": [candidate.slot for candidate in result.selected],
        "answers": [candidate.answer for candidate in result.selected],
        "tokens": result.usage.completion,
        "seconds": round(result.seconds, 3),
        "stopped_early": result.stopped_early,
        "deviations": result.config.deviations,
        "warnings": [*warnings, *result.warnings],
        "token_counting": result.capabilities.token_counting,
        "thinking_budget": result.capabilities.thinking_budget,
    }


def usage_object(result: RSAResult) -> dict[str, Any]:
    """OpenAI's ``usage`` over all rollouts of the run."""
    used = result.usage
    return {
        "prompt_tokens": used.prompt,
        "completion_tokens": used.completion,
        "total_tokens": used.prompt + used.completion,
        "prompt_tokens_details": {"cached_tokens": used.cached, "audio_tokens": 0},
        "completion_tokens_details": {"reasoning_tokens": used.reasoning, "audio_tokens": 0},
    }
