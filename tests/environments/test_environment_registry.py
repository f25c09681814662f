"""Specifications: told apart by kind, light to import, and names that are unique."""

from __future__ import annotations

import subprocess
import sys

import pytest
from pydantic import TypeAdapter, ValidationError

from openzaya.environments.families import problem_of
from openzaya.environments.registry import EnvironmentSpec, ProblemsSpec, make_environments
from openzaya.errors import DataError
from openzaya.problems import FAMILIES, TRAINED_FAMILIES, get_family

SPECS = TypeAdapter(list[EnvironmentSpec])


def test_kinds_are_told_apart_and_unknown_ones_named() -> None:
    kinds = ["problems", "reasoning_gym", "rlve", "mathematics", "code", "instructions"]
    assert [spec.kind for spec in SPECS.validate_python([{"kind": kind} for kind in kinds])] == kinds
    for wrong in ({"kind": "no_such_kind"}, {}, {"kind": "problems", "family": "sorting"}):
        with pytest.raises(ValidationError):
            SPECS.validate_python([wrong])


def test_families_are_environments_that_reward_their_solutions() -> None:
    environments = make_environments([ProblemsSpec(families=["*"], seed=2)])
    assert list(environments) == list(FAMILIES)
    assert len(environments) >= 26
    for name, environment in environments.items():
        for difficulty in (0, 4):
            task = environment.task(difficulty, 3)
            solution = get_family(name).solve(problem_of(task))
            assert environment.verify(task, f"<think>{solution.trace}</think>{solution.answer}").reward == 1.0
            assert environment.verify(task, "").reward == 0.0
        environment.close()
    assert list(make_environments([ProblemsSpec()])) == list(TRAINED_FAMILIES)


def test_names_are_unique_and_known() -> None:
    with pytest.raises(DataError, match="two environments are called 'sorting'"):
        make_environments([ProblemsSpec(families=["sorting"]), ProblemsSpec(families=["s*"])])
    with pytest.raises(DataError, match="did you mean 'sorting'"):
        make_environments([ProblemsSpec(families=["sortin"])])
    assert make_environments([]) == {}


def test_specifications_import_no_library() -> None:
    heavy = {"torch", "transformers", "reasoning_gym", "sympy", "math_verify", "networkx", "numpy"}
    code = f"import sys, openzaya.environments.registry; print(*sorted({heavy!r} & set(sys.modules)))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.split() == []
