"""The greatest common divisor by Euclid's divisions.

A line divides and keeps the remainder, ``84%36=12`` then ``36%12=0``; the last divisor is the answer. A
problem is built from its end, so that difficulty d takes exactly d + 2 divisions and every divisor from 2
to 60 is as likely as any other. The careless annotator stops one division early.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any, ClassVar

from openzaya.problems.base import Annotator, Family


class Gcd(Family):
    """Data: the greater and the smaller number."""

    name: ClassVar[str] = "gcd"
    title: ClassVar[str] = "greatest common divisor"
    habit: ClassVar[str] = "stops one division early"

    def _draw(self, rng: random.Random, difficulty: int) -> tuple[str, str, Sequence[Any]]:
        divisor = rng.randint(2, 60)
        greater, smaller = divisor * rng.randint(2, 9), divisor
        for step in range(difficulty + 1):
            quotient = rng.randint(1, 9 if step == 0 else 2)
            greater, smaller = greater * quotient + smaller, greater
        return f"Greatest common divisor: {greater} {smaller}", f"{greater} {smaller}", (greater, smaller)

    def _work(self, data: Sequence[Any], annotator: Annotator | None) -> tuple[str, str]:
        greater, smaller = data
        lines = []
        while smaller:
            remainder = greater % smaller
            if annotator is not None:
                if annotator.habit and not remainder:
                    smaller = greater
                    break
                remainder = annotator.number(remainder) % smaller
            lines.append(f"{greater}%{smaller}={remainder}")
            if not remainder:
                break
            greater, smaller = smaller, remainder
        return "\n".join([*lines, str(smaller)]), str(smaller)
