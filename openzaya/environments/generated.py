"""Environments of outside libraries: tasks set and answers scored by a service in a worker process.

A task is made anew from (name, difficulty, number) wherever it is judged, so that a task holds no library objects; the
service keeps the last ones. The prompt must come out the same again, else there is no verdict: another version of the
library sets other tasks.

    prompt      = service.prompt(name, difficulty, number)
    score, text = service.score(name, difficulty, number, answer)        0 to 1, and the prompt
"""

from __future__ import annotations

import hashlib
import re
from abc import ABC, abstractmethod
from collections import OrderedDict
from typing import Any

from openzaya.environments.base import Environment, Task, check_difficulty
from openzaya.environments.worker import Worker, WorkerFailure
from openzaya.errors import DataError
from openzaya.problems.base import Verdict
from openzaya.problems.verify import UNCLOSED_REASONING, split_response

TASK_TIMEOUT_S = 60.0
SCORE_TIMEOUT_S = 20.0
MAX_ANSWER_LENGTH = 100_000
"""Characters; longer answers are wrong without being looked at."""
MAX_DIFFICULTY = 1_000
"""Higher ones set the same tasks: libraries step through the levels."""
_NUM_KEPT = 512
_ENOUGH = 1.0 - 1e-6
_ALTERNATIVES = re.compile(r"\b(?:or|either)\b|\|\||&&", re.IGNORECASE)


class GeneratedService(ABC):
    """Runs in the worker process; keeps the tasks made last."""

    def __init__(self, seed: int) -> None:
        self._seed = seed
        self._made: OrderedDict[tuple[str, int, int], tuple[str, Any]] = OrderedDict()

    @abstractmethod
    def names(self) -> list[str]:
        """All environments of the library."""

    @abstractmethod
    def _make(self, name: str, difficulty: int, number: int) -> tuple[str, Any]:
        """The prompt, and what is needed to score."""

    @abstractmethod
    def _score(self, name: str, made: Any, answer: str) -> float:
        """From 0 to 1."""

    def prompt(self, name: str, difficulty: int, number: int) -> str:
        return self._find(name, difficulty, number)[0]

    def score(self, name: str, difficulty: int, number: int, answer: str) -> tuple[float, str]:
        prompt, made = self._find(name, difficulty, number)
        return float(self._score(name, made, answer)), prompt

    def _find(self, name: str, difficulty: int, number: int) -> tuple[str, Any]:
        key = (name, difficulty, number)
        if key not in self._made:
            self._made[key] = self._make(*key)
            while len(self._made) > _NUM_KEPT:
                self._made.popitem(last=False)
        self._made.move_to_end(key)
        return self._made[key]

    def seed_of(self, name: str, difficulty: int, number: int) -> int:
        """A seed of 31 bits for a task."""
        text = f"{self._seed}/{name}/{difficulty}/{number}"
        return int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "big") >> 1


def names_alternatives(answer: str, gold: str) -> bool:
    """Whether an answer says "or" where the right one does not: some scorers read one part, or compute with it."""
    return _ALTERNATIVES.search(answer) is not None and _ALTERNATIVES.search(gold) is None


class GeneratedEnvironment(Environment):
    """One environment of a library, ``prefix/name``; the library's environments share ``worker``."""

    def __init__(
        self,
        prefix: str,
        name: str,
        worker: Worker,
        *,
        task_timeout_s: float = TASK_TIMEOUT_S,
        score_timeout_s: float = SCORE_TIMEOUT_S,
    ) -> None:
        self.name = f"{prefix}/{name}"
        self._name = name
        self._worker = worker.share()
        self._is_closed = False
        self._task_timeout_s, self._score_timeout_s = task_timeout_s, score_timeout_s

    def task(self, difficulty: int, number: int) -> Task:
        check_difficulty(difficulty)
        level = min(difficulty, MAX_DIFFICULTY)
        try:
            prompt = self._worker.call("prompt", self._name, level, number, timeout_s=self._task_timeout_s)
        except WorkerFailure as failure:
            # A generator that failed may have left a thread behind that never ends.
            self._worker.restart()
            raise DataError(
                f"{self.name} cannot set task {number} of difficulty {difficulty}: {failure}; "
                "lower the difficulty or leave this environment out"
            ) from None
        data = {"level": level, "number": number}
        return Task(self.name, difficulty, number, [{"role": "user", "content": prompt}], data)

    def verify(self, task: Task, response: str) -> Verdict:
        if task.environment != self.name:
            return Verdict(None, f"task is of '{task.environment}', not '{self.name}'")
        if not isinstance(response, str):
            return Verdict(None, f"response is {type(response).__name__}, not text")
        _, answer = split_response(response)
        if answer is None:
            return Verdict(0.0, UNCLOSED_REASONING)
        if not answer:
            return Verdict(0.0, "empty answer")
        if len(answer) > MAX_ANSWER_LENGTH:
            return Verdict(0.0, "answer too long")
        if (reason := self.malformed(answer)) is not None:
            return Verdict(0.0, reason)
        try:
            level, number, prompt = task.data["level"], task.data["number"], task.messages[-1]["content"]
            score, made = self._worker.call("score", self._name, level, number, answer, timeout_s=self._score_timeout_s)
        except WorkerFailure as failure:
            return Verdict(None, f"verifier failed: {failure}")
        except (KeyError, IndexError, TypeError) as error:
            return Verdict(None, f"task cannot be read: {type(error).__name__}: {error}")
        if made != prompt:
            return Verdict(None, "the library sets another task today; is it another version?")
        return Verdict(1.0, "correct") if score >= _ENOUGH else Verdict(0.0, "wrong answer")

    def malformed(self, answer: str) -> str | None:
        """Why an answer is wrong by its form alone."""
        return None

    def close(self) -> None:
        if not self._is_closed:
            self._is_closed = True
            self._worker.close()
