"""What the families share that read small programs over one number: drawing statements, and undoing them.

Statements are drawn along the way of one input, on which x stays within 0..99, and those that are undone are
invertible, so that a wanted value is followed backwards line by line to an input that gives it. An answer that names an
input is judged by running the program's data (``openzaya.problems.small_programs``) on it: several may be right.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

from openzaya.problems.base import Annotator
from openzaya.problems.small_programs import Statement, steps, write

LARGEST = 99
"""Inputs are integers from 0 to this."""


def read_input(tokens: tuple[str, ...]) -> int | None:
    """The input that an answer's tokens name: one number from 0 to 99; else None."""
    if len(tokens) != 1 or not tokens[0].isdigit() or len(tokens[0]) > len(str(LARGEST)):
        return None
    return int(tokens[0])


def draw_sum(rng: random.Random, value: int, before: Statement | None) -> Statement:
    """An addition or subtraction of 1 to 9 that keeps ``value`` within 0..99, other than the statement ``before``."""
    while True:
        number = 1 + int(rng.random() * 9)
        statement: Statement = [_sign(rng, value, number), number]
        if statement != before:
            return statement


def draw_loop(rng: random.Random, value: int, num_rounds: int, *, uses_variable: bool) -> Statement:
    """A loop of 2 to 4 rounds that adds or subtracts 1 to 5 or its own variable, and keeps ``value`` within 0..99."""
    if uses_variable:
        return ["for", num_rounds, [_sign(rng, value, num_rounds * (num_rounds - 1) // 2), "i"]]
    number = 1 + int(rng.random() * 5)
    return ["for", num_rounds, [_sign(rng, value, num_rounds * number), number]]


def _sign(rng: random.Random, value: int, change: int) -> str:
    fits_above, fits_below = value + change <= LARGEST, value - change >= 0
    return "+" if fits_above and (not fits_below or rng.random() < 0.5) else "-"


def draw_mirror(rng: random.Random, value: int) -> Statement:
    """``x=k-x`` that keeps ``value`` within 0..99; k is a multiple of ten, from which it is easier to subtract."""
    fitting = [number for number in range(10, 101, 10) if 0 <= number - value <= LARGEST]
    return ["from", fitting[int(rng.random() * len(fitting))]]


def undo(statement: Statement, value: int, i: int) -> int:
    """The value of x before a simple statement that left ``value``."""
    match statement:
        case ["from", number]:
            return number - value
        case ["*", number]:
            return value // number
        case ["//", number]:
            return value * number
        case ["+" | "-" as sign, operand]:
            number = i if operand == "i" else operand
            return value - number if sign == "+" else value + number
    raise ValueError(f"cannot undo {statement!r}")


def undo_all(
    statements: Sequence[Statement], value: int, annotator: Annotator | None, *, forwards: bool = False
) -> tuple[list[str], int]:
    """Lines of a trace, ``x+=3 38``: a statement and the value before it, from the last one to the first.

    ``forwards`` goes wrongly from the first to the last. Returns the value at the end, too.
    """
    lines = []
    executed = list(steps(statements))
    for simple, whole, i in executed if forwards else reversed(executed):
        result = undo(simple, value, i)
        value = result if annotator is None else annotator.number(result)
        lines.append(f"{f'i={i} ' if whole[0] == 'for' else ''}{write([simple])[0]} {value}")
    return lines, value
