"""Writing a number in another base by repeated division.

A line holds the quotient and the digits found so far, ``15:0`` then ``5:00`` for 45 in base 3: the
next line divides the quotient and puts the remainder before the digits. Difficulty d has d + 2
digits; numbers stay below 1000, or 10,000 where that would leave few problems, as long as some base
allows it. The careless annotator puts each remainder after the digits.
"""

from __future__ import annotations

import functools
import random
from collections.abc import Sequence
from typing import Any, ClassVar

from openzaya.problems.base import Annotator, Family

_LIMITS = (1000, 10_000)
_FEWEST_PROBLEMS = 400
"""The first limit that leaves at least so many problems of a difficulty applies."""
_FEWEST_NUMBERS = 16
"""A base is used only where at least so many numbers have the wanted length: no answer can be guessed."""


@functools.lru_cache(maxsize=256)
def _ranges(num_digits: int) -> tuple[tuple[int, int, int], ...]:
    """(base, smallest, one past the largest) of the numbers with ``num_digits`` digits."""
    ranges: list[tuple[int, int, int]] = []
    for limit in _LIMITS:
        if sum(end - smallest for _, smallest, end in ranges) >= _FEWEST_PROBLEMS:
            break
        ranges = []
        for base in range(2, 10):
            smallest = base ** (num_digits - 1)
            end = min(base**num_digits, limit)
            if end - smallest >= _FEWEST_NUMBERS:
                ranges.append((base, smallest, end))
    return tuple(ranges) or ((2, 2 ** (num_digits - 1), 2**num_digits),)


class BaseConversion(Family):
    """Data: number, base."""

    name: ClassVar[str] = "base_conversion"
    title: ClassVar[str] = "base conversion"
    habit: ClassVar[str] = "writes the remainders in the order in which they appear"

    def _draw(self, rng: random.Random, difficulty: int) -> tuple[str, str, Sequence[Any]]:
        ranges = _ranges(difficulty + 2)
        base, smallest, end = ranges[int(rng.random() * len(ranges))]
        number = rng.randrange(smallest, end)
        return f"Write in base {base}: {number}", f"{number} {base}", (number, base)

    def _work(self, data: Sequence[Any], annotator: Annotator | None) -> tuple[str, str]:
        quotient, base = data
        digits = ""
        lines = []
        while quotient:
            quotient, remainder = divmod(quotient, base)
            if annotator is not None:
                if annotator.slips():
                    remainder = (remainder + 1 + int(annotator.rng.random() * (base - 1))) % base
                digits = f"{digits}{remainder}" if annotator.habit else f"{remainder}{digits}"
            else:
                digits = f"{remainder}{digits}"
            lines.append(f"{quotient}:{digits}")
        return "\n".join(lines), digits
