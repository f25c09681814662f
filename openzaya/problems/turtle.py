"""Where a walk ends: turn, then go straight on.

A line is heading and place after one command, ``west x=-3 y=0``. Difficulty d has d + 2 commands. The walk
begins at x=0 y=0, heading north. The careless annotator turns to the wrong side.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any, ClassVar

from openzaya.problems.base import Annotator, Family

_HEADINGS = ("north", "east", "south", "west")
_STEPS = ((0, 1), (1, 0), (0, -1), (-1, 0))
_TURNS = {"left": -1, "right": 1, "on": 0}


class Turtle(Family):
    """Data: commands as (turn, distance)."""

    name: ClassVar[str] = "turtle"
    title: ClassVar[str] = "where a walk ends"
    habit: ClassVar[str] = "turns to the wrong side"

    def _draw(self, rng: random.Random, difficulty: int) -> tuple[str, str, Sequence[Any]]:
        commands = [(rng.choice(("left", "right")), rng.randint(1, 9))]
        commands += [(rng.choice(tuple(_TURNS)), rng.randint(1, 9)) for _ in range(difficulty + 1)]
        written = ", ".join(f"{turn} {distance}" for turn, distance in commands)
        return f"Walk from x=0 y=0 north: {written}", written, tuple(commands)

    def _work(self, data: Sequence[Any], annotator: Annotator | None) -> tuple[str, str]:
        x = y = heading = 0
        lines = []
        for turn, distance in data:
            sign = -1 if annotator is not None and annotator.habit else 1
            heading = (heading + sign * _TURNS[turn]) % 4
            if annotator is not None:
                distance = annotator.number(distance)
            x += _STEPS[heading][0] * distance
            y += _STEPS[heading][1] * distance
            lines.append(f"{_HEADINGS[heading]} x={x} y={y}")
        return "\n".join(lines), f"x={x} y={y}"
