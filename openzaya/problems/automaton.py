"""A ring of cells of which each becomes a sum, without carry, of two of: its left neighbour, itself, its right one.

The steps are named one by one: ``left`` adds the left neighbour to the cell, ``right`` the right one, and
``both`` puts the sum of the neighbours into it. A line is the ring after one step. Difficulty d has d + 1
steps on nine cells, of which the first and the last are neighbours; the careless annotator takes cells
beyond the ends for 0. On a ring of odd size only one problem in 256 ends with any given ring.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any, ClassVar

from openzaya.problems.base import Annotator, Family

_SIZE = 9
_STEPS = ("left", "right", "both")


class Automaton(Family):
    """Data: the cells as 0 and 1; the steps."""

    name: ClassVar[str] = "automaton"
    title: ClassVar[str] = "cellular automaton"
    habit: ClassVar[str] = "takes cells beyond the ends for 0"

    def _draw(self, rng: random.Random, difficulty: int) -> tuple[str, str, Sequence[Any]]:
        cells = tuple(rng.randrange(2) for _ in range(_SIZE))
        steps = tuple(rng.choice(_STEPS) for _ in range(difficulty + 1))
        written = " ".join(map(str, cells))
        return f"Ring {written}: {', '.join(steps)}", f"{written} {' '.join(steps)}", (cells, steps)

    def _work(self, data: Sequence[Any], annotator: Annotator | None) -> tuple[str, str]:
        cells = list(data[0])
        lines = []
        for step in data[1]:
            beyond = [0, 0] if annotator is not None and annotator.habit else [cells[-1], cells[0]]
            left, right = [beyond[0], *cells[:-1]], [*cells[1:], beyond[1]]
            one = cells if step != "both" else left
            other = left if step == "left" else right
            cells = [a ^ b for a, b in zip(one, other, strict=True)]
            if annotator is not None and annotator.slips():
                cells[annotator.rng.randrange(len(cells))] ^= 1
            lines.append(" ".join(map(str, cells)))
        return "\n".join(lines), lines[-1]
