"""Chains of +, - and * worked strictly from left to right: ``7+5*3-4``.

One line an operation, ``7+5=12`` then ``12*3=36``: each starts with the result of the line before.
Difficulty d has d + 2 operations. Every value of the right solution lies in 0..99, and every chain
holds a product, because the careless annotator reads ``*`` as ``+``.

Also home of :func:`canonical_chain`, which the modular family shares.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any, ClassVar

from openzaya.problems.base import Annotator, Family

_LARGEST = 99
_LARGEST_BEFORE_PRODUCT = 33
"""Bound on values before the promised product: leaves a factor of at least 3."""


def canonical_chain(start: int, operators: str, operands: Sequence[int]) -> str:
    """One text for all orders of terms that commute.

    Worked from left to right, neighbouring additions and subtractions commute, and so do
    neighbouring products; the start belongs to the first run.
    """
    runs: list[str] = []
    first_is_product = operators[:1] == "*"
    terms = [("*" if first_is_product else "+") + str(start)]
    run_is_product = first_is_product
    for operator, operand in zip(operators, operands, strict=True):
        if (operator == "*") != run_is_product:
            terms.sort()
            runs.append("".join(terms))
            terms = []
            run_is_product = not run_is_product
        terms.append(operator + str(operand))
    terms.sort()
    runs.append("".join(terms))
    return " ".join(runs)


class ArithmeticChain(Family):
    """Data: start, operators as one string, operands."""

    name: ClassVar[str] = "arithmetic_chain"
    title: ClassVar[str] = "arithmetic from left to right"
    habit: ClassVar[str] = "reads * as +"

    def _draw(self, rng: random.Random, difficulty: int) -> tuple[str, str, Sequence[Any]]:
        uniform = rng.random
        num_operations = difficulty + 2
        product_at = int(uniform() * num_operations)
        start = value = 3 + int(uniform() * 30)
        operators = []
        operands = []
        for position in range(num_operations):
            before_product = position < product_at
            if position == product_at or (not before_product and 2 <= value <= 33 and uniform() < 0.25):
                operator = "*"
                operand = 2 + int(uniform() * (min(9, _LARGEST // value) - 1))
                value *= operand
            else:
                smallest, largest = (3, _LARGEST_BEFORE_PRODUCT) if before_product else (0, _LARGEST)
                operand = 1 + int(uniform() * 9)
                adds = uniform() < 0.5
                if adds and value + operand > largest:
                    adds = False
                elif not adds and value - operand < smallest:
                    adds = True
                operator = "+" if adds else "-"
                value += operand if adds else -operand
            operators.append(operator)
            operands.append(operand)
        chain = "".join(operators)
        expression = str(start) + "".join([f"{a}{b}" for a, b in zip(operators, operands, strict=True)])
        return (
            f"Work from left to right: {expression}",
            canonical_chain(start, chain, operands),
            (start, chain, tuple(operands)),
        )

    def _work(self, data: Sequence[Any], annotator: Annotator | None) -> tuple[str, str]:
        value, operators, operands = data
        lines = []
        for operator, operand in zip(operators, operands, strict=True):
            if annotator is not None and annotator.habit and operator == "*":
                operator = "+"
            if operator == "+":
                result = value + operand
            elif operator == "-":
                result = value - operand
            else:
                result = value * operand
            if annotator is not None:
                result = annotator.number(result)
            lines.append(f"{value}{operator}{operand}={result}")
            value = result
        return "\n".join(lines), str(value)
