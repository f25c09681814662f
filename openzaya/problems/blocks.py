"""Moving blocks between three piles; the top of a pile is its right end.

``1>3`` moves the top block of the first pile onto the third. A line is the piles after one move, ``-`` for
an empty one, and the last line is the answer. Difficulty d has d + 2 moves of 6 + d // 4 blocks. A
block is never put back at once. The careless annotator takes the block from below.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any, ClassVar

from openzaya.problems.base import Annotator, Family
from openzaya.problems.names import draw_names

_NUM_PILES = 3


class Blocks(Family):
    """Data: the piles as lists of names; moves as (from, to), counted from 1."""

    name: ClassVar[str] = "blocks"
    title: ClassVar[str] = "moving blocks"
    habit: ClassVar[str] = "takes the block from below"

    def _draw(self, rng: random.Random, difficulty: int) -> tuple[str, str, Sequence[Any]]:
        piles: list[list[str]] = [[] for _ in range(_NUM_PILES)]
        for name in draw_names(rng, 6 + difficulty // 4):
            piles[rng.randrange(_NUM_PILES)].append(name)
        start = tuple(tuple(pile) for pile in piles)
        heights = [len(pile) for pile in piles]
        moves: list[tuple[int, int]] = []
        for place in range(difficulty + 2):
            sources = [pile for pile in range(_NUM_PILES) if heights[pile] > (1 if place == 0 else 0)]
            while True:
                source, target = rng.choice(sources), rng.randrange(_NUM_PILES)
                if source != target and moves[-1:] != [(target + 1, source + 1)]:
                    break
            heights[source] -= 1
            heights[target] += 1
            moves.append((source + 1, target + 1))
        listed = ", ".join(f"{source}>{target}" for source, target in moves)
        return f"Piles {_write(start)}: {listed}", f"{_write(start)} {listed}", (start, tuple(moves))

    def _work(self, data: Sequence[Any], annotator: Annotator | None) -> tuple[str, str]:
        piles = [list(pile) for pile in data[0]]
        lines = []
        for source, target in data[1]:
            taken = piles[source - 1].pop(0 if annotator is not None and annotator.habit else -1)
            place = len(piles[target - 1])
            if annotator is not None and annotator.slips() and place:
                place -= 1
            piles[target - 1].insert(place, taken)
            lines.append(_write(piles))
        return "\n".join(lines), lines[-1]


def _write(piles: Sequence[Sequence[str]]) -> str:
    return " | ".join(" ".join(pile) or "-" for pile in piles)
