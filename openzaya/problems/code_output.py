"""Predicting what a small Python program prints.

The program sets x and changes it: assignments, loops over ``range`` and conditions. A line of the trace repeats the
statement that is executed and writes x after it, ``x+=4 x=11``; in a loop it begins with the loop's variable,
``i=2 x-=i x=9``, and a condition says what it found, ``if x>9 yes x-=4 x=7``. Difficulty d executes d + 3 statements,
rounds counted singly. Values of the right solution lie in 0..99. Each program has a loop that uses its variable,
because the careless annotator counts from 1.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any, ClassVar

from openzaya.problems.base import Annotator, Family
from openzaya.problems.code_numbers import LARGEST, draw_loop, draw_sum
from openzaya.problems.small_programs import Statement, holds, run, step, steps, write


class CodeOutput(Family):
    """Data: the value of x at the start, the statements."""

    name: ClassVar[str] = "code_output"
    title: ClassVar[str] = "output of Python code"
    habit: ClassVar[str] = "counts a loop's variable from 1"

    def _draw(self, rng: random.Random, difficulty: int) -> tuple[str, str, Sequence[Any]]:
        value = start = int(rng.random() * (LARGEST + 1))
        statements: list[Statement] = []
        for num_rounds in _draw_rounds(rng, difficulty + 3):
            before = statements[-1] if statements else None
            statement = _draw_statement(rng, value, num_rounds, before)
            value = run([statement], value)
            statements.append(statement)
        code = "\n".join([f"x={start}", *write(statements), "print(x)"])
        return f"Output of this program: \n{code}", code, (start, tuple(statements))

    def _work(self, data: Sequence[Any], annotator: Annotator | None) -> tuple[str, str]:
        value, statements = data
        lines = []
        first_round = 1 if annotator is not None and annotator.habit else 0
        for simple, whole, i in steps(statements, first_round):
            text = " ".join(line.strip().rstrip(":") for line in write([simple]))
            if simple[0] == "if":
                condition, body = write([simple])
                found = f"yes {body.strip()}" if holds(simple[1], simple[2], value) else "no"
                text = f"{condition.rstrip(':')} {found}"
            elif whole[0] == "for":
                text = f"i={i} {text}"
            result = step(simple, value, i)
            value = result if annotator is None else annotator.number(result)
            lines.append(f"{text} x={value}")
        return "\n".join(lines), str(value)


def _draw_rounds(rng: random.Random, num_steps: int) -> list[int]:
    """Rounds of each statement, in all ``num_steps``; negative for the one loop that must use its variable."""
    uniform = rng.random
    loop = 2 + int(uniform() * min(2, num_steps - 1))
    rounds = [-loop]
    left = num_steps - loop
    while left:
        num_rounds = min(left, 2 + int(uniform() * 3)) if uniform() < 0.4 else 1
        rounds.insert(int(uniform() * (len(rounds) + 1)), num_rounds)
        left -= num_rounds
    return rounds


def _draw_statement(rng: random.Random, value: int, num_rounds: int, before: Statement | None) -> Statement:
    """A statement that keeps x within 0..99 throughout; negative rounds ask for a loop that uses its variable."""
    uniform = rng.random
    if abs(num_rounds) > 1:
        return draw_loop(rng, value, abs(num_rounds), uses_variable=num_rounds < 0 or uniform() < 0.5)
    kind = uniform()
    if kind < 0.15 and 0 < value <= LARGEST // 2:
        return ["*", 2]
    if kind < 0.25 and value > 9:
        return ["//", 2]
    if kind < 0.5:
        # The limit lies near the value, so that the condition has to be looked at.
        limit = min(max(value + int(uniform() * 21) - 10, 1), LARGEST - 1)
        return ["if", ">" if uniform() < 0.5 else "<", limit, draw_sum(rng, value, None)]
    return draw_sum(rng, value, before)
