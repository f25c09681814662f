"""Taking a number apart into primes, smallest first.

A line divides by the smallest prime that fits, ``84/2=42``; the last line lists all primes, ``2 2 3 7``.
Difficulty d has d + 4 primes, one of them at least twice, because the careless annotator names a
repeated prime once.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from typing import Any, ClassVar

from openzaya.problems.base import Annotator, Family

_PRIMES = (2, 3, 5, 7, 11, 13, 17, 19, 23, 29, 31)
_WEIGHTS = (5, 5, 4, 4, 2, 2, 2, 2, 1, 1, 1)


class PrimeFactors(Family):
    """Data: the number."""

    name: ClassVar[str] = "prime_factors"
    title: ClassVar[str] = "prime factors"
    habit: ClassVar[str] = "names a repeated prime once"

    def _draw(self, rng: random.Random, difficulty: int) -> tuple[str, str, Sequence[Any]]:
        primes = rng.choices(_PRIMES, _WEIGHTS, k=difficulty + 3)
        primes.append(primes[0])
        number = math.prod(primes)
        return f"Prime factors from the smallest: {number}", str(number), (number,)

    def _work(self, data: Sequence[Any], annotator: Annotator | None) -> tuple[str, str]:
        (number,) = data
        lines = []
        primes: list[int] = []
        while number > 1:
            # The number was built of these primes: one of them divides whatever is left.
            prime = next(prime for prime in _PRIMES if number % prime == 0)
            number //= prime
            if annotator is not None and annotator.slips():
                prime = annotator.rng.choice([other for other in _PRIMES if other != prime])
            if number > 1:
                lines.append(f"{number * prime}/{prime}={number}")
            if annotator is None or not annotator.habit or prime not in primes:
                primes.append(prime)
        answer = " ".join(map(str, primes))
        return "\n".join([*lines, answer]), answer
