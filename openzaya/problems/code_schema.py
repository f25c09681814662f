"""What the standard input of a program looks like: a schema that draws inputs and checks them.

A schema is a list of lines, and a line a list of fields (JSON in a user's file)::

    [[{"type": "integer", "low": 1, "high": 100, "name": "n"}],
     [{"type": "integers", "low": 0, "high": 9, "length": "n"}]]

``integer`` is one number; ``integers`` are numbers up to the end of the line; ``text`` is the rest of the line, of
letters of an alphabet. The number of items lies between ``min_length`` and ``max_length``, or is the integer of an
earlier line that ``length`` names. Checking is exact but for blanks at the ends of lines and empty lines at the end,
and its work is bounded by the longest input that the schema allows.
"""

from __future__ import annotations

import random
import re
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

SMALL_LETTERS = "abcdefghijklmnopqrstuvwxyz"
MAX_ITEMS = 100_000
_NUMBER = re.compile(r"-?(0|[1-9][0-9]{0,17})", re.ASCII)


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class IntegerField(_Part):
    """One number of ``low`` to ``high``; ``name`` lets later fields take it for their length."""

    type: Literal["integer"] = "integer"
    low: int
    high: int
    name: str = ""

    @model_validator(mode="after")
    def _ordered(self) -> IntegerField:
        _check_bounds(self.low, self.high)
        return self


class _Repeated(_Part):
    min_length: int = Field(1, ge=0)
    max_length: int = Field(10, ge=0, le=MAX_ITEMS)
    length: str = ""
    """The name of an earlier integer that says how many items there are."""

    @model_validator(mode="after")
    def _lengths_ordered(self) -> _Repeated:
        if self.min_length > self.max_length:
            raise ValueError(f"min_length={self.min_length} exceeds max_length={self.max_length}")
        return self

    def _draw_length(self, rng: random.Random, named: dict[str, int]) -> int:
        return named[self.length] if self.length else rng.randint(self.min_length, self.max_length)

    def _length_problem(self, num_items: int, named: dict[str, int]) -> str:
        if self.length:
            return "" if num_items == named[self.length] else f"{num_items} items where {self.length} says otherwise"
        if self.min_length <= num_items <= self.max_length:
            return ""
        return f"{num_items} items, not {self.min_length} to {self.max_length}"


class IntegersField(_Repeated):
    """Numbers of ``low`` to ``high``, with blanks between them, to the end of the line."""

    type: Literal["integers"] = "integers"
    low: int
    high: int

    @model_validator(mode="after")
    def _ordered(self) -> IntegersField:
        _check_bounds(self.low, self.high)
        return self


class TextField(_Repeated):
    """Characters of ``alphabet`` to the end of the line."""

    type: Literal["text"] = "text"
    alphabet: str = Field(SMALL_LETTERS, min_length=1)

    @model_validator(mode="after")
    def _one_line(self) -> TextField:
        if any(not character.isprintable() for character in self.alphabet):
            raise ValueError("the alphabet holds characters that cannot be printed on one line")
        if not self.alphabet.strip():
            raise ValueError("the alphabet holds blanks only")
        return self


InputField = Annotated[IntegerField | IntegersField | TextField, Field(discriminator="type")]


class InputSchema(_Part):
    """Lines of fields."""

    lines: list[list[InputField]] = Field(min_length=1)

    @model_validator(mode="after")
    def _names_known(self) -> InputSchema:
        known: dict[str, IntegerField] = {}
        for number, line in enumerate(self.lines, start=1):
            if not line:
                raise ValueError(f"line {number} of the schema has no field")
            for place, field in enumerate(line):
                if isinstance(field, IntegerField):
                    known[field.name] = field
                elif place != len(line) - 1:
                    raise ValueError(
                        f"line {number}: '{field.type}' goes to the end of the line; make it the last field"
                    )
                elif field.length and field.length not in known:
                    raise ValueError(f"line {number}: no integer before it is named '{field.length}'")
                elif field.length and not 0 <= known[field.length].low <= known[field.length].high <= MAX_ITEMS:
                    raise ValueError(f"line {number}: '{field.length}' must lie within 0 to {MAX_ITEMS} to be a length")
        return self

    def draw(self, rng: random.Random) -> str:
        """One input, with a line feed behind each line."""
        named: dict[str, int] = {}
        lines = []
        for line in self.lines:
            words = []
            for field in line:
                if isinstance(field, IntegerField):
                    named[field.name] = rng.randint(field.low, field.high)
                    words.append(str(named[field.name]))
                elif isinstance(field, IntegersField):
                    length = field._draw_length(rng, named)
                    words += [str(rng.randint(field.low, field.high)) for _ in range(length)]
                else:
                    words.append(_draw_text(rng, field.alphabet, field._draw_length(rng, named)))
            lines.append(" ".join(words))
        return "".join(f"{line}\n" for line in lines)

    def max_characters(self) -> int:
        """More characters than any input has."""
        return 2 + sum(_max_characters(field, self) + 1 for line in self.lines for field in line)

    def normalise(self, text: str) -> str:
        """``text`` without blanks at the ends of lines and empty lines at the end, as :meth:`draw` would write it."""
        return "".join(f"{line}\n" for line in self._lines_of(text))

    def problem(self, text: str) -> str:
        """What is wrong with an input, in words; empty where nothing is."""
        if len(text) > 2 * self.max_characters() + 64:
            return "too long"
        lines = self._lines_of(text)
        if len(lines) != len(self.lines):
            return f"{len(lines)} lines, not {len(self.lines)}"
        named: dict[str, int] = {}
        for number, (line, fields) in enumerate(zip(lines, self.lines, strict=True), start=1):
            problem = _line_problem(line, fields, named)
            if problem:
                return f"line {number}: {problem}"
        return ""

    def _lines_of(self, text: str) -> list[str]:
        lines = [line.rstrip() for line in text.rstrip().split("\n")]
        # Lines at the end may be empty where the schema allows nothing on them.
        return lines + [""] * (len(self.lines) - len(lines))

    def describe(self) -> str:
        """The format in words, a sentence a line."""
        sentences = []
        for number, line in enumerate(self.lines, start=1):
            where = f"Line {number}" if len(self.lines) > 1 else "One line"
            sentences.append(f"{where}: {', then '.join(map(_describe, line))}.")
        return " ".join(sentences)


