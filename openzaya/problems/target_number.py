"""Reaching a target with some numbers, each used once, by +, - and * from left to right.

One line an operation, ``7*4=28``; the last line is the whole calculation, ``7*4+3-5``, without a result.
Difficulty d has d + 4 numbers; any calculation that uses each number once and gives the target is right.
One operation at least subtracts, because the careless annotator writes + where - is needed.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence
from typing import Any, ClassVar

from openzaya.problems.base import Annotator, Family

_LARGEST = 200


def _calculate(value: int, sign: str, number: int) -> int:
    return value + number if sign == "+" else value - number if sign == "-" else value * number


class TargetNumber(Family):
    """Data: the target, the numbers, the signs of a right calculation, its numbers."""

    name: ClassVar[str] = "target_number"
    title: ClassVar[str] = "reaching a target number"
    habit: ClassVar[str] = "adds where to subtract"

    def _draw(self, rng: random.Random, difficulty: int) -> tuple[str, str, Sequence[Any]]:
        numbers = [rng.randint(2, 20) for _ in range(difficulty + 4)]
        value = numbers[0]
        signs = ""
        minus_at = rng.randint(1, len(numbers) - 1)
        for place in range(1, len(numbers)):
            number = numbers[place]
            if place == minus_at:
                # The number that is subtracted must be smaller than what there is.
                number = numbers[place] = min(number, max(2, value - 1))
            fitting = [
                sign
                for sign in ("-" if place == minus_at else "+-*")
                if 0 < _calculate(value, sign, number) <= _LARGEST or place == minus_at
            ]
            if not fitting:
                number = numbers[place] = 2
                fitting = ["-"]
            signs += rng.choice(fitting)
            value = _calculate(value, signs[-1], number)
        listed = rng.sample(numbers, len(numbers))
        canonical = f"{value} {' '.join(map(str, sorted(numbers)))}"
        prompt = f"Reach {value} from left to right, each number once: {' '.join(map(str, listed))}"
        return prompt, canonical, (value, tuple(listed), signs, tuple(numbers))

    def _work(self, data: Sequence[Any], annotator: Annotator | None) -> tuple[str, str]:
        _, _, signs, numbers = data
        value = numbers[0]
        written = str(value)
        lines = []
        for sign, number in zip(signs, numbers[1:], strict=True):
            if annotator is not None:
                if annotator.habit and sign == "-":
                    sign = "+"
                number = abs(annotator.number(number))
            result = _calculate(value, sign, number)
            lines.append(f"{value}{sign}{number}={result}")
            written += f"{sign}{number}"
            value = result
        return "\n".join([*lines, written]), written

    def _accepts(self, data: Sequence[Any], tokens: tuple[str, ...], right_answer: str) -> bool:
        target, numbers, _, _ = data
        # "7-5" and "7 - 5" are read as (7, -5) and (7, -, 5): both become (7, -, 5).
        parts: list[str] = []
        for token in tokens:
            if len(token) > 1 and token[0] == "-":
                parts += ["-", token[1:]]
            else:
                parts.append(token)
        used, signs = parts[::2], parts[1::2]
        if len(parts) != 2 * len(numbers) - 1 or Counter(used) != Counter(map(str, numbers)):
            return False
        value = int(used[0])
        for sign, number in zip(signs, used[1:], strict=True):
            if sign not in "+-*":
                return False
            value = _calculate(value, sign, int(number))
        return value == target
