"""Environments of instructions: short problems with answer forms, and files of prompts with constraints.

``InstructionEnvironment`` asks for the answer of a small problem in one or more forms
(``openzaya.problems.instructions``). Three levels of difficulty add a form each: with forms = low + d // 3,
capped at high, the problem's own difficulty is what is left, d - 3 * (forms - low), so that levels go up
without an end.

``ConstraintEnvironment`` asks for a short text under constraints (``CONSTRAINTS``), d + 1 of them as far as they go
together; ``ConstraintFileEnvironment`` takes prompts and constraints from a file in the format of IFEval
(arXiv 2311.07911). These two reward whatever text satisfies all constraints: a reward for what it says, such as that
of a reward model, has to come on top.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

from openzaya.environments.base import Environment, Task, check_difficulty
from openzaya.errors import DataError
from openzaya.problems import TRAINED_FAMILIES, Problem, Solution, Split, Verdict, get_family, make_problem
from openzaya.problems.instructions.answer_forms import AnswerForm, get_form, in_order
from openzaya.problems.instructions.base import Constraint
from openzaya.problems.instructions.composed import (
    allowed_forms,
    comply,
    draw_forms,
    prompt_with_forms,
    right_answer,
    verify_forms,
)
from openzaya.problems.instructions.registry import draw_constraints, get_constraint, make_constraint
from openzaya.problems.verify import UNCLOSED_REASONING, split_response

LEVELS_PER_FORM = 3
REQUESTS = (
    "Write a short text about {topic}.",
    "Tell me something about {topic}.",
    "Describe {topic} to a friend.",
    "Explain why people care about {topic}.",
)
TOPICS = (
    "rain in the mountains",
    "an old harbor",
    "learning to cook",
    "the first day at school",
    "a night train",
    "a garden in spring",
    "how bread is made",
    "a lost letter",
    "bees and flowers",
    "repairing a bicycle",
    "a museum after closing time",
    "the sound of the sea",
)


class InstructionEnvironment(Environment):
    """Problems of ``families`` whose answer is to take forms, ``num_forms`` (lowest, highest) of them.

    ``forms`` limits the forms to those named (empty: all). With ``answer_required=False`` a wrong answer in
    all forms is rewarded too; only forms whose absence shows in any answer are then asked for.
    """

    def __init__(
        self,
        families: Sequence[str] = TRAINED_FAMILIES,
        *,
        num_forms: tuple[int, int] = (1, 3),
        forms: Sequence[str] = (),
        answer_required: bool = True,
        seed: int = 0,
        split: Split = "train",
        name: str = "instructions",
    ) -> None:
        low, high = num_forms
        if not 1 <= low <= high:
            raise DataError(f"{name}: num_forms={num_forms}; give (lowest, highest) with 1 <= lowest <= highest")
        if not families:
            raise DataError(f"{name}: families is empty; give at least one")
        self.name = name
        self._families = [get_family(family).name for family in families]
        allowed = allowed_forms(forms)
        self._allowed = [form for form in allowed if form.checkable or answer_required]
        self._low, self._high = low, high
        self._answer_required = answer_required
        self._seed, self._split = seed, split

    def task(self, difficulty: int, number: int) -> Task:
        check_difficulty(difficulty)
        num = min(self._low + difficulty // LEVELS_PER_FORM, self._high)
        rng = _generator(self.name, self._seed, difficulty, number, self._split)
        level = difficulty - LEVELS_PER_FORM * (num - self._low)
        problem = make_problem(rng.choice(self._families), level, self._seed, number, self._split)
        forms = draw_forms(rng, right_answer(problem), num, self._allowed)
        data = {
            "family": problem.family,
            "difficulty": problem.difficulty,
            "prompt": problem.prompt,
            "canonical": problem.canonical,
            "data": problem.data,
            "forms": [form.name for form in forms],
        }
        messages = [{"role": "user", "content": prompt_with_forms(problem.prompt, forms)}]
        return Task(self.name, difficulty, number, messages, data)

    def verify(self, task: Task, response: str) -> Verdict:
        try:
            problem, forms = problem_and_forms(task)
        except Exception as error:  # a damaged task cannot be judged
            return Verdict(None, f"task cannot be read: {type(error).__name__}: {error}")
        return verify_forms(problem, forms, response, answer_required=self._answer_required)


def problem_and_forms(task: Task) -> tuple[Problem, list[AnswerForm]]:
    """The problem and the forms, in order, behind a task of :class:`InstructionEnvironment`."""
    values = {**task.data}
    forms = in_order([get_form(name) for name in values.pop("forms")])
    return Problem(**values), forms


def solve(task: Task) -> Solution:
    """A right and complying solution of a task of :class:`InstructionEnvironment`."""
    problem, forms = problem_and_forms(task)
    return comply(get_family(problem.family).solve(problem), forms)


def _generator(*key: object) -> random.Random:
    digest = hashlib.blake2b("/".join(map(str, key)).encode(), digest_size=8).digest()
    return random.Random(int.from_bytes(digest, "big"))


class InstructionsSpec(BaseModel):
    """Recipe entry of :class:`InstructionEnvironment`."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Literal["instructions"] = "instructions"
    name: str = "instructions"
    families: list[str] = list(TRAINED_FAMILIES)
    num_forms: tuple[int, int] = (1, 3)
    """Lowest and highest number of forms; (1, 1) is simple, (2, 3) is hard instruction following."""
    forms: list[str] = []
    """Names of forms; all where it is empty."""
    answer_required: bool = True
    seed: int = 0

    def make(self) -> list[Environment]:
        return [
            InstructionEnvironment(
                self.families,
                num_forms=self.num_forms,
                forms=self.forms,
                answer_required=self.answer_required,
                seed=self.seed,
                name=self.name,
            )
        ]


