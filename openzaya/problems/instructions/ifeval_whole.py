"""The IFEval constraints on an answer as a whole (arXiv 2311.07911): its start, its end, JSON, two answers, a title.

Names, arguments and meaning are those of the public checkers, also where these are lenient (one of the fixed
answers may stand among other words).
"""

from __future__ import annotations

import json
import random
from dataclasses import dataclass
from typing import ClassVar, Self

from openzaya.problems.instructions.base import EVERYTHING, Constraint, filler, prose

FIXED_ANSWERS = ("My answer is yes.", "My answer is no.", "My answer is maybe.")
_END_PHRASES = ("That is all for today.", "Is there more you want to know?", "Let me know what you think.")
_REQUESTS = (
    "Explain why the sky is blue.",
    "Name three things to see in a harbor town.",
    "Write a short note of thanks to a neighbour.",
    "Compare tea and coffee in two sentences.",
)
_FENCES = ("```json", "```Json", "```JSON", "```")


@dataclass(frozen=True)
class ConstrainedResponse(Constraint):
    """One of the three fixed answers occurs."""

    kind: ClassVar[str] = "detectable_format:constrained_response"
    aspects: ClassVar[frozenset[str]] = frozenset({EVERYTHING})
    phrasings: ClassVar[tuple[str, ...]] = (
        "Answer with one of these: 'My answer is yes.', 'My answer is no.', 'My answer is maybe.'",
        "Pick one: 'My answer is yes.' or 'My answer is no.' or 'My answer is maybe.'",
    )

    @classmethod
    def draw(cls, rng: random.Random) -> Self:
        return cls()

    def holds(self, text: str) -> bool:
        return any(answer in text for answer in FIXED_ANSWERS)

    def witness(self, rng: random.Random) -> str:
        return rng.choice(FIXED_ANSWERS)

    def violation(self, rng: random.Random) -> str:
        return rng.choice(FIXED_ANSWERS).lower()


@dataclass(frozen=True)
class JsonFormat(Constraint):
    """All of it is JSON, which may stand in a code fence."""

    kind: ClassVar[str] = "detectable_format:json_format"
    aspects: ClassVar[frozenset[str]] = frozenset({EVERYTHING})
    phrasings: ClassVar[tuple[str, ...]] = (
        "Give the whole answer as JSON; a code fence around it is allowed.",
        "Nothing but valid JSON may be in your answer (```json and ``` around it are fine).",
    )

    @classmethod
    def draw(cls, rng: random.Random) -> Self:
        return cls()

    def holds(self, text: str) -> bool:
        for fence in _FENCES:
            text = text.removeprefix(fence)
        try:
            json.loads(text.removesuffix("```").strip())
        except (ValueError, RecursionError):
            return False
        return True

    def witness(self, rng: random.Random) -> str:
        body = json.dumps({word: filler(rng, 2) for word in filler(rng, 2)})
        return rng.choice((body, f"```json\n{body}\n```"))

    def violation(self, rng: random.Random) -> str:
        return self.witness(rng).replace("}", "", 1)


@dataclass(frozen=True)
class Title(Constraint):
    """A title in double angular brackets within a line."""

    kind: ClassVar[str] = "detectable_format:title"
    aspects: ClassVar[frozenset[str]] = frozenset({"title"})
    phrasings: ClassVar[tuple[str, ...]] = (
        "Give your answer a title in double angle brackets, such as <<a quiet morning>>.",
        "A title like <<the long way home>> has to be part of your answer.",
    )

    @classmethod
    def draw(cls, rng: random.Random) -> Self:
        return cls()

    def holds(self, text: str) -> bool:
        for line in text.split("\n"):
            start, end = line.find("<<"), line.rfind(">>")
            if start >= 0 and end > start + 2 and line[start : end + 2].lstrip("<").rstrip(">").strip():
                return True
        return False

    def witness(self, rng: random.Random) -> str:
        return f"<<{' '.join(filler(rng, 3))}>>\n{prose(rng, 8)}"

    def violation(self, rng: random.Random) -> str:
        return self.witness(rng).replace("<<", "<", 1)


