"""Seeds of code problems: a statement, the input's schema, an accepted program, wrong ones, and tests.

All code environments are made of seeds (arXiv 2605.05365, stage 3). They come from a file of the user's, one JSON
object a line, or are generated (``openzaya.problems.code_generator``). A line of a file::

    {"name": "double", "statement": "Print twice the number.", "difficulty": 0,
     "input_schema": {"lines": [[{"type": "integer", "low": 0, "high": 99}]]},
     "accepted": "print(2 * int(input()))", "wrong": ["print(2 + int(input()))"],
     "tests": [{"input": "3\n", "output": "6\n"}, {"input": "40\n", "output": "80\n"}], "num_examples": 1}

The first ``num_examples`` tests are shown, the others are hidden. Programs are Python, and read standard input.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from openzaya.errors import DataError
from openzaya.problems.code_schema import InputSchema
from openzaya.problems.small_programs import Kind

MAX_LINE_BYTES = 16 << 20


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class CodeTest(_Record):
    """What stands on standard input, and what is to be printed."""

    input: str
    output: str


class CodeProgram(_Record):
    """A program; those that we generated also as data of ``openzaya.problems.small_programs``, to run without exec."""

    source: str = Field(min_length=1)
    kind: Kind | None = None
    statements: list[Any] | None = None


class CodeSeed(_Record):
    """One problem with all that is known of it."""

    name: str = Field(min_length=1)
    statement: str = Field(min_length=1)
    outline: str = ""
    """What reconstruction shows in place of the statement, such as a part of it; empty: the statement."""
    input_format: str = ""
    """In words; empty: as the schema says it."""
    output_format: str = ""
    input_schema: InputSchema
    accepted: CodeProgram
    wrong: list[CodeProgram] = []
    tests: list[CodeTest] = Field(min_length=2)
    num_examples: int = Field(1, ge=1)
    difficulty: int = Field(0, ge=0)

    @field_validator("accepted", mode="before")
    @classmethod
    def _program(cls, value: Any) -> Any:
        return CodeProgram(source=value) if isinstance(value, str) else value

    @field_validator("wrong", mode="before")
    @classmethod
    def _programs(cls, values: Any) -> Any:
        if not isinstance(values, list):
            return values
        return [CodeProgram(source=value) if isinstance(value, str) else value for value in values]

    @model_validator(mode="after")
    def _coherent(self) -> CodeSeed:
        if self.num_examples >= len(self.tests):
            raise ValueError(
                f"num_examples={self.num_examples} of {len(self.tests)} tests leaves no hidden test; add tests"
            )
        for number, test in enumerate(self.tests, start=1):
            problem = self.input_schema.problem(test.input)
            if problem:
                raise ValueError(
                    f"the input of test {number} does not fit input_schema: {problem}; change one of the two"
                )
        first_with: dict[str, int] = {}
        for number, test in enumerate(self.tests, start=1):
            same = first_with.setdefault(self.input_schema.normalise(test.input), number)
            if same != number:
                raise ValueError(f"tests {same} and {number} have the same input; leave one out")
        return self

    @property
    def examples(self) -> list[CodeTest]:
        """The tests that the prompt shows."""
        return self.tests[: self.num_examples]

    @property
    def hidden_tests(self) -> list[CodeTest]:
        """The tests that decide."""
        return self.tests[self.num_examples :]


def normalise_output(text: str) -> str:
    """``text`` without blanks at the ends of lines and at both its ends: what outputs are compared by."""
    return "\n".join(line.rstrip() for line in text.strip().splitlines())


def load_seeds(path: str | Path) -> list[CodeSeed]:
    """The seeds of a JSONL file, in order of difficulty, those of one difficulty in the file's order.

    Raises:
        DataError: no such file, no seed in it, or a broken line; names file, line, key and remedy.
    """
    file = Path(path)
    try:
        lines = file.read_bytes().splitlines()
    except OSError as error:
        raise DataError(f"cannot read the seeds of code problems: {file}: {error.strerror}; check the path") from None
    seeds: dict[str, tuple[int, CodeSeed]] = {}
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        where = f"{file}, line {number}"
        if len(line) > MAX_LINE_BYTES:
            raise DataError(f"{where}: {len(line)} bytes; a seed has at most {MAX_LINE_BYTES}: give it smaller tests")
        seed = _parse(line, where)
        if seed.name in seeds:
            raise DataError(
                f"{where}: key 'name': '{seed.name}' is the name of line {seeds[seed.name][0]} too; change one"
            )
        seeds[seed.name] = (number, seed)
    if not seeds:
        raise DataError(f"{file} holds no seeds of code problems; give one JSON object a line")
    return sorted((seed for _, seed in seeds.values()), key=lambda seed: seed.difficulty)


def _parse(line: bytes, where: str) -> CodeSeed:
    try:
        seed = CodeSeed.model_validate_json(line)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(map(str, first["loc"]))
        message = first["msg"].removeprefix("Value error, ")
        known = f"; known keys: {', '.join(CodeSeed.model_fields)}" if first["type"] == "extra_forbidden" else ""
        raise DataError(f"{where}: {f'key {key!r}: ' if key else ''}{message}{known}") from None
    if seed.accepted.statements is not None or any(program.statements is not None for program in seed.wrong):
        raise DataError(f"{where}: programs are given as text, without 'statements'; leave that key out")
    return seed
