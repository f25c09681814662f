"""Finding an input on which a small Python program prints a given number.

A line of the trace undoes one executed statement, from the last to the first, and writes the value of x before it,
``x-=8 49``; in a loop it begins with the loop's variable. Difficulty d undoes d + 2 statements, rounds counted singly.
One statement is ``x=k-x``, because the careless annotator undoes the statements in the order of the program. Where
``x//=2`` occurs two inputs are right.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any, ClassVar

from openzaya.problems.base import Annotator, Family
from openzaya.problems.code_numbers import LARGEST, draw_loop, draw_mirror, draw_sum, read_input, undo_all
from openzaya.problems.small_programs import Statement, run, write


class CodeInput(Family):
    """Data: the output, the statements."""

    name: ClassVar[str] = "code_input"
    title: ClassVar[str] = "input of Python code"
    habit: ClassVar[str] = "undoes the statements from the first to the last"

    def _draw(self, rng: random.Random, difficulty: int) -> tuple[str, str, Sequence[Any]]:
        uniform = rng.random
        value = int(uniform() * (LARGEST + 1))
        rounds = [0]  # of the mirror
        left = difficulty + 1
        while left:
            num_rounds = min(left, 2 + int(uniform() * 2)) if uniform() < 0.3 else 1
            rounds.insert(int(uniform() * (len(rounds) + 1)), num_rounds)
            left -= num_rounds
        statements: list[Statement] = []
        halved = False
        for num_rounds in rounds:
            kind = uniform()
            if not num_rounds:
                statement = draw_mirror(rng, value)
            elif num_rounds == 1 and kind < 0.15 and 0 < value <= LARGEST // 2:
                statement = ["*", 2]
            elif num_rounds == 1 and kind < 0.3 and value > 1 and value % 2 == 0 and not halved:
                statement, halved = ["//", 2], True
            elif num_rounds == 1:
                statement = draw_sum(rng, value, statements[-1] if statements else None)
            else:
                statement = draw_loop(rng, value, num_rounds, uses_variable=uniform() < 0.5)
            value = run([statement], value)
            statements.append(statement)
        code = "\n".join([*write(statements), "print(x)"])
        prompt = f"Find x, 0 to {LARGEST}, to print {value}: \n{code}"
        return prompt, f"{value}\n{code}", (value, tuple(statements))

    def _work(self, data: Sequence[Any], annotator: Annotator | None) -> tuple[str, str]:
        value, statements = data
        forwards = annotator is not None and annotator.habit
        lines, value = undo_all(statements, value, annotator, forwards=forwards)
        return "\n".join(lines), str(value)

    def _accepts(self, data: Sequence[Any], tokens: tuple[str, ...], right_answer: str) -> bool:
        number = read_input(tokens)
        if number is None:
            return False
        return run(data[1], number) == data[0]
