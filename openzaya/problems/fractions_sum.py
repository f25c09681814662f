"""Sums and differences of fractions, always in lowest terms.

One line an operation, ``1/2+1/3=5/6``; a whole number is written without a denominator. Difficulty d has
d + 1 operations; denominators divide 120, so that they stay small. The careless annotator adds the
denominators as well.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from fractions import Fraction
from typing import Any, ClassVar

from openzaya.problems.base import Annotator, Family

_OPERANDS = sorted({Fraction(top, bottom) for bottom in (2, 3, 4, 5, 6, 8, 10, 12) for top in range(1, bottom)})


class FractionsSum(Family):
    """Data: the first fraction as (numerator, denominator); operations as (sign, numerator, denominator)."""

    name: ClassVar[str] = "fractions"
    title: ClassVar[str] = "sums of fractions"
    habit: ClassVar[str] = "adds the denominators as well"

    def _draw(self, rng: random.Random, difficulty: int) -> tuple[str, str, Sequence[Any]]:
        start = value = rng.choice(_OPERANDS)
        operations: list[tuple[str, int, int]] = []
        for _ in range(difficulty + 1):
            operand = rng.choice(_OPERANDS)
            sign = "-" if value > operand and (value > 3 or rng.random() < 0.5) else "+"
            value = value - operand if sign == "-" else value + operand
            operations.append((sign, operand.numerator, operand.denominator))
        written = str(start) + "".join(f"{sign}{top}/{bottom}" for sign, top, bottom in operations)
        terms = [f"+{start}", *(f"{sign}{top}/{bottom}" for sign, top, bottom in operations)]
        data = ((start.numerator, start.denominator), tuple(operations))
        return f"Add up in lowest terms: {written}", " ".join(sorted(terms)), data

    def _work(self, data: Sequence[Any], annotator: Annotator | None) -> tuple[str, str]:
        value = Fraction(*data[0])
        lines = []
        for sign, top, bottom in data[1]:
            operand = Fraction(top, bottom) if sign == "+" else -Fraction(top, bottom)
            result = value + operand
            if annotator is not None:
                if annotator.habit:
                    denominator = value.denominator + operand.denominator
                    result = Fraction(value.numerator + operand.numerator, denominator)
                result = Fraction(annotator.number(result.numerator), result.denominator)
            lines.append(f"{value}{sign}{top}/{bottom}={result}")
            value = result
        return "\n".join(lines), str(value)
