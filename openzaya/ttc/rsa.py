"""Markovian RSA (arXiv 2605.05365, section VI): think in rounds, carry only tails.

    round 0        n rollouts from the question, beta tokens each
    round 1 .. t   n rollouts, each from the question and c tails of the round before, drawn without replacement
    after round t  an answer is selected among the last round's

A tail is the last tau tokens of a rollout's reasoning, so that no prompt exceeds |q| + c * tau and a constant, however
long the whole thinks. The last round has a budget of its own, with which it ends in an answer. Which settings give
best-of-N, Delethink, full-chain RSA and PaCoRe is listed in config.py.

Each slot's seed and draw follow from the run's seed, the question, the round and the slot alone. So a run that was
interrupted and resumed from its journal is the run that it would have been.
"""

from __future__ import annotations

import asyncio
import inspect
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

from openzaya.errors import CompletionFailed, RSAError
from openzaya.ttc.answers import answer_of, group_answers, select
from openzaya.ttc.completer import Call, Capabilities, Completer, Rollout, Usage
from openzaya.ttc.config import RSAConfig
from openzaya.ttc.cost import Budget, BudgetExceeded
from openzaya.ttc.journal import JournalProtocol
from openzaya.ttc.results import Candidate, Event, OnEvent, Round, RSAResult
from openzaya.ttc.rounds import Carried, Question, carry, first_call, next_call, selection_call
from openzaya.ttc.subsets import canonical_order, derive_seed, draw_order, draw_subsets

Verifier = Callable[[Rollout], float | Awaitable[float | None] | None]
"""Reward of a rollout, None without a verdict."""
Limiter = AbstractAsyncContextManager[Any]
"""Held during each rollout; an ``asyncio.Semaphore`` shared by all problems bounds them together."""


async def markovian_rsa(
    messages: str | Sequence[Mapping[str, Any]],
    completer: Completer,
    config: RSAConfig | None = None,
    *,
    tools: Sequence[Mapping[str, Any]] = (),
    final: Mapping[str, Any] | None = None,
    journal: JournalProtocol | None = None,
    run_key: str = "",
    on_event: OnEvent | None = None,
    limiter: Limiter | None = None,
    budget: Budget | None = None,
    verifier: Verifier | None = None,
) -> RSAResult:
    """Answer one question with a population of rollouts.

    Args:
        messages: the question, or a conversation that ends with it; system prompt and history are kept in each round.
        completer: the model: :class:`EngineCompleter` or :class:`EndpointCompleter`.
        tools: functions that the model is shown in each round.
        final: ``response_format``, ``tool_choice``, ``parallel_tool_calls``: hold for the final call only.
        journal: keeps each finished rollout; those of an interrupted run with this ``run_key`` are not repeated.
        run_key: name of this run in the journal; by default made from the question and the settings.
        on_event: told what happens, as it happens.
        budget: a cap on tokens or money, which may be shared by several runs.
        verifier: reward of a rollout; for ``select="verifier"`` and for scores.

    Cancelling the task ends all calls that are under way.

    Raises:
        RSAError: a question that cannot be asked, or a round without any result.
    """
    config = config or RSAConfig()
    if config.select == "verifier" and verifier is None:
        raise RSAError("select='verifier' needs a verifier; pass one, or choose majority, aggregate, random or all")
    question = Question.of(messages, tools, final)
    run = _Run(
        question,
        completer,
        config,
        await completer.capabilities(),
        journal,
        run_key or f"{question.digest[:16]}-{config.seed}",
        on_event or (lambda event: None),
        limiter or nullcontext(),
        budget,
        verifier,
    )
    return await run.run()


