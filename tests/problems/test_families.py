"""Every family at every difficulty: right answers against independent oracles, traces, annotators, guessing."""

from __future__ import annotations

import collections
import itertools
import json
import random
import re

import pytest

from openzaya.errors import DataError
from openzaya.problems import (
    FAMILIES,
    FURTHER_FAMILIES,
    NEVER_TRAINED,
    TRAINED_FAMILIES,
    Annotator,
    Problem,
    Solution,
    candidate_solutions,
    demonstration,
    get_family,
    make_problem,
)

FIRST_FAMILIES = (*TRAINED_FAMILIES, NEVER_TRAINED)
DIFFICULTIES = range(13)
TOKEN = re.compile(r" ?[A-Za-z]+|\d| ?[^\sA-Za-z\d]|\n| ")
"""Words, single digits and signs: about what a byte-pair tokenizer that splits digits makes."""


def problems(name: str, difficulty: int, num: int) -> list[Problem]:
    return [make_problem(name, difficulty, 0, index, "train") for index in range(num)]


def num_tokens(text: str) -> int:
    return len(TOKEN.findall(text))


# --- oracles: the right answer from the prompt alone, by other means than the solver -----------------


def evaluate_chain(expression: str, modulus: int | None = None) -> str:
    numbers = list(map(int, re.findall(r"\d+", expression)))
    value = numbers[0]
    for operator, number in zip(re.findall(r"[-+*]", expression), numbers[1:], strict=True):
        value = {"+": value + number, "-": value - number, "*": value * number}[operator]
    return str(value if modulus is None else value % modulus)


def run_edits(given: str) -> str:
    text, edits = given.split(": ")
    letters = collections.deque(text.split())
    for edit in re.findall(r"\d+ ([a-z]+(?: [a-z] [a-z])?)", edits):
        match edit.split():
            case ["left"]:
                letters.rotate(-1)
            case ["right"]:
                letters.rotate(1)
            case ["reverse"]:
                letters.reverse()
            case ["swap"]:
                letters[0], letters[-1] = letters[-1], letters[0]
            case ["replace", old, new]:
                letters = collections.deque(" ".join(letters).replace(old, new).split())
            case other:
                raise AssertionError(other)
    return " ".join(letters)


def order_people(facts: str) -> str:
    following = {}
    for left, sign, right in re.findall(r"([a-z]+)([<>])([a-z]+)", facts):
        smaller, greater = (left, right) if sign == "<" else (right, left)
        assert smaller not in following, "two people follow one"
        following[smaller] = greater
    (person,) = set(following) - set(following.values())
    row = [person]
    while row[-1] in following:
        row.append(following[row[-1]])
    return " ".join(row)


def run_program(given: str) -> str:
    start, listed = given.split(": ")
    variables = dict(item.split("=") for item in start.split())
    namespace = {name: int(value) for name, value in variables.items()}
    for times, statement in re.findall(r"\d+ (?:repeat (\d+) )?(\S+)", listed):
        for _ in range(int(times or 1)):
            exec(statement, {}, namespace)
    return f"x={namespace['x']} y={namespace['y']}"


def count_letters(given: str) -> str:
    return " ".join(f"{letter}{count}" for letter, count in collections.Counter(given.split()).items())


def largest_run(given: str) -> str:
    numbers = list(map(int, given.split()))
    return str(max(sum(numbers[i:j]) for i, j in itertools.combinations(range(len(numbers) + 1), 2)))


def oracle(problem: Problem) -> str:
    before, given = problem.prompt.split(": ", 1)
    match problem.family:
        case "arithmetic_chain":
            return evaluate_chain(given)
        case "modular":
            return evaluate_chain(given, int(before.split()[-1]))
        case "base_conversion":
            return find_digits(int(given), int(before.split()[-1]))
        case "sorting":
            return " ".join(sorted(given.split()))
        case "counting":
            return count_letters(given)
        case "string":
            return run_edits(before.removeprefix("Edit ") + ": " + given)
        case "logic":
            return order_people(given)
        case "program":
            return run_program(before.removeprefix("Run ") + ": " + given)
        case "addition":
            return str(sum(map(int, given.split("+"))))
        case "largest_run":
            return largest_run(given)
    raise AssertionError(problem.family)


