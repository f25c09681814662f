"""The further families: right answers against oracles, growth, habits, slips, guessing, and several right answers."""

from __future__ import annotations

import collections
import dataclasses
import itertools
import json
import random
import re

import pytest

from openzaya.problems import FURTHER_FAMILIES, Annotator, Problem, get_family, make_problem
from tests.problems.oracles import is_right

TOKEN = re.compile(r" ?[A-Za-z]+|\d| ?[^\sA-Za-z\d]|\n| ")
"""Words, single digits and signs: about what a byte-pair tokenizer that splits digits makes."""
WITHOUT_ORACLE = ("code_falsification",)
"""What a prompt's words ask for is not worked out here; its own tests do."""
NAMES = tuple(name for name in FURTHER_FAMILIES if not name.startswith("code_"))


def problems(name: str, difficulty: int, num: int) -> list[Problem]:
    return [make_problem(name, difficulty, 0, index, "train") for index in range(num)]


@pytest.mark.parametrize("name", [name for name in FURTHER_FAMILIES if name not in WITHOUT_ORACLE])
def test_right_solution_agrees_with_an_oracle_and_verifies(name: str) -> None:
    family = get_family(name)
    for difficulty in (0, 1, 2, 4, 7, 30):
        if name == "liars" and difficulty > 4:
            continue  # the oracle tries all ways
        for problem in problems(name, difficulty, 15):
            solution = family.solve(problem)
            assert solution.correct
            assert is_right(name, problem.prompt, solution.answer), (problem, solution)
            assert solution.trace.splitlines()[-1].endswith(solution.answer)
            response = f"<think>\n{solution.trace}\n</think>\n\n{solution.answer}"
            assert family.verify(problem, response, strict=True).reward == 1.0
            assert family.verify(problem, solution.answer).reward == 1.0


@pytest.mark.parametrize("name", NAMES)
def test_problems_survive_json(name: str) -> None:
    family = get_family(name)
    for problem in problems(name, 3, 10):
        copy = dataclasses.replace(problem, data=json.loads(json.dumps(problem.data)))
        assert family.solve(copy) == family.solve(problem)
        assert family.verify(copy, family.solve(problem).answer).reward == 1.0


@pytest.mark.parametrize("name", NAMES)
def test_a_level_adds_about_one_step(name: str) -> None:
    family = get_family(name)
    num_characters, num_lines = [], []
    for difficulty in (0, 1, 2, 3, 5, 8, 20):
        sample = problems(name, difficulty, 60)
        traces = [family.solve(problem).trace for problem in sample]
        num_characters.append(sum(map(len, traces)) / len(traces))
        num_lines.append(sum(trace.count("\n") + 1 for trace in traces) / len(traces))
        if difficulty == 0:
            assert max(len(TOKEN.findall(trace)) for trace in traces) <= 80
        if difficulty <= 8:
            assert max(len(TOKEN.findall(problem.prompt)) for problem in sample) <= 130
            assert max(len(TOKEN.findall(trace)) for trace in traces) <= 350
    assert all(after > before for before, after in itertools.pairwise(num_characters)), num_characters
    assert 0.5 <= (num_lines[5] - num_lines[0]) / 8 <= 2.1, num_lines


@pytest.mark.parametrize("name", NAMES)
def test_space_is_large_and_no_answer_can_be_guessed(name: str) -> None:
    family = get_family(name)
    for difficulty in (0, 1, 4):
        sample = problems(name, difficulty, 500)
        assert len({problem.canonical for problem in sample}) >= (200 if difficulty == 0 else 350)
        answers = collections.Counter(family.solve(problem).answer for problem in sample)
        assert answers.most_common(1)[0][1] <= 500 / 20, (difficulty, answers.most_common(3))


@pytest.mark.parametrize("name", NAMES)
def test_an_answer_to_another_problem_earns_nothing(name: str) -> None:
    family = get_family(name)
    for difficulty in (0, 3):
        sample = problems(name, difficulty, 30)
        answers = [family.solve(problem).answer for problem in sample]
        rewards = [family.verify(problem, answer).reward for problem in sample for answer in answers]
        assert 30 <= sum(rewards) <= 30 + 900 / 40