class _Constrained(Environment):
    """Judges by the constraints that a task holds."""

    def verify(self, task: Task, response: str) -> Verdict:
        if not isinstance(response, str):
            return Verdict(None, f"response is {type(response).__name__}, not text")
        try:
            constraints = constraints_of(task)
            _, answer = split_response(response)
            if answer is None:
                return Verdict(0.0, UNCLOSED_REASONING)
            if not answer:
                return Verdict(0.0, "empty answer")
            missed = [constraint.kind for constraint in constraints if not constraint.check(answer)]
        except Exception as error:  # a damaged task, or a checker that cannot run here
            return Verdict(None, f"cannot be judged: {type(error).__name__}: {error}")
        return Verdict(0.0, f"not followed: {', '.join(missed)}") if missed else Verdict(1.0, "all constraints hold")


def constraints_of(task: Task) -> list[Constraint]:
    """The constraints of a task of :class:`ConstraintEnvironment` or :class:`ConstraintFileEnvironment`."""
    return [make_constraint(kind, arguments) for kind, arguments in task.data["constraints"]]


def _constraint_data(constraints: Sequence[Constraint]) -> dict[str, Any]:
    return {"constraints": [[constraint.kind, constraint.arguments()] for constraint in constraints]}


class ConstraintEnvironment(_Constrained):
    """A request for a short text with difficulty + 1 constraints, as far as these go together.

    ``kinds`` names the types to draw from; empty means all that need no extra package.
    """

    def __init__(self, kinds: Sequence[str] = (), *, seed: int = 0, name: str = "constraints") -> None:
        self.name = name
        self._kinds = [get_constraint(kind).kind for kind in kinds]
        self._seed = seed

    def task(self, difficulty: int, number: int) -> Task:
        check_difficulty(difficulty)
        rng = _generator(self.name, self._seed, difficulty, number)
        request = rng.choice(REQUESTS).format(topic=rng.choice(TOPICS))
        constraints = draw_constraints(rng, difficulty + 1, self._kinds)
        content = " ".join([request, *(constraint.describe(rng) for constraint in constraints)])
        messages = [{"role": "user", "content": content}]
        return Task(self.name, difficulty, number, messages, _constraint_data(constraints))