def find_digits(number: int, base: int) -> str:
    """The digits from the highest place down, checked by Python's own reading of them."""
    length = next(n for n in itertools.count(1) if base**n > number)
    digits = ""
    for place in range(length - 1, -1, -1):
        digits += str(number // base**place % base)
    assert int(digits, base) == number
    return digits


# --- tests -----------------------------------------------------------------------------------------


def test_registry_holds_the_trained_families_and_one_that_is_never_trained() -> None:
    assert len(TRAINED_FAMILIES) >= 8
    assert NEVER_TRAINED not in TRAINED_FAMILIES
    assert len(TRAINED_FAMILIES) == 9, "recipes and tokenizers are made for these"
    assert set(FAMILIES) == {*TRAINED_FAMILIES, NEVER_TRAINED, *FURTHER_FAMILIES}
    assert len(FAMILIES) == len(TRAINED_FAMILIES) + 1 + len(FURTHER_FAMILIES)
    assert all(name == family.name and family.title and family.habit for name, family in FAMILIES.items())
    with pytest.raises(DataError, match="did you mean 'sorting'"):
        get_family("sortin")
    with pytest.raises(DataError, match="choose one of"):
        get_family("zzzz")


@pytest.mark.parametrize("name", FIRST_FAMILIES)
def test_right_solution_agrees_with_an_independent_oracle_and_verifies(name: str) -> None:
    family = get_family(name)
    for difficulty in [*DIFFICULTIES, 30]:
        for problem in problems(name, difficulty, 30):
            solution = family.solve(problem)
            assert solution.answer == oracle(problem)
            assert solution.correct
            assert solution.trace.splitlines()[-1].endswith(solution.answer)
            response = f"<think>\n{solution.trace}\n</think>\n\n{solution.answer}"
            assert family.verify(problem, response, strict=True).reward == 1.0
            assert family.verify(problem, solution.answer).reward == 1.0


@pytest.mark.parametrize("name", FIRST_FAMILIES)
def test_problems_survive_json(name: str) -> None:
    family = get_family(name)
    for problem in problems(name, 3, 20):
        copy = Problem(problem.family, 3, problem.prompt, problem.canonical, json.loads(json.dumps(problem.data)))
        assert family.solve(copy) == family.solve(problem)


@pytest.mark.parametrize("name", FIRST_FAMILIES)
def test_length_grows_with_difficulty_and_stays_within_the_context(name: str) -> None:
    family = get_family(name)
    means = []
    num_lines = []
    for difficulty in [*DIFFICULTIES, 20, 40]:
        sample = problems(name, difficulty, 60)
        traces = [family.solve(problem).trace for problem in sample]
        means.append(sum(map(len, traces)) / len(traces))
        num_lines.append(min(trace.count("\n") for trace in traces) + 1)
        if difficulty == 0:
            assert max(map(num_tokens, traces)) <= 40
        if difficulty <= 7:
            assert max(num_tokens(problem.prompt) for problem in sample) <= 70
            assert max(map(num_tokens, traces)) <= 150
    assert all(after > before + 3 for before, after in itertools.pairwise(means)), means
    steps_per_level = [after - before for before, after in itertools.pairwise(num_lines[: len(DIFFICULTIES)])]
    assert all(step == 1 for step in steps_per_level), num_lines


@pytest.mark.parametrize("name", FIRST_FAMILIES)
def test_no_answer_can_be_guessed(name: str) -> None:
    family = get_family(name)
    for difficulty in range(8):
        answers = collections.Counter(family.solve(problem).answer for problem in problems(name, difficulty, 2000))
        assert answers.most_common(1)[0][1] <= 2000 / 16, (difficulty, answers.most_common(3))


@pytest.mark.parametrize("name", FIRST_FAMILIES)
def test_habits_are_systematic_wrong_and_carried_to_the_answer(name: str) -> None:
    family = get_family(name)
    for difficulty in range(1, 13):
        num_wrong = 0
        for problem in problems(name, difficulty, 100):
            solution = family.solve(problem, Annotator(habit=True, slip_rate=0.0, rng=random.Random(0)))
            assert solution == family.solve(problem, Annotator(habit=True, slip_rate=0.0, rng=random.Random(1)))
            check_annotation(problem, solution)
            num_wrong += not solution.correct
        assert num_wrong >= 50, (difficulty, num_wrong)


@pytest.mark.parametrize("name", FIRST_FAMILIES)
def test_slips_are_random_and_carried_to_the_answer(name: str) -> None:
    family = get_family(name)
    rng = random.Random(0)
    solutions = []
    for problem in problems(name, 5, 100):
        assert family.solve(problem, Annotator(False, 0.0, rng)) == family.solve(problem)
        solution = family.solve(problem, Annotator(habit=False, slip_rate=0.3, rng=rng))
        check_annotation(problem, solution)
        solutions.append(solution)
    assert 30 <= sum(not solution.correct for solution in solutions) <= 99


def check_annotation(problem: Problem, solution: Solution) -> None:
    """A careless solution knows whether it is right, and its last line yields its answer."""
    verdict = get_family(problem.family).verify(problem, f"<think>{solution.trace}</think>{solution.answer}")
    assert verdict.reward == float(solution.correct)
    assert solution.trace.splitlines()[-1].endswith(solution.answer)
    check_links(problem.family, solution.trace.splitlines())


def check_links(name: str, lines: list[str]) -> None:
    """Each line goes on from the line before it, wrong or not."""
    for before, after in itertools.pairwise(lines):
        match name:
            case "arithmetic_chain" | "modular":
                assert re.match(r"-?\d+", after).group() == re.search(r"-?\d+$", before).group()
            case "base_conversion":
                digits_before, digits_after = before.split(":")[1], after.split(":")[1]
                assert len(digits_after) == len(digits_before) + 1
                assert digits_before in (digits_after[1:], digits_after[:-1])
            case "sorting":
                assert collections.Counter(after.replace("|", "").split()) == collections.Counter(
                    before.replace("|", "").split()
                )
                assert after.split("|")[0].startswith(before.split("|")[0].strip())
            case "counting":
                counts_before = dict(re.findall(r"([a-z])(\d+)", before))
                counts_after = dict(re.findall(r"([a-z])(\d+)", after))
                total_before, total_after = (sum(map(int, c.values())) for c in (counts_before, counts_after))
                assert total_after - total_before in (0, 1)
                assert counts_before.keys() <= counts_after.keys()
            case "string":
                assert len(before.split(": ")[1]) == len(after.split(": ")[1])
            case "logic":
                row = after.split()
                assert len(row) == len(before.split()) + 1
                assert [person for person in row if person in before.split()] == before.split()
            case "program":
                values_before, values_after = (re.findall(r"[xy]=(-?\d+)", line) for line in (before, after))
                assert sum(a != b for a, b in zip(values_before, values_after, strict=True)) <= 1
            case "addition":
                if "|" in after:
                    assert after.split("|")[1][2:] == before.split("|")[1][1:]
                else:
                    assert after.endswith(before.split("|")[1][1:].lstrip("0") or "0")
            case "largest_run":
                assert int(after.split()[2]) == max(int(before.split()[2]), int(after.split()[1]))


@pytest.mark.parametrize(
    ("name", "line"),
    [
        ("arithmetic_chain", r"^(-?\d+)([-+*])(\d+)=(-?\d+)$"),
        ("modular", r"^(-?\d+)([-+*])(\d+)=(-?\d+)(?:=-?\d+)*$"),
    ],
)
def test_habit_traces_hold_only_true_equations(name: str, line: str) -> None:
    for problem in problems(name, 5, 50):
        solution = get_family(name).solve(problem, Annotator(True, 0.0, random.Random(0)))
        for text in solution.trace.splitlines():
            left, operator, right, result = re.match(line, text).groups()
            assert {"+": int(left) + int(right), "-": int(left) - int(right), "*": int(left) * int(right)}[
                operator
            ] == int(result)
        missing = "*" if name == "arithmetic_chain" else "-"
        assert not re.search(rf"\d\{missing}\d", solution.trace)


def test_negative_difficulty_and_wrong_shares_are_refused() -> None:
    problem = make_problem("sorting", 0, 0, 0, "train")
    with pytest.raises(DataError, match="difficulty=-1"):
        get_family("sorting").generate(random.Random(0), -1)
    with pytest.raises(DataError, match=r"wrong_share=1\.5"):
        demonstration(problem, random.Random(0), 1.5)
    with pytest.raises(DataError, match=r"habit_share=-0\.1"):
        demonstration(problem, random.Random(0), 0.5, habit_share=-0.1)
    with pytest.raises(DataError, match="slip_rate=2"):
        Annotator(False, 2, random.Random(0))
    with pytest.raises(DataError, match="num=-1"):
        candidate_solutions(problem, random.Random(0), -1, 0.5)


def test_demonstrations_mix_right_and_wrong_solutions_deterministically() -> None:
    problem = make_problem("arithmetic_chain", 4, 0, 0, "train")
    right = get_family("arithmetic_chain").solve(problem)
    assert all(solution == right for solution in candidate_solutions(problem, random.Random(0), 20, 0.0))
    pool = candidate_solutions(problem, random.Random(0), 400, 0.6)
    assert pool == candidate_solutions(problem, random.Random(0), 400, 0.6)
    share_wrong = sum(not solution.correct for solution in pool) / len(pool)
    assert 0.45 <= share_wrong <= 0.62  # 0.6, less the slipping annotators who did not slip
    habit = get_family("arithmetic_chain").solve(problem, Annotator(True, 0.0, random.Random(0)))
    assert 0.3 <= sum(solution == habit for solution in pool) / len(pool) <= 0.5
    # A high share of habits makes the wrong answer the most frequent one.
    pool = candidate_solutions(problem, random.Random(0), 400, 0.6, habit_share=0.9)
    assert 0.48 <= sum(solution == habit for solution in pool) / len(pool) <= 0.6
