"""Names of people, places and things in problems: letters as long as they suffice."""

from __future__ import annotations

import itertools
import random
from collections.abc import Sequence

LETTERS = "abcdefghijklmnopqrstuvwxyz"


def draw_names(rng: random.Random, num_names: int) -> list[str]:
    """Distinct names: single letters, and longer ones only where the alphabet is too short."""
    names: Sequence[str] = LETTERS
    length = 1
    while len(names) < num_names:
        length += 1
        names = [*names, *map("".join, itertools.product(LETTERS, repeat=length))]
    return rng.sample(names, num_names)
