"""Procedural problems with worked solutions and verifiers, one family a file.

``make_problem(family, difficulty, seed, index, split)`` gives problem number ``index``;
``get_family(name)`` solves and verifies it; ``demonstration`` and ``candidate_solutions`` write
solutions of mixed quality.
"""

from __future__ import annotations

from openzaya.problems.base import Annotator, Family, Problem, Solution, Verdict
from openzaya.problems.demonstrations import HABIT_SHARE, candidate_solutions, demonstration
from openzaya.problems.registry import FAMILIES, FURTHER_FAMILIES, NEVER_TRAINED, TRAINED_FAMILIES, get_family
from openzaya.problems.split import SPLITS, Split, make_problem, split_of

__all__ = [
    "FAMILIES",
    "FURTHER_FAMILIES",
    "HABIT_SHARE",
    "NEVER_TRAINED",
    "SPLITS",
    "TRAINED_FAMILIES",
    "Annotator",
    "Family",
    "Problem",
    "Solution",
    "Split",
    "Verdict",
    "candidate_solutions",
    "demonstration",
    "get_family",
    "make_problem",
    "split_of",
]
