"""The built-in families of problems as environments."""

from __future__ import annotations

from openzaya.environments.base import Environment, Task, check_difficulty
from openzaya.problems import Problem, Split, Verdict, get_family, make_problem


class FamilyEnvironment(Environment):
    """One family of ``openzaya.problems``; tasks are those of its ``split`` with this ``seed``."""

    def __init__(self, family: str, *, seed: int = 0, split: Split = "train") -> None:
        self.name = get_family(family).name
        self._seed, self._split = seed, split

    def task(self, difficulty: int, number: int) -> Task:
        check_difficulty(difficulty)
        problem = make_problem(self.name, difficulty, self._seed, number, self._split)
        data = {"prompt": problem.prompt, "canonical": problem.canonical, "data": problem.data}
        return Task(self.name, difficulty, number, [{"role": "user", "content": problem.prompt}], data)

    def verify(self, task: Task, response: str) -> Verdict:
        return get_family(self.name).verify(problem_of(task), response)


def problem_of(task: Task) -> Problem:
    """The problem behind a task of :class:`FamilyEnvironment`."""
    return Problem(task.environment, task.difficulty, **task.data)
