"""Seeds of code problems: schemas that draw what they accept, files that are checked, generated seeds that hold."""

from __future__ import annotations

import json
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from openzaya.errors import DataError
from openzaya.problems.code_generator import generate_seed
from openzaya.problems.code_schema import InputSchema
from openzaya.problems.code_seeds import CodeSeed, load_seeds, normalise_output
from openzaya.problems.small_programs import read, run, show
from openzaya.problems.split import split_of

INTEGER = {"type": "integer", "low": -5, "high": 99}
SIZED = [
    [{"type": "integer", "low": 0, "high": 4, "name": "n"}, {"type": "integer", "low": 1, "high": 3, "name": "m"}],
    [{"type": "integers", "low": -9, "high": 9, "length": "n"}],
    [{"type": "text", "alphabet": "ab c", "length": "m"}],
]
SCHEMAS = [
    [[INTEGER]],
    [[INTEGER, INTEGER]],
    [[{"type": "integers", "low": 0, "high": 9, "min_length": 0, "max_length": 3}]],
    [[{"type": "text", "min_length": 0, "max_length": 4, "alphabet": "ab c"}]],
    [[INTEGER, {"type": "text", "max_length": 4, "alphabet": "a "}], [INTEGER]],
    SIZED,
]


def schema(lines: object) -> InputSchema:
    return InputSchema.model_validate({"lines": lines})


@pytest.mark.parametrize("lines", SCHEMAS, ids=range(len(SCHEMAS)))
def test_a_schema_accepts_what_it_draws(lines: object) -> None:
    made = schema(lines)
    rng = random.Random(0)
    drawn = {made.draw(rng) for _ in range(300)}
    assert len(drawn) > 10
    for text in drawn:
        assert made.problem(text) == "", text
        assert made.normalise(text) == text
        assert made.problem(f"{text.rstrip()}  \n\n") == ""
        assert len(text) <= made.max_characters()
        assert made.problem(f"{text}1 1 1\n2\n3\n4") != ""
    assert made.describe().count(":") == len(made.lines)


@pytest.mark.parametrize(
    ("lines", "wrong"),
    [
        ([[INTEGER]], ["", "x", "100", "-6", "1 2", "1\n2", "1.0", "+1", "01", "-0", "1e1", "0x1", "\u0661", "1_0"]),
        ([[INTEGER, INTEGER]], ["1", "1 2 3", "1  2", "1\n2", "1\t2", " 1 2"]),
        ([[{"type": "integers", "low": 0, "high": 9, "max_length": 3}]], ["", "1 2 3 4", "10", "1,2", "1  2", "[1]"]),
        ([[{"type": "text", "max_length": 3}]], ["", "abcd", "A", "a b", "\u00e9", "a\nb"]),
        (SIZED, ["2 1\n1\na", "2 1\n1 2\nab", "1 1\n1", "5 1\n1 2 3 4 5\na", "1\n1\na", "1 1\n1\na\nb", "x 1\n1\na"]),
    ],
)
def test_a_schema_says_what_is_wrong(lines: object, wrong: list[str]) -> None:
    made = schema(lines)
    for text in wrong:
        assert made.problem(text), text
    assert made.problem("1 " * 10**6) == "too long"


@settings(derandomize=True, max_examples=200, deadline=None)
@given(st.text(max_size=40), st.sampled_from(SCHEMAS))
def test_any_text_is_judged_and_accepted_ones_are_stable(text: str, lines: object) -> None:
    made = schema(lines)
    if made.problem(text) == "":
        assert made.problem(made.normalise(text)) == ""


@pytest.mark.parametrize(
    ("lines", "said"),
    [
        ([], "at least 1 item"),
        ([[]], "line 1 of the schema has no field"),
        ([[{"type": "integer", "low": 3, "high": 1}]], "low=3 exceeds high=1"),
        ([[{"type": "integer", "low": 0, "high": 10**18}]], "18 digits"),
        ([[{"type": "text", "min_length": 3, "max_length": 1}]], "min_length=3 exceeds"),
        ([[{"type": "text", "alphabet": "a\n"}]], "cannot be printed"),
        ([[{"type": "text", "alphabet": "  "}]], "blanks only"),
        ([[{"type": "text", "length": "n"}]], "no integer before it is named 'n'"),
        ([[{"type": "text"}, INTEGER]], "goes to the end of the line"),
        ([[{**INTEGER, "name": "n"}], [{"type": "text", "length": "n"}]], "to be a length"),
        ([[{"type": "number"}]], "type"),
    ],
)
def test_broken_schemas_are_refused(lines: object, said: str) -> None:
    with pytest.raises(ValidationError, match=said):
        schema(lines)


SEED = {
    "name": "double",
    "statement": "Print twice the number.",
    "input_schema": {"lines": [[{"type": "integer", "low": 0, "high": 99}]]},
    "accepted": "print(2 * int(input()))",
    "wrong": ["print(2 + int(input()))"],
    "tests": [{"input": "3\n", "output": "6\n"}, {"input": "40\n", "output": "80\n"}],
}


