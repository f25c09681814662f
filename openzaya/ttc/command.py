"""``openzaya rsa``: from options to answers, one problem or a file of them.

What is wrong with options, problems, journal or model is said before a token is spent; then comes what the run may
cost, and then the run itself, with every finished rollout in a journal. Answers go to standard output, everything
else to the error stream.
"""

from __future__ import annotations

import asyncio
import json
import math
import os
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import AsyncExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any

from openzaya.errors import ConfigError, OpenZayaError, RSAError
from openzaya.ttc.answers import check_answer
from openzaya.ttc.completer import Capabilities, Completer, Rollout
from openzaya.ttc.cost import Budget, Estimate, estimate, estimate_text, total_estimate
from openzaya.ttc.dataset import QuestionRecord
from openzaya.ttc.display import RSADisplay, leading_answers, one_line
from openzaya.ttc.fitting import BUDGETS, SHORT_PROMPT_CONTEXT, fit_context
from openzaya.ttc.journal import Journal
from openzaya.ttc.options import RSAOptions, open_completer, price_of, questions_of, settings_of
from openzaya.ttc.results import RSAResult
from openzaya.ttc.rounds import Question
from openzaya.ttc.rsa import Verifier, markovian_rsa
from openzaya.ttc.summary import problem_figures, summarise, summary_text
from openzaya.ttc.view import JournalRuns, write_view

MAX_COUNTED = 64
"""Questions of a file whose tokens are counted for the estimate: an endpoint may have to be asked for each."""
DEFAULT_JOURNALS = Path("runs/rsa")


class Stopped(Exception):
    """The user interrupted a run, and was told how to go on."""


class Failed(RSAError):
    """Some problems of a file have no result."""


def run_rsa(options: RSAOptions) -> None:
    """Run the command.

    Raises:
        OpenZayaError: what stands in the way; ``Failed`` where some problems of a file ended without a result.
        Stopped: interrupted; what was finished is in the journal.
    """
    Command(options).run()


