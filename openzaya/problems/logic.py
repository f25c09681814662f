"""Putting people in order from facts about neighbours: ``a<b, a>c`` means c, a, b.

Each fact names one person who is already placed, at an end of the row, and one new person; a line of
the trace is the row after one fact. The answer is the whole row. Difficulty d has d + 4 people. At
least one fact is written with ``>``, because the careless annotator reads ``>`` as ``<``. The order
in which the facts are told does not make another problem: the row identifies it.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any, ClassVar

from openzaya.problems.base import Annotator, Family
from openzaya.problems.names import draw_names


class Logic(Family):
    """Data: the facts as (name, sign, name)."""

    name: ClassVar[str] = "logic"
    title: ClassVar[str] = "ordering people"
    habit: ClassVar[str] = "reads > as <"

    def _draw(self, rng: random.Random, difficulty: int) -> tuple[str, str, Sequence[Any]]:
        uniform = rng.random
        row = draw_names(rng, difficulty + 4)
        first = last = int(uniform() * (len(row) - 1))
        num_facts = len(row) - 1
        greater_at = int(uniform() * num_facts)
        facts = []
        for position in range(num_facts):
            # The first fact places two neighbours, each later one extends the row at an end.
            at_the_end = position == 0 or (last < len(row) - 1 and (first == 0 or uniform() < 0.5))
            if at_the_end:
                smaller, greater = row[last], row[last + 1]
                last += 1
            else:
                smaller, greater = row[first - 1], row[first]
                first -= 1
            if position == greater_at or uniform() < 0.5:
                facts.append((greater, ">", smaller))
            else:
                facts.append((smaller, "<", greater))
        told = ", ".join(["".join(fact) for fact in facts])
        return f"Order from first to last: {told}", " ".join(row), tuple(facts)

    def _work(self, data: Sequence[Any], annotator: Annotator | None) -> tuple[str, str]:
        row: list[str] = []
        lines = []
        for left, sign, right in data:
            left_is_first = sign == "<"
            if annotator is not None:
                left_is_first = left_is_first or annotator.habit
                if annotator.slips():
                    left_is_first = not left_is_first
            if not row:
                row = [left, right] if left_is_first else [right, left]
            elif left in row:
                row.insert(row.index(left) + left_is_first, right)
            else:
                row.insert(row.index(right) + (not left_is_first), left)
            lines.append(" ".join(row))
        return "\n".join(lines), lines[-1]
