"""Small Python programs as data: written out, put into words, and run without ``exec``.

A program is a list of statements that change one variable, x: an integer, a list of integers or a string. Statements
are JSON, ``["+", 7]``, ``["for", 3, ["+", "i"]]``, ``["if", ">", 40, ["-", 5]]``, so that programs lie in tasks and
checkpoints. Three readings of the same data:

    write     ["+", 7]  ->  x+=7            real Python, which gives the same result as run
    describe  ["+", 7]  ->  add 7           for statements of what is wanted
    run       ["+", 7]  ->  the value of x  by a look at the data alone: no sandbox is needed

Loops have a fixed number of rounds, so that every program ends after as many steps as its text says.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal

Kind = Literal["int", "list", "str"]
"""What x is: an integer, a list of integers, or a string."""
Value = int | list[int] | str
Statement = Sequence[Any]

COMPARISONS: dict[str, Callable[[int, int], bool]] = {
    ">": operator.gt,
    ">=": operator.ge,
    "<": operator.lt,
    "<=": operator.le,
    "==": operator.eq,
}
_COMPARISON_WORDS = {">": "over", ">=": "at least", "<": "under", "<=": "at most", "==": "equal to"}
ARITHMETIC: dict[str, Callable[[int, int], int]] = {
    "+": operator.add,
    "-": operator.sub,
    "*": operator.mul,
    "//": operator.floordiv,
    "%": operator.mod,
}
_ARITHMETIC_WORDS = {
    "+": "add {}",
    "-": "subtract {}",
    "*": "multiply by {}",
    "//": "divide by {} without remainder",
    "%": "take the remainder of division by {}",
}
_READERS = {"int": "int(input())", "list": "list(map(int,input().split()))", "str": "input()"}
_REDUCERS = ("sum", "max")


def result_kind(statements: Sequence[Statement], kind: Kind) -> Kind:
    """The kind of x after ``statements``, of which the last may reduce a list or a string to a number."""
    return "int" if statements and statements[-1][0] in _REDUCERS else kind


def write(statements: Sequence[Statement], kind: Kind = "int") -> list[str]:
    """The lines of Python, indented by one blank; x is set before."""
    lines = []
    for statement in statements:
        match statement:
            case ["for", num_rounds, body]:
                lines += [f"for i in range({num_rounds}):", f" {_write_simple(body, kind)}"]
            case ["if", comparison, limit, body]:
                measured = "x" if kind == "int" else "len(x)"
                lines += [f"if {measured}{comparison}{limit}:", f" {_write_simple(body, kind)}"]
            case _:
                lines.append(_write_simple(statement, kind))
    return lines


def write_program(statements: Sequence[Statement], kind: Kind) -> str:
    """A whole program that reads x from standard input and prints it at the end."""
    shown = "*x" if result_kind(statements, kind) == "list" else "x"
    return "\n".join([f"x={_READERS[kind]}", *write(statements, kind), f"print({shown})"]) + "\n"


def _write_simple(statement: Statement, kind: Kind) -> str:
    match statement:
        case ["from", number]:
            return f"x={number}-x"
        case ["reverse"]:
            return "x=x[::-1]"
        case ["rotate", number]:
            return f"x=x[{number}:]+x[:{number}]"
        case ["drop", number]:
            return f"x=x[{number}:]"
        case ["take", number]:
            return f"x=x[:{number}]"
        case ["append", item]:
            return f"x+=[{item}]" if kind == "list" else f"x+={item!r}"
        case ["sort"]:
            return "x=sorted(x)" if kind == "list" else "x=''.join(sorted(x))"
        case ["each", sign, number]:
            return f"x=[v{sign}{number} for v in x]"
        case ["keep", comparison, number]:
            return f"x=[v for v in x if v{comparison}{number}]"
        case ["replace", old, new]:
            return f"x=x.replace({old!r},{new!r})"
        case ["max"]:
            return "x=max(x,default=0)"
        case ["sum"]:
            return "x=sum(x)"
        case [sign, operand] if sign in ARITHMETIC:
            return f"x{sign}={operand}"
    raise ValueError(f"no statement: {statement!r}")


def describe(statement: Statement, kind: Kind = "int") -> str:
    """The statement in words, with x as "it"."""
    match statement:
        case ["for", num_rounds, [sign, "i"]]:
            return f"{_ARITHMETIC_WORDS[sign].format('each of 0')} to {num_rounds - 1}"
        case ["for", num_rounds, body]:
            return f"{num_rounds} times {describe(body)}"
        case ["if", comparison, limit, body]:
            measured = "" if kind == "int" else "its length is "
            return f"if {measured}{_COMPARISON_WORDS[comparison]} {limit} {describe(body)}"
        case ["from", number]:
            return f"take it from {number}"
        case ["reverse"]:
            return "reverse it"
        case ["rotate", number]:
            return f"move the first {number} to the end"
        case ["drop", number]:
            return f"drop the first {number}"
        case ["take", number]:
            return f"keep only the first {number}"
        case ["append", item]:
            return f"put {item} at the end"
        case ["sort"]:
            return "sort it in ascending order"
        case ["each", sign, number]:
            return f"for each number {_ARITHMETIC_WORDS[sign].format(number)}"
        case ["keep", comparison, number]:
            return f"keep only the numbers {_COMPARISON_WORDS[comparison]} {number}"
        case ["replace", old, new]:
            return f"replace every {old} by {new}"
        case ["max"]:
            return "take the largest number (0 if there is none)"
        case ["sum"]:
            return "take the sum"
        case [sign, operand] if sign in ARITHMETIC:
            return _ARITHMETIC_WORDS[sign].format(operand)
    raise ValueError(f"no statement: {statement!r}")


def apply(statement: Statement, value: Any, i: int = 0) -> Any:
    """The value of x after one simple statement; ``i`` is the loop's variable."""
    match statement:
        case ["from", number]:
            return number - value
        case ["reverse"]:
            return value[::-1]
        case ["rotate", number]:
            return value[number:] + value[:number]
        case ["drop", number]:
            return value[number:]
        case ["take", number]:
            return value[:number]
        case ["append", item]:
            return value + ([item] if isinstance(value, list) else item)
        case ["sort"]:
            return sorted(value) if isinstance(value, list) else "".join(sorted(value))
        case ["each", sign, number]:
            return [ARITHMETIC[sign](item, number) for item in value]
        case ["keep", comparison, number]:
            return [item for item in value if COMPARISONS[comparison](item, number)]
        case ["replace", old, new]:
            return value.replace(old, new)
        case ["max"]:
            return max(value, default=0)
        case ["sum"]:
            return sum(value)
        case [sign, operand]:
            return ARITHMETIC[sign](value, i if operand == "i" else operand)
    raise ValueError(f"no statement: {statement!r}")


