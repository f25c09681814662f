"""Adding two numbers column by column from the right.

A line holds the columns still to be added and the sum so far with its carry in front, ``4+8|12`` for
47+85: the next line adds the last digits and the carry (4+8+1=13, giving ``132``). Difficulty d adds
numbers of d + 2 digits. The careless annotator forgets every carry. The order of the two numbers
does not make another problem.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any, ClassVar

from openzaya.problems.base import Annotator, Family


class Addition(Family):
    """Data: the two numbers as texts (JSON readers elsewhere may not keep long integers)."""

    name: ClassVar[str] = "addition"
    title: ClassVar[str] = "column addition"
    habit: ClassVar[str] = "forgets the carry"

    def _draw(self, rng: random.Random, difficulty: int) -> tuple[str, str, Sequence[Any]]:
        # Drawn digit by digit: no length limit of integer texts applies.
        one = rng.choice("123456789") + "".join(rng.choices("0123456789", k=difficulty + 1))
        two = rng.choice("123456789") + "".join(rng.choices("0123456789", k=difficulty + 1))
        canonical = f"{one}+{two}" if one <= two else f"{two}+{one}"
        return f"Add: {one}+{two}", canonical, (one, two)

    def _work(self, data: Sequence[Any], annotator: Annotator | None) -> tuple[str, str]:
        one, two = data
        lines = []
        carry = 0
        digits = ""
        for column in range(len(one) - 1, -1, -1):
            total = int(one[column]) + int(two[column]) + carry
            if annotator is not None and annotator.slips():
                total += 1 if total < 10 else -1
            carry, digit = divmod(total, 10)
            if annotator is not None and annotator.habit:
                carry = 0
            digits = f"{digit}{digits}"
            if column:
                lines.append(f"{one[:column]}+{two[:column]}|{carry}{digits}")
        answer = (f"{carry}{digits}").lstrip("0") or "0"
        lines.append(answer)
        return "\n".join(lines), answer
