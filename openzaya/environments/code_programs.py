"""Running the programs of code problems, and taking them out of responses.

Programs of models and of users' files run in the sandbox only. Those that we generated are data as well, and are read
as such (``openzaya.problems.small_programs``), which is as right and takes no process.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from openzaya.problems.code_seeds import CodeProgram, CodeTest, normalise_output
from openzaya.problems.small_programs import read, run, show
from openzaya.sandbox import Limits, Test, run_python

_FENCE = re.compile(r"^[ \t]*```[^\n`]*$", re.MULTILINE)
MAX_PROGRAM_CHARACTERS = 65_536


@dataclass(frozen=True, slots=True)
class Output:
    """What a program did on one input: its output, normalised, or the sandbox's word for why there is none."""

    text: str
    failure: str = ""
    """``error``, ``timeout``, ``memory``, ``output`` or ``killed``; empty where the program ended well."""
    detail: str = ""


def outputs_of(program: CodeProgram, inputs: Sequence[str], limits: Limits) -> list[Output]:
    """The outputs of one program for several inputs, in one start of the sandbox; raises ``SandboxError``."""
    if program.statements is not None and program.kind is not None:
        return [Output(normalise_output(show(run(program.statements, read(text, program.kind))))) for text in inputs]
    results = run_python(program.source, [Test(stdin=text) for text in inputs], limits)
    return [
        Output(normalise_output(result.stdout))
        if result.status == "ok"
        else Output("", result.status, result.error[:200])
        for result in results
    ]


def num_passed(outputs: Sequence[Output], tests: Sequence[CodeTest]) -> int:
    """How many outputs are those of the tests."""
    return sum(
        not output.failure and output.text == normalise_output(test.output)
        for output, test in zip(outputs, tests, strict=True)
    )


def extract_program(answer: str) -> str | None:
    """The one program in an answer: what stands in its only code block, or all of an answer without code blocks.

    None where there are several blocks or an open one: several programs are not an answer.
    """
    fences = list(_FENCE.finditer(answer))
    if not fences:
        return None if "```" in answer else answer
    if len(fences) != 2:
        return None
    return answer[fences[0].end() : fences[1].start()].strip("\n")