def test_a_file_of_seeds_is_read_in_order_of_difficulty(tmp_path) -> None:
    path = tmp_path / "seeds.jsonl"
    hard = {**SEED, "name": "hard", "difficulty": 4}
    path.write_text(f"{json.dumps(hard)}\n\n{json.dumps(SEED)}\n")
    easy, last = load_seeds(path)
    assert (easy.name, last.name) == ("double", "hard")
    assert easy.accepted.source == SEED["accepted"]
    assert [test.input for test in easy.examples] == ["3\n"]
    assert [test.input for test in easy.hidden_tests] == ["40\n"]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"tests": []}, "line 2: key 'tests': .*at least 2"),
        ({"num_examples": 2}, "line 2: num_examples=2 of 2 tests leaves no hidden test; add tests"),
        ({"num_examples": 0}, "line 2: key 'num_examples'"),
        ({"tests": [{"input": "100", "output": ""}] * 2}, "of test 1 does not fit input_schema: .*outside 0 to 99"),
        ({"tests": [{"input": "1", "output": "2"}, {"input": "1\n", "output": "2"}]}, "tests 1 and 2 have the same"),
        ({"acepted": "x"}, "line 2: key 'acepted': .*known keys: .*accepted"),
        ({"accepted": ""}, "line 2: key 'accepted.*'"),
        ({"accepted": 3}, "line 2: key 'accepted'"),
        ({"wrong": "print(1)"}, "line 2: key 'wrong'"),
        ({"difficulty": -1}, "line 2: key 'difficulty'"),
        ({"name": "first"}, "line 2: key 'name': 'first' is the name of line 1 too; change one"),
        ({"input_schema": {"lines": [[{"type": "text", "length": "k"}]]}}, "no integer before it is named 'k'"),
        ({"accepted": {"source": "print(1)", "statements": [["+", 1]]}}, "line 2: programs are given as text"),
    ],
)  # fmt: skip
def test_broken_lines_are_named_with_the_remedy(change: dict, said: str, tmp_path) -> None:
    path = tmp_path / "seeds.jsonl"
    path.write_text(json.dumps({**SEED, "name": "first"}) + "\n" + json.dumps({**SEED, **change}) + "\n")
    with pytest.raises(DataError, match=said):
        load_seeds(path)


def test_broken_files_are_refused(tmp_path) -> None:
    with pytest.raises(DataError, match="check the path"):
        load_seeds(tmp_path / "none.jsonl")
    with pytest.raises(DataError, match="cannot read"):
        load_seeds(tmp_path)
    path = tmp_path / "seeds.jsonl"
    for text, said in ((b"\n", "holds no seeds"), (b"{", "line 1: "), (b"[1]\n", "line 1: "), (b"\xff\n", "line 1: ")):
        path.write_bytes(text)
        with pytest.raises(DataError, match=said):
            load_seeds(path)
    path.write_bytes(b"[" * 100_000 + b"\n")
    with pytest.raises(DataError, match="line 1: "):
        load_seeds(path)


def test_generated_seeds_are_pure_and_differ() -> None:
    seeds = [generate_seed(2, number) for number in range(30)]
    assert seeds[7] == generate_seed(2, 7) == CodeSeed.model_validate_json(seeds[7].model_dump_json())
    assert len({seed.accepted.source for seed in seeds}) >= 29
    assert {seed.accepted.kind for seed in seeds} == {"int", "list", "str"}
    assert generate_seed(2, 7, seed=1).accepted != seeds[7].accepted
    for number in range(8):
        for split in ("train", "heldout"):
            assert split_of(f"code:{generate_seed(1, number, 0, split).accepted.source}") == split
    with pytest.raises(DataError, match="difficulty=-1"):
        generate_seed(-1, 0)


@pytest.mark.parametrize("difficulty", [0, 1, 4, 8, 25])
def test_generated_seeds_hold_what_they_promise(difficulty: int) -> None:
    for number in range(8):
        seed = generate_seed(difficulty, number)
        assert len(seed.accepted.statements) == difficulty + 2
        assert len(seed.statement.splitlines()) == difficulty + 4
        assert len(seed.outline.splitlines()) == difficulty + 4
        assert seed.outline != seed.statement
        assert len({test.output for test in seed.tests}) >= 8
        assert len(seed.hidden_tests) == 12 and len(seed.examples) == 4
        assert seed.wrong
        for program in (seed.accepted, *seed.wrong):
            outputs = [show(run(program.statements, read(test.input, program.kind))) for test in seed.tests]
            right = [output == test.output for output, test in zip(outputs, seed.tests, strict=True)]
            assert all(right) == (program is seed.accepted)
        # The first wrong program is wrong on few inputs.
        rng = random.Random(number)
        values = [read(seed.input_schema.draw(rng), seed.accepted.kind) for _ in range(100)]
        wrong = seed.wrong[0].statements
        assert sum(run(wrong, value) != run(seed.accepted.statements, value) for value in values) <= 25


def test_outputs_are_compared_without_blanks_at_ends() -> None:
    assert normalise_output(" 1 2 \n3  \n\n") == normalise_output("1 2\n3") == "1 2\n3"
    assert normalise_output("1  2") != normalise_output("1 2")
    assert normalise_output("A") != normalise_output("a")
