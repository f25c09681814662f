"""Problems by number: ``item = f(family, difficulty, seed, index)`` with disjoint splits.

A problem belongs to the held-out split when the SHA-256 of its canonical form (which starts with the
family's name) falls into one eighth of all values. As the split depends on the problem alone, no
seed, index or difficulty can put one problem into both, however small the space is.
"""

from __future__ import annotations

import functools
import hashlib
import random
from typing import Literal

from openzaya.errors import DataError
from openzaya.problems.base import Problem
from openzaya.problems.registry import get_family

Split = Literal["train", "heldout"]
SPLITS: tuple[Split, ...] = ("train", "heldout")
MAX_DRAWS = 1000
_HELD_OUT_BELOW = 256 // 8
"""First digest bytes below this are held out: one eighth."""


def split_of(canonical: str) -> Split:
    """The split that the problem with this canonical form belongs to."""
    return "heldout" if hashlib.sha256(canonical.encode()).digest()[0] < _HELD_OUT_BELOW else "train"


@functools.lru_cache(maxsize=4096)
def _stream(family_name: str, difficulty: int, seed: int) -> hashlib._Hash:
    """Hash state of everything but the index, so that an item hashes a few bytes only."""
    return hashlib.sha256(f"{family_name}/{difficulty}/{seed}/".encode())


def make_problem(family_name: str, difficulty: int, seed: int, index: int, split: Split) -> Problem:
    """Problem number ``index`` of a split: a pure function of its arguments, on every machine.

    Draws from one generator seeded by the arguments until a problem of the wanted split appears.
    Raises :class:`DataError` for an unknown family or split, a negative difficulty, and a space so
    small that 1000 draws held no problem of the split.
    """
    family = get_family(family_name)
    if split not in SPLITS:
        raise DataError(f"unknown split '{split}'; choose one of: {', '.join(SPLITS)}")
    state = _stream(family_name, difficulty, seed).copy()
    state.update(str(index).encode())
    rng = random.Random(int.from_bytes(state.digest()[:8], "big"))
    for _ in range(MAX_DRAWS):
        problem = family.generate(rng, difficulty)
        if split_of(problem.canonical) == split:
            return problem
    raise DataError(
        f"family '{family_name}' at difficulty {difficulty}: {MAX_DRAWS} draws gave no problem of split '{split}'; "
        "the space is too small, use a higher difficulty"
    )
