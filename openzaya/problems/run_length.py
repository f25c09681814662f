"""Run-length coding: ``b b b a b b`` is ``b3 a1 b2``.

A line is the code so far, one run longer than the line before. Difficulty d has d + 3 runs of three
letters. The careless annotator leaves single letters out; each problem has one, and a longer run.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from itertools import groupby
from typing import Any, ClassVar

from openzaya.problems.base import Annotator, Family
from openzaya.problems.names import LETTERS


class RunLength(Family):
    """Data: the letters as one string."""

    name: ClassVar[str] = "run_length"
    title: ClassVar[str] = "run-length coding"
    habit: ClassVar[str] = "leaves single letters out"

    def _draw(self, rng: random.Random, difficulty: int) -> tuple[str, str, Sequence[Any]]:
        alphabet = rng.sample(LETTERS, 3)
        lengths = [1, rng.randint(2, 4), *(rng.randint(1, 3) for _ in range(difficulty + 1))]
        rng.shuffle(lengths)
        runs: list[str] = []
        for length in lengths:
            letter = rng.choice([letter for letter in alphabet if not runs or letter != runs[-1][0]])
            runs.append(letter * length)
        letters = "".join(runs)
        return f"Write each run as letter and length: {' '.join(letters)}", letters, (letters,)

    def _work(self, data: Sequence[Any], annotator: Annotator | None) -> tuple[str, str]:
        code: list[str] = []
        lines = []
        for letter, run in groupby(data[0]):
            length = len(list(run))
            if annotator is not None:
                if annotator.habit and length == 1:
                    continue
                length = abs(annotator.number(length))
            code.append(f"{letter}{length}")
            lines.append(" ".join(code))
        return "\n".join(lines), lines[-1]
