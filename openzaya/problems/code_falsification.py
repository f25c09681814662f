"""Finding an input on which a small Python program does not do what was wanted.

What is wanted stands in words, the program beside it in Python. They differ in one condition, at one or two values of
x. The trace names the condition and a value where the two differ, with what each of them says there, ``over 40 x>=40:
40 no yes``, and undoes the statements before it line by line as ``code_input`` does, down to the input. Difficulty d
has d + 1 statements before the condition, rounds of loops counted singly. The careless annotator gives the value at
the condition itself for the input.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any, ClassVar

from openzaya.problems.base import Annotator, Family
from openzaya.problems.code_numbers import LARGEST, draw_loop, draw_mirror, draw_sum, read_input, undo, undo_all
from openzaya.problems.small_programs import Statement, describe, holds, run, steps, write

_CONDITIONS = (">", ">=", "<", "<=")


class CodeFalsification(Family):
    """Data: the statements before the condition, the wanted condition, the program's condition, those after it."""

    name: ClassVar[str] = "code_falsification"
    title: ClassVar[str] = "input that shows a program wrong"
    habit: ClassVar[str] = "takes the value at the wrong condition for the input"

    def _draw(self, rng: random.Random, difficulty: int) -> tuple[str, str, Sequence[Any]]:
        uniform = rng.random
        value = int(uniform() * (LARGEST + 1))
        before: list[Statement] = []
        left = difficulty + 1
        while left:
            num_rounds = min(left, 3 + int(uniform() * 2)) if left > 2 and uniform() < 0.5 else 1
            if num_rounds > 1:
                statement = draw_loop(rng, value, num_rounds, uses_variable=False)
            elif uniform() < 0.1:
                statement = draw_mirror(rng, value)
            else:
                statement = draw_sum(rng, value, before[-1] if before else None)
            value = run([statement], value)
            before.append(statement)
            left -= num_rounds
        wanted, written = self._draw_conditions(rng, value)
        body: Statement = ["+" if uniform() < 0.5 else "-", 1 + int(uniform() * 9)]
        wanted_if, written_if = ["if", *wanted, body], ["if", *written, body]
        after = [draw_sum(rng, value, None)] if uniform() < 0.3 else []
        words = "; ".join(describe(statement) for statement in [*before, wanted_if, *after])
        code = "\n".join([*write([*before, written_if, *after]), "print(x)"])
        prompt = f"Wanted: {words}. Find x, 0 to {LARGEST}, where this is wrong:\n{code}"
        data = (tuple(before), wanted_if, written_if, tuple(after))
        return prompt, f"{words}\n{code}", data

    @staticmethod
    def _draw_conditions(rng: random.Random, value: int) -> tuple[tuple[str, int], tuple[str, int]]:
        """Two conditions of one direction that differ at ``value`` and at most at one value beside it."""
        uniform = rng.random
        while True:
            wanted, written = ((_CONDITIONS[int(uniform() * 4)], value + int(uniform() * 5) - 2) for _ in range(2))
            differing = [v for v in range(value - 5, value + 6) if holds(*wanted, v) != holds(*written, v)]
            if wanted[0][0] == written[0][0] and value in differing and len(differing) <= 2:
                return wanted, written

    def _work(self, data: Sequence[Any], annotator: Annotator | None) -> tuple[str, str]:
        before, wanted, written, _ = data
        value = _difference(before, wanted, written)
        words = describe(wanted).removeprefix("if ").removesuffix(f" {describe(wanted[3])}")
        code = write([written])[0].removeprefix("if ").removesuffix(":")
        says = ["yes" if holds(condition[1], condition[2], value) else "no" for condition in (wanted, written)]
        value = value if annotator is None else annotator.number(value)
        lines = [f"{words} {code}: {' '.join(says)} {value}"]
        if annotator is None or not annotator.habit:
            undone, value = undo_all(before, value, annotator)
            lines += undone
        return "\n".join(lines), str(value)

    def _accepts(self, data: Sequence[Any], tokens: tuple[str, ...], right_answer: str) -> bool:
        number = read_input(tokens)
        if number is None:
            return False
        before, wanted, written, after = data
        return run([*before, wanted, *after], number) != run([*before, written, *after], number)


def _difference(before: Sequence[Statement], wanted: Statement, written: Statement) -> int:
    """The lowest value where the conditions differ that an input leads to on which x stays within 0..99."""
    low, high = sorted((wanted[2], written[2]))
    executed = list(steps(before))
    for value in range(low - 1, high + 2):
        if holds(wanted[1], wanted[2], value) == holds(written[1], written[2], value):
            continue
        x = value
        for simple, _, i in reversed(executed):
            x = undo(simple, x, i)
            if not 0 <= x <= LARGEST:
                break
        else:
            return value
    raise ValueError("the conditions differ nowhere")
