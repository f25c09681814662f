"""Counting each letter of a string, in the order in which the letters first appear.

A line holds the letters still to be read and the counts so far, ``b a | a1`` then ``a | a1 b1``, and
the last line is the answer. Answering with all counts leaves nothing to guess. Difficulty d has
d + 4 letters out of three. The careless annotator counts a letter once where it stands several times
in a row. Strings with the same counts in the same order count as the same problem.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any, ClassVar

from openzaya.problems.base import Annotator, Family

_LETTERS = "abcdefghijklmnopqrstuvwxyz"
_NUM_DISTINCT = 3


class Counting(Family):
    """Data: the letters as one string."""

    name: ClassVar[str] = "counting"
    title: ClassVar[str] = "counting letters"
    habit: ClassVar[str] = "counts a run of one letter once"

    def _draw(self, rng: random.Random, difficulty: int) -> tuple[str, str, Sequence[Any]]:
        letters = rng.choices(rng.sample(_LETTERS, _NUM_DISTINCT), k=difficulty + 4)
        counts: dict[str, int] = {}
        for letter in letters:
            counts[letter] = counts.get(letter, 0) + 1
        return f"Count each letter in order: {' '.join(letters)}", _write(counts), ("".join(letters),)

    def _work(self, data: Sequence[Any], annotator: Annotator | None) -> tuple[str, str]:
        letters = data[0]
        counts: dict[str, int] = {}
        lines = []
        previous = ""
        for position, letter in enumerate(letters, start=1):
            overlooked = annotator is not None and (
                (annotator.habit and letter == previous) or (annotator.slips() and bool(counts))
            )
            if not overlooked:
                counts[letter] = counts.get(letter, 0) + 1
            previous = letter
            written = _write(counts)
            remaining = " ".join(letters[position:])
            lines.append(f"{remaining} | {written}" if remaining else written)
        return "\n".join(lines), _write(counts)


def _write(counts: dict[str, int]) -> str:
    return " ".join([f"{letter}{count}" for letter, count in counts.items()])