class ConstraintFileEnvironment(_Constrained):
    """Prompts of a JSONL file with ``prompt``, ``instruction_id_list`` and ``kwargs``; other fields are ignored.

    The easiest level holds the prompts with the fewest constraints, the next those with the next number, and so on.
    A line that cannot be used raises :class:`DataError` with its number.
    """

    def __init__(self, path: str | Path, *, name: str = "constraint-file") -> None:
        self.name = name
        levels: dict[int, list[tuple[str, list[Constraint]]]] = {}
        try:
            lines = Path(path).read_text(encoding="utf-8").split("\n")
        except (OSError, UnicodeDecodeError) as error:
            raise DataError(f"{path}: cannot be read as UTF-8 text: {error}") from None
        for number, line in enumerate(lines, 1):
            if line.strip():
                prompt, constraints = _read_line(f"{path}, line {number}", line)
                levels.setdefault(len(constraints), []).append((prompt, constraints))
        if not levels:
            raise DataError(f"{path}: no prompts; give one JSON object a line")
        self._levels = [levels[num] for num in sorted(levels)]

    def task(self, difficulty: int, number: int) -> Task:
        check_difficulty(difficulty)
        level = self._levels[min(difficulty, len(self._levels) - 1)]
        prompt, constraints = level[number % len(level)]
        return Task(self.name, difficulty, number, [{"role": "user", "content": prompt}], _constraint_data(constraints))


def _read_line(where: str, line: str) -> tuple[str, list[Constraint]]:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where}: no JSON: {error}") from None
    if not isinstance(row, Mapping):
        raise DataError(f"{where}: {type(row).__name__} instead of an object")
    prompt, kinds, arguments = row.get("prompt"), row.get("instruction_id_list"), row.get("kwargs")
    if not isinstance(prompt, str) or not prompt.strip():
        raise DataError(f"{where}: 'prompt' is no text, or a blank one")
    if not isinstance(kinds, list) or not kinds:
        raise DataError(f"{where}: 'instruction_id_list' is no list of names, or an empty one")
    if not isinstance(arguments, list) or len(arguments) != len(kinds):
        raise DataError(f"{where}: 'kwargs' is no list with one entry for each of the {len(kinds)} constraints")
    try:
        return prompt, [_from_file(kind, values) for kind, values in zip(kinds, arguments, strict=True)]
    except DataError as error:
        raise DataError(f"{where}: {error}") from None


def _from_file(kind: Any, values: Any) -> Constraint:
    if not isinstance(kind, str):
        raise DataError(f"constraint name {kind!r} is no text")
    if values is not None and not isinstance(values, Mapping):
        raise DataError(f"{kind}: arguments are {type(values).__name__} instead of an object")
    # Tables list every argument of every type; those of other types are null.
    return make_constraint(kind, values)


class ConstraintsSpec(BaseModel):
    """Recipe entry of :class:`ConstraintEnvironment` and, with a ``path``, of :class:`ConstraintFileEnvironment`."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Literal["constraints"] = "constraints"
    name: str = "constraints"
    path: str = ""
    """JSONL in the format of IFEval; empty: prompts of our own."""
    constraints: list[str] = []
    """Names of constraint types to draw from; all where it is empty. Not with a path."""
    seed: int = 0

    def make(self) -> list[Environment]:
        if self.path and self.constraints:
            raise DataError(f"{self.name}: path and constraints are both given; a file brings its own constraints")
        if self.path:
            return [ConstraintFileEnvironment(self.path, name=self.name)]
        return [ConstraintEnvironment(self.constraints, seed=self.seed, name=self.name)]
