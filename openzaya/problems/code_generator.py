"""Generated seeds of code problems: small programs over an integer, a list or a string.

    seed = generate_seed(difficulty, number, seed, split)      a pure function of its arguments

Difficulty d has d + 2 statements, drawn one after another along a sample of random inputs: a statement is taken when it
changes something, keeps values small, and leaves the outputs so varied that none can be guessed. One statement is a
condition that few inputs reach: a wrong program that differs from the accepted one there is wrong on a few inputs only,
so that it takes reasoning to find one. The other wrong programs have any statement changed. Each is wrong on one of the
tests, as running the programs' data shows.
"""

from __future__ import annotations

import collections
import hashlib
import random
from collections.abc import Iterator, Sequence
from typing import Any

from openzaya.errors import DataError
from openzaya.problems.code_schema import InputSchema, IntegerField, IntegersField, TextField
from openzaya.problems.code_seeds import CodeProgram, CodeSeed, CodeTest
from openzaya.problems.small_programs import (
    Kind,
    Statement,
    describe,
    read,
    result_kind,
    run,
    show,
    write_program,
)
from openzaya.problems.split import MAX_DRAWS, Split, split_of

_SCHEMAS: dict[Kind, InputSchema] = {
    "int": InputSchema(lines=[[IntegerField(low=0, high=199)]]),
    "list": InputSchema(lines=[[IntegersField(low=0, high=199, min_length=3, max_length=8)]]),
    "str": InputSchema(lines=[[TextField(alphabet="abcdefghijklmnop", min_length=4, max_length=10)]]),
}
_NOUNS: dict[Kind, str] = {"int": "an integer", "list": "a list of integers", "str": "a string of letters"}
_OUTPUTS: dict[Kind, str] = {"int": "One integer.", "list": "Integers with blanks between them.", "str": "One string."}
_NUM_SAMPLES = 64
_NUM_EXAMPLES = 4
_NUM_HIDDEN = 12
_NUM_WRONG = 4
_RARE_ATTEMPTS = 3
_MAX_RARE = _NUM_SAMPLES // 16
"""Of the sampled inputs, those that show a rarely wrong program wrong."""
_MIN_DISTINCT = 40
_MAX_EQUAL = 4
_LARGEST = 10**6
_LONGEST = 24
_ATTEMPTS = 30
_GAP = "(a step that is not given)"


def generate_seed(difficulty: int, number: int, seed: int = 0, split: Split = "train") -> CodeSeed:
    """Seed ``number`` of a difficulty and split; :class:`DataError` for a negative difficulty."""
    if difficulty < 0:
        raise DataError(f"difficulty={difficulty} is below 0, the easiest; give 0 or more")
    digest = hashlib.sha256(f"code/{difficulty}/{seed}/{number}".encode()).digest()
    rng = random.Random(int.from_bytes(digest[:8], "big"))
    for _ in range(MAX_DRAWS):
        made = _draw(rng, difficulty)
        if made is not None and split_of(f"code:{made.accepted.source}") == split:
            return made.model_copy(update={"name": f"generated-{difficulty}-{number}"})
    raise DataError(f"no seed of difficulty {difficulty} in {MAX_DRAWS} draws; use another difficulty")


