"""The five code environments (arXiv 2605.05365, stage 3), made of seeds of code problems.

``code/plain``           statement -> program; hidden tests decide.
``code/reconstruction``  outline and examples -> program; hidden tests decide.
``code/output``          program and input -> what it prints.
``code/input``           program and output -> an input that gives it.
``code/falsification``   statement and wrong program -> a valid input on which the program is wrong.

Seeds are generated, or come from a file of the user's (``openzaya.problems.code_seeds``); of a file's seeds a task has
those of the highest difficulty that is not above its own. Nothing that is asked for can be guessed: an output, or a
program to falsify, is taken only where at most ``max_guess_rate`` of random inputs give it, or show it wrong; a seed
with fewer than ``1 / max_guess_rate`` valid inputs makes no such task.

A program of the model's that fails, in whatever way, earns 0, if the accepted program passes in the same sandbox; where
that fails too, or the sandbox itself does, there is no verdict.
"""

from __future__ import annotations

import hashlib
import itertools
import random
from abc import abstractmethod
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from openzaya.environments.base import Environment, Task, check_difficulty
from openzaya.environments.code_programs import (
    MAX_PROGRAM_CHARACTERS,
    Output,
    extract_program,
    num_passed,
    outputs_of,
)
from openzaya.environments.code_prompts import (
    falsification_prompt,
    input_prompt,
    output_prompt,
    plain_prompt,
    reconstruction_prompt,
)
from openzaya.errors import DataError
from openzaya.problems import Split, Verdict
from openzaya.problems.code_generator import generate_seed
from openzaya.problems.code_schema import InputSchema
from openzaya.problems.code_seeds import CodeProgram, CodeSeed, CodeTest, load_seeds, normalise_output
from openzaya.problems.verify import UNCLOSED_REASONING, split_response
from openzaya.sandbox import Limits

NUM_SAMPLES = 64
"""Random inputs that tell what can be guessed."""
_MAX_SEEDS_TRIED = 64
_BACKGROUND_SECONDS = 1.0
"""Wall time for each input where many are run to get to know a seed."""

SeedSource = Callable[[int, int], Iterator[CodeSeed]]
"""Seeds for a task of a difficulty and number, the one that it should have first."""


def generated_seeds(seed: int, split: Split) -> SeedSource:
    """Seeds of ``openzaya.problems.code_generator``."""

    def candidates(difficulty: int, number: int) -> Iterator[CodeSeed]:
        for attempt in itertools.count():
            yield generate_seed(difficulty, number + (attempt << 32), seed, split)

    return candidates


def file_seeds(path: str | Path) -> SeedSource:
    """Seeds of a JSONL file; raises :class:`DataError` for a broken one."""
    seeds = load_seeds(path)

    def candidates(difficulty: int, number: int) -> Iterator[CodeSeed]:
        level = max((seed.difficulty for seed in seeds if seed.difficulty <= difficulty), default=seeds[0].difficulty)
        level_seeds = [seed for seed in seeds if seed.difficulty == level]
        for place in range(len(level_seeds)):
            yield level_seeds[(number + place) % len(level_seeds)]

    return candidates


@dataclass(frozen=True, slots=True)
class _Case:
    """A valid input and what the accepted program does on it."""

    given: str
    output: Output
    num_drawn: int
    """How many of the random inputs are this one; 0 for tests that none is."""


def _guess_rate(cases: Sequence[_Case], is_right: Sequence[bool]) -> float:
    """The share of random inputs that are right, where one of the cases is.

    Counted as they were drawn, as short inputs may come often; and each once, which is exact where there are so few
    inputs that all were drawn. Tests do not count, being made to show programs wrong.
    """
    drawn = [(case.num_drawn, right) for case, right in zip(cases, is_right, strict=True) if case.num_drawn]
    if not drawn:
        return 1.0
    as_drawn = sum(num for num, right in drawn if right) / sum(num for num, _ in drawn)
    return max(as_drawn, sum(right for _, right in drawn) / len(drawn), 1 / len(cases))


