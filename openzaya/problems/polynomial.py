"""The value of a polynomial by Horner's rule, modulo a prime.

One line a coefficient, ``3*5-2=13``, with the modulus taken off where needed, ``31*5+4=159=62``.
Difficulty d has degree d + 2. One coefficient at least is subtracted, because the careless annotator
reads - as +.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any, ClassVar

from openzaya.problems.base import Annotator, Family

_MODULI = (53, 61, 73, 97)


class Polynomial(Family):
    """Data: modulus, x, coefficients from the highest power down, of either sign."""

    name: ClassVar[str] = "polynomial"
    title: ClassVar[str] = "value of a polynomial"
    habit: ClassVar[str] = "reads - as +"

    def _draw(self, rng: random.Random, difficulty: int) -> tuple[str, str, Sequence[Any]]:
        modulus = rng.choice(_MODULI)
        x = rng.randint(2, 9)
        degree = difficulty + 2
        minus_at = rng.randint(1, degree)
        coefficients = [rng.randint(1, 9)]
        for place in range(1, degree + 1):
            size = rng.randint(1, 9 if place < degree else 50)
            coefficients.append(-size if place == minus_at or rng.random() < 0.4 else size)
        terms = []
        for place, coefficient in enumerate(coefficients):
            power = degree - place
            variable = "" if power == 0 else "x" if power == 1 else f"x^{power}"
            sign = "" if place == 0 else "-" if coefficient < 0 else "+"
            terms.append(f"{sign}{abs(coefficient)}{variable}")
        written = "".join(terms)
        prompt = f"Value modulo {modulus} at x={x}: {written}"
        return prompt, f"{modulus} {x} {written}", (modulus, x, tuple(coefficients))

    def _work(self, data: Sequence[Any], annotator: Annotator | None) -> tuple[str, str]:
        modulus, x, coefficients = data
        value = coefficients[0]
        lines = []
        for coefficient in coefficients[1:]:
            if annotator is not None and annotator.habit:
                coefficient = abs(coefficient)
            result = value * x + coefficient
            if annotator is not None:
                result = annotator.number(result)
            line = f"{value}*{x}{coefficient:+d}={result}"
            value = result % modulus
            lines.append(line if value == result else f"{line}={value}")
        return "\n".join(lines), str(value)
