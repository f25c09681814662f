"""What a person sees while Markovian RSA runs: a live table on a terminal, plain lines elsewhere.

One problem is shown by its rounds, many by how far each that is running has come. The rate counts newly generated
tokens of rollouts that have ended; the time left supposes that rollouts take as long as those that ended in this
process. Answers are the model's text: only printable characters of them reach the terminal.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import IO, TYPE_CHECKING

from openzaya.runlog import PLAIN_LINE_INTERVAL_S, format_duration
from openzaya.ttc.config import RSAConfig
from openzaya.ttc.results import Event, OnEvent

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.live import Live

MAX_ANSWERS_SHOWN = 4
MAX_ANSWER_CHARACTERS = 24
MAX_PROBLEMS_SHOWN = 12


def one_line(text: str, max_characters: int) -> str:
    """``text`` fit for one line of a terminal: printable, blanks collapsed, cut with an ellipsis."""
    # A whole rollout need not be cleaned for a few characters of it.
    text = " ".join("".join(c if c.isprintable() else " " for c in text[: 8 * max_characters]).split())
    return text if len(text) <= max_characters else text[: max_characters - 1] + "…"


def leading_answers(answers: Mapping[str, int]) -> str:
    """``42 (5), 17 (2)``: the most frequent answers and how often each was given."""
    leading = sorted(answers.items(), key=lambda item: -item[1])
    shown = [f"{one_line(answer, MAX_ANSWER_CHARACTERS)} ({count})" for answer, count in leading[:MAX_ANSWERS_SHOWN]]
    return ", ".join(shown) + (", …" if len(leading) > MAX_ANSWERS_SHOWN else "")


@dataclass
class RoundState:
    """How far one round has come."""

    width: int
    running: set[int] = field(default_factory=set)
    done: int = 0
    failed: int = 0
    tokens: int = 0
    answers: dict[str, int] = field(default_factory=dict)
    has_ended: bool = False
    seconds: float = 0.0


@dataclass
class ProblemState:
    """How far one problem has come."""

    name: str
    rounds: list[RoundState]
    begun: bool = False
    result: str | None = None
    """What to say of it when it has ended."""

    @property
    def current(self) -> int:
        """The latest round of which anything is known."""
        known = [i for i, one in enumerate(self.rounds) if one.running or one.done or one.failed]
        return known[-1] if known else 0

    @property
    def num_left(self) -> int:
        if self.result is not None:
            return 0
        return sum(max(0, one.width - one.done - one.failed) for one in self.rounds if not one.has_ended)


class RSADisplay:
    """Shows runs on ``stream``; their events may come from any thread. Use it as a context manager."""

    def __init__(
        self, names: list[str], config: RSAConfig, *, stream: IO[str], clock: Callable[[], float] = time.monotonic
    ) -> None:
        widths = [config.width(i) for i in range(config.t + 1)]
        self._problems = {name: ProblemState(name, [RoundState(width) for width in widths]) for name in names}
        self._stream, self._clock = stream, clock
        self._started_s = self._last_line_s = clock()
        self._fresh_rollouts = self._fresh_tokens = 0
        self._lock = threading.Lock()
        self._live: Live | None = None

    def listener(self, name: str) -> OnEvent:
        """What :func:`openzaya.markovian_rsa` is to call for the problem of that name."""
        problem = self._problems[name]

        def listen(event: Event) -> None:
            with self._lock:
                lines = self._take(problem, event)
            if self._live is None:
                for line in lines:
                    print(line, file=self._stream, flush=True)

        return listen

    def ended(self, name: str, result: str) -> None:
        """A problem has come to its end; ``result`` says in a few words how."""
        with self._lock:
            problem = self._problems[name]
            problem.result = one_line(result, 200)
            line = f"{self._place(problem)}{problem.result}  {self._pace()}"
        if self._live is None:
            print(line, file=self._stream, flush=True)

    def _take(self, problem: ProblemState, event: Event) -> list[str]:
        """Book an event; gives the plain lines that are due."""
        problem.begun = True
        if not 0 <= event.round_index < len(problem.rounds):
            return []
        current = problem.rounds[event.round_index]
        if event.kind == "launched":
            current.running.add(event.slot)
        elif event.kind == "candidate" and event.candidate is not None:
            candidate = event.candidate
            current.running.discard(candidate.slot)
            current.done += candidate.status == "done"
            current.failed += candidate.status == "failed"
            tokens = 0 if candidate.rollout is None else candidate.rollout.usage.completion
            current.tokens += tokens
            if not candidate.is_resumed:
                self._fresh_rollouts += 1
                self._fresh_tokens += tokens
            if candidate.answer is not None:
                current.answers[candidate.answer] = current.answers.get(candidate.answer, 0) + 1
            if self._clock() - self._last_line_s >= PLAIN_LINE_INTERVAL_S:
                return [self._line(problem, event.round_index)]
        elif event.kind == "round" and event.round is not None:
            current.has_ended, current.seconds = True, event.round.seconds
            current.running.clear()
            # Answers that mean the same have one name by now.
            current.answers = event.round.answers() or current.answers
            if len(self._problems) == 1:
                return [self._line(problem, event.round_index)]
        return []

    # --- text -------------------------------------------------------------------------------------

    def _line(self, problem: ProblemState, index: int) -> str:
        self._last_line_s = self._clock()
        one = problem.rounds[index]
        parts = [
            f"{self._place(problem)}round {index}/{len(problem.rounds) - 1}  {self._counts(one)}",
            self._pace(),
            leading_answers(one.answers),
        ]
        return "  ".join(part for part in parts if part)

    def _place(self, problem: ProblemState) -> str:
        if len(self._problems) == 1:
            return ""
        ended = sum(one.result is not None for one in self._problems.values())
        return f"[{ended}/{len(self._problems)}] {one_line(problem.name, 40)}: "

    @staticmethod
    def _counts(one: RoundState) -> str:
        running = f", {len(one.running)} under way" if one.running else ""
        failed = f", {one.failed} failed" if one.failed else ""
        return f"{one.done} of {one.width} done{running}{failed}  {one.tokens:,} tokens"

    def _pace(self) -> str:
        elapsed = self._clock() - self._started_s
        left = sum(problem.num_left for problem in self._problems.values())
        parts = [f"{self._fresh_tokens / elapsed:,.0f} tokens/s"] if elapsed > 0 and self._fresh_tokens else []
        if self._fresh_rollouts and left:
            parts.append(f"ETA {format_duration(left * elapsed / self._fresh_rollouts)}")
        return "  ".join([*parts, f"{format_duration(elapsed)} gone"])

    # --- terminal ---------------------------------------------------------------------------------

    def _render(self) -> RenderableType:
        from rich.table import Table
        from rich.text import Text

        with self._lock:
            table = Table(box=None, padding=(0, 2, 0, 0), show_header=True, header_style="bold")
            many = len(self._problems) > 1
            for title in ("problem", "round") if many else ("round",):
                table.add_column(title, no_wrap=True)
            for title in ("done", "under way", "failed", "tokens"):
                table.add_column(title, justify="right", no_wrap=True)
            table.add_column("leading answers", no_wrap=True, overflow="ellipsis")
            rows: list[tuple[str, int, RoundState]]
            if many:
                active = [one for one in self._problems.values() if one.begun and one.result is None]
                rows = [(one.name, one.current, one.rounds[one.current]) for one in active[:MAX_PROBLEMS_SHOWN]]
            else:
                [problem] = self._problems.values()
                rows = [("", index, one) for index, one in enumerate(problem.rounds)]
            last = next(iter(self._problems.values())).rounds
            for name, index, one in rows:
                first = [one_line(name, 24)] if many else []
                cells = [f"{index}/{len(last) - 1}", f"{one.done}/{one.width}", f"{len(one.running)}"]
                cells += [f"{one.failed}" if one.failed else "", f"{one.tokens:,}", leading_answers(one.answers)]
                # Text, not str: square brackets of an answer are no markup.
                table.add_row(*(Text(cell) for cell in first + cells))
            table.caption_justify = "left"
            ended = sum(one.result is not None for one in self._problems.values())
            begun = f"{ended} of {len(self._problems)} problems done  " if many else ""
            table.caption = Text(begun + self._pace())
        return table

    def __enter__(self) -> RSADisplay:
        self._started_s = self._last_line_s = self._clock()
        if self._stream.isatty():
            from rich.console import Console
            from rich.live import Live

            self._live = Live(
                get_renderable=self._render, console=Console(file=self._stream), refresh_per_second=4, transient=False
            )
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._live is not None:
            self._live.stop()