def _draw(rng: random.Random, difficulty: int) -> CodeSeed | None:
    kind: Kind = rng.choice(("int", "list", "str"))
    schema = _SCHEMAS[kind]
    inputs = list(dict.fromkeys(schema.draw(rng) for _ in range(_NUM_SAMPLES)))
    values = [read(text, kind) for text in inputs]
    statements: list[Statement] = []
    rare_at = rng.randrange(difficulty + 2)
    samples: list[Any] = values
    for position in range(difficulty + 2):
        is_last = position == difficulty + 1
        drawn = (
            _draw_rare(rng, kind, samples)
            if position == rare_at
            else _draw_statement(rng, kind, samples, statements[-1:], is_last)
        )
        if drawn is None:
            return None
        statements.append(drawn)
        samples = [run([drawn], value) for value in samples]
    outputs = [show(value) for value in samples]
    wrong: list[list[Statement]] = []
    witnesses = []
    for is_rare, mutant in _mutants(rng, statements, rare_at):
        if not is_rare and not wrong:
            return None  # no change shows on a few inputs only
        results = (show(run(mutant, value)) for value in values)
        differing = [text for text, result, output in zip(inputs, results, outputs, strict=True) if result != output]
        if differing and mutant not in wrong and not (is_rare and len(differing) > _MAX_RARE):
            wrong.append(mutant)
            witnesses.append(rng.choice(differing))
        if len(wrong) == _NUM_WRONG:
            break
    if not wrong:
        return None
    hidden = list(dict.fromkeys(witnesses))
    others = [text for text in inputs if text not in hidden]
    rng.shuffle(others)
    examples, others = others[:_NUM_EXAMPLES], others[_NUM_EXAMPLES:]
    hidden += others[: _NUM_HIDDEN - len(hidden)]
    rng.shuffle(hidden)
    output_of = dict(zip(inputs, outputs, strict=True))
    ends_as = result_kind(statements, kind)
    return CodeSeed(
        name="generated",
        statement=_statement(kind, ends_as, [describe(statement, kind) for statement in statements]),
        outline=_outline(rng, kind, ends_as, statements),
        output_format=_OUTPUTS[ends_as],
        input_schema=schema,
        accepted=_program(statements, kind),
        wrong=[_program(mutant, kind) for mutant in wrong],
        tests=[CodeTest(input=text, output=output_of[text]) for text in (*examples, *hidden)],
        num_examples=_NUM_EXAMPLES,
        difficulty=difficulty,
    )


def _program(statements: Sequence[Statement], kind: Kind) -> CodeProgram:
    return CodeProgram(source=write_program(statements, kind), kind=kind, statements=list(statements))


def _statement(kind: Kind, ends_as: Kind, words: Sequence[str]) -> str:
    """Steps in words; lists are printed with blanks between their items, everything else as it is."""
    listed = "\n".join(f"{number}. {step}" for number, step in enumerate(words, start=1))
    last = "Print the numbers that are left." if ends_as == "list" else "Print the result."
    return f"Read {_NOUNS[kind]} and change it step by step:\n{listed}\n{last}"


