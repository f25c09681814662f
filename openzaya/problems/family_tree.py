"""How two people are related: the line from one up to the nearest common ancestor and down to the other.

Facts are ``child<parent``. Lines climb from the one person, ``e``, ``e d``, ``e d a``, then from the other until
someone already named is met, and the last line is the whole way. Difficulty d has d + 4 steps on the way,
an ancestor above it, and two other people. The careless annotator always goes up to the oldest ancestor.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from itertools import pairwise
from typing import Any, ClassVar

from openzaya.problems.base import Annotator, Family
from openzaya.problems.names import draw_names


class FamilyTree(Family):
    """Data: the two people; facts as (child, parent)."""

    name: ClassVar[str] = "family_tree"
    title: ClassVar[str] = "how two people are related"
    habit: ClassVar[str] = "goes up to the oldest ancestor"

    def _draw(self, rng: random.Random, difficulty: int) -> tuple[str, str, Sequence[Any]]:
        names = draw_names(rng, difficulty + 8)
        oldest, *way, one, two = names
        common = rng.randint(1, len(way) - 2)
        parents = dict(pairwise(way[: common + 1]))
        parents |= {child: parent for parent, child in pairwise(way[common:])}
        parents[way[common]] = oldest
        for other in (one, two):
            parents[other] = rng.choice([oldest, *way])
        told = sorted(f"{child}<{parent}" for child, parent in parents.items())
        facts = list(parents.items())
        rng.shuffle(facts)
        written = " ".join(f"{child}<{parent}" for child, parent in facts)
        prompt = f"Each child<parent. Way from {way[0]} to {way[-1]}: {written}"
        return prompt, f"{way[0]} {way[-1]} {' '.join(told)}", (way[0], way[-1], tuple(facts))

    def _work(self, data: Sequence[Any], annotator: Annotator | None) -> tuple[str, str]:
        start, end, facts = data
        parents = dict(facts)
        lines = []
        rows: list[list[str]] = []
        for person in (start, end):
            row = [person]
            lines.append(person)
            while row[-1] in parents and not (rows and row[-1] in rows[0]):
                parent = parents[row[-1]]
                if annotator is not None and annotator.slips():
                    # The wrong child's parent is read; nobody is named twice, so that the climb ends.
                    parent = annotator.rng.choice([name for name in parents.values() if name not in row] or [parent])
                if parent in row:
                    break
                row.append(parent)
                lines.append(" ".join(row))
            rows.append(row)
        up, down = rows
        if down[-1] in up and not (annotator is not None and annotator.habit):
            up = up[: up.index(down[-1])]
        answer = " ".join([*up, *reversed(down)])
        return "\n".join([*lines, answer]), answer
