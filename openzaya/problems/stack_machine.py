"""What is on the stack after some instructions; its top is at the right end.

Instructions: a number (put on top), ``add`` and ``sub`` (the two at the top become one), ``dup``, ``swap`` and
``drop``. A line is the stack after one of them, and the last line is the answer. Difficulty d has d + 3
instructions; the stack holds two to five numbers from 0 to 99. The careless annotator works at the left
end.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any, ClassVar

from openzaya.problems.base import Annotator, Family

_LARGEST = 99
_FEWEST, _MOST = 2, 5


def _execute(stack: list[int], instruction: str) -> list[int]:
    if instruction.isdigit():
        return [*stack, int(instruction)]
    *below, under, top = stack
    match instruction:
        case "add":
            return [*below, under + top]
        case "sub":
            return [*below, under - top]
        case "dup":
            return [*stack, top]
        case "swap":
            return [*below, top, under]
    return [*below, under]


class StackMachine(Family):
    """Data: the first stack; the instructions."""

    name: ClassVar[str] = "stack"
    title: ClassVar[str] = "stack machine"
    habit: ClassVar[str] = "works at the wrong end"

    def _draw(self, rng: random.Random, difficulty: int) -> tuple[str, str, Sequence[Any]]:
        stack = rng.sample(range(1, 30), 3)
        start = tuple(stack)
        instructions: list[str] = []
        for _ in range(difficulty + 3):
            possible = ["add", "add", "sub", "sub", "drop"] if len(stack) > _FEWEST else []
            if stack[-1] != stack[-2] and instructions[-1:] != ["swap"]:
                possible.append("swap")
            if len(stack) < _MOST:
                possible += ["dup", *(str(rng.randint(1, 20)) for _ in range(3))]
            results = {instruction: _execute(stack, instruction) for instruction in possible}
            instruction = rng.choice([name for name in possible if 0 <= results[name][-1] <= _LARGEST])
            instructions.append(instruction)
            stack = results[instruction]
        written = " ".join(map(str, start))
        listed = ", ".join(instructions)
        return f"Stack {written}: {listed}", f"{written} {listed}", (start, tuple(instructions))

    def _work(self, data: Sequence[Any], annotator: Annotator | None) -> tuple[str, str]:
        stack = list(data[0])
        lines = []
        for instruction in data[1]:
            if annotator is not None and annotator.habit:
                stack = _execute(stack[::-1], instruction)[::-1]
            else:
                stack = _execute(stack, instruction)
            if annotator is not None:
                stack[-1] = annotator.number(stack[-1])
            lines.append(" ".join(map(str, stack)))
        return "\n".join(lines), lines[-1]
