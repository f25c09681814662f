"""What a constraint on a text is: arguments, a description in words, a checker, and texts that do and do not hold.

The constraint types follow IFEval (arXiv 2311.07911), whose names and arguments are kept so that its data
files can be checked, and IFBench (arXiv 2507.02833), which asks for harder ones. A type is a frozen dataclass:

    constraint = NumberWords.draw(rng)           its arguments are drawn, or given: NumberWords("at least", 80)
    sentence = constraint.describe(rng)          one of several phrasings
    held = constraint.check(response)            on the text behind the reasoning; an empty one never holds
    text = constraint.witness(rng)               a text that satisfies it; ``violation(rng)`` one that does not

Checkers work in time linear in the text and never take a pattern from the arguments: these come from files.
"""

from __future__ import annotations

import random
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any, ClassVar, Self

from openzaya.errors import DataError
from openzaya.problems.verify import split_response

MAX_CHARACTERS = 1_000_000
"""Longer answers hold nothing: work is bounded on hostile input."""
LESS_THAN, AT_LEAST = "less than", "at least"
RELATIONS = (LESS_THAN, AT_LEAST)
EVERYTHING = "everything"
"""The aspect of constraints that go with no other."""

# Plain words without a digit, a capital or a repeated meaning: what witnesses are made of.
_FILLER = (
    "amber anchor apple autumn basket birch bright candle canyon castle cedar cherry cloud cobalt copper coral "
    "cotton cradle crystal daisy desert dragon eagle early ember engine evening falcon feather fern field flame "
    "flower forest garden gentle ginger glacier golden granite harbor harvest hazel hollow honey island ivory "
    "jasmine journey jungle kettle lantern lemon linen little lonely maple marble meadow melody mellow mirror "
    "morning mountain narrow nectar northern ocean olive orchard orange paper pebble pepper pillow planet plum "
    "pocket prairie quartz quiet rabbit raven ribbon river rocket saddle saffron silver simple spring stone "
    "summer sunset table temple thunder timber travel tulip tunnel valley velvet village violet walnut water "
    "whisper willow window winter wonder yellow young zephyr"
)
FILLER = tuple(_FILLER.split())


@dataclass(frozen=True)
class Constraint(ABC):
    """One constraint with its arguments."""

    kind: ClassVar[str]
    """Such as ``length_constraints:number_words``."""
    phrasings: ClassVar[tuple[str, ...]]
    """Format strings over the arguments."""
    aspects: ClassVar[frozenset[str]]
    """What it fixes about a text; two constraints that share an aspect are never drawn together."""

    @classmethod
    @abstractmethod
    def draw(cls, rng: random.Random) -> Self:
        """A constraint of this type with arguments from ``rng``."""

    @abstractmethod
    def holds(self, text: str) -> bool:
        """Whether ``text``, stripped and not empty, satisfies it."""

    @abstractmethod
    def witness(self, rng: random.Random) -> str:
        """A text that satisfies it."""

    @abstractmethod
    def violation(self, rng: random.Random) -> str:
        """A text that is not empty and does not satisfy it."""

    def arguments(self) -> dict[str, Any]:
        """Plain values, as in a file."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}

    def describe(self, rng: random.Random | None = None) -> str:
        """The constraint in words: one of its phrasings drawn from ``rng``, the first without."""
        phrasing = self.phrasings[0] if rng is None else rng.choice(self.phrasings)
        return phrasing.format(**self.spoken())

    def spoken(self) -> dict[str, Any]:
        """The arguments as they appear in a description."""
        return {name: quoted(value) if isinstance(value, list) else value for name, value in self.arguments().items()}

    def check(self, response: str) -> bool:
        """Whether the answer of ``<think>…</think>answer``, or a bare answer, satisfies it."""
        _, answer = split_response(response)
        return bool(answer) and len(answer or "") <= MAX_CHARACTERS and self.holds(answer or "")

    def _require_number(self, name: str, lowest: int = 0) -> None:
        value = getattr(self, name)
        if isinstance(value, float) and value.is_integer():  # tables with gaps turn whole numbers into floats
            object.__setattr__(self, name, int(value))
        elif not isinstance(value, int) or isinstance(value, bool):
            raise DataError(f"{self.kind}: {name}={value!r} is no whole number")
        if getattr(self, name) < lowest:
            raise DataError(f"{self.kind}: {name}={value} is below {lowest}")

    def _require_relation(self, name: str) -> None:
        if getattr(self, name) not in RELATIONS:
            raise DataError(f"{self.kind}: {name}={getattr(self, name)!r}; give '{LESS_THAN}' or '{AT_LEAST}'")

    def _require_text(self, name: str) -> None:
        value = getattr(self, name)
        if not isinstance(value, str) or not value.strip():
            raise DataError(f"{self.kind}: {name}={value!r} is no text, or a blank one")

    def _require_texts(self, name: str) -> None:
        value = getattr(self, name)
        if isinstance(value, str) or not isinstance(value, Sequence) or not value:
            raise DataError(f"{self.kind}: {name}={value!r} is no list of texts, or an empty one")
        if not all(isinstance(item, str) and item.strip() for item in value):
            raise DataError(f"{self.kind}: {name}={value!r} holds something that is no text, or a blank one")
        object.__setattr__(self, name, tuple(value))


def related(number: int, relation: str, limit: int) -> bool:
    """Whether ``number`` is less than, or at least, ``limit``."""
    return number < limit if relation == LESS_THAN else number >= limit


def number_for(rng: random.Random, relation: str, limit: int, wanted: bool) -> int:
    """A number that is (``wanted``) or is not in the relation to ``limit``, 0 or more and near to it."""
    if (relation == AT_LEAST) == wanted:
        return limit + rng.randrange(3)
    return max(0, limit - 1 - rng.randrange(min(3, max(1, limit))))


def quoted(texts: Sequence[str]) -> str:
    """``'a', 'b' and 'c'``."""
    marked = [f"'{text}'" for text in texts]
    return marked[0] if len(marked) == 1 else f"{', '.join(marked[:-1])} and {marked[-1]}"


def filler(rng: random.Random, num: int, avoid: Sequence[str] = ()) -> list[str]:
    """``num`` plain words, none of which holds one of ``avoid``."""
    usable = [word for word in FILLER if not any(item.lower() in word for item in avoid)]
    if not usable:
        raise DataError(f"no plain word is left that avoids {list(avoid)}")
    return rng.choices(usable, k=num)


def sentence_of(words: Sequence[str], end: str = ".") -> str:
    """The words as a sentence."""
    text = " ".join(words)
    return text[:1].upper() + text[1:] + end


def prose(rng: random.Random, num_words: int, avoid: Sequence[str] = ()) -> str:
    """Sentences of at most eight plain words, ``num_words`` in all."""
    chosen = filler(rng, num_words, avoid)
    return " ".join(sentence_of(chosen[start : start + 8]) for start in range(0, num_words, 8))
