"""Shifting letters through the alphabet; after z comes a.

A line shifts one letter, ``y+3=b``, and the last line is the whole answer. Difficulty d has d + 4
letters. The careless annotator shifts in the wrong direction.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any, ClassVar

from openzaya.problems.base import Annotator, Family
from openzaya.problems.names import LETTERS


class Caesar(Family):
    """Data: the shift; the letters as one string."""

    name: ClassVar[str] = "caesar"
    title: ClassVar[str] = "shifted letters"
    habit: ClassVar[str] = "shifts in the wrong direction"

    def _draw(self, rng: random.Random, difficulty: int) -> tuple[str, str, Sequence[Any]]:
        shift = rng.randint(1, 12)
        letters = "".join(rng.choices(LETTERS, k=difficulty + 4))
        return f"Shift each letter by {shift}: {' '.join(letters)}", f"{shift} {letters}", (shift, letters)

    def _work(self, data: Sequence[Any], annotator: Annotator | None) -> tuple[str, str]:
        shift, letters = data
        sign = "-" if annotator is not None and annotator.habit else "+"
        shifted = []
        for letter in letters:
            place = LETTERS.index(letter) + (shift if sign == "+" else -shift)
            if annotator is not None:
                place = annotator.number(place)
            shifted.append(LETTERS[place % len(LETTERS)])
        lines = [f"{letter}{sign}{shift}={result}" for letter, result in zip(letters, shifted, strict=True)]
        answer = " ".join(shifted)
        return "\n".join([*lines, answer]), answer