@dataclass
class _Run:
    question: Question
    completer: Completer
    config: RSAConfig
    capabilities: Capabilities
    journal: JournalProtocol | None
    run_key: str
    tell: OnEvent
    limiter: Limiter
    budget: Budget | None
    verifier: Verifier | None
    stopped: str | None = None

    def __post_init__(self) -> None:
        self._carried: dict[tuple[int, int], Carried | None] = {}

    async def run(self) -> RSAResult:
        began = time.perf_counter()
        if self.journal is not None:
            self.journal.begin(self.run_key, self.config, self.question, self.capabilities)
        self.tell(Event("started", data={"config": self.config, "capabilities": self.capabilities}))
        rounds = await (self._asynchronous() if self.config.asynchronous else self._rounds())
        final = rounds[-1]
        selected, selection = await self._select(final)
        self.tell(Event("selected", data={"slots": [candidate.slot for candidate in selected]}))
        result = RSAResult(
            config=self.config,
            capabilities=self.capabilities,
            rounds=tuple(rounds),
            selected=tuple(selected),
            seconds=time.perf_counter() - began,
            selection=selection,
            stopped_early=self.stopped,
            warnings=tuple(self.config.warnings()),
        )
        if self.journal is not None:
            self.journal.finish(self.run_key, result.to_dict())
        return result

    # --- rounds -----------------------------------------------------------------------------------

    async def _rounds(self) -> list[Round]:
        """Round after round, each as a whole."""
        rounds: list[Round] = []
        for index in range(self.config.t + 1):
            began = time.perf_counter()
            tasks = [self._slot(index, slot, order) for slot, order in enumerate(self._draws(index, rounds))]
            candidates = await self._together(tasks, index)
            one = await self._finish_round(index, candidates, time.perf_counter() - began)
            if not one.done and rounds and self.stopped:
                break
            rounds.append(one)
            if self.stopped or self._agrees(one):
                break
        rounds[-1] = replace(rounds[-1], is_final=True)
        return rounds

    def _draws(self, index: int, rounds: Sequence[Round]) -> list[list[int]]:
        """For each slot of a round the slots before that it is given."""
        width = self.config.width(index)
        if index == 0:
            return [[] for _ in range(width)]
        before = rounds[-1]
        available = {c.slot for c in before.done if self._carried.get((index - 1, c.slot)) is not None}
        if not available:
            raise RSAError(
                f"round {index - 1} left nothing to carry ({self.config.carry}); raise beta={self.config.beta}, or set "
                "carry to 'answer_or_reasoning'"
            )
        subsets = draw_subsets(
            width, self.config.c, self.config.seed, index, population=len(before.candidates), available=available
        )
        return canonical_order(subsets)

    async def _together(self, slots: Sequence[Awaitable[Candidate]], index: int) -> list[Candidate]:
        """All slots of a round; with a quorum, as many as it asks for, and the others cancelled."""
        tasks = [asyncio.ensure_future(slot) for slot in slots]
        wanted = len(tasks) if self.config.quorum is None else max(1, round(self.config.quorum * len(tasks)))
        try:
            pending: set[asyncio.Future[Candidate]] = set(tasks)
            while pending and sum(_succeeded(task) for task in tasks) < wanted:
                done, pending = await asyncio.wait(pending, return_when=asyncio.FIRST_COMPLETED)
                for task in done:
                    task.result()
        finally:
            await _cancel(tasks)
        return [
            self._slot_record(index, slot, (), "cancelled") if task.cancelled() else task.result()
            for slot, task in enumerate(tasks)
        ]

    async def _asynchronous(self) -> list[Round]:
        """Each rollout as soon as the candidates that it draws are there; what is drawn is the same."""
        config, began = self.config, time.perf_counter()
        tasks: list[list[asyncio.Future[Candidate]]] = []

        async def slot_of(index: int, slot: int, order: list[int]) -> Candidate:
            parents: list[int] = []
            for parent in order:
                await asyncio.shield(tasks[index - 1][parent])
                if self._carried.get((index - 1, parent)) is not None:
                    parents.append(parent)
                if len(parents) == config.c:
                    break
            if index and not parents:
                return self._slot_record(index, slot, (), "failed", error="no candidate to aggregate")
            return await self._slot(index, slot, parents)

        try:
            for index in range(config.t + 1):
                orders: list[list[int]] = [[] for _ in range(config.width(index))]
                if index:
                    population = config.width(index - 1)
                    drawn = [draw_order(population, config.c, config.seed, index, slot) for slot in range(len(orders))]
                    # Those that a slot takes first stand in canonical order, as in rounds that wait.
                    first = canonical_order([order[: config.c] for order in drawn])
                    orders = [[*head, *order[config.c :]] for head, order in zip(first, drawn, strict=True)]
                tasks.append([asyncio.ensure_future(slot_of(index, slot, order)) for slot, order in enumerate(orders)])
            rounds = []
            for index, level in enumerate(tasks):
                candidates = list(await asyncio.gather(*level))
                rounds.append(await self._finish_round(index, candidates, time.perf_counter() - began))
        finally:
            await _cancel([task for level in tasks for task in level])
        while len(rounds) > 1 and self.stopped and not rounds[-1].done:
            rounds.pop()
        rounds[-1] = replace(rounds[-1], is_final=True)
        return rounds

    async def _finish_round(self, index: int, candidates: list[Candidate], seconds: float) -> Round:
        """Answers that mean the same get one name; a round without a result ends the run, unless a cap stopped it."""
        done = [candidate for candidate in candidates if candidate.status == "done"]
        if not done and (not self.stopped or index == 0):
            reason = next((c.error for c in candidates if c.error), self.stopped or "all were cancelled")
            raise RSAError(f"all {len(candidates)} rollouts of round {index} failed; the first: {reason}")
        # Mathematical equality asks a process of its own: not on the event loop.
        names = await asyncio.to_thread(group_answers, [candidate.answer for candidate in done], self.config.task)
        named = {c.slot: replace(c, answer=name) for c, name in zip(done, names, strict=True)}
        one = Round(index, tuple(named.get(c.slot, c) for c in candidates), index == self.config.t, seconds)
        self.tell(Event("round", index, round=one))
        return one

    def _agrees(self, one: Round) -> bool:
        limit = self.config.early_stop
        if limit is None or one.is_final:
            return False
        votes = max(one.answers().values(), default=0)
        if votes < limit * len(one.done):
            return False
        self.stopped = f"{votes} of {len(one.done)} candidates of round {one.index} agree"
        return True

    # --- one rollout ------------------------------------------------------------------------------

    async def _slot(self, index: int, slot: int, parents: Sequence[int]) -> Candidate:
        """A slot's candidate: from the journal, or drawn, and drawn again where the policy says so."""
        config = self.config
        before = [one for parent in parents if (one := self._carried.get((index - 1, parent))) is not None]
        num_attempts = 1 + (config.max_refills if config.on_failure == "refill" else 0)
        calls = [self._call(index, before, self._seed(index, slot, attempt)) for attempt in range(num_attempts)]
        digests = [call.digest() for call in calls]
        for attempt, digest in enumerate(digests):
            found = self.journal.find(self.run_key, index, slot, attempt, digest) if self.journal is not None else None
            if found is not None:
                if self.budget is not None and found.rollout is not None:
                    self.budget.count(found.rollout.usage)
                return await self._accept(replace(found, is_resumed=True), before, attempt, digest)
        error = ""
        for attempt, call in enumerate(calls):
            self.tell(Event("launched", index, slot, tuple(parents)))
            try:
                rollout = await self._write(call, before)
                candidate = Candidate(index, slot, tuple(parents), "done", call.seed, rollout)
                candidate = replace(candidate, answer=answer_of(rollout, config.task))
                # At once: what follows may wait for an endpoint's tokenizer, and the rollout is paid for.
                self._record(candidate, attempt, digests[attempt])
                return await self._accept(candidate, before, attempt, digests[attempt])
            except BudgetExceeded as exceeded:
                self.stopped = str(exceeded)
                return self._slot_record(index, slot, parents, "cancelled", error=str(exceeded))
            except CompletionFailed as failed:
                error = str(failed)
                self._record(self._slot_record(index, slot, parents, "failed", error), attempt, digests[attempt])
        failed_candidate = self._slot_record(index, slot, parents, "failed", error=error)
        self.tell(Event("candidate", index, slot, tuple(parents), failed_candidate))
        return failed_candidate

    async def _write(self, call: Call, before: Sequence[Carried]) -> Rollout:
        ended = before[0].ended if before else None
        if ended is None:
            return await self._complete(call)
        # A chain of Delethink that has come to its end is handed on as it is.
        return replace(ended, usage=Usage(), seconds=0.0, num_calls=0)

    async def _accept(self, candidate: Candidate, before: list[Carried], attempt: int, digest: str) -> Candidate:
        """A finished rollout with its reward and what it hands on."""
        index, slot, rollout = candidate.round_index, candidate.slot, candidate.rollout
        assert rollout is not None
        judged = candidate
        if judged.correct is None:
            judged = replace(judged, correct=await self._verify(rollout))
        if index < self.config.t:
            if judged.tail is not None and self.config.continuation == "refine":
                carried: Carried | None = Carried(judged.tail)
            else:
                carried = await carry(self.completer, self.config, rollout, before)
            self._carried[index, slot] = carried
            judged = replace(judged, tail=None if carried is None else carried.tail)
        if judged != candidate:
            self._record(judged, attempt, digest)
        self.tell(Event("candidate", index, slot, judged.parents, judged))
        return judged

    def _record(self, candidate: Candidate, attempt: int, digest: str) -> None:
        if self.journal is not None:
            self.journal.record(self.run_key, candidate, attempt, digest)

    async def _complete(self, call: Call) -> Rollout:
        async with self.limiter:
            if self.budget is None:
                return await self.completer.complete(call)
            num_prompt = await self.completer.count(call.messages, call.tools)
            async with self.budget.admit(num_prompt, call.max_tokens) as reservation:
                rollout = await self.completer.complete(call)
                reservation.settle(rollout.usage)
                return rollout

    async def _verify(self, rollout: Rollout) -> float | None:
        if self.verifier is None:
            return None
        reward = self.verifier(rollout)
        return await reward if inspect.isawaitable(reward) else reward

    def _call(self, index: int, before: list[Carried], seed: int) -> Call:
        if index == 0:
            return first_call(self.question, self.config, seed)
        return next_call(self.question, self.config, index, before, seed)

    def _seed(self, index: int, slot: int, attempt: int) -> int:
        return derive_seed(self.config.seed, self.question.digest, "rollout", index, slot, attempt)

    def _slot_record(
        self, index: int, slot: int, parents: Sequence[int], status: Any, error: str | None = None
    ) -> Candidate:
        return Candidate(index, slot, tuple(parents), status, self._seed(index, slot, 0), error=error)

    # --- the end ----------------------------------------------------------------------------------

    async def _select(self, final: Round) -> tuple[list[Candidate], Rollout | None]:
        config = self.config
        if config.select != "aggregate":
            seed = derive_seed(config.seed, self.question.digest, "select")
            return select(final.done, config.select, seed), None
        carried = {
            c.slot: one
            for c in final.done
            if c.rollout is not None and (one := await carry(self.completer, config, c.rollout, [])) is not None
        }
        [chosen] = draw_subsets(
            1, config.c, config.seed, config.t + 1, population=len(final.candidates), available=carried
        )
        seed = derive_seed(config.seed, self.question.digest, "select")
        call = selection_call(self.question, config, [carried[slot] for slot in chosen], seed)
        try:
            rollout = await self._last_call(call, chosen)
        except (CompletionFailed, BudgetExceeded) as error:
            self.stopped = f"the aggregating call failed ({error}); the majority's answer instead"
            return select(final.done, "majority", seed), None
        by_slot = {candidate.slot: candidate for candidate in final.done}
        return [by_slot[slot] for slot in chosen], rollout

    async def _last_call(self, call: Call, chosen: Sequence[int]) -> Rollout:
        """The call behind the last round, journaled as the only slot of a round of its own."""
        index, digest = self.config.t + 1, call.digest()
        found = self.journal.find(self.run_key, index, 0, 0, digest) if self.journal is not None else None
        if found is not None and found.rollout is not None:
            return found.rollout
        rollout = await self._complete(call)
        answer = answer_of(rollout, self.config.task)
        self._record(Candidate(index, 0, tuple(chosen), "done", call.seed, rollout, answer=answer), 0, digest)
        return rollout


def _succeeded(task: asyncio.Future[Candidate]) -> bool:
    return task.done() and not task.cancelled() and task.exception() is None and task.result().status == "done"


async def _cancel(tasks: Sequence[asyncio.Future[Candidate]]) -> None:
    """End what is still running and wait for it, so that no call outlives its run."""
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
