"""Solving an equation by undoing its operations from the outside in.

A line is the equation with one operation less, ``3*(x+4)=45`` then ``x+4=15`` then ``x=11``. Difficulty d
has d + 2 operations; solutions lie in 1..60. One operation at least adds or subtracts, because the
careless annotator takes a term to the other side with its sign.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any, ClassVar

from openzaya.problems.base import Annotator, Family

_LARGEST = 200


class Equation(Family):
    """Data: operations on x as (sign, number), the innermost first; the right side."""

    name: ClassVar[str] = "equation"
    title: ClassVar[str] = "solving an equation"
    habit: ClassVar[str] = "takes a term across with its sign"

    def _draw(self, rng: random.Random, difficulty: int) -> tuple[str, str, Sequence[Any]]:
        value = rng.randint(1, 60)
        operations: list[tuple[str, int]] = []
        for place in range(difficulty + 2):
            may_multiply = value * 3 <= _LARGEST and place > 0 and operations[-1][0] != "*"
            if may_multiply and rng.random() < 0.5:
                number = rng.randint(2, 3)
                operations.append(("*", number))
                value *= number
            elif value > 20 and (value > 150 or rng.random() < 0.5):
                number = rng.randint(1, 19)
                operations.append(("-", number))
                value -= number
            else:
                number = rng.randint(1, 19)
                operations.append(("+", number))
                value += number
        written = _write(operations)
        return f"Solve for x: {written}={value}", f"{written}={value}", (tuple(operations), value)

    def _work(self, data: Sequence[Any], annotator: Annotator | None) -> tuple[str, str]:
        operations, value = data
        lines = []
        for num_left in range(len(operations) - 1, -1, -1):
            sign, number = operations[num_left]
            if annotator is not None and annotator.habit and sign != "*":
                sign = "-" if sign == "+" else "+"
            # Only after an error is a product not divisible; the careless annotator rounds down.
            value = value // number if sign == "*" else value - number if sign == "+" else value + number
            if annotator is not None:
                value = annotator.number(value)
            lines.append(f"{_write(operations[:num_left])}={value}")
        return "\n".join(lines), str(value)


def _write(operations: Sequence[Sequence[Any]]) -> str:
    text = "x"
    for sign, number in operations:
        if sign != "*":
            text = f"{text}{sign}{number}"
        else:
            text = f"{number}*({text})" if text != "x" else f"{number}*x"
    return text