class Command:
    """One call of the command."""

    def __init__(self, options: RSAOptions) -> None:
        self.options = options
        self.config, self.chosen = settings_of(options)
        self.price = price_of(options)
        self.questions = questions_of(options)
        if self.config.select == "verifier" and any(question.answer is None for question in self.questions):
            raise ConfigError("select='verifier' needs a right answer for each problem; give --data with answers")
        self.keys = {question.name: self._run_key(question) for question in self.questions}
        self.journal_path = self._journal_path()
        _check_page(options.html)
        self.runs: dict[str, dict[str, Any]] = {}
        """Finished runs as JSON, by the question's name."""
        self.errors: dict[str, str] = {}
        self.began = time.monotonic()

    def run(self) -> None:
        """See :func:`run_rsa`."""
        if self._take_finished():
            _say("all of it is in the journal already; nothing is run")
        else:
            try:
                asyncio.run(self._run())
            except (KeyboardInterrupt, asyncio.CancelledError):
                self._write_page()
                raise Stopped(self._how_to_go_on()) from None
        self._report()

    # --- before -----------------------------------------------------------------------------------

    def _run_key(self, question: QuestionRecord) -> str:
        return question.name if self.options.data else f"problem-{Question.of(question.messages).digest[:12]}"

    def _journal_path(self) -> Path | None:
        options = self.options
        if not options.keep_journal:
            return None
        if options.journal is None:
            digest = Question.of(self.questions[0].messages).digest[:6]
            return DEFAULT_JOURNALS / f"{time.strftime('%Y%m%d-%H%M%S')}-{digest}.sqlite"
        if options.resume and not options.journal.is_file():
            raise ConfigError(f"there is no journal {options.journal} to resume; check the path, or leave out --resume")
        return options.journal

    def _take_finished(self) -> bool:
        """Look into a journal that is there. True where it holds all that is asked, so that nothing is to be done."""
        path = self.options.journal
        if path is None or not path.exists():
            return False
        with Journal.open(path, read_only=True) as journal:
            known = {run.run_key: run for run in journal.runs()}
            wanted = list(self.keys.values())
            if all(key in known and known[key].is_finished for key in wanted):
                for question in self.questions:
                    run = self._same(journal.load(self.keys[question.name]), question)
                    if not (self.options.resume and _was_capped(run)):
                        self._keep(question, run)
                if len(self.runs) == len(self.questions):
                    return True
                self.runs.clear()
        if known and not self.options.resume:
            unfinished = sum(not run.is_finished for run in known.values())
            raise RSAError(
                f"the journal {path} holds {len(known)} run{'s' if len(known) > 1 else ''}, {unfinished} unfinished; "
                "add --resume to go on with it, or name another file"
            )
        return False

    def _same(self, run: dict[str, Any], question: QuestionRecord) -> dict[str, Any]:
        """A finished run, checked to be the one that is asked for; budgets may have been fitted to the model."""
        asked, kept = self.config.model_dump(mode="json"), run["config"]
        fitted = {*BUDGETS, "prompt_style"} - self.chosen
        different = [f"{name}={asked[name]}, not {kept.get(name)}" for name in asked if asked[name] != kept.get(name)]
        different = [text for text in different if text.partition("=")[0] not in fitted]
        if run["question"]["messages"] != json.loads(json.dumps(question.messages)):
            different.append("another question")
        if different:
            raise RSAError(
                f"run '{run['run_key']}' in {self.options.journal} has other settings; asked are "
                f"{'; '.join(different)}. Ask with the same settings, or name another file"
            )
        return run

    # --- the run ----------------------------------------------------------------------------------

    async def _run(self) -> None:
        async with AsyncExitStack() as stack:
            completer = await open_completer(self.options, stack)
            capabilities = await completer.capabilities()
            lengths = await self._prompt_lengths(completer)
            self._fit(capabilities, max(lengths))
            self._announce(capabilities, self._estimate(lengths))
            journal = None
            if self.journal_path is not None:
                journal = stack.enter_context(Journal.open(self.journal_path))
                self._take_parts(journal, capabilities)
                _say(f"journal: {self.journal_path}")
            todo = [question for question in self.questions if question.name not in self.runs]
            self.began = time.monotonic()
            names = [question.name for question in todo]
            display = stack.enter_context(RSADisplay(names, self.config, stream=sys.stderr))
            await self._work(todo, completer, journal, display)

    async def _prompt_lengths(self, completer: Completer) -> list[int]:
        """Tokens of the questions, or of the longest and a sample of the others."""
        by_length = sorted(self.questions, key=lambda question: len(question.text), reverse=True)
        step = max(1, math.ceil(len(by_length) / MAX_COUNTED))
        return [await completer.count(question.messages, ()) for question in by_length[::step]]

    def _fit(self, capabilities: Capabilities, longest: int) -> None:
        context = capabilities.context
        is_small = capabilities.kind == "engine" and context is not None and context <= SHORT_PROMPT_CONTEXT
        if is_small and self.config.t and "prompt_style" not in self.chosen:
            self.config = self.config.model_copy(update={"prompt_style": "short"})
            _say(f"the model has {context:,} positions: short aggregation prompts (--set prompt_style=full for others)")
        self.config, note = fit_context(self.config, context, longest, self.chosen)
        if note:
            _say(f"warning: {note}")

    def _estimate(self, lengths: Sequence[int]) -> Estimate:
        mean = math.ceil(sum(lengths) / len(lengths))
        several = [estimate(self.config, max(lengths), self.price)]
        several += [estimate(self.config, mean, self.price)] * (len(self.questions) - 1)
        return total_estimate(several)

    def _announce(self, capabilities: Capabilities, expected: Estimate) -> None:
        _say(f"model: {capabilities.model} ({capabilities.kind}); tokens counted by: {capabilities.token_counting}")
        _say(estimate_text(expected))
        for warning in self.config.warnings():
            _say(f"warning: {warning}")
        for note in capabilities.notes:
            _say(f"note: {note}")
        for deviation in self.config.deviations:
            _say(f"deviation from the published algorithm: {deviation}")
        if self.config.task == "general" and any(question.answer is not None for question in self.questions):
            _say("answers are compared as whole texts; for worked solutions give --task math")
        if not self.options.yes and has_terminal():
            print("go on? [Y/n] ", end="", file=sys.stderr, flush=True)
            if sys.stdin.readline().strip().lower() not in ("", "y", "yes"):
                raise RSAError("not begun; lower the budgets, or give --max-tokens-total as a cap")

    def _take_parts(self, journal: Journal, capabilities: Capabilities) -> None:
        """What a resumed journal holds: all of it is checked before anything is spent, finished runs are taken."""
        known = {run.run_key: run for run in journal.runs()}
        for question in self.questions:
            run = known.get(self.keys[question.name])
            if run is not None:
                journal.begin(run.run_key, self.config, Question.of(question.messages), capabilities)
                if run.is_finished and not _was_capped(kept := journal.load(run.run_key)):
                    self._keep(question, kept)
        if self.runs:
            _say(f"{len(self.runs)} of {len(self.questions)} problems are finished in the journal")

    async def _work(
        self, todo: Sequence[QuestionRecord], completer: Completer, journal: Journal | None, display: RSADisplay
    ) -> None:
        """All problems, as many at a time as keep every call busy; each ends for itself."""
        concurrency = self.options.most_calls
        limiter = asyncio.Semaphore(concurrency)
        budget = None
        if self.options.max_tokens_total is not None:
            budget = Budget(self.options.max_tokens_total)
        waiting = iter(todo)

        async def work() -> None:
            for question in waiting:
                key = self.keys[question.name]
                try:
                    result = await markovian_rsa(
                        question.messages,
                        completer,
                        self.config,
                        journal=journal,
                        run_key=key,
                        on_event=display.listener(question.name),
                        limiter=limiter,
                        budget=budget,
                        verifier=self._verifier(question),
                    )
                except OpenZayaError as error:
                    if not self.options.data:
                        raise
                    self.errors[question.name] = str(error)
                    display.ended(question.name, f"failed: {error}")
                    continue
                self._keep(question, self._record(question, result) if journal is None else journal.load(key))
                display.ended(question.name, self._in_words(question.name))

        # Twice the problems that fill the limit: between two rounds of one, another has calls to make.
        num_workers = min(len(todo), max(1, math.ceil(2 * concurrency / self.config.width(0))))
        workers = [asyncio.ensure_future(work()) for _ in range(num_workers)]
        try:
            await asyncio.gather(*workers)
        finally:
            for worker in workers:
                worker.cancel()
            await asyncio.gather(*workers, return_exceptions=True)

    def _verifier(self, question: QuestionRecord) -> Verifier | None:
        gold, task = question.answer, self.config.task
        if gold is None:
            return None

        def verify(rollout: Rollout) -> float | None:
            # One that was cut off has no answer, and is not right.
            return check_answer(rollout.content, gold, task) if rollout.is_closed else 0.0

        return verify

    # --- after ------------------------------------------------------------------------------------

    def _record(self, question: QuestionRecord, result: RSAResult) -> dict[str, Any]:
        """What a journal would give."""
        failures = sum(one.status == "failed" for round_ in result.rounds for one in round_.candidates)
        asked = asdict(Question.of(question.messages))
        marks = {"run_key": self.keys[question.name], "question": asked, "state": "finished"}
        return result.to_dict() | marks | {"num_failures": failures}

    def _keep(self, question: QuestionRecord, run: dict[str, Any]) -> None:
        if self.options.data is not None and (self.journal_path is not None or self.options.html is None):
            # Of many problems only figures are shown, and the view reads the journal: memory need not hold all texts.
            for round_ in run["rounds"]:
                for candidate in round_["candidates"]:
                    candidate["rollout"] = candidate["tail"] = None
        self.runs[question.name] = run | {"expected": question.answer}

    def _in_words(self, name: str) -> str:
        run = self.runs[name]
        final = run["rounds"][-1]
        answer = (run["answer"] or {}).get("normalised") or (run["answer"] or {}).get("content") or "no answer"
        score = "" if run["score"] is None else f", mean reward {run['score']:.0%}"
        stopped = f", stopped early: {run['stopped_early']}" if run["stopped_early"] else ""
        votes = leading_answers(final["answers"])
        return f"{one_line(answer, 60)}{score}; {run['tokens']['completion']:,} tokens; votes: {votes}{stopped}"

    def _report(self) -> None:
        seconds = time.monotonic() - self.began
        place = {
            "journal": None if self.journal_path is None else str(self.journal_path),
            "html": None if self.options.html is None else str(self.options.html),
        }
        if self.options.data is None:
            [run] = self.runs.values()
            print(json.dumps(run | place) if self.options.as_json else _answer_text(run), flush=True)
            self._write_page()
            return
        runs = list(self.runs.values())
        summary = summarise(runs, self.errors, seconds)
        if self.options.as_json:
            problems = [self._problem_record(question.name) for question in self.questions]
            print(json.dumps({"summary": summary, "problems": problems} | place))
        else:
            print(summary_text(summary, self.errors), flush=True)
        self._write_page()
        if self.errors:
            again = f"; go on with: --journal {self.journal_path} --resume" if self.journal_path else ""
            raise Failed(f"{len(self.errors)} of {len(self.questions)} problems have no result{again}")

    def _problem_record(self, name: str) -> dict[str, Any]:
        if name not in self.runs:
            return {"id": name, "error": self.errors.get(name, "not run")}
        run = self.runs[name]
        left_out = ("candidates",)
        return {
            "id": name,
            "answer": run["answer"]["normalised"] or run["answer"]["content"],
            "expected": run["expected"],
            **problem_figures(run),
            "rounds": [{key: one[key] for key in one if key not in left_out} for one in run["rounds"]],
            "tokens": run["tokens"],
            "seconds": run["seconds"],
            "stopped_early": run["stopped_early"],
        }

    def _write_page(self) -> None:
        if self.options.html is None:
            return
        if self.journal_path is None or not self.journal_path.is_file():
            path = write_view(list(self.runs.values()), self.options.html)
        else:
            # What an interrupted run left is there only.
            with Journal.open(self.journal_path, read_only=True) as journal:
                known = {run.run_key for run in journal.runs()}
                expected = {self.keys[question.name]: {"expected": question.answer} for question in self.questions}
                asked = {key: more for key, more in expected.items() if key in known}
                path = write_view(JournalRuns(journal, asked), self.options.html)
        _say(f"view: {path}")

    def _how_to_go_on(self) -> str:
        if self.journal_path is None or not self.journal_path.is_file():
            return "interrupted; nothing is kept" + ("" if self.journal_path else ", since there is no journal")
        return (
            "interrupted; every finished rollout is in the journal. Go on with the same command and: "
            f"--journal {self.journal_path} --resume"
        )


