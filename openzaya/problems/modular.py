"""Chains of +, - and * worked from left to right modulo a small prime.

One line an operation: the result, then the modulus taken off (or added) until it lies below the
modulus: ``47*3=141=88=35`` modulo 53. Difficulty d has d + 2 operations. Each chain subtracts
somewhere, because the careless annotator reads ``-`` as ``+``; with a prime modulus that error
cannot cancel in a product. A uniform start makes every answer below the modulus equally likely.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any, ClassVar

from openzaya.problems.arithmetic_chain import canonical_chain
from openzaya.problems.base import Annotator, Family

_MODULI = (53, 61, 73, 97)


class Modular(Family):
    """Data: modulus, start, operators as one string, operands."""

    name: ClassVar[str] = "modular"
    title: ClassVar[str] = "modular arithmetic"
    habit: ClassVar[str] = "reads - as +"

    def _draw(self, rng: random.Random, difficulty: int) -> tuple[str, str, Sequence[Any]]:
        uniform = rng.random
        num_operations = difficulty + 2
        modulus = _MODULI[int(uniform() * len(_MODULI))]
        start = int(uniform() * modulus)
        minus_at = int(uniform() * num_operations)
        operators = []
        operands = []
        for position in range(num_operations):
            kind = 0.5 if position == minus_at else uniform()
            if kind < 0.4:
                operators.append("+")
                operands.append(1 + int(uniform() * 9))
            elif kind < 0.65:
                operators.append("-")
                operands.append(1 + int(uniform() * 9))
            else:
                operators.append("*")
                operands.append(2 + int(uniform() * 2))
        chain = "".join(operators)
        expression = str(start) + "".join([f"{a}{b}" for a, b in zip(operators, operands, strict=True)])
        return (
            f"Work from left to right modulo {modulus}: {expression}",
            f"{modulus} {canonical_chain(start, chain, operands)}",
            (modulus, start, chain, tuple(operands)),
        )

    def _work(self, data: Sequence[Any], annotator: Annotator | None) -> tuple[str, str]:
        modulus, value, operators, operands = data
        lines = []
        for operator, operand in zip(operators, operands, strict=True):
            if annotator is not None and annotator.habit and operator == "-":
                operator = "+"
            if operator == "+":
                result = value + operand
            elif operator == "-":
                result = value - operand
            else:
                result = value * operand
            if annotator is not None:
                result = annotator.number(result)
            line = f"{value}{operator}{operand}={result}"
            while result >= modulus:
                result -= modulus
                line = f"{line}={result}"
            while result < 0:
                result += modulus
                line = f"{line}={result}"
            lines.append(line)
            value = result
        return "\n".join(lines), str(value)