def _draw_text(rng: random.Random, alphabet: str, length: int) -> str:
    """Characters of ``alphabet``, of which the first and the last are no blanks."""
    inner = "".join(rng.choices(alphabet, k=length))
    ends = "".join(rng.choices([character for character in alphabet if character != " "], k=2))
    first = ends[0] if inner[:1] == " " else inner[:1]
    return first + inner[1:-1] + (ends[1] if inner[-1:] == " " else inner[-1:]) if length > 1 else first


def _check_bounds(low: int, high: int) -> None:
    if low > high:
        raise ValueError(f"low={low} exceeds high={high}")
    if max(abs(low), abs(high)) >= 10**18:
        raise ValueError("numbers have at most 18 digits")


def _max_characters(field: IntegerField | IntegersField | TextField, schema: InputSchema) -> int:
    if isinstance(field, IntegerField):
        return 20
    length = field.max_length
    if field.length:
        integers = [part for line in schema.lines for part in line if isinstance(part, IntegerField)]
        length = max(part.high for part in integers if part.name == field.length)
    return length * (20 if isinstance(field, IntegersField) else 1)


def _line_problem(line: str, fields: list[InputField], named: dict[str, int]) -> str:
    last = fields[-1]
    num_before = len(fields) if isinstance(last, IntegerField) else len(fields) - 1
    # Text may hold blanks, so only what stands before it is split.
    words = line.split(" ", num_before) if isinstance(last, TextField) else line.split(" ")
    if line == "" and num_before == 0:
        words = [""] if isinstance(last, TextField) else []
    if len(words) < num_before:
        return f"{len(words)} fields, not {len(fields)}"
    for field, word in zip(fields[:num_before], words, strict=False):
        assert isinstance(field, IntegerField)
        problem = _number_problem(word, field.low, field.high)
        if problem:
            return problem
        named[field.name] = int(word)
    rest = words[num_before:]
    if isinstance(last, IntegerField):
        return "more on it than the numbers asked for" if rest else ""
    if isinstance(last, IntegersField):
        problems = (_number_problem(word, last.low, last.high) for word in rest)
        return last._length_problem(len(rest), named) or next(filter(None, problems), "")
    text = rest[0] if rest else ""
    if not set(text) <= set(last.alphabet):
        return "characters that are not of the alphabet"
    return last._length_problem(len(text), named)


def _number_problem(word: str, low: int, high: int) -> str:
    if not _NUMBER.fullmatch(word) or word == "-0":
        return "not a number"
    return "" if low <= int(word) <= high else f"a number outside {low} to {high}"


def _describe(field: IntegerField | IntegersField | TextField) -> str:
    if isinstance(field, IntegerField):
        return f"an integer{' ' * bool(field.name)}{field.name} from {field.low} to {field.high}"
    if field.length:
        length = field.length
    elif field.min_length == field.max_length:
        length = str(field.min_length)
    else:
        length = f"{field.min_length} to {field.max_length}"
    if isinstance(field, IntegersField):
        return f"{length} integers from {field.low} to {field.high} with blanks between them"
    characters = (
        "small letters" if field.alphabet == "abcdefghijklmnopqrstuvwxyz" else f"characters of {field.alphabet!r}"
    )
    return f"{length} {characters}"
