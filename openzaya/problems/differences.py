"""Going on with a sequence by its differences.

Lines are the rows of differences down to a row of equal numbers, then the sums back up, ``5+3=8``; the
last one ends with the next term. Difficulty d has d + 1 rows of differences. The careless annotator goes
on with the last difference of the first row.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from itertools import pairwise
from typing import Any, ClassVar

from openzaya.problems.base import Annotator, Family


class Differences(Family):
    """Data: the terms."""

    name: ClassVar[str] = "differences"
    title: ClassVar[str] = "next term of a sequence"
    habit: ClassVar[str] = "goes on with the last first difference"

    def _draw(self, rng: random.Random, difficulty: int) -> tuple[str, str, Sequence[Any]]:
        num_rows = difficulty + 1
        heads = [rng.randint(1, 60), *(rng.randint(1, 20 if num_rows == 1 else 9) for _ in range(num_rows))]
        row = [heads[-1]] * 2
        for head in reversed(heads[:-1]):
            extended = [head]
            for difference in row:
                extended.append(extended[-1] + difference)
            row = extended
        written = " ".join(map(str, row))
        return f"Next term: {written}", written, (tuple(row),)

    def _work(self, data: Sequence[Any], annotator: Annotator | None) -> tuple[str, str]:
        row = list(data[0])
        lasts = [row[-1]]
        lines = []
        while any(one != two for one, two in pairwise(row)):
            row = [two - one for one, two in pairwise(row)]
            if annotator is not None:
                row[-1] = annotator.number(row[-1])
            lasts.append(row[-1])
            lines.append(" ".join(map(str, row)))
            if annotator is not None and annotator.habit:
                break
        value = lasts.pop()
        for last in reversed(lasts):
            lines.append(f"{last}+{value}={last + value}")
            value += last
        return "\n".join(lines), str(value)
