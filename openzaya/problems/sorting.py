"""Sorting letters by taking the smallest one again and again.

A line holds what is sorted and what remains, ``a | d c`` then ``a c | d``, and the last line is the
answer. Difficulty d has d + 3 letters, with repetition. The careless annotator overlooks the last
letter. Two lists of the same letters count as the same problem.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any, ClassVar

from openzaya.problems.base import Annotator, Family

_LETTERS = "abcdefghijklmnopqrstuvwxyz"


class Sorting(Family):
    """Data: the letters as one string."""

    name: ClassVar[str] = "sorting"
    title: ClassVar[str] = "sorting letters"
    habit: ClassVar[str] = "overlooks the last letter"

    def _draw(self, rng: random.Random, difficulty: int) -> tuple[str, str, Sequence[Any]]:
        letters = rng.choices(_LETTERS, k=difficulty + 3)
        return f"Sort from a to z: {' '.join(letters)}", "".join(sorted(letters)), ("".join(letters),)

    def _work(self, data: Sequence[Any], annotator: Annotator | None) -> tuple[str, str]:
        remaining = list(data[0])
        if annotator is not None and annotator.habit:
            remaining.pop()
        done: list[str] = []
        lines = []
        while remaining:
            letter = min(remaining)
            if annotator is not None and annotator.slips():
                letter = remaining[int(annotator.rng.random() * len(remaining))]
            remaining.remove(letter)
            done.append(letter)
            lines.append(" ".join([*done, "|", *remaining] if remaining else done))
        return "\n".join(lines), " ".join(done)
