"""Programs as data and the Python that is written of them do the same."""

from __future__ import annotations

import builtins
import contextlib
import io
from unittest import mock

import pytest

from openzaya.problems.code_generator import generate_seed
from openzaya.problems.small_programs import Kind, describe, read, run, show, write, write_program


def printed(source: str, given: str) -> str:
    """What real Python prints for a program of ours."""
    shown = io.StringIO()
    with contextlib.redirect_stdout(shown), mock.patch.object(builtins, "input", lambda: given.removesuffix("\n")):
        exec(source, {})
    return shown.getvalue()


INTEGERS = [
    ["+", 7],
    ["-", 3],
    ["*", 4],
    ["//", 3],
    ["%", 5],
    ["from", 20],
    ["for", 3, ["+", "i"]],
    ["for", 4, ["-", 2]],
    ["if", ">", 10, ["-", 5]],
    ["if", "<=", 10, ["from", 5]],
    ["if", "==", 10, ["+", 1]],
]
SEQUENCES = [["reverse"], ["rotate", 2], ["rotate", 9], ["drop", 1], ["take", 2], ["sort"]]
LISTS = [
    *SEQUENCES,
    ["append", 5],
    ["each", "+", 3],
    ["each", "%", 3],
    ["keep", ">", 4],
    ["keep", "<=", 4],
    ["if", ">=", 3, ["drop", 1]],
    ["sum"],
    ["max"],
]
STRINGS = [*SEQUENCES, ["append", "xy"], ["replace", "ab", "c"], ["if", "<", 4, ["append", "z"]]]
CASES: list[tuple[Kind, list[object], list[str]]] = [
    *(("int", statement, ["0\n", "-7\n", "10\n", "11\n", "99\n"]) for statement in INTEGERS),
    *(("list", statement, ["\n", "4\n", "5 4 3\n", "9 -1 4 4 0 7\n"]) for statement in LISTS),
    *(("str", statement, ["\n", "a\n", "abab\n", 'it\'s "ab"\n']) for statement in STRINGS),
]


@pytest.mark.parametrize(("kind", "statement", "inputs"), CASES, ids=lambda value: str(value)[:30])
def test_every_statement_does_in_python_what_its_data_say(
    kind: Kind, statement: list[object], inputs: list[str]
) -> None:
    assert describe(statement)
    for given in inputs:
        assert show(run([statement], read(given, kind))) == printed(write_program([statement], kind), given)


def test_generated_programs_do_in_python_what_their_data_say() -> None:
    for difficulty in (0, 3, 8):
        for number in range(4):
            seed = generate_seed(difficulty, number)
            for program in (seed.accepted, *seed.wrong):
                for test in seed.tests[:4]:
                    value = read(test.input, program.kind)
                    assert show(run(program.statements, value)) == printed(program.source, test.input)


@pytest.mark.parametrize("broken", [[], ["jump"], ["if", ">", 1], ["for", 2], ["+"], "+", ["each", 1]])
def test_what_is_no_statement_is_refused(broken: object) -> None:
    for reading in (lambda: run([broken], 3), lambda: write([broken]), lambda: describe(broken)):
        with pytest.raises((ValueError, IndexError, KeyError)):
            reading()