class _CodeEnvironment(Environment):
    """What the five have in common."""

    def __init__(
        self, name: str, seeds: SeedSource, *, seed: int = 0, limits: Limits, max_guess_rate: float = 1 / 16
    ) -> None:
        self.name = name
        self._seeds, self._seed, self._limits, self._max_guess_rate = seeds, seed, limits, max_guess_rate
        self._known: dict[str, list[_Case]] = {}

    def task(self, difficulty: int, number: int) -> Task:
        check_difficulty(difficulty)
        digest = hashlib.sha256(f"{self.name}/{difficulty}/{self._seed}/{number}".encode()).digest()
        rng = random.Random(int.from_bytes(digest[:8], "big"))
        num_tried = 0
        for seed in itertools.islice(self._seeds(difficulty, number), _MAX_SEEDS_TRIED):
            made = self._make(seed, rng)
            if made is not None:
                prompt, data = made
                return Task(self.name, difficulty, number, [{"role": "user", "content": prompt}], data)
            num_tried += 1
        raise DataError(
            f"{self.name}: none of {num_tried} seeds for difficulty {difficulty} makes a task that cannot be guessed "
            f"(max_guess_rate={self._max_guess_rate:g}); give seeds with more varied outputs, or with wrong programs "
            "that few inputs show wrong, or raise max_guess_rate"
        )

    def verify(self, task: Task, response: str) -> Verdict:
        try:
            _, answer = split_response(response)
            if answer is None:
                return Verdict(0.0, UNCLOSED_REASONING)
            if not answer:
                return Verdict(0.0, "empty answer")
            return self._judge(task.data, answer)
        except Exception as error:  # a verifier or sandbox that fails cannot judge
            return Verdict(None, f"verifier failed: {type(error).__name__}: {error}")

    @abstractmethod
    def _make(self, seed: CodeSeed, rng: random.Random) -> tuple[str, dict[str, Any]] | None:
        """Prompt and data of a task; None where this seed makes none."""

    @abstractmethod
    def _judge(self, data: dict[str, Any], answer: str) -> Verdict: ...

    def _known_cases(self, seed: CodeSeed) -> list[_Case]:
        """The inputs of the tests and those drawn from the schema, each once."""
        if seed.name not in self._known:
            rng = random.Random(f"samples of {seed.name}")
            drawn = Counter(seed.input_schema.draw(rng) for _ in range(NUM_SAMPLES))
            inputs = list(dict.fromkeys([*(seed.input_schema.normalise(test.input) for test in seed.tests), *drawn]))
            outputs = self._run_many(seed.accepted, inputs)
            for number, (test, output) in enumerate(zip(seed.tests, outputs, strict=False), start=1):
                if output.failure or output.text != normalise_output(test.output):
                    got = (
                        f"fails ({output.failure}: {output.detail})"
                        if output.failure
                        else f"prints {output.text!r:.80}"
                    )
                    raise DataError(
                        f"seed '{seed.name}': its accepted program {got} on test {number}, which wants "
                        f"{test.output!r:.80}; correct the program or the test"
                    )
            cases = [_Case(given, output, drawn[given]) for given, output in zip(inputs, outputs, strict=True)]
            if seed.accepted.statements is not None:
                return cases  # quick, and every task has another seed
            self._known[seed.name] = cases
        return self._known[seed.name]

    def _run_many(self, program: CodeProgram, inputs: list[str]) -> list[Output]:
        wall_s = max(self._limits.wall_s, _BACKGROUND_SECONDS * len(inputs))
        return outputs_of(program, inputs, replace(self._limits, wall_s=wall_s))

    def _draw_case(self, seed: CodeSeed, rng: random.Random) -> tuple[str, str] | None:
        """An input and its output, which few random inputs have."""
        cases = [case for case in self._known_cases(seed) if not case.output.failure]
        texts = [case.output.text for case in cases]
        rare = {
            text
            for text in set(texts)
            if text and _guess_rate(cases, [other == text for other in texts]) <= self._max_guess_rate
        }
        choices = [(case.given, text) for case, text in zip(cases, texts, strict=True) if text in rare]
        return rng.choice(choices) if choices else None


