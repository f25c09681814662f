"""Converting amounts through invented units: ``1 g=4 k, 1 k=3 b; in b: 2 g 1 k 2 b``.

A line turns the amount into the next smaller unit and adds what there is of it, ``2*4+1=9``. Difficulty d
has d + 2 such steps. The careless annotator forgets to add. The units' names make no other problem.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any, ClassVar

from openzaya.problems.base import Annotator, Family
from openzaya.problems.names import draw_names


class Units(Family):
    """Data: the amount of the greatest unit; steps as (factor, amount)."""

    name: ClassVar[str] = "units"
    title: ClassVar[str] = "converting units"
    habit: ClassVar[str] = "forgets the smaller units"

    def _draw(self, rng: random.Random, difficulty: int) -> tuple[str, str, Sequence[Any]]:
        names = draw_names(rng, difficulty + 3)
        start = rng.randint(2, 12)
        steps = []
        for _ in names[1:]:
            factor = rng.randint(2, 4 if difficulty > 2 else 9)
            steps.append((factor, rng.randint(1, factor - 1)))
        told = ", ".join(f"1 {names[place]}={steps[place][0]} {names[place + 1]}" for place in range(len(steps)))
        amounts = [start, *(amount for _, amount in steps)]
        given = " ".join(f"{amount} {name}" for amount, name in zip(amounts, names, strict=True))
        canonical = f"{start} " + " ".join(f"*{factor}+{amount}" for factor, amount in steps)
        return f"{told}. In {names[-1]}: {given}", canonical, (start, tuple(steps))

    def _work(self, data: Sequence[Any], annotator: Annotator | None) -> tuple[str, str]:
        value = data[0]
        lines = []
        for factor, amount in data[1]:
            forgets = annotator is not None and annotator.habit
            result = value * factor + (0 if forgets else amount)
            if annotator is not None:
                result = annotator.number(result)
            lines.append(f"{value}*{factor}={result}" if forgets else f"{value}*{factor}+{amount}={result}")
            value = result
        return "\n".join(lines), str(value)
