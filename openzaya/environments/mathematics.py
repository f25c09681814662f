"""Mathematics with exact answers: a user's file of problems, or built-in items; answers are compared by math-verify.

A response answers in one ``\\boxed{...}`` after its reasoning, or with the bare answer and nothing else. Two boxes,
several values for one, and an answer among words earn nothing. Equal values in any spelling are right
(``math_equality``: a worker process; too slow a comparison gives no verdict). Without the package math-verify answers
are compared by one spelling (``openzaya.problems.math_answers``).

A file is JSON Lines: ``problem``, ``answer`` (the final answer) and, where wanted, ``difficulty``, an integer. At
difficulty d come problems of the highest difficulty in the file that is not above d, or of the lowest.
"""

from __future__ import annotations

import hashlib
import json
import random
import re
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

from openzaya.environments import math_equality
from openzaya.environments.base import Environment, Task, check_difficulty
from openzaya.environments.symbolic import KINDS
from openzaya.errors import DataError
from openzaya.problems.base import Verdict
from openzaya.problems.math_answers import last_boxed, normalise_math
from openzaya.problems.verify import UNCLOSED_REASONING, split_response

REQUEST = r"Give the final answer in \boxed{}."
MAX_ANSWER_LENGTH = 2_000
MAX_DIFFICULTY = 200
"""Higher ones set items of this difficulty: numbers would fill pages."""
_BOX = re.compile(r"\\f?box(?:ed)?\s{0,8}\{")
_SEVERAL = re.compile(
    r"\b(?:or|and|either|maybe|not|to)\b|\\(?:text|mbox|mathrm)\s*\{[^{}]*\}|\\(?:lor|vee|pm|mp)\b|[;?&|]|\.\."
)


