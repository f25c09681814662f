"""Giving places one of three colours so that neighbours differ.

Each place but the first two has two neighbours of different colours before it, so that a line gives it the
colour that is left, ``c3``; the last line is all of them. Difficulty d has d + 6 places; any of the six right
colourings is right, in any order. The careless annotator looks at one neighbour only.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any, ClassVar

from openzaya.problems.base import Annotator, Family
from openzaya.problems.names import draw_names

_COLOURS = (1, 2, 3)


class Colouring(Family):
    """Data: pairs of neighbours, each place after the places before it."""

    name: ClassVar[str] = "colouring"
    title: ClassVar[str] = "colouring a map"
    habit: ClassVar[str] = "looks at one neighbour only"

    def _draw(self, rng: random.Random, difficulty: int) -> tuple[str, str, Sequence[Any]]:
        names = draw_names(rng, difficulty + 6)
        pairs = [(names[0], names[1])]
        for name in names[2:]:
            # Two neighbours of each other differ in colour; the new place gets the third one.
            one, other = rng.choice(pairs)
            pairs += [(one, name), (other, name)]
        told = " ".join(map("-".join, pairs))
        canonical = " ".join(sorted("-".join(sorted(pair)) for pair in pairs))
        return f"Colours 1 2 3, neighbours differ: {told}", canonical, tuple(pairs)

    def _work(self, data: Sequence[Any], annotator: Annotator | None) -> tuple[str, str]:
        colours: dict[str, int] = {}
        for place in dict.fromkeys(name for pair in data for name in pair):
            taken = [colours[one] for one, two in data if two == place and one in colours]
            if annotator is not None and annotator.habit:
                taken = taken[:1]
            free = [colour for colour in _COLOURS if colour not in taken]
            colours[place] = free[0] if free else _COLOURS[0]
            if annotator is not None and annotator.slips():
                colours[place] = annotator.rng.choice(_COLOURS)
        lines = [f"{place}{colour}" for place, colour in colours.items()]
        answer = " ".join(lines)
        return "\n".join([*lines, answer]), answer

    def _accepts(self, data: Sequence[Any], tokens: tuple[str, ...], right_answer: str) -> bool:
        places = {name for pair in data for name in pair}
        colours = dict(zip(tokens[::2], tokens[1::2], strict=False))
        if len(tokens) != 2 * len(places) or colours.keys() != places:
            return False
        if not set(colours.values()) <= set(map(str, _COLOURS)):
            return False
        return all(colours[one] != colours[other] for one, other in data)
