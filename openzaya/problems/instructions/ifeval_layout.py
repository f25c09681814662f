"""The IFEval constraints on layout (arXiv 2311.07911): paragraphs, sections, lists, highlights, postscripts.

Names, arguments and meaning are those of the public checkers, also where these are lenient (a postscript may
stand anywhere).
"""

from __future__ import annotations

import random
import re
from dataclasses import dataclass
from typing import ClassVar, Self

from openzaya.errors import DataError
from openzaya.problems.instructions.base import Constraint, filler, prose, sentence_of

POSTSCRIPTS = ("P.S.", "P.P.S")
_DIVIDER = "***"


@dataclass(frozen=True)
class NumberParagraphs(Constraint):
    """The exact number of paragraphs between ``***``; none in the middle may be empty."""

    kind: ClassVar[str] = "length_constraints:number_paragraphs"
    aspects: ClassVar[frozenset[str]] = frozenset({"paragraphs", "stars"})
    phrasings: ClassVar[tuple[str, ...]] = (
        "Write {num_paragraphs} paragraphs and put the divider *** between them.",
        "Your answer must have exactly {num_paragraphs} paragraphs, separated by ***.",
    )
    num_paragraphs: int

    def __post_init__(self) -> None:
        self._require_number("num_paragraphs", 1)

    @classmethod
    def draw(cls, rng: random.Random) -> Self:
        return cls(rng.randint(2, 6))

    def holds(self, text: str) -> bool:
        pieces = [piece.strip() for piece in text.split(_DIVIDER)]
        if not all(pieces[1:-1]):
            return False
        return sum(1 for piece in pieces if piece) == self.num_paragraphs

    def witness(self, rng: random.Random) -> str:
        return f"\n{_DIVIDER}\n".join(prose(rng, 6) for _ in range(self.num_paragraphs))

    def violation(self, rng: random.Random) -> str:
        return f"{self.witness(rng)}\n{_DIVIDER}\n{prose(rng, 6)}"


@dataclass(frozen=True)
class NthParagraphFirstWord(Constraint):
    """The exact number of paragraphs between blank lines, and the first word of one of them (from 1)."""

    kind: ClassVar[str] = "length_constraints:nth_paragraph_first_word"
    aspects: ClassVar[frozenset[str]] = frozenset({"paragraphs", "start"})
    phrasings: ClassVar[tuple[str, ...]] = (
        "Write {num_paragraphs} paragraphs with one blank line between them (and nowhere else); let paragraph "
        "{nth_paragraph} begin with the word '{first_word}'.",
        "Use exactly {num_paragraphs} paragraphs, separated by two line breaks. The first word of paragraph "
        "{nth_paragraph} is '{first_word}'.",
    )
    num_paragraphs: int
    nth_paragraph: int
    first_word: str

    def __post_init__(self) -> None:
        self._require_number("num_paragraphs", 1)
        self._require_number("nth_paragraph", 1)
        self._require_text("first_word")
        if self.nth_paragraph > self.num_paragraphs:
            raise DataError(
                f"{self.kind}: nth_paragraph={self.nth_paragraph} is above num_paragraphs={self.num_paragraphs}"
            )

    @classmethod
    def draw(cls, rng: random.Random) -> Self:
        num = rng.randint(2, 6)
        return cls(num, rng.randint(1, num), filler(rng, 1)[0])

    def holds(self, text: str) -> bool:
        blocks = text.split("\n\n")
        num = sum(1 for block in blocks if block.strip())
        if num != self.num_paragraphs or not blocks[self.nth_paragraph - 1].strip():
            return False
        word = blocks[self.nth_paragraph - 1].split(maxsplit=1)[0].lstrip("'").lstrip('"')
        return re.split("[.,?!'\"]", word, maxsplit=1)[0].lower() == self.first_word.lower()

    def witness(self, rng: random.Random) -> str:
        blocks = [prose(rng, 6, [self.first_word]) for _ in range(self.num_paragraphs)]
        blocks[self.nth_paragraph - 1] = sentence_of([self.first_word, *filler(rng, 4)])
        return "\n\n".join(blocks)

    def violation(self, rng: random.Random) -> str:
        if rng.random() < 0.5:
            return f"{self.witness(rng)}\n\n{prose(rng, 6)}"
        return "\n\n".join(prose(rng, 6, [self.first_word]) for _ in range(self.num_paragraphs))


class _AtLeast(Constraint):
    """At least a number of marked places."""

    @property
    def num(self) -> int:
        """How many at least."""
        return next(iter(self.arguments().values()))

    def count(self, text: str) -> int:
        """Marked places in ``text``."""
        raise NotImplementedError

    def marked(self, rng: random.Random, place: int) -> str:
        """One marked place, number ``place`` from 1."""
        raise NotImplementedError

    def holds(self, text: str) -> bool:
        return self.count(text) >= self.num

    def witness(self, rng: random.Random) -> str:
        return self._text(rng, self.num + rng.randrange(2))

    def violation(self, rng: random.Random) -> str:
        return self._text(rng, self.num - 1)

    def _text(self, rng: random.Random, num: int) -> str:
        return "\n".join([prose(rng, 5), *(f"{self.marked(rng, i + 1)} {prose(rng, 3)}" for i in range(num))])