class MathematicsSpec(BaseModel):
    """Recipe entry of mathematical tasks."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Literal["mathematics"] = "mathematics"
    name: str = "mathematics"
    path: str = ""
    """A JSON Lines file of problems; empty: built-in items."""
    seed: int = 0

    def make(self) -> list[Environment]:
        if self.path:
            return [MathematicsFile(self.path, seed=self.seed, name=self.name)]
        return [SymbolicMathematics(seed=self.seed, name=self.name)]


class _Mathematics(Environment):
    """Judges; subclasses set the tasks. Task data: the answer."""

    name: str

    def _task(self, difficulty: int, number: int, problem: str, answer: str) -> Task:
        content = f"{problem}\n{REQUEST}"
        return Task(self.name, difficulty, number, [{"role": "user", "content": content}], {"answer": answer})

    def verify(self, task: Task, response: str) -> Verdict:
        if not isinstance(response, str):
            return Verdict(None, f"response is {type(response).__name__}, not text")
        try:
            gold = str(task.data["answer"])
        except (KeyError, TypeError) as error:
            return Verdict(None, f"task cannot be read: {type(error).__name__}: {error}")
        return check(gold, response)


class SymbolicMathematics(_Mathematics):
    """Built-in items of all kinds in turn."""

    def __init__(self, *, seed: int = 0, name: str = "mathematics") -> None:
        self.name, self._seed = name, seed

    def task(self, difficulty: int, number: int) -> Task:
        check_difficulty(difficulty)
        rng = _generator("symbolic", self._seed, difficulty, number)
        problem, answer = rng.choice(KINDS)(rng, min(difficulty, MAX_DIFFICULTY))
        return self._task(difficulty, number, problem, answer)


class MathematicsFile(_Mathematics):
    """A file of problems; each difficulty goes through its problems in an order of its own, again and again.

    Raises:
        DataError: a file that cannot be read, or a line of it that is no problem.
    """

    def __init__(self, path: str | Path, *, seed: int = 0, name: str = "mathematics") -> None:
        self.name, self._seed = name, seed
        self._levels: dict[int, list[tuple[str, str]]] = {}
        for difficulty, problem, answer in _read(Path(path)):
            self._levels.setdefault(difficulty, []).append((problem, answer))
        if not self._levels:
            raise DataError(f"{path} holds no problems; write one JSON object with problem and answer a line")

    def task(self, difficulty: int, number: int) -> Task:
        check_difficulty(difficulty)
        level = max((level for level in self._levels if level <= difficulty), default=min(self._levels))
        items = self._levels[level]
        passes, place = divmod(number, len(items))
        order = list(range(len(items)))
        _generator("file", self._seed, level, passes).shuffle(order)
        return self._task(difficulty, number, *items[order[place]])


def check(gold: str, response: str) -> Verdict:
    """Judge a response whose right final answer is ``gold``."""
    _, answer = split_response(response)
    if answer is None:
        return Verdict(0.0, UNCLOSED_REASONING)
    if not answer:
        return Verdict(0.0, "empty answer")
    boxes = len(_BOX.findall(answer))
    if boxes > 1:
        return Verdict(0.0, "more than one box")
    found = last_boxed(answer) if boxes else answer
    if not found:
        return Verdict(0.0, "empty box")
    if len(found) > MAX_ANSWER_LENGTH:
        return Verdict(0.0, "answer too long")
    if gold.isascii() and not found.replace("−", "-").isascii():
        return Verdict(0.0, "wrong answer")  # digits of other alphabets, signs that are not seen
    wanted, given = normalise_math(gold), normalise_math(found)
    if wanted == given:
        return Verdict(1.0, "correct")
    if _has_more(found, gold):
        return Verdict(0.0, "wrong answer")
    equal = math_equality.compare(wanted, given)
    if equal is None:
        return Verdict(None, "the comparison took too long")
    return Verdict(1.0, "correct") if equal else Verdict(0.0, "wrong answer")


def _has_more(found: str, gold: str) -> bool:
    """Whether an answer holds what its right answer does not: words, alternatives, further values or equations.

    math-verify looks for a formula in any text, and compares one of several.
    """
    if _SEVERAL.search(found) and not _SEVERAL.search(gold):
        return True
    if any(found.count(sign) > gold.count(sign) for sign in (",", "\n", "<", ">", "{=", "\\\\")):
        return True
    if found.count("=") > max(1, gold.count("=")) or "$" in found.strip().strip("$"):
        return True
    if "=" in found and "=" not in gold and not re.match(r"\$?\s*[A-Za-z](?:\([a-z]\))?\s*=", found):
        return True
    # A blank between two values is no sign of multiplication here: "3 5" is no answer to 15.
    return bool(re.search(r"[\w)}]\s+[\w(]", re.sub(r"\\[A-Za-z]+\s", "", found))) and not re.search(r"\w\s+\w", gold)


def _read(path: Path) -> list[tuple[int, str, str]]:
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"cannot read {path}: {error}; give a UTF-8 file of JSON lines") from None
    found = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            item: Any = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise DataError(f"{path}, line {number} is no JSON: {error}; write one object a line") from None
        if not isinstance(item, dict):
            raise DataError(f"{path}, line {number} is {type(item).__name__}; write an object with problem and answer")
        problem, answer, difficulty = item.get("problem"), item.get("answer"), item.get("difficulty", 0)
        if isinstance(answer, (int, float)) and not isinstance(answer, bool):
            answer = str(answer)
        for key, value in (("problem", problem), ("answer", answer)):
            if not isinstance(value, str) or not value.strip():
                raise DataError(f"{path}, line {number}: {key} is {value!r:.40}; give a text that is not empty")
        if not isinstance(difficulty, int) or isinstance(difficulty, bool) or difficulty < 0:
            raise DataError(f"{path}, line {number}: difficulty is {difficulty!r:.40}; give an integer of 0 or more")
        found.append((difficulty, str(problem), str(answer)))
    return found


def _generator(*key: object) -> random.Random:
    digest = hashlib.sha256("/".join(map(str, key)).encode()).digest()
    return random.Random(int.from_bytes(digest[:8], "big"))