def _was_capped(run: Mapping[str, Any]) -> bool:
    """Whether a finished run ended at the cap on tokens: it can go on under a higher one."""
    return "the cap of" in (run["stopped_early"] or "")


def _answer_text(run: Mapping[str, Any]) -> str:
    """What was asked for: one answer, or with ``select="all"`` each under its number."""
    slots = run["selected"]
    if len(slots) < 2 or run["config"]["select"] != "all":
        calls = run["answer"]["tool_calls"]
        return run["answer"]["content"].strip() + (f"\n{json.dumps(calls)}" if calls else "")
    by_slot = {candidate["slot"]: candidate for candidate in run["rounds"][-1]["candidates"]}
    return "\n".join(f"--- answer {slot} ---\n{by_slot[slot]['rollout']['content'].strip()}" for slot in slots)


def _check_page(path: Path | None) -> None:
    """Raise ``ConfigError`` where the view could not be written after hours of work."""
    if path is None:
        return
    folder = next(parent for parent in path.absolute().parents if parent.exists())
    if path.is_dir() or not folder.is_dir() or not os.access(folder, os.W_OK):
        raise ConfigError(f"--html {path} cannot be written; name a file in a folder that you may write to")


def has_terminal() -> bool:
    """Whether somebody is there to be asked."""
    return sys.stdin.isatty() and sys.stderr.isatty()


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
