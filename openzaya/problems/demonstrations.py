"""Demonstrations of mixed quality: what supervised training and aggregation examples show.

A share of the solutions comes from careless annotators, so that a model trained on them knows several
ways of working and reinforcement learning has something to choose between; sampled candidates for
aggregation prompts (arXiv 2605.05365, test-time compute) are mixed in the same way.
"""

from __future__ import annotations

import random

from openzaya.errors import DataError
from openzaya.problems.base import Annotator, Problem, Solution
from openzaya.problems.registry import get_family

HABIT_SHARE = 2 / 3
"""Default share of the careless annotators that has the family's wrong habit; the others slip."""
SLIP_RATE = 0.3
"""Chance of a slip at each step of a slipping annotator."""


def demonstration(
    problem: Problem, rng: random.Random, wrong_share: float, *, habit_share: float = HABIT_SHARE
) -> Solution:
    """One solution: careless with probability ``wrong_share``, else right.

    ``habit_share`` of the careless ones follow the family's wrong habit, the others slip. The habit
    makes the same error each time, so that where ``wrong_share * habit_share`` exceeds
    ``1 - wrong_share`` the most frequent answer is a wrong one. A careless solution may still reach
    the right answer; ``Solution.correct`` tells.
    """
    for name, share in (("wrong_share", wrong_share), ("habit_share", habit_share)):
        if not 0.0 <= share <= 1.0:
            raise DataError(f"{name}={share} is no probability; give a number from 0 to 1")
    family = get_family(problem.family)
    if rng.random() >= wrong_share:
        return family.solve(problem)
    if rng.random() < habit_share:
        return family.solve(problem, Annotator(habit=True, slip_rate=0.0, rng=rng))
    return family.solve(problem, Annotator(habit=False, slip_rate=SLIP_RATE, rng=rng))


def candidate_solutions(
    problem: Problem, rng: random.Random, num: int, wrong_share: float, *, habit_share: float = HABIT_SHARE
) -> list[Solution]:
    """A pool of ``num`` independent demonstrations, for aggregation examples."""
    if num < 0:
        raise DataError(f"num={num} candidates cannot be drawn; give 0 or more")
    return [demonstration(problem, rng, wrong_share, habit_share=habit_share) for _ in range(num)]
