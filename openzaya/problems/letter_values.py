"""Which numbers letters stand for: ``a=4, a+b=9, c-b=2``.

Each equation has one letter whose number is known already and one new letter; a line is the number of
the new letter, ``b=5``, and the last line is all of them in that order. Difficulty d has d + 3 letters and
numbers up to 30. One equation at least subtracts, because the careless annotator reads - as +.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any, ClassVar

from openzaya.problems.base import Annotator, Family
from openzaya.problems.names import draw_names

_LARGEST = 30


class LetterValues(Family):
    """Data: the first letter and its number; equations as (letter, sign, letter, result)."""

    name: ClassVar[str] = "letter_values"
    title: ClassVar[str] = "numbers for letters"
    habit: ClassVar[str] = "reads - as +"

    def _draw(self, rng: random.Random, difficulty: int) -> tuple[str, str, Sequence[Any]]:
        letters = draw_names(rng, difficulty + 3)
        values = [rng.randint(1, _LARGEST) for _ in letters]
        minus_at = rng.randint(1, len(letters) - 1)
        equations = []
        for new in range(1, len(letters)):
            pair = [new, rng.randrange(new)]
            rng.shuffle(pair)
            one, two = pair
            if new == minus_at or rng.random() < 0.4:
                if values[one] < values[two]:
                    one, two = two, one
                equations.append((letters[one], "-", letters[two], values[one] - values[two]))
            else:
                equations.append((letters[one], "+", letters[two], values[one] + values[two]))
        first = f"{letters[0]}={values[0]}"
        told = [f"{one}{sign}{two}={result}" for one, sign, two, result in equations]
        return (
            f"Find all numbers: {', '.join([first, *told])}",
            ", ".join([first, *told]),
            (
                (letters[0], values[0]),
                tuple(equations),
            ),
        )

    def _work(self, data: Sequence[Any], annotator: Annotator | None) -> tuple[str, str]:
        (first, value), equations = data
        values = {first: value}
        lines = []
        for one, sign, two, result in equations:
            if annotator is not None and annotator.habit:
                sign = "+"
            new = two if one in values else one
            if sign == "+":
                value = result - values[one if new == two else two]
            elif new == one:
                value = result + values[two]
            else:
                value = values[one] - result
            if annotator is not None:
                value = annotator.number(value)
            values[new] = value
            lines.append(f"{new}={value}")
        answer = " ".join(f"{letter}={value}" for letter, value in values.items())
        return "\n".join([*lines, answer]), answer
