"""Putting tasks into an order that keeps every condition: ``a<b`` says that a comes first.

A line is the row so far: of the tasks that wait for nothing, the first by name is added. Difficulty d
has d + 6 tasks in two chains with conditions between them; any order that keeps all of them is right. At
least one condition is written with ``>``, because the careless annotator reads ``>`` as ``<``.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any, ClassVar

from openzaya.problems.base import Annotator, Family
from openzaya.problems.names import draw_names


class TaskOrder(Family):
    """Data: the conditions as (name, sign, name)."""

    name: ClassVar[str] = "task_order"
    title: ClassVar[str] = "ordering tasks"
    habit: ClassVar[str] = "reads > as <"

    def _draw(self, rng: random.Random, difficulty: int) -> tuple[str, str, Sequence[Any]]:
        tasks = draw_names(rng, difficulty + 6)
        gap = rng.randint(2, len(tasks) - 2)
        pairs = {(tasks[place - 1], tasks[place]) for place in range(1, len(tasks)) if place != gap}
        for _ in range(1 + difficulty // 3):
            pairs.add((tasks[rng.randrange(gap)], tasks[rng.randrange(gap, len(tasks))]))
        told = sorted(pairs)
        rng.shuffle(told)
        greater_at = rng.randrange(len(told))
        conditions = [
            (greater, ">", smaller) if place == greater_at or rng.random() < 0.4 else (smaller, "<", greater)
            for place, (smaller, greater) in enumerate(told)
        ]
        written = ", ".join("".join(condition) for condition in conditions)
        return f"Order the tasks: {written}", " ".join(map("<".join, sorted(pairs))), tuple(conditions)

    def _work(self, data: Sequence[Any], annotator: Annotator | None) -> tuple[str, str]:
        misread = annotator is not None and annotator.habit
        pairs = [(one, two) if sign == "<" or misread else (two, one) for one, sign, two in data]
        remaining = sorted({name for pair in pairs for name in pair})
        row: list[str] = []
        lines = []
        while remaining:
            # Misread conditions may contradict each other: then the task that waits for the fewest goes first.
            num_awaited = {task: sum(b == task and a in remaining for a, b in pairs) for task in remaining}
            task = min(remaining, key=lambda task: (num_awaited[task], task))
            if annotator is not None and annotator.slips():
                task = annotator.rng.choice(remaining)
            remaining.remove(task)
            row.append(task)
            lines.append(" ".join(row))
        return "\n".join(lines), lines[-1]

    def _accepts(self, data: Sequence[Any], tokens: tuple[str, ...], right_answer: str) -> bool:
        place = {task: number for number, task in enumerate(tokens)}
        if len(place) != len(tokens) or place.keys() != set(right_answer.split()):
            return False
        return all((place[one] < place[two]) == (sign == "<") for one, sign, two in data)
