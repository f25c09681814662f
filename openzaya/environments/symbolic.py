"""Built-in mathematical items with exact answers: fractions, surds, polynomials, modular powers, counting.

Each kind draws an item of a difficulty, without an upper end, and works the answer out in exact numbers. Answers are
written as a person would, ``7\\sqrt{2}`` or ``3x^2-4x+1``, and any equal spelling is right. The numbers are drawn wide
enough that no answer is frequent.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from fractions import Fraction

Item = tuple[str, str]
"""Problem and answer."""


def fraction_chain(rng: random.Random, difficulty: int) -> Item:
    """A nested chain of d + 2 operations on fractions."""
    value = Fraction(rng.randint(1, 30), rng.randint(2, 12))
    text = _fraction(value)
    for _ in range(difficulty + 2):
        operand = Fraction(rng.randint(1, 15), rng.randint(2, 9))
        sign = rng.choice("+-*" if abs(value) < 50 else "+-")
        value = value + operand if sign == "+" else value - operand if sign == "-" else value * operand
        text = rf"\left({text}\right){_SIGNS[sign]}{_fraction(operand)}"
    return f"Compute ${text}$.", _fraction(value)


def surd_sum(rng: random.Random, difficulty: int) -> Item:
    """A sum of d + 2 square roots that are multiples of two different ones."""
    bases = rng.sample((2, 3, 5, 6, 7, 10, 11, 13), 2)
    totals = dict.fromkeys(sorted(bases), 0)
    text = ""
    for place in range(difficulty + 3):
        base = bases[place % 2]
        inside, outside = rng.randint(2, 9), rng.randint(1, 9) * (-1 if place and rng.random() < 0.4 else 1)
        totals[base] += outside * inside
        text += rf"{outside:+d}\sqrt{{{inside * inside * base}}}"
    answer = "".join(rf"{factor:+d}\sqrt{{{base}}}" for base, factor in totals.items() if factor)
    return f"Simplify ${text.removeprefix('+')}$.", answer.removeprefix("+") or "0"


def polynomial_product(rng: random.Random, difficulty: int) -> Item:
    """The product of d + 2 linear factors, expanded."""
    product = [1]
    text = ""
    for _ in range(difficulty + 2):
        slope, constant = rng.randint(1, 3), rng.choice([number for number in range(-9, 10) if number])
        text += f"({_polynomial([slope, constant])})"
        product = [slope * high + constant * low for high, low in zip([*product, 0], [0, *product], strict=True)]
    return f"Expand ${text}$.", _polynomial(product)


def derivative(rng: random.Random, difficulty: int) -> Item:
    """The second derivative of a polynomial of degree d + 3."""
    degree = difficulty + 3
    coefficients = [rng.choice([number for number in range(-9, 10) if number]) for _ in range(degree + 1)]
    second = [
        coefficient * (degree - place) * (degree - place - 1) for place, coefficient in enumerate(coefficients[:-2])
    ]
    return f"Find the second derivative of ${_polynomial(coefficients)}$ with respect to $x$.", _polynomial(second)


def modular_power(rng: random.Random, difficulty: int) -> Item:
    """The remainder of a power, or of a sum of d // 2 + 1 powers."""
    modulus = rng.randint(50, 200 + 50 * difficulty)
    terms = [(rng.randint(2, 30), rng.randint(10, 20 * (difficulty + 2))) for _ in range(difficulty // 2 + 1)]
    text = "+".join(f"{base}^{{{exponent}}}" for base, exponent in terms)
    remainder = sum(pow(base, exponent, modulus) for base, exponent in terms) % modulus
    return f"Find the remainder when ${text}$ is divided by {modulus}.", str(remainder)


def arrangements(rng: random.Random, difficulty: int) -> Item:
    """Different arrangements of letters of which some are equal."""
    counts = [rng.randint(1, 5 + difficulty // 3) for _ in range(5 + difficulty // 2)]
    letters = rng.sample("abcdefghijklmnopqrstuvwxyz", min(len(counts), 26))
    counts = counts[: len(letters)]
    told = ", ".join(f"{count} of the letter {letter}" for letter, count in zip(letters, counts, strict=True))
    number = math.factorial(sum(counts)) // math.prod(map(math.factorial, counts))
    return f"How many different words, with or without meaning, use all of these letters: {told}?", str(number)


def committees(rng: random.Random, difficulty: int) -> Item:
    """Committees with given numbers of members from d + 2 groups."""
    groups = [(rng.randint(5, 14 + difficulty), rng.randint(2, 4)) for _ in range(difficulty + 2)]
    told = ", ".join(f"{chosen} of {size}" for size, chosen in groups)
    number = math.prod(math.comb(size, chosen) for size, chosen in groups)
    return f"From separate groups one chooses {told} people. In how many ways can this be done?", str(number)


def quadratic_surd(rng: random.Random, difficulty: int) -> Item:
    """The greater root of a quadratic equation, exact."""
    limit = 12 + 3 * difficulty
    middle = rng.randint(-limit, limit)
    inside = rng.choice([number for number in range(2, 100 + 20 * difficulty) if math.isqrt(number) ** 2 != number])
    polynomial = _polynomial([1, -2 * middle, middle * middle - inside])
    outside, base = _square_part(inside)
    root = rf"\sqrt{{{base}}}" if outside == 1 else rf"{outside}\sqrt{{{base}}}"
    return f"Find the greater root of ${polynomial}=0$.", f"{middle}+{root}" if middle else root


KINDS: Sequence[Callable[[random.Random, int], Item]] = (
    fraction_chain,
    surd_sum,
    polynomial_product,
    derivative,
    modular_power,
    arrangements,
    committees,
    quadratic_surd,
)
_SIGNS = {"+": "+", "-": "-", "*": r"\cdot "}


def _fraction(value: Fraction) -> str:
    if value.denominator == 1:
        return str(value)
    return ("-" if value < 0 else "") + rf"\frac{{{abs(value.numerator)}}}{{{value.denominator}}}"


def _polynomial(coefficients: Sequence[int]) -> str:
    """From the highest power down; terms of 0 left out."""
    text = ""
    for power, coefficient in zip(range(len(coefficients) - 1, -1, -1), coefficients, strict=True):
        if coefficient:
            size = "" if abs(coefficient) == 1 and power else str(abs(coefficient))
            variable = "" if power == 0 else "x" if power == 1 else f"x^{{{power}}}"
            text += ("-" if coefficient < 0 else "+") + size + variable
    return text.removeprefix("+") or "0"


def _square_part(number: int) -> tuple[int, int]:
    """(a, b) with number = a * a * b and b without a square."""
    outside = max(root for root in range(1, math.isqrt(number) + 1) if number % (root * root) == 0)
    return outside, number // (outside * outside)
