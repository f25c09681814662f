"""Reading small programs: the programs do in Python what their data say, answers are judged by running them."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import itertools
import json
import random
import re

import pytest

from openzaya.problems import Annotator, Problem, Solution, get_family, make_problem
from openzaya.problems.small_programs import run

NAMES = ("code_output", "code_input", "code_falsification")
INPUT_NAMES = NAMES[1:]
MAX_ACCEPTED = 2


def problems(name: str, difficulty: int, num: int) -> list[Problem]:
    return [make_problem(name, difficulty, 0, index, "train") for index in range(num)]


def careless(problem: Problem, seed: int = 0) -> Solution:
    return get_family(problem.family).solve(problem, Annotator(True, 0.0, random.Random(seed)))


def printed(code: str, value: int | None = None) -> int:
    """What real Python prints for a program of ours."""
    shown = io.StringIO()
    with contextlib.redirect_stdout(shown):
        exec(code, {} if value is None else {"x": value})
    return int(shown.getvalue())


def wanted(words: str, value: int) -> int:
    """What the words of a falsification ask for, read from the words alone."""
    for text in words.split("; "):
        times, condition = 1, True
        if match := re.match(r"(\d+) times (.*)", text):
            times, text = int(match[1]), match[2]
        elif match := re.match(r"if (over|at least|under|at most) (\d+) (.*)", text):
            limit, text = int(match[2]), match[3]
            condition = {
                "over": value > limit,
                "at least": value >= limit,
                "under": value < limit,
                "at most": value <= limit,
            }[match[1]]
        number = int(re.search(r"\d+$", text)[0])
        for _ in range(times if condition else 0):
            if text.startswith("take it from"):
                value = number - value
            else:
                value += number if text.startswith("add") else -number
    return value


def is_right(problem: Problem, answer: int) -> bool:
    before, code = problem.prompt.split(":\n" if problem.family == "code_falsification" else ": \n", 1)
    if problem.family == "code_output":
        return printed(code) == answer
    if not 0 <= answer <= 99:
        return False
    if problem.family == "code_input":
        return printed(code, answer) == int(re.search(r"\d+$", before)[0])
    words = re.fullmatch(r"Wanted: (.*)\. Find x, 0 to 99, where this is wrong", before)[1]
    return printed(code, answer) != wanted(words, answer)


@pytest.mark.parametrize("name", NAMES)
def test_exactly_the_answers_that_python_confirms_are_right(name: str) -> None:
    family = get_family(name)
    for difficulty in (0, 1, 3, 7):
        for problem in problems(name, difficulty, 6):
            right = [answer for answer in range(-2, 110) if is_right(problem, answer)]
            rewarded = [answer for answer in range(-2, 110) if family.verify(problem, str(answer)).reward]
            assert rewarded == right
            assert 1 <= len(right) <= (1 if name == "code_output" else MAX_ACCEPTED)
            solution = family.solve(problem)
            assert solution.correct and int(solution.answer) in right
            response = f"<think>\n{solution.trace}\n</think>\n{solution.answer}"
            assert family.verify(problem, response, strict=True).reward == 1.0


def test_both_inputs_that_lead_to_one_output_are_right() -> None:
    data = (20, (["//", 2], ["+", 10]))
    problem = Problem("code_input", 0, "", "code_input:", data)
    family = get_family("code_input")
    assert [answer for answer in range(100) if family.verify(problem, str(answer)).reward] == [20, 21]


@pytest.mark.parametrize("name", INPUT_NAMES)
def test_only_one_number_within_the_range_is_an_answer(name: str) -> None:
    family = get_family(name)
    problem = make_problem(name, 3, 0, 0, "train")
    answer = family.solve(problem).answer
    for text in (
        f"x={answer}",
        f"{answer} {answer}",
        f"{answer}.0",
        f"+{answer}",
        f"[{answer}]",
        f"{answer}e0",
        "1" * 60,
    ):
        assert family.verify(problem, text).reward == 0.0, text
    assert family.verify(problem, f"0{answer}").reward == 1.0
    # Outside the range other numbers would do, too.
    data = (150, (["+", 20],))
    assert run(data[1], 130) == 150
    assert family.verify(Problem("code_input", 0, "", "", data), "130").reward in (0.0, None)


@pytest.mark.parametrize("name", NAMES)
def test_every_line_follows_from_the_one_before(name: str) -> None:
    for problem in problems(name, 6, 40):
        lines = get_family(name).solve(problem).trace.splitlines()
        for before, after in itertools.pairwise(lines):
            old, new = (int(re.search(r"\d+$", line)[0]) for line in (before, after))
            if name == "code_output":
                statement = re.sub(r"^i=\d+ | x=\d+$|^if .* (yes|no) ?", "", after)
                known = {"x": old, "i": int((re.match(r"i=(\d+)", after) or [0, 0])[1])}
                exec(
                    statement.removeprefix("x=") if "if" in after and "no" in after else statement or "pass", {}, known
                )
                assert known["x"] == new, (before, after)
            else:
                i = int((re.match(r"i=(\d+)", after) or [0, 0])[1])
                known = {"x": new, "i": i}
                exec(re.sub(r"^i=\d+ | \d+$", "", after), {}, known)
                assert known["x"] == old, (before, after)


@pytest.mark.parametrize("name", NAMES)
def test_a_level_adds_one_line_and_few_characters(name: str) -> None:
    family = get_family(name)
    for difficulty in (0, 1, 3, 5, 7, 30):
        for problem in problems(name, difficulty, 40):
            trace = family.solve(problem).trace
            assert trace.count("\n") + 1 == difficulty + (3 if name == "code_output" else 2)
            if difficulty <= 5:
                assert len(trace) <= 170
                assert len(problem.prompt) <= 230


@pytest.mark.parametrize("name", NAMES)
def test_no_answer_can_be_guessed(name: str) -> None:
    family = get_family(name)
    for difficulty in (0, 3, 7):
        sample = problems(name, difficulty, 100)
        assert len({problem.canonical for problem in sample}) >= 75
        best = max(sum(family.verify(problem, str(x)).reward for problem in sample) for x in range(0, 100, 5))
        assert best <= 100 / 14


@pytest.mark.parametrize("name", NAMES)
def test_careless_solutions_are_wrong_and_known_to_be(name: str) -> None:
    family = get_family(name)
    rng = random.Random(0)
    for difficulty in (0, 1, 4, 9):
        sample = problems(name, difficulty, 60)
        solutions = [careless(problem) for problem in sample]
        assert solutions == [careless(problem, seed=1) for problem in sample]
        assert sum(not solution.correct for solution in solutions) >= 45
        slipping = [family.solve(problem, Annotator(False, 0.3, rng)) for problem in sample]
        assert sum(not solution.correct for solution in slipping) >= 12
        for problem, solution in zip(sample * 2, solutions + slipping, strict=True):
            verdict = family.verify(problem, f"<think>{solution.trace}</think>{solution.answer}")
            # A negative answer is no input, and wrong.
            assert verdict.reward == float(solution.correct)
            assert solution.trace.endswith(solution.answer)


@pytest.mark.parametrize("name", NAMES)
def test_problems_survive_json_and_failures_are_no_verdict(name: str) -> None:
    family = get_family(name)
    problem = make_problem(name, 5, 0, 0, "train")
    copy = dataclasses.replace(problem, data=json.loads(json.dumps(problem.data)))
    assert family.solve(copy) == family.solve(problem)
    answer = family.solve(problem).answer
    assert family.verify(copy, answer).reward == 1.0
    assert family.verify(dataclasses.replace(problem, data=(3, [["no", "statement", 1]])), "1").reward is None