class _Programming(_CodeEnvironment):
    """Asks for a program; hidden tests decide."""

    _prompt: Callable[[CodeSeed], str]
    _passed: tuple[str, list[CodeTest]] | None = None
    """The accepted program that passed last, and its tests: a group's responses are judged one after another."""

    def _make(self, seed: CodeSeed, rng: random.Random) -> tuple[str, dict[str, Any]] | None:
        tests = [test.model_dump() for test in seed.hidden_tests]
        outputs = Counter(normalise_output(test.output) for test in seed.hidden_tests)
        if len(outputs) < 2:
            return None  # a program that prints a constant would pass
        return type(self)._prompt(seed), {"tests": tests, "accepted": seed.accepted.model_dump(exclude_none=True)}

    def _judge(self, data: dict[str, Any], answer: str) -> Verdict:
        source = extract_program(answer)
        if not source or not source.strip():
            return Verdict(0.0, "not one program")
        if len(source) > MAX_PROGRAM_CHARACTERS:
            return Verdict(0.0, "program too long")
        source = source.encode("utf-8", "replace").decode()
        tests = [CodeTest.model_validate(test) for test in data["tests"]]
        inputs = [test.input for test in tests]
        outputs = outputs_of(CodeProgram(source=source), inputs, self._limits)
        passed = num_passed(outputs, tests)
        if passed == len(tests):
            return Verdict(1.0, "correct")
        # The program's own doing only where the accepted one passes here; whether it does may depend on the moment.
        is_passing = self._passed == (data["accepted"]["source"], tests)
        if not is_passing or any(output.failure in ("killed", "timeout") for output in outputs):
            accepted = CodeProgram(source=data["accepted"]["source"])
            if num_passed(outputs_of(accepted, inputs, self._limits), tests) < len(tests):
                return Verdict(None, "the accepted program failed in the sandbox, too")
            self._passed = (accepted.source, tests)
        failure = next((output.failure for output in outputs if output.failure), "wrong output")
        return Verdict(0.0, f"{failure}: {passed} of {len(tests)} tests passed")


class PlainCode(_Programming):
    """Statement to program."""

    _prompt = staticmethod(plain_prompt)


class Reconstruction(_Programming):
    """Outline and examples to program."""

    _prompt = staticmethod(reconstruction_prompt)


class OutputPrediction(_CodeEnvironment):
    """Program and input to output."""

    def _make(self, seed: CodeSeed, rng: random.Random) -> tuple[str, dict[str, Any]] | None:
        case = self._draw_case(seed, rng)
        return case and (output_prompt(seed.accepted.source, case[0]), {"output": case[1]})

    def _judge(self, data: dict[str, Any], answer: str) -> Verdict:
        if len(answer) > 4 * len(data["output"]) + 64:
            return Verdict(0.0, "answer too long")
        right = normalise_output(answer) == data["output"]
        return Verdict(1.0, "correct") if right else Verdict(0.0, "wrong output")


class InputPrediction(_CodeEnvironment):
    """Program and output to input."""

    def _make(self, seed: CodeSeed, rng: random.Random) -> tuple[str, dict[str, Any]] | None:
        case = self._draw_case(seed, rng)
        return case and (
            input_prompt(seed, seed.accepted.source, case[1]),
            {
                "output": case[1],
                "accepted": seed.accepted.model_dump(exclude_none=True),
                "input_schema": seed.input_schema.model_dump(),
            },
        )

    def _judge(self, data: dict[str, Any], answer: str) -> Verdict:
        schema = InputSchema.model_validate(data["input_schema"])
        problem = schema.problem(answer)
        if problem:
            return Verdict(0.0, f"not a valid input: {problem}")
        program = CodeProgram.model_validate(data["accepted"])
        (output,) = outputs_of(program, [schema.normalise(answer)], self._limits)
        if output.failure not in ("", "error"):
            return Verdict(None, f"the program could not be run on this input: {output.failure}")
        right = not output.failure and output.text == data["output"]
        return Verdict(1.0, "correct") if right else Verdict(0.0, "another output")


