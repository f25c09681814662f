"""Operations on sets of letters, from left to right: ``+`` joins, ``-`` takes away, ``&`` keeps what is common.

A line is the set after one operation, from a to z. Difficulty d has d + 2 operations on sets of a dozen
letters; the set never holds fewer than two. One operation at least is ``&``, because the careless
annotator joins there too.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any, ClassVar

from openzaya.problems.base import Annotator, Family
from openzaya.problems.names import LETTERS


class LetterSets(Family):
    """Data: the first set as letters; operations as (sign, letters)."""

    name: ClassVar[str] = "sets"
    title: ClassVar[str] = "sets of letters"
    habit: ClassVar[str] = "joins instead of keeping what is common"

    def _draw(self, rng: random.Random, difficulty: int) -> tuple[str, str, Sequence[Any]]:
        universe = rng.sample(LETTERS, 12)
        start = rng.sample(universe, 5)
        current = set(start)
        operations = []
        common_at = rng.randint(0, difficulty + 1)
        for place in range(difficulty + 2):
            sign = (
                "&"
                if place == common_at
                else rng.choice("+-&" if 3 < len(current) < 10 else "-&" if len(current) > 3 else "+")
            )
            inside = [letter for letter in universe if letter in current]
            outside = [letter for letter in universe if letter not in current]
            if sign == "&":
                letters = rng.sample(inside, max(2, len(inside) - rng.randint(1, 2))) + rng.sample(
                    outside, min(2, len(outside))
                )
                current &= set(letters)
            elif sign == "-":
                letters = rng.sample(inside, rng.randint(1, 2)) + rng.sample(outside, min(1, len(outside)))
                current -= set(letters)
            else:
                letters = rng.sample(inside, 1) + rng.sample(outside, 2)
                current |= set(letters)
            operations.append((sign, "".join(sorted(letters))))
        written = " ".join([*sorted(start), *(f"{sign} {' '.join(letters)}" for sign, letters in operations)])
        return f"Sets from left to right: {written}", written, ("".join(sorted(start)), tuple(operations))

    def _work(self, data: Sequence[Any], annotator: Annotator | None) -> tuple[str, str]:
        current = set(data[0])
        lines = []
        for sign, letters in data[1]:
            joins = sign == "+" or (annotator is not None and annotator.habit and sign == "&")
            if joins:
                current |= set(letters)
            elif sign == "-":
                current -= set(letters)
            else:
                current &= set(letters)
            if annotator is not None and annotator.slips():
                current ^= {annotator.rng.choice(letters)}
            lines.append(" ".join(sorted(current)) or "none")
        return "\n".join(lines), lines[-1]
