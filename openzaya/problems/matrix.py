"""A pair of numbers multiplied by two-by-two matrices, one after another, modulo a prime.

A matrix takes two lines, one for each new number, ``2*31+1*7=69=16``; the last line is the pair.
Difficulty d has d + 1 matrices. The first is not symmetric, because the careless annotator takes columns
for rows.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any, ClassVar

from openzaya.problems.base import Annotator, Family

_MODULI = (53, 61, 73, 97)


class Matrix(Family):
    """Data: modulus, the pair, matrices as four numbers by rows."""

    name: ClassVar[str] = "matrix"
    title: ClassVar[str] = "matrices times a pair"
    habit: ClassVar[str] = "takes columns for rows"

    def _draw(self, rng: random.Random, difficulty: int) -> tuple[str, str, Sequence[Any]]:
        modulus = rng.choice(_MODULI)
        pair = (rng.randrange(modulus), rng.randrange(modulus))
        matrices: list[tuple[int, int, int, int]] = []
        while len(matrices) <= difficulty:
            a, b, c, d = (rng.randint(1, 4) for _ in range(4))
            # Invertible, so that every pair is equally likely in the end.
            if a * d != b * c and (matrices or b != c):
                matrices.append((a, b, c, d))
        written = ", ".join(f"{a} {b} / {c} {d}" for a, b, c, d in matrices)
        given = f"modulo {modulus}, {pair[0]} {pair[1]}"
        return f"Multiply by each matrix {given}: {written}", f"{given} {written}", (modulus, pair, tuple(matrices))

    def _work(self, data: Sequence[Any], annotator: Annotator | None) -> tuple[str, str]:
        modulus, (x, y), matrices = data
        lines = []
        for a, b, c, d in matrices:
            if annotator is not None and annotator.habit:
                b, c = c, b
            results = []
            for left, right in ((a, b), (c, d)):
                total = left * x + right * y
                if annotator is not None:
                    total = annotator.number(total)
                results.append(total % modulus)
                lines.append(f"{left}*{x}+{right}*{y}={total}={results[-1]}")
            x, y = results
        return "\n".join([*lines, f"{x} {y}"]), f"{x} {y}"