class Falsification(_CodeEnvironment):
    """Statement and wrong program to an input that shows it wrong."""

    def _make(self, seed: CodeSeed, rng: random.Random) -> tuple[str, dict[str, Any]] | None:
        cases = [case for case in self._known_cases(seed) if not case.output.failure]
        for wrong in rng.sample(seed.wrong, len(seed.wrong)):
            outputs = self._run_many(wrong, [case.given for case in cases])
            differs = [
                output.failure in ("", "error") and output != case.output
                for case, output in zip(cases, outputs, strict=True)
            ]
            if any(differs) and _guess_rate(cases, differs) <= self._max_guess_rate:
                data = {
                    "accepted": seed.accepted.model_dump(exclude_none=True),
                    "candidate": wrong.model_dump(exclude_none=True),
                    "input_schema": seed.input_schema.model_dump(),
                }
                return falsification_prompt(seed, wrong.source), data
        return None

    def _judge(self, data: dict[str, Any], answer: str) -> Verdict:
        schema = InputSchema.model_validate(data["input_schema"])
        problem = schema.problem(answer)
        if problem:
            return Verdict(0.0, f"not a valid input: {problem}")
        given = [schema.normalise(answer)]
        (expected,) = outputs_of(CodeProgram.model_validate(data["accepted"]), given, self._limits)
        if expected.failure:
            return Verdict(None, f"the accepted program could not be run on this input: {expected.failure}")
        (output,) = outputs_of(CodeProgram.model_validate(data["candidate"]), given, self._limits)
        if output.failure not in ("", "error"):
            return Verdict(None, f"the candidate could not be run on this input: {output.failure}")
        if output.failure or output.text != expected.text:
            return Verdict(1.0, "correct")
        return Verdict(0.0, "the program is right on this input")


CODE_ENVIRONMENTS: dict[str, type[_CodeEnvironment]] = {
    "plain": PlainCode,
    "output": OutputPrediction,
    "input": InputPrediction,
    "reconstruction": Reconstruction,
    "falsification": Falsification,
}
CodeEnvironmentName = Literal["plain", "output", "input", "reconstruction", "falsification"]


class CodeSpec(BaseModel):
    """Code environments of a recipe."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Literal["code"] = "code"
    environments: list[CodeEnvironmentName] = ["plain", "output", "input", "reconstruction", "falsification"]
    name: str = "code"
    """Environments are called ``NAME/plain`` and so on."""
    path: str = ""
    """A JSONL file of seeds; empty: generated ones."""
    seed: int = 0
    max_guess_rate: float = Field(1 / 16, ge=2 / NUM_SAMPLES, le=1)
    """Share of random inputs; of fewer, so many samples tell nothing."""
    cpu_s: float = Field(2.0, gt=0)
    """Processor seconds of each test."""
    wall_s: float = Field(10.0, gt=0)
    """Seconds of all tests of one program."""
    memory_mb: int = Field(256, ge=16)

    def make(self) -> list[Environment]:
        """The environments; raises :class:`DataError` for a broken file."""
        limits = Limits(cpu_s=self.cpu_s, wall_s=self.wall_s, memory_mb=self.memory_mb)
        seeds = file_seeds(self.path) if self.path else generated_seeds(self.seed, "train")
        return [
            CODE_ENVIRONMENTS[environment](
                f"{self.name}/{environment}", seeds, seed=self.seed, limits=limits, max_guess_rate=self.max_guess_rate
            )
            for environment in self.environments
        ]
