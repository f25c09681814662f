"""One-way roads between places: a shortest way (several may be right), and everything that can be reached.

Both search in breadth: a line names a place and the new places to which its roads lead, ``a: c f``, and
the last line is the answer. Shortest way: difficulty d has about 4 + d / 2 roads on the way and d + 9
places; any way of the least number of roads is right. Reach: difficulty d reaches d + 4 places and not
three others; the answer names them from a to z. The careless annotator drives the roads both ways: each
problem has a road that is a short cut, or leads on, in the wrong direction only.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from itertools import pairwise
from typing import Any, ClassVar

from openzaya.problems.base import Annotator, Family
from openzaya.problems.names import draw_names

Roads = Sequence[Sequence[str]]


def _search(
    roads: Roads, start: str, goal: str | None, annotator: Annotator | None
) -> tuple[list[str], dict[str, str]]:
    """Trace lines, and each place that is reached with the place before it (the start with itself)."""
    both_ways = annotator is not None and annotator.habit
    before = {start: start}
    waiting = [start]
    lines = []
    for place in waiting:
        if place == goal:
            break
        ends = {end for begin, end in roads if begin == place}
        if both_ways:
            ends |= {begin for begin, end in roads if end == place}
        new = sorted(ends - before.keys())
        if annotator is not None and annotator.slips():
            others = sorted({place for road in roads for place in road} - before.keys() - ends)
            new = sorted([*new, annotator.rng.choice(others)]) if others else new
        before |= dict.fromkeys(new, place)
        waiting += new
        lines.append(f"{place}: {' '.join(new) or 'none'}")
    return lines, before


class ShortestPath(Family):
    """Data: start, goal, roads as (from, to)."""

    name: ClassVar[str] = "shortest_path"
    title: ClassVar[str] = "shortest way"
    habit: ClassVar[str] = "drives one-way roads both ways"

    def _draw(self, rng: random.Random, difficulty: int) -> tuple[str, str, Sequence[Any]]:
        length = 4 + difficulty // 2
        names = draw_names(rng, difficulty + 9)
        way, others = names[: length + 1], names[length + 1 :]
        roads = set(pairwise(way))
        # Backwards along the way: short cuts for those who drive them in the wrong direction.
        for _ in range(2):
            end = rng.randint(2, length)
            roads.add((way[end], way[rng.randint(0, end - 2)]))
        # Each other place stands at a distance from the start; roads lead at most one step further away.
        distance = {place: step for step, place in enumerate(way)}
        for place in others:
            distance[place] = rng.randint(1, length)
            nearer = [other for other, step in distance.items() if step == distance[place] - 1]
            roads.add((rng.choice(nearer), place))
            further = [o for o, step in distance.items() if step <= distance[place] + 1 and o not in (place, way[0])]
            if further and rng.random() < 0.6:
                roads.add((place, rng.choice(further)))
        listed = sorted(roads)
        rng.shuffle(listed)
        told = " ".join(f"{begin}>{end}" for begin, end in listed)
        canonical = f"{way[0]} {way[-1]} " + " ".join(f"{begin}>{end}" for begin, end in sorted(roads))
        return f"Shortest way from {way[0]} to {way[-1]}: {told}", canonical, (way[0], way[-1], tuple(listed))

    def _work(self, data: Sequence[Any], annotator: Annotator | None) -> tuple[str, str]:
        start, goal, roads = data
        lines, before = _search(roads, start, goal, annotator)
        way = [goal]
        while way[-1] != start:
            way.append(before[way[-1]])
        answer = " ".join(reversed(way))
        return "\n".join([*lines, answer]), answer

    def _accepts(self, data: Sequence[Any], tokens: tuple[str, ...], right_answer: str) -> bool:
        start, goal, roads = data
        known = {tuple(road) for road in roads}
        return (
            len(tokens) == len(right_answer.split())
            and (tokens[0], tokens[-1]) == (start, goal)
            and all(step in known for step in pairwise(tokens))
        )


class Reachability(Family):
    """Data: start, roads as (from, to)."""

    name: ClassVar[str] = "reachability"
    title: ClassVar[str] = "places within reach"
    habit: ClassVar[str] = "drives one-way roads both ways"

    def _draw(self, rng: random.Random, difficulty: int) -> tuple[str, str, Sequence[Any]]:
        names = draw_names(rng, difficulty + 8)
        reached, others = names[: difficulty + 5], names[difficulty + 5 :]
        roads = {(rng.choice(reached[:place]), reached[place]) for place in range(1, len(reached))}
        roads |= {(other, rng.choice(reached)) for other in others}
        for _ in range(1 + difficulty // 3):
            begin, end = rng.sample(reached, 2)
            roads.add((begin, end))
        listed = sorted(roads)
        told = " ".join(f"{begin}>{end}" for begin, end in listed)
        rng.shuffle(listed)
        shuffled = " ".join(f"{begin}>{end}" for begin, end in listed)
        return (
            f"Which places can be reached from {names[0]}: {shuffled}",
            f"{names[0]} {told}",
            (names[0], tuple(listed)),
        )

    def _work(self, data: Sequence[Any], annotator: Annotator | None) -> tuple[str, str]:
        start, roads = data
        lines, before = _search(roads, start, None, annotator)
        answer = " ".join(sorted(before.keys() - {start}))
        return "\n".join([*lines, answer]), answer
