"""Choosing numbers that add up to a target.

A line takes one number off what is left, ``42-17=25``; the last line is the choice. Difficulty d chooses
d + 3 of d + 7 different numbers; any choice with the right sum is right. The careless annotator takes the
greatest number that fits, again and again.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any, ClassVar

from openzaya.problems.base import Annotator, Family


class SubsetSum(Family):
    """Data: the target, the numbers, those of a right choice."""

    name: ClassVar[str] = "subset_sum"
    title: ClassVar[str] = "numbers with a given sum"
    habit: ClassVar[str] = "takes the greatest number that fits"

    def _draw(self, rng: random.Random, difficulty: int) -> tuple[str, str, Sequence[Any]]:
        numbers = rng.sample(range(3, 60 + 10 * difficulty), difficulty + 7)
        chosen = rng.sample(numbers, difficulty + 3)
        target = sum(chosen)
        listed = " ".join(map(str, numbers))
        canonical = f"{target} {' '.join(map(str, sorted(numbers)))}"
        return f"Choose numbers with the sum {target}: {listed}", canonical, (target, tuple(numbers), tuple(chosen))

    def _work(self, data: Sequence[Any], annotator: Annotator | None) -> tuple[str, str]:
        left, numbers, chosen = data
        if annotator is not None and annotator.habit:
            room = left
            chosen = []
            for number in sorted(numbers, reverse=True):
                if number <= room:
                    chosen.append(number)
                    room -= number
        lines = []
        taken = []
        for number in chosen:
            if annotator is not None and annotator.slips():
                number = annotator.rng.choice(numbers)
            taken.append(number)
            lines.append(f"{left}-{number}={left - number}")
            left -= number
        answer = " ".join(map(str, taken))
        return "\n".join([*lines, answer]), answer

    def _accepts(self, data: Sequence[Any], tokens: tuple[str, ...], right_answer: str) -> bool:
        target, numbers, _ = data
        known = {str(number): number for number in numbers}
        if len(set(tokens)) != len(tokens) or not known.keys() >= set(tokens):
            return False
        return sum(known[token] for token in tokens) == target