@pytest.mark.parametrize("name", NAMES)
def test_habits_and_slips_give_wrong_answers_that_are_known_to_be_wrong(name: str) -> None:
    family = get_family(name)
    rng = random.Random(0)
    for difficulty in (1, 2, 5, 12):
        num_wrong = 0
        for problem in problems(name, difficulty, 40):
            solution = family.solve(problem, Annotator(habit=True, slip_rate=0.0, rng=rng))
            verdict = family.verify(problem, f"<think>{solution.trace}</think>{solution.answer}")
            assert verdict.reward == float(solution.correct), (problem, solution, verdict)
            assert solution.trace.splitlines()[-1].endswith(solution.answer)
            num_wrong += not solution.correct
        assert num_wrong >= 20, (difficulty, num_wrong)
    solutions = []
    for problem in problems(name, 5, 100):
        assert family.solve(problem, Annotator(False, 0.0, rng)) == family.solve(problem)
        solutions.append(family.solve(problem, Annotator(habit=False, slip_rate=0.2, rng=rng)))
        verdict = family.verify(problem, f"<think>{solutions[-1].trace}</think>{solutions[-1].answer}")
        assert verdict.reward == float(solutions[-1].correct)
    assert 30 <= sum(not solution.correct for solution in solutions) <= 99


def problem_with(name: str, data: object) -> Problem:
    return Problem(name, 0, "", name, data)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("name", "data", "right", "wrong"),
    [
        (
            "shortest_path",
            ("a", "d", (("a", "b"), ("a", "c"), ("b", "d"), ("c", "d"), ("d", "a"))),
            ["a b d", "a c d", "A C D"],
            ["a d", "d a", "a b c d", "a b d a d", "a e d", "a d d", "b d", "a c", "1 2 3"],
        ),
        (
            "task_order",
            (("a", "<", "b"), ("c", ">", "b"), ("d", "<", "c")),
            ["a b d c", "a d b c", "d a b c"],
            ["a b c d", "a b c", "a b d c c", "a b d c e", "a a b d c", "b a d c", "a<b d c"],
        ),
        (
            "subset_sum",
            (10, (3, 7, 6, 4, 9), (3, 7)),
            ["3 7", "7 3", "6 4", "4 6", "04 6"],
            ["10", "3 3 4", "3 7 6 4", "5 5", "3+7", "-3 13", "9 1", "3 7 0"],
        ),
        (
            "target_number",
            (10, (3, 4, 2, 4), "+*-", (3, 4, 2, 4)),
            ["3+4*2-4", "4+3*2-4", "4 + 3 * 2 - 4", "3+4*2 -4"],
            ["10", "3+4*2-4=10", "3+7", "3+4+2+4", "3+4+2+4-3", "(3+4)*2-4", "3+4*2--4", "3+4*2/4", "3 4 2 4"],
        ),
        (
            "colouring",
            (("a", "b"), ("a", "c"), ("b", "c")),
            ["a1 b2 c3", "a3 b2 c1", "c1 b3 a2", "A1B2C3", "a 1 b 2 c 3"],
            ["a1 b2 c1", "a1 b2", "a1 b2 c4", "a1 b2 c3 c3", "a1 b2 c3 d1", "a1 b1 a2 c3", "1a 2b 3c", "a1, b2, c3"],
        ),
    ],
)
def test_every_right_answer_is_accepted_and_no_other(
    name: str, data: object, right: list[str], wrong: list[str]
) -> None:
    problem = problem_with(name, data)
    for answer in right:
        assert get_family(name).verify(problem, answer).reward == 1.0, answer
    for answer in wrong:
        assert get_family(name).verify(problem, answer).reward == 0.0, answer


@pytest.mark.parametrize("name", ["shortest_path", "task_order", "subset_sum", "target_number", "colouring"])
def test_right_answers_that_are_not_the_solvers_are_found_among_many(name: str) -> None:
    """A random attempt of the right kind is rarely right, and then the oracle agrees."""
    rng = random.Random(0)
    num_right = 0
    for problem in problems(name, 0, 300):
        words = get_family(name).solve(problem).answer
        parts = re.findall(r"[a-z]+|\d+|[-+*]", words)
        if name == "colouring":
            attempt = " ".join(f"{part}{rng.randint(1, 3)}" for part in parts[::2])
        elif name == "target_number":
            numbers = rng.sample(parts[::2], len(parts[::2]))
            attempt = numbers[0] + "".join(f"{rng.choice('+-*')}{number}" for number in numbers[1:])
        elif name == "subset_sum":
            attempt = " ".join(map(str, rng.sample(problem.data[1], 3)))
        elif name == "shortest_path":
            inner = rng.sample(sorted({place for road in problem.data[2] for place in road}), 3)
            attempt = " ".join([parts[0], *inner, parts[-1]])
        else:
            attempt = " ".join(rng.sample(parts, len(parts)))
        reward = get_family(name).verify(problem, attempt).reward
        assert reward == float(is_right(name, problem.prompt, attempt))
        num_right += reward == 1.0
    assert num_right <= 300 / 24
