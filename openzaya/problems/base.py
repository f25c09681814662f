"""What a family of procedural problems is: the records, the annotator, and the abstract family.

The ZAYA1-8B report (arXiv 2605.05365) trains on procedural environments with a difficulty knob and
a verifier. A family here is the same at any size: it draws a problem of a given difficulty, works
it out in a fixed notation (the reasoning text and the answer), and judges a response.

1. ``generate(rng, difficulty)`` draws a :class:`Problem`; a level of difficulty adds about one step, without end.
2. ``solve(problem)`` writes the worked trace. With an :class:`Annotator` it writes what a careless
   person would have written: an error is carried on, so the wrong trace still follows from itself.
3. ``verify(problem, response)`` gives reward 1 or 0, or no verdict (``None``) when it could not judge.

Traces are built of lines of which each follows from the line before and the prompt in one step.
Letters are separated by blanks and numbers are short, so that a tokenizer that splits digits sees
one symbol a token.
"""

from __future__ import annotations

import random
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from openzaya.errors import DataError
from openzaya.problems.verify import UNCLOSED_REASONING, normalise_answer, normalise_spaces, split_response

_SLIPS = (-10, -2, -1, 1, 2, 10)


@dataclass(frozen=True, slots=True)
class Solution:
    """A worked solution: the text inside ``<think>``, the text after it, and whether the answer is right."""

    trace: str
    answer: str
    correct: bool


@dataclass(frozen=True, slots=True)
class Problem:
    """One problem.

    ``canonical`` is equal for problems that are the same (``3+4`` and ``4+3``) and starts with the
    family's name; the split is computed from it. ``data`` is what the solver needs and survives JSON.
    """

    family: str
    difficulty: int
    prompt: str
    canonical: str
    data: Sequence[Any]


@dataclass(frozen=True, slots=True)
class Verdict:
    """Reward 1.0 or 0.0 with the reason; ``None`` means no verdict: leave the response out, never count it as 0."""

    reward: float | None
    reason: str


@dataclass(frozen=True, slots=True)
class Annotator:
    """A fallible writer of demonstrations.

    ``habit`` applies the family's systematic wrong rule everywhere; ``slip_rate`` is the chance of a
    random slip at each step, drawn from ``rng``.
    """

    habit: bool
    slip_rate: float
    rng: random.Random

    def __post_init__(self) -> None:
        if not 0.0 <= self.slip_rate <= 1.0:
            raise DataError(f"slip_rate={self.slip_rate} is no probability; give a number from 0 to 1")

    def slips(self) -> bool:
        """Whether this step goes wrong by chance."""
        return self.slip_rate > 0.0 and self.rng.random() < self.slip_rate

    def number(self, value: int) -> int:
        """``value``, or a near but different number when this step slips."""
        if self.slips():
            return value + _SLIPS[int(self.rng.random() * len(_SLIPS))]
        return value


class Family(ABC):
    """A family of problems. Stateless: one instance serves all callers."""

    name: ClassVar[str]
    title: ClassVar[str]
    habit: ClassVar[str]
    """The systematic wrong rule of a careless annotator, in words."""

    @abstractmethod
    def _draw(self, rng: random.Random, difficulty: int) -> tuple[str, str, Sequence[Any]]:
        """Prompt, canonical form without the family's name, and data of a new problem."""

    @abstractmethod
    def _work(self, data: Sequence[Any], annotator: Annotator | None) -> tuple[str, str]:
        """Trace and answer; without an annotator both are right."""

    def _accepts(self, data: Sequence[Any], tokens: tuple[str, ...], right_answer: str) -> bool:
        """Whether an answer's ``tokens`` (of ``normalise_answer``) are right.

        A family whose problems have several right answers checks the tokens against the problem.
        """
        return tokens == normalise_answer(right_answer)

    def generate(self, rng: random.Random, difficulty: int) -> Problem:
        """Draw one problem from ``rng``; raises :class:`DataError` for a negative difficulty."""
        if difficulty < 0:
            raise DataError(f"difficulty={difficulty} is below 0, the easiest; give 0 or more")
        prompt, canonical, data = self._draw(rng, difficulty)
        return Problem(self.name, difficulty, prompt, f"{self.name}:{canonical}", data)

    def solve(self, problem: Problem, annotator: Annotator | None = None) -> Solution:
        """The right solution, or what ``annotator`` makes of the problem."""
        trace, answer = self._work(problem.data, annotator)
        if annotator is None:
            return Solution(trace, answer, True)
        _, right_answer = self._work(problem.data, None)
        return Solution(trace, answer, self._accepts(problem.data, normalise_answer(answer), right_answer))

    def verify(self, problem: Problem, response: str, *, strict: bool = False) -> Verdict:
        """Judge ``<think>…</think>answer`` or a bare answer.

        The answer is all text after the last ``</think>`` and must equal the right answer (a right
        answer, where there are several) up to blanks, case and leading zeros: nothing before or after
        it. ``strict`` also demands the solver's own trace. A failure of the verifier gives reward ``None``.
        """
        if problem.family != self.name:
            return Verdict(None, f"problem is of family '{problem.family}', not '{self.name}'")
        if not isinstance(response, str):
            return Verdict(None, f"response is {type(response).__name__}, not text")
        try:
            right = self.solve(problem)
            if not right.trace or not right.answer:
                raise DataError("a problem without any work")
        except Exception as error:  # any failure of the solver means that we cannot judge
            return Verdict(None, f"solver failed: {type(error).__name__}: {error}")
        reasoning, answer = split_response(response)
        if answer is None:
            return Verdict(0.0, UNCLOSED_REASONING)
        if not answer:
            return Verdict(0.0, "empty answer")
        # Bounded work on hostile input: a right answer is never much longer than ours.
        if len(answer) > 4 * len(right.answer) + 64:
            return Verdict(0.0, "answer too long")
        try:
            accepted = answer.isascii() and self._accepts(problem.data, normalise_answer(answer), right.answer)
        except Exception as error:
            return Verdict(None, f"verifier failed: {type(error).__name__}: {error}")
        if not accepted:
            return Verdict(0.0, "wrong answer")
        if strict:
            if reasoning is None:
                return Verdict(0.0, "no reasoning")
            if len(reasoning) > 4 * len(right.trace) + 64:
                return Verdict(0.0, "reasoning too long")
            if normalise_spaces(reasoning) != normalise_spaces(right.trace):
                return Verdict(0.0, "wrong reasoning")
        return Verdict(1.0, "correct")
