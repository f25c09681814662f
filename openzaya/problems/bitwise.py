"""And, or and xor on six-bit numbers, from left to right.

One line an operation, in binary, ``101101 xor 010010=111111``; the last line is the decimal number.
Difficulty d has d + 2 operations; the last is an xor with any number, so that every answer from 0 to 63
is equally likely. The careless annotator reads xor as or.
"""

from __future__ import annotations

import operator
import random
from collections.abc import Sequence
from typing import Any, ClassVar

from openzaya.problems.base import Annotator, Family

_LIMIT = 64
_OPERATIONS = {"and": operator.and_, "or": operator.or_, "xor": operator.xor}


class Bitwise(Family):
    """Data: the first number; operations as (name, number)."""

    name: ClassVar[str] = "bitwise"
    title: ClassVar[str] = "bitwise operations"
    habit: ClassVar[str] = "reads xor as or"

    def _draw(self, rng: random.Random, difficulty: int) -> tuple[str, str, Sequence[Any]]:
        start = rng.randrange(_LIMIT)
        operations = [(rng.choice(("and", "or", "xor")), rng.randrange(_LIMIT)) for _ in range(difficulty + 1)]
        operations.append(("xor", rng.randrange(_LIMIT)))
        written = " ".join([str(start), *(f"{name} {number}" for name, number in operations)])
        return f"Work bit by bit from left to right: {written}", written, (start, tuple(operations))

    def _work(self, data: Sequence[Any], annotator: Annotator | None) -> tuple[str, str]:
        value = data[0]
        lines = []
        for name, number in data[1]:
            if annotator is not None and annotator.habit and name == "xor":
                name = "or"
            result = _OPERATIONS[name](value, number)
            if annotator is not None and annotator.slips():
                result ^= 1 << annotator.rng.randrange(6)
            lines.append(f"{value:06b} {name} {number:06b}={result:06b}")
            value = result
        return "\n".join([*lines, str(value)]), str(value)