def _outline(rng: random.Random, kind: Kind, ends_as: Kind, statements: Sequence[Statement]) -> str:
    """The statement with gaps, one for every four steps."""
    gaps = set(rng.sample(range(len(statements)), 1 + (len(statements) - 2) // 4))
    words = [_GAP if number in gaps else describe(statement, kind) for number, statement in enumerate(statements)]
    return _statement(kind, ends_as, words)


def _is_fit(before: Sequence[Any], after: Sequence[Any]) -> bool:
    """Whether outputs remain small and varied, and a statement changed something."""
    if before == after:
        return False
    for value in after:
        numbers = [value] if isinstance(value, int) else value
        if not isinstance(value, int) and len(value) > _LONGEST:
            return False
        if not isinstance(value, str) and any(abs(number) > _LARGEST for number in numbers):
            return False
    counts = collections.Counter(show(value) for value in after)
    return len(counts) >= _MIN_DISTINCT and max(counts.values()) <= _MAX_EQUAL


def _draw_statement(
    rng: random.Random, kind: Kind, samples: Sequence[Any], before: Sequence[Statement], is_last: bool
) -> Statement | None:
    for _ in range(_ATTEMPTS):
        statement = _DRAW[kind](rng, is_last)
        if statement not in before and _is_fit(samples, [run([statement], value) for value in samples]):
            return statement
    return None


def _draw_for_int(rng: random.Random, is_last: bool) -> Statement:
    number = rng.randint(1, 20)
    simple: Statement = rng.choice(
        [["+", number], ["-", number], ["*", rng.randint(2, 5)], ["from", 10 * number], ["%", rng.randint(80, 150)]]
    )
    match rng.randrange(4):
        case 0:
            return ["for", rng.randint(2, 5), [rng.choice("+-"), rng.choice(["i", number])]]
        case 1:
            return ["if", rng.choice(["<", ">", "<=", ">="]), rng.randint(10, 190), simple]
    return simple


def _draw_for_list(rng: random.Random, is_last: bool) -> Statement:
    number = rng.randint(1, 20)
    choices: list[Statement] = [
        ["reverse"],
        ["sort"],
        ["rotate", rng.randint(1, 3)],
        ["drop", 1],
        ["append", number],
        ["each", "+", number],
        ["each", "-", number],
        ["each", "*", rng.randint(2, 4)],
        ["each", "%", rng.randint(50, 150)],
        ["if", rng.choice(["<", ">"]), rng.randint(3, 7), ["append", number]],
    ]
    if is_last and rng.random() < 0.5:
        return rng.choice([["sum"], ["max"]])
    return rng.choice(choices)


def _draw_for_str(rng: random.Random, is_last: bool) -> Statement:
    letters = rng.choices("abcdefghijklmnopqrstuvwxyz", k=4)
    return rng.choice(
        [
            ["reverse"],
            ["sort"],
            ["rotate", rng.randint(1, 3)],
            ["drop", rng.randint(1, 2)],
            ["take", rng.randint(4, 8)],
            ["append", "".join(letters[:2])],
            ["replace", letters[0], "".join(letters[1:3])],
            ["if", rng.choice(["<", ">"]), rng.randint(4, 9), ["append", letters[0]]],
        ]
    )


_DRAW = {"int": _draw_for_int, "list": _draw_for_list, "str": _draw_for_str}


def _draw_rare(rng: random.Random, kind: Kind, samples: Sequence[Any]) -> Statement | None:
    """A statement in which a small change shows on few inputs, a sampled one among them."""
    for _ in range(_ATTEMPTS):
        value = rng.choice(samples)
        statement: Statement
        if kind == "int":
            body: Statement = [rng.choice("+-"), rng.randint(1, 20)]
            statement = ["if", rng.choice(["<", ">", "<=", ">="]), value, body]
        elif kind == "list":
            if not value:
                continue
            statement = ["keep", rng.choice(["<", ">", "<=", ">="]), rng.choice(value)]
        else:
            if len(value) < 2:
                continue
            place = rng.randrange(len(value) - 1)
            statement = ["replace", value[place : place + 2], rng.choice("qrstuvwxyz")]
        if _is_fit(samples, [run([statement], value) for value in samples]):
            return statement
    return None


def _mutants(
    rng: random.Random, statements: Sequence[Statement], rare_at: int
) -> Iterator[tuple[bool, list[Statement]]]:
    """Programs with one changed statement: first, and marked so, with the one that few inputs reach, then with any."""
    for is_rare in [True] * _RARE_ATTEMPTS + [False] * _ATTEMPTS:
        position = rare_at if is_rare else rng.randrange(len(statements))
        changed = _change(rng, statements[position])
        if changed != statements[position]:
            yield is_rare, [*statements[:position], *([changed] if changed else []), *statements[position + 1 :]]


def _change(rng: random.Random, statement: Statement) -> Statement:
    """The statement with something else in one place; empty where it is left out."""
    match statement:
        case ["if", comparison, limit, body]:
            return ["if", *_change_condition(rng, comparison, limit), body]
        case ["keep", comparison, limit]:
            return ["keep", *_change_condition(rng, comparison, limit)]
        case ["for", num_rounds, [sign, operand]]:
            return rng.choice(
                [["for", num_rounds + 1, [sign, operand]], ["for", num_rounds, ["-" if sign == "+" else "+", operand]]]
            )
        case ["each", sign, number]:
            return ["each", sign, number + rng.choice([1, 2])]
        case ["replace", old, new]:
            return ["replace", old, rng.choice("qrstuvwxyz") + new[1:]]
        case ["append", str(text)]:
            return ["append", text[::-1]]
        case ["+" | "-" as sign, int(number)]:
            return rng.choice([["-" if sign == "+" else "+", number], [sign, number + 1]])
        case [name, int(number)]:
            return [name, number + 1]
    return []


def _change_condition(rng: random.Random, comparison: str, limit: int) -> tuple[str, int]:
    other = {">": ">=", ">=": ">", "<": "<=", "<=": "<"}[comparison]
    return rng.choice([(other, limit), (comparison, limit - 1), (comparison, limit + 1)])