@dataclass(frozen=True)
class NumberPlaceholders(_AtLeast):
    """At least a number of ``[…]`` within a line."""

    kind: ClassVar[str] = "detectable_content:number_placeholders"
    aspects: ClassVar[frozenset[str]] = frozenset({"brackets"})
    phrasings: ClassVar[tuple[str, ...]] = (
        "Leave at least {num_placeholders} placeholders in square brackets, such as [name].",
        "Put {num_placeholders} or more gaps to be filled in later, each in square brackets like [date].",
    )
    num_placeholders: int

    def __post_init__(self) -> None:
        self._require_number("num_placeholders", 1)

    @classmethod
    def draw(cls, rng: random.Random) -> Self:
        return cls(rng.randint(1, 6))

    def count(self, text: str) -> int:
        num = 0
        for line in text.split("\n"):
            end = -1
            while (start := line.find("[", end + 1)) >= 0 and (end := line.find("]", start)) >= 0:
                num += 1
        return num

    def marked(self, rng: random.Random, place: int) -> str:
        return f"[{filler(rng, 1)[0]}]"


@dataclass(frozen=True)
class NumberHighlightedSections(_AtLeast):
    """At least a number of ``*…*`` or ``**…**`` within a line."""

    kind: ClassVar[str] = "detectable_format:number_highlighted_sections"
    aspects: ClassVar[frozenset[str]] = frozenset({"stars"})
    phrasings: ClassVar[tuple[str, ...]] = (
        "Highlight at least {num_highlights} parts of your answer with stars, *like this*.",
        "Mark {num_highlights} or more passages in markdown italics, as in *a passage*.",
    )
    num_highlights: int

    def __post_init__(self) -> None:
        self._require_number("num_highlights", 1)

    @classmethod
    def draw(cls, rng: random.Random) -> Self:
        return cls(rng.randint(1, 5))

    def count(self, text: str) -> int:
        single = re.findall(r"\*([^\n*]*)\*", text)
        double = re.findall(r"\*\*([^\n*]*)\*\*", text)
        return sum(1 for inner in single + double if inner.strip())

    def marked(self, rng: random.Random, place: int) -> str:
        stars = rng.choice(("*", "**"))
        return f"{stars}{' '.join(filler(rng, 2))}{stars}"


@dataclass(frozen=True)
class MultipleSections(_AtLeast):
    """At least a number of headings: the section word and a number."""

    kind: ClassVar[str] = "detectable_format:multiple_sections"
    aspects: ClassVar[frozenset[str]] = frozenset({"paragraphs"})
    phrasings: ClassVar[tuple[str, ...]] = (
        "Divide your answer into {num_sections} sections headed {section_spliter} 1, {section_spliter} 2 and so on.",
        "There must be {num_sections} sections; start each with '{section_spliter}' and its number.",
    )
    section_spliter: str
    num_sections: int

    def __post_init__(self) -> None:
        self._require_text("section_spliter")
        self._require_number("num_sections", 1)

    @property
    def num(self) -> int:
        return self.num_sections

    @classmethod
    def draw(cls, rng: random.Random) -> Self:
        return cls(rng.choice(("Section", "SECTION", "Part", "Chapter")), rng.randint(2, 5))

    def count(self, text: str) -> int:
        return len(re.findall(re.escape(self.section_spliter.strip()) + r"\s?[0-9]+", text))

    def marked(self, rng: random.Random, place: int) -> str:
        return f"{self.section_spliter.strip()} {place}\n"


@dataclass(frozen=True)
class Postscript(Constraint):
    """A postscript with the marker, which may stand anywhere."""

    kind: ClassVar[str] = "detectable_content:postscript"
    aspects: ClassVar[frozenset[str]] = frozenset({"end"})
    phrasings: ClassVar[tuple[str, ...]] = (
        "Close with a postscript that begins with {postscript_marker}",
        "Add a postscript at the very end; it starts with {postscript_marker}",
    )
    postscript_marker: str

    def __post_init__(self) -> None:
        self._require_text("postscript_marker")

    @classmethod
    def draw(cls, rng: random.Random) -> Self:
        return cls(rng.choice(POSTSCRIPTS))

    def holds(self, text: str) -> bool:
        marker = self.postscript_marker.strip()
        if marker == "P.S.":
            return re.search(r"p\.\s?s\.", text.lower()) is not None
        if marker == "P.P.S":
            return re.search(r"p\.\s?p\.\s?s", text.lower()) is not None
        return marker.lower() in text.lower()

    def witness(self, rng: random.Random) -> str:
        return f"{prose(rng, 10)}\n\n{self.postscript_marker} {prose(rng, 4)}"

    def violation(self, rng: random.Random) -> str:
        return prose(rng, 14)


@dataclass(frozen=True)
class NumberBulletLists(Constraint):
    """The exact number of lines that begin with ``* `` or ``-``."""

    kind: ClassVar[str] = "detectable_format:number_bullet_lists"
    aspects: ClassVar[frozenset[str]] = frozenset({"stars", "paragraphs"})
    phrasings: ClassVar[tuple[str, ...]] = (
        "Give exactly {num_bullets} bullet points, each on a line that begins with '* '.",
        "Your answer holds a list of {num_bullets} points, no more and no fewer; mark each with '* '.",
    )
    num_bullets: int

    def __post_init__(self) -> None:
        self._require_number("num_bullets", 1)

    @classmethod
    def draw(cls, rng: random.Random) -> Self:
        return cls(rng.randint(1, 6))

    def holds(self, text: str) -> bool:
        lines = [line.lstrip() for line in text.split("\n")]
        return self.num_bullets == sum(
            line.startswith("-") or (line.startswith("*") and len(line) > 1 and line[1] != "*") for line in lines
        )

    def witness(self, rng: random.Random) -> str:
        return self._text(rng, self.num_bullets)

    def violation(self, rng: random.Random) -> str:
        return self._text(rng, self.num_bullets + rng.choice((-1, 1)))

    def _text(self, rng: random.Random, num: int) -> str:
        sign = rng.choice("*-")
        return "\n".join([prose(rng, 4), *(f"{sign} {prose(rng, 3)}" for _ in range(num))])