@dataclass(frozen=True)
class TwoResponses(Constraint):
    """Two different texts with six stars between them."""

    kind: ClassVar[str] = "combination:two_responses"
    aspects: ClassVar[frozenset[str]] = frozenset({EVERYTHING})
    phrasings: ClassVar[tuple[str, ...]] = (
        "Give two answers that differ, with six stars between them: ******",
        "Answer twice, in two different ways, and put ****** (and nothing else) between the two.",
    )

    @classmethod
    def draw(cls, rng: random.Random) -> Self:
        return cls()

    def holds(self, text: str) -> bool:
        pieces = [piece.strip() for piece in text.split("******")]
        filled = [piece for piece in pieces if piece]
        return all(pieces[1:-1]) and len(filled) == 2 and filled[0] != filled[1]

    def witness(self, rng: random.Random) -> str:
        return f"{prose(rng, 6)}\n******\n{prose(rng, 7)}"

    def violation(self, rng: random.Random) -> str:
        one = prose(rng, 6)
        return rng.choice((one, f"{one}\n******\n{one}", f"{one}\n******\n{prose(rng, 7)}\n******\n{prose(rng, 8)}"))


@dataclass(frozen=True)
class RepeatPrompt(Constraint):
    """The answer begins with a given text, in any case."""

    kind: ClassVar[str] = "combination:repeat_prompt"
    aspects: ClassVar[frozenset[str]] = frozenset({EVERYTHING})
    phrasings: ClassVar[tuple[str, ...]] = (
        "Begin by repeating this word for word, then answer it: {prompt_to_repeat}",
        "Before your answer, and with nothing in front, write out the following again: {prompt_to_repeat}",
    )
    prompt_to_repeat: str

    def __post_init__(self) -> None:
        self._require_text("prompt_to_repeat")

    @classmethod
    def draw(cls, rng: random.Random) -> Self:
        return cls(rng.choice(_REQUESTS))

    def holds(self, text: str) -> bool:
        return text.lower().startswith(self.prompt_to_repeat.strip().lower())

    def witness(self, rng: random.Random) -> str:
        return f"{self.prompt_to_repeat}\n{prose(rng, 10)}"

    def violation(self, rng: random.Random) -> str:
        return f"{filler(rng, 1)[0]} {self.prompt_to_repeat}\n{prose(rng, 10)}"


@dataclass(frozen=True)
class EndChecker(Constraint):
    """The answer ends with a phrase, in any case; double quotes around the answer do not count."""

    kind: ClassVar[str] = "startend:end_checker"
    aspects: ClassVar[frozenset[str]] = frozenset({"end"})
    phrasings: ClassVar[tuple[str, ...]] = (
        "End with exactly this phrase, and nothing behind it: {end_phrase}",
        "The last words of your answer must be: {end_phrase}",
    )
    end_phrase: str

    def __post_init__(self) -> None:
        self._require_text("end_phrase")

    @classmethod
    def draw(cls, rng: random.Random) -> Self:
        return cls(rng.choice(_END_PHRASES))

    def holds(self, text: str) -> bool:
        return text.strip('"').lower().endswith(self.end_phrase.strip().lower())

    def witness(self, rng: random.Random) -> str:
        return f"{prose(rng, 10)} {self.end_phrase}"

    def violation(self, rng: random.Random) -> str:
        return f"{self.witness(rng)} {prose(rng, 3)}"


@dataclass(frozen=True)
class Quotation(Constraint):
    """Double quotes around all of it."""

    kind: ClassVar[str] = "startend:quotation"
    aspects: ClassVar[frozenset[str]] = frozenset({"start", "end"})
    phrasings: ClassVar[tuple[str, ...]] = (
        "Put your whole answer in double quotation marks.",
        'Your answer begins and ends with the sign ".',
    )

    @classmethod
    def draw(cls, rng: random.Random) -> Self:
        return cls()

    def holds(self, text: str) -> bool:
        return len(text) > 1 and text.startswith('"') and text.endswith('"')

    def witness(self, rng: random.Random) -> str:
        return f'"{prose(rng, 10)}"'

    def violation(self, rng: random.Random) -> str:
        return self.witness(rng)[rng.randrange(2) :][:-1]