def holds(comparison: str, limit: int, value: Any) -> bool:
    """Whether an ``if`` is taken: lists and strings are measured by their length."""
    return COMPARISONS[comparison](value if isinstance(value, int) else len(value), limit)


def steps(statements: Sequence[Statement], first_round: int = 0) -> Iterator[tuple[Statement, Statement, int]]:
    """What is executed one after another: the simple statement, the whole one, and i. An ``if`` is one step.

    ``first_round`` is where loops begin to count: 0 in Python.
    """
    for statement in statements:
        if statement[0] == "for":
            for i in range(first_round, first_round + statement[1]):
                yield statement[2], statement, i
        else:
            yield statement, statement, 0


def step(simple: Statement, value: Any, i: int) -> Any:
    """The value of x after one step of :func:`steps`."""
    if simple[0] == "if":
        return apply(simple[3], value) if holds(simple[1], simple[2], value) else value
    return apply(simple, value, i)


def run(statements: Sequence[Statement], value: Any) -> Any:
    """The value of x after all statements."""
    for simple, _, i in steps(statements):
        value = step(simple, value, i)
    return value


def read(text: str, kind: Kind) -> Value:
    """The value of x that a program of :func:`write_program` reads from standard input."""
    line = text.partition("\n")[0]
    return int(line) if kind == "int" else list(map(int, line.split())) if kind == "list" else line


def show(value: Value) -> str:
    """What such a program prints."""
    return (" ".join(map(str, value)) if isinstance(value, list) else str(value)) + "\n"
