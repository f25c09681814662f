"""What code environments ask, in words of ours."""

from __future__ import annotations

from collections.abc import Sequence

from openzaya.problems.code_seeds import CodeSeed, CodeTest

_WRITE = (
    "Write a Python program that reads the input from standard input and prints the output. "
    "Answer with the whole program in one code block."
)


def plain_prompt(seed: CodeSeed) -> str:
    """Asks for a program, from a statement."""
    return "\n\n".join([seed.statement, _formats(seed), _examples(seed.examples[:2]), _WRITE])


def reconstruction_prompt(seed: CodeSeed) -> str:
    """Asks for a program, from what is said of it and from examples."""
    return "\n\n".join(
        [
            "Find out what a program does, from what is known of it and from what it printed.",
            seed.outline or seed.statement,
            _formats(seed),
            _examples(seed.examples),
            _WRITE + " It will be run on other inputs, too.",
        ]
    )


def output_prompt(program: str, given: str) -> str:
    """Asks what a program prints."""
    return "\n\n".join(
        ["What does this program print?", _code(program), f"Input:\n{given.rstrip()}", "Answer with the output alone."]
    )


def input_prompt(seed: CodeSeed, program: str, output: str) -> str:
    """Asks for an input."""
    return "\n\n".join(
        [
            "Find an input for which this program prints the output below.",
            _code(program),
            f"Output:\n{output.rstrip()}",
            f"The input must have this form. {_input_format(seed)}",
            "Answer with the input alone. Any one that fits is right.",
        ]
    )


def falsification_prompt(seed: CodeSeed, program: str) -> str:
    """Asks for an input on which a program is wrong."""
    return "\n\n".join(
        [
            "A program is to do this:",
            seed.statement,
            _formats(seed),
            "The program below does not always do so.",
            _code(program),
            "Find one valid input for which it prints something wrong, or fails. Answer with the input alone.",
        ]
    )


def _input_format(seed: CodeSeed) -> str:
    return seed.input_format or seed.input_schema.describe()


def _formats(seed: CodeSeed) -> str:
    output = f"\nOutput: {seed.output_format}" if seed.output_format else ""
    return f"Input: {_input_format(seed)}{output}"


def _examples(tests: Sequence[CodeTest]) -> str:
    return "\n\n".join(f"Input:\n{test.input.rstrip()}\nOutput:\n{test.output.rstrip()}" for test in tests)


def _code(program: str) -> str:
    return f"```python\n{program.strip()}\n```"
