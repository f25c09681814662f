"""The largest sum of neighbouring numbers (maximum subarray): the family that is never trained on.

A line reads one number and writes the best sum that ends with it and the best so far, ``7: 9 12``
(Kadane's algorithm). Difficulty d has d + 3 numbers between -40 and 40. The careless annotator adds
all positive numbers, neighbours or not. A list and its mirror image are the same problem.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any, ClassVar

from openzaya.problems.base import Annotator, Family

_LARGEST = 40


class LargestRun(Family):
    """Data: the numbers."""

    name: ClassVar[str] = "largest_run"
    title: ClassVar[str] = "largest sum of neighbours"
    habit: ClassVar[str] = "skips negative numbers"

    def _draw(self, rng: random.Random, difficulty: int) -> tuple[str, str, Sequence[Any]]:
        uniform = rng.random
        numbers = tuple([int(uniform() * (2 * _LARGEST + 1)) - _LARGEST for _ in range(difficulty + 3)])
        canonical = " ".join(map(str, min(numbers, numbers[::-1])))
        return f"Largest sum of neighbours: {' '.join(map(str, numbers))}", canonical, numbers

    def _work(self, data: Sequence[Any], annotator: Annotator | None) -> tuple[str, str]:
        lines = []
        run = best = data[0]
        for position, number in enumerate(data):
            if position:
                if annotator is not None and annotator.habit:
                    run = max(run, run + number)
                else:
                    run = max(number, run + number)
                if annotator is not None:
                    run = annotator.number(run)
                best = max(best, run)
            lines.append(f"{number}: {run} {best}")
        return "\n".join(lines), str(best)
