"""Closing what is open: ``( [ ( )`` needs ``] )``.

A line is what is open after one more bracket, and the last line closes it all, innermost first.
Difficulty d has d + 6 brackets of three kinds, at least three of them left open. The careless annotator
closes in the order in which they were opened.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any, ClassVar

from openzaya.problems.base import Annotator, Family

_CLOSING = {"(": ")", "[": "]", "{": "}"}
_OPENING = tuple(_CLOSING)
_LEFT_OPEN = 3


class Brackets(Family):
    """Data: the brackets as one string."""

    name: ClassVar[str] = "brackets"
    title: ClassVar[str] = "closing brackets"
    habit: ClassVar[str] = "closes in the order of opening"

    def _draw(self, rng: random.Random, difficulty: int) -> tuple[str, str, Sequence[Any]]:
        text = ""
        is_open: list[str] = []
        num_brackets = difficulty + 6
        for left in range(num_brackets - 1, -1, -1):
            may_close = bool(is_open) and len(is_open) - 1 + left >= _LEFT_OPEN
            if may_close and rng.random() < 0.4:
                text += _CLOSING[is_open.pop()]
            else:
                is_open.append(rng.choice(_OPENING))
                text += is_open[-1]
        return f"Close what is open: {' '.join(text)}", text, (text,)

    def _work(self, data: Sequence[Any], annotator: Annotator | None) -> tuple[str, str]:
        is_open: list[str] = []
        lines = []
        for bracket in data[0]:
            if bracket in _CLOSING:
                if annotator is not None and annotator.slips():
                    bracket = annotator.rng.choice([other for other in _OPENING if other != bracket])
                is_open.append(bracket)
            else:
                is_open.pop()
            lines.append(" ".join(is_open) or "none")
        if annotator is None or not annotator.habit:
            is_open.reverse()
        answer = " ".join(_CLOSING[bracket] for bracket in is_open)
        return "\n".join([*lines, answer]), answer
