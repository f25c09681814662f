"""Predicting the variables at the end of a tiny program.

A program has two variables and numbered statements, ``1 x+=4 2 repeat 3 y-=x``. A line of the trace
is the state after one execution of a statement, ``2 x=9 y=4 more 2``, where ``more`` says how many
rounds of a loop are left. Difficulty d executes d + 3 statements, loop rounds counted singly. Values
of the right solution lie in 0..99. Each program has a loop, because the careless annotator runs
loops one round short. Exchanging the two names does not make another program.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any, ClassVar

from openzaya.problems.base import Annotator, Family

_LARGEST = 99
_NAMES = "xy"


def _execute(values: list[int], target: int, operator: str, operand: int | None) -> int:
    """New value of variable ``target``; an operand of ``None`` is the other variable."""
    number = values[1 - target] if operand is None else operand
    if operator == "+":
        return values[target] + number
    if operator == "-":
        return values[target] - number
    return values[target] * number


def _write(target: int, operator: str, operand: int | None, num_rounds: int) -> str:
    name = _NAMES[target]
    number = _NAMES[1 - target] if operand is None else operand
    statement = f"{name}{operator}={number}"
    return statement if num_rounds == 1 else f"repeat {num_rounds} {statement}"


class Program(Family):
    """Data: the two start values; the statements as (target, operator, operand or None, rounds)."""

    name: ClassVar[str] = "program"
    title: ClassVar[str] = "program output"
    habit: ClassVar[str] = "runs a loop one round short"

    def _draw(self, rng: random.Random, difficulty: int) -> tuple[str, str, Sequence[Any]]:
        uniform = rng.random
        rounds = self._draw_rounds(rng, difficulty + 3)
        values = [1 + int(uniform() * 20), 1 + int(uniform() * 20)]
        start = tuple(values)
        statements = []
        for num_rounds in rounds:
            target = int(uniform() * 2)
            statement = self._draw_statement(rng, values, target, num_rounds)
            for _ in range(num_rounds):
                values[target] = _execute(values, *statement)
            statements.append((*statement, num_rounds))
        texts = [_write(*statement) for statement in statements]
        listed = " ".join([f"{number} {text}" for number, text in enumerate(texts, start=1)])
        code = f"{start[0]} {start[1]} {' '.join(texts)}"
        exchanged_texts = " ".join(texts).translate({ord("x"): "y", ord("y"): "x"})
        exchanged = f"{start[1]} {start[0]} {exchanged_texts}"
        return f"Run x={start[0]} y={start[1]}: {listed}", min(code, exchanged), (start, tuple(statements))

    @staticmethod
    def _draw_rounds(rng: random.Random, num_steps: int) -> list[int]:
        """Rounds of each statement, in all ``num_steps``; at least one is a loop."""
        uniform = rng.random
        rounds = [2 + int(uniform() * min(2, num_steps - 1))]
        left = num_steps - rounds[0]
        while left:
            num_rounds = min(left, 2 + int(uniform() * 2)) if uniform() < 0.25 else 1
            rounds.insert(int(uniform() * (len(rounds) + 1)), num_rounds)
            left -= num_rounds
        return rounds

    @staticmethod
    def _draw_statement(
        rng: random.Random, values: list[int], target: int, num_rounds: int
    ) -> tuple[int, str, int | None]:
        """A statement that changes its target and keeps it within 0..99 in every round."""
        uniform = rng.random
        value, other = values[target], values[1 - target]
        kind = uniform()
        if num_rounds == 1 and kind < 0.15 and 0 < value <= _LARGEST // 2:
            return target, "*", 2
        operand: int | None = None
        number = other
        if kind < 0.65 or not other:
            operand = number = 1 + int(uniform() * 9)
        fits_above = value + number * num_rounds <= _LARGEST
        fits_below = value - number * num_rounds >= 0
        if not fits_above and not fits_below:
            # The other variable is too large here; a small number always fits one way.
            operand = number = 1 + int(uniform() * 9)
            fits_above = value + number * num_rounds <= _LARGEST
            fits_below = not fits_above
        adds = fits_above and (not fits_below or uniform() < 0.5)
        return target, "+" if adds else "-", operand

    def _work(self, data: Sequence[Any], annotator: Annotator | None) -> tuple[str, str]:
        values = list(data[0])
        lines = []
        state = ""
        for number, (target, operator, operand, num_rounds) in enumerate(data[1], start=1):
            if annotator is not None and annotator.habit and num_rounds > 1:
                num_rounds -= 1
            for left in range(num_rounds - 1, -1, -1):
                result = _execute(values, target, operator, operand)
                values[target] = result if annotator is None else annotator.number(result)
                state = f"x={values[0]} y={values[1]}"
                lines.append(f"{number} {state} more {left}" if left else f"{number} {state}")
        return "\n".join(lines), state
