"""Problems by number: pure, disjoint splits in small spaces too, and equal problems share a canonical form."""

from __future__ import annotations

import random
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

import pytest

from openzaya.errors import DataError
from openzaya.problems import FAMILIES, SPLITS, Problem, get_family, make_problem, split_of
from openzaya.problems.arithmetic_chain import canonical_chain
from openzaya.problems.base import Annotator, Family
from openzaya.problems.split import MAX_DRAWS


@pytest.mark.parametrize("name", FAMILIES)
def test_item_is_a_function_of_seed_and_index(name: str) -> None:
    for difficulty in range(13):
        for split in SPLITS:
            first = [make_problem(name, difficulty, 7, index, split) for index in range(10)]
            again = [make_problem(name, difficulty, 7, index, split) for index in reversed(range(10))]
            assert first == again[::-1]
            assert len({problem.canonical for problem in first}) >= 4
            other_seed = [make_problem(name, difficulty, 8, index, split) for index in range(10)]
            assert first != other_seed


def test_items_do_not_depend_on_the_process() -> None:
    """String hashes differ between processes; items must not."""
    code = (
        "from openzaya.problems import FAMILIES, make_problem;"
        "print([make_problem(name, 3, 1, 2, 'heldout').prompt for name in FAMILIES])"
    )
    here = str([make_problem(name, 3, 1, 2, "heldout").prompt for name in FAMILIES])
    for hash_seed in ("1", "2"):
        environment = {"PYTHONHASHSEED": hash_seed, "PYTHONPATH": ":".join(sys.path)}
        result = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=True
        )
        assert result.stdout.strip() == here


@pytest.mark.parametrize("name", FAMILIES)
def test_splits_are_disjoint_and_both_reachable(name: str) -> None:
    for difficulty in (0, 1, 5):
        train = {make_problem(name, difficulty, 0, index, "train").canonical for index in range(1500)}
        held_out = {make_problem(name, difficulty, 0, index, "heldout").canonical for index in range(300)}
        assert train and len(held_out) >= 10
        assert not train & held_out
        assert all(canonical.startswith(f"{name}:") for canonical in train | held_out)


def test_one_eighth_of_all_problems_is_held_out() -> None:
    shares = [split_of(f"sorting:{number}") == "heldout" for number in range(8000)]
    assert 0.115 <= sum(shares) / len(shares) <= 0.135


def test_problems_with_one_canonical_form_have_the_same_answer() -> None:
    """Or one that is right for both. The variables of ``program`` may have exchanged their names."""
    for name, family in FAMILIES.items():
        answers: dict[str, str] = {}
        for index in range(1500):
            problem = make_problem(name, 0, 0, index, "train")
            answer = family.solve(problem).answer
            if name == "program":
                answer = " ".join(sorted(part.split("=")[1] for part in answer.split()))
            known = answers.setdefault(problem.canonical, answer)
            assert known == answer or family.verify(problem, known).reward == 1.0, (name, problem)


@pytest.mark.parametrize(
    ("one", "two", "same"),
    [
        ((3, "+", (4,)), (4, "+", (3,)), True),
        ((3, "*", (4,)), (4, "*", (3,)), True),
        ((3, "+", (4,)), (3, "*", (4,)), False),
        ((9, "-+", (4, 2)), (2, "+-", (9, 4)), True),
        ((9, "-+", (4, 2)), (9, "-+", (2, 4)), False),
        ((3, "+*", (4, 5)), (4, "+*", (3, 5)), True),
        ((3, "+*", (4, 5)), (3, "*+", (5, 4)), False),
        ((3, "+*-", (4, 5, 2)), (3, "+*+", (4, 5, 2)), False),
        ((1, "+", (23,)), (12, "+", (3,)), False),
    ],
)
def test_chains_that_differ_by_commuting_terms_are_one_problem(one: Any, two: Any, same: bool) -> None:
    assert (canonical_chain(*one) == canonical_chain(*two)) == same


def test_orders_that_make_no_difference_are_one_problem() -> None:
    """All problems of small spaces that a person would call the same fall into one split."""
    for name in ("sorting", "addition", "largest_run"):
        seen: dict[str, str] = {}
        prompts = set()
        for index in range(3000):
            problem = make_problem(name, 0, 3, index, "train")
            given = problem.prompt.split(": ")[1]
            if name == "sorting":
                key = "".join(sorted(given.split()))
            elif name == "addition":
                key = "+".join(sorted(given.split("+")))
            else:
                key = str(min(given.split(), given.split()[::-1]))
            assert seen.setdefault(key, problem.canonical) == problem.canonical
            prompts.add(problem.prompt)
        assert len(seen) < len(prompts), "no two prompts were one problem: the check was empty"


def test_exchanged_variables_are_one_program() -> None:
    family = get_family("program")
    by_text = {}
    for index in range(4000):
        problem = family.generate(random.Random(index), 0)
        by_text[problem.prompt] = problem.canonical
    exchange = str.maketrans("xy", "yx")
    num_pairs = 0
    for prompt, canonical in by_text.items():
        start, listed = prompt.removeprefix("Run ").split(": ")
        x, y = start.split()
        exchanged = f"Run {y.translate(exchange)} {x.translate(exchange)}: {listed.translate(exchange)}"
        if exchanged != prompt and exchanged in by_text:
            num_pairs += 1
            assert by_text[exchanged] == canonical
    assert num_pairs > 10


class _OneProblem(Family):
    """A space of a single problem, which lies in one split only."""

    name = "one_problem"
    title = "one problem"
    habit = "none"

    def _draw(self, rng: random.Random, difficulty: int) -> tuple[str, str, Sequence[Any]]:
        return "Say one", "one", ()

    def _work(self, data: Sequence[Any], annotator: Annotator | None) -> tuple[str, str]:
        return "one", "one"


def test_too_small_space_and_wrong_arguments_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(FAMILIES, "one_problem", _OneProblem())
    full: Problem = get_family("one_problem").generate(random.Random(0), 0)
    empty = "train" if split_of(full.canonical) == "heldout" else "heldout"
    with pytest.raises(DataError, match=f"{MAX_DRAWS} draws.*too small"):
        make_problem("one_problem", 0, 0, 0, empty)
    with pytest.raises(DataError, match="unknown split 'test'"):
        make_problem("sorting", 0, 0, 0, "test")  # type: ignore[arg-type]
    with pytest.raises(DataError, match="unknown problem family"):
        make_problem("no_such_family", 0, 0, 0, "train")
    with pytest.raises(DataError, match="difficulty=-2"):
        make_problem("sorting", -2, 0, 0, "train")
