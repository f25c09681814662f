"""Putting version numbers in order: 2.9 comes before 2.10.

A line names the oldest version that is left; the last line is the whole row. Difficulty d has d + 4
versions. The careless annotator reads them as decimal numbers, so each problem holds a pair of one main
version for which that is wrong. The order in which they are listed makes no other problem.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any, ClassVar

from openzaya.problems.base import Annotator, Family


def _as_decimal(version: Sequence[int]) -> tuple[int, str]:
    return version[0], str(version[1])


class Versions(Family):
    """Data: the versions as (main, part)."""

    name: ClassVar[str] = "versions"
    title: ClassVar[str] = "ordering versions"
    habit: ClassVar[str] = "reads them as decimal numbers"

    def _draw(self, rng: random.Random, difficulty: int) -> tuple[str, str, Sequence[Any]]:
        main = rng.randint(1, 9)
        versions = {(main, rng.randint(2, 9)), (main, rng.randint(10, 19))}
        num_mains = 3 + difficulty // 8
        while len(versions) < difficulty + 4:
            versions.add((main + rng.randrange(num_mains), rng.randint(1, 30)))
        listed = sorted(versions)
        rng.shuffle(listed)
        return f"Order versions, oldest first: {_write(listed)}", _write(sorted(versions)), tuple(listed)

    def _work(self, data: Sequence[Any], annotator: Annotator | None) -> tuple[str, str]:
        remaining = [tuple(version) for version in data]
        row = []
        while remaining:
            by_decimal = annotator is not None and annotator.habit
            oldest = min(remaining, key=_as_decimal if by_decimal else None)
            if annotator is not None and annotator.slips():
                oldest = annotator.rng.choice(remaining)
            remaining.remove(oldest)
            row.append(oldest)
        return "\n".join([*(_write([version]) for version in row), _write(row)]), _write(row)


def _write(versions: Sequence[Sequence[int]]) -> str:
    return " ".join(f"{main}.{part}" for main, part in versions)
