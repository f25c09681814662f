"""Harder constraints on content and layout: numbers, ordered keywords, copies, nested lists, patterns of lines.

Of the kind that IFBench asks for (arXiv 2507.02833), with types, wording and checkers of our own.
"""

from __future__ import annotations

import random
import re
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, ClassVar, Self

from openzaya.errors import DataError
from openzaya.problems.instructions.base import EVERYTHING, FILLER, Constraint, filler, prose, sentence_of
from openzaya.problems.instructions.hard_sentences import first_word
from openzaya.problems.instructions.text import lines, words

_PAIRS = {")": "(", "]": "[", "}": "{"}
_NUMBER = re.compile(r"[0-9]+(?:[.,][0-9]+)*")
_LINES = frozenset({"paragraphs", "stars", "sentences", "start"})
_ACROSTIC_WORDS = ("BEACH", "CLOUD", "EARTH", "GRASS", "HONEY", "MAPLE", "RIVER", "STONE", "TIGER", "WORLD")


@dataclass(frozen=True)
class NumberCount(Constraint):
    """The exact number of numbers written in digits."""

    kind: ClassVar[str] = "content:number_numbers"
    aspects: ClassVar[frozenset[str]] = frozenset({"digits"})
    phrasings: ClassVar[tuple[str, ...]] = (
        "Include exactly {num_numbers} numbers written in digits.",
        "Numbers in digits, such as 42 or 3.5, must appear {num_numbers} times in your answer.",
    )
    num_numbers: int

    def __post_init__(self) -> None:
        self._require_number("num_numbers")

    @classmethod
    def draw(cls, rng: random.Random) -> Self:
        return cls(rng.randint(1, 9))

    def holds(self, text: str) -> bool:
        return len(_NUMBER.findall(text)) == self.num_numbers

    def _text(self, rng: random.Random, num: int) -> str:
        chosen = [*(str(rng.randrange(1000)) for _ in range(num)), *filler(rng, 10)]
        rng.shuffle(chosen)
        return " ".join(chosen)

    def witness(self, rng: random.Random) -> str:
        return self._text(rng, self.num_numbers)

    def violation(self, rng: random.Random) -> str:
        return self._text(
            rng, max(0, self.num_numbers - 1) if self.num_numbers and rng.random() < 0.5 else self.num_numbers + 1
        )


@dataclass(frozen=True)
class OrderedKeywords(Constraint):
    """The keywords occur as whole words, each once, in the given order."""

    kind: ClassVar[str] = "content:ordered_keywords"
    aspects: ClassVar[frozenset[str]] = frozenset({"keywords", "word order"})
    phrasings: ClassVar[tuple[str, ...]] = (
        "Use {keywords} in this order, each exactly once.",
        "These words must all occur, one time each and in the order given: {keywords}.",
    )
    keywords: tuple[str, ...]

    def __post_init__(self) -> None:
        self._require_texts("keywords")
        if len({keyword.lower() for keyword in self.keywords}) != len(self.keywords):
            raise DataError(f"{self.kind}: keywords={list(self.keywords)} repeat")

    @classmethod
    def draw(cls, rng: random.Random) -> Self:
        return cls(tuple(rng.sample(FILLER, rng.randint(2, 6))))

    def holds(self, text: str) -> bool:
        wanted = [keyword.lower() for keyword in self.keywords]
        names = set(wanted)
        return [word for word in map(str.lower, words(text)) if word in names] == wanted

    def _text(self, rng: random.Random, keywords: list[str]) -> str:
        chosen = []
        for keyword in keywords:
            chosen += [*filler(rng, rng.randint(1, 4), self.keywords), keyword]
        return sentence_of(chosen)

    def witness(self, rng: random.Random) -> str:
        return self._text(rng, list(self.keywords))

    def violation(self, rng: random.Random) -> str:
        keywords = list(self.keywords)
        if len(keywords) == 1 or rng.random() < 0.5:
            return self._text(rng, [*keywords, rng.choice(keywords)])
        keywords[0], keywords[-1] = keywords[-1], keywords[0]
        return self._text(rng, keywords)


@dataclass(frozen=True)
class CopySpan(Constraint):
    """The answer is some words of a given text, from one place to another (from 1, both included), and no more."""

    kind: ClassVar[str] = "content:copy_words"
    aspects: ClassVar[frozenset[str]] = frozenset({EVERYTHING})
    phrasings: ClassVar[tuple[str, ...]] = (
        "Write out words {first} to {last} of this text, unchanged, and nothing else: {source}",
        "From the following text copy the words number {first} to {last}, as they are, without adding anything: "
        "{source}",
    )
    source: str
    first: int
    last: int

    def __post_init__(self) -> None:
        self._require_text("source")
        self._require_number("first", 1)
        self._require_number("last", int(self.first))
        if self.last > len(self.source.split()):
            raise DataError(f"{self.kind}: last={self.last} is behind the text's {len(self.source.split())} words")

    @classmethod
    def draw(cls, rng: random.Random) -> Self:
        num = rng.randint(10, 30)
        first = rng.randint(1, num - 4)
        return cls(" ".join(rng.sample(FILLER, num)), first, rng.randint(first + 2, min(num, first + 12)))

    def holds(self, text: str) -> bool:
        return text.split() == self.source.split()[self.first - 1 : self.last]

    def witness(self, rng: random.Random) -> str:
        return " ".join(self.source.split()[self.first - 1 : self.last])

    def violation(self, rng: random.Random) -> str:
        return rng.choice((f"{self.witness(rng)} again", f"Here: {self.witness(rng)}", self.source + " too"))


@dataclass(frozen=True)
class NestedList(Constraint):
    """A list of points, each with the same number of indented points below it, and no other points."""

    kind: ClassVar[str] = "layout:nested_list"
    aspects: ClassVar[frozenset[str]] = _LINES
    phrasings: ClassVar[tuple[str, ...]] = (
        "Give a list of {num_items} points that begin with '- ', each with {num_inner} points below it, indented by "
        "two blanks or more.",
        "Write a two-level list with '- ' before every point: {num_items} on the outer level, {num_inner} (indented) "
        "inside each of these.",
    )
    num_items: int
    num_inner: int

    def __post_init__(self) -> None:
        self._require_number("num_items", 1)
        self._require_number("num_inner", 1)

    @classmethod
    def draw(cls, rng: random.Random) -> Self:
        return cls(rng.randint(2, 5), rng.randint(1, 4))

    def holds(self, text: str) -> bool:
        counts: list[int] = []
        for line in text.split("\n"):
            inner = line.lstrip(" ")
            if not (inner.startswith("- ") and inner[2:].strip()):
                continue
            indent = len(line) - len(inner)
            if indent == 0:
                counts.append(0)
            elif indent == 1 or not counts:
                return False
            else:
                counts[-1] += 1
        return counts == [self.num_inner] * self.num_items

    def _lines(self, rng: random.Random) -> list[str]:
        one = ["- outer"] + ["  - inner"] * self.num_inner
        return [f"{line} {rng.choice(FILLER)}" for line in one * self.num_items]

    def witness(self, rng: random.Random) -> str:
        return "\n".join(self._lines(rng))

    def violation(self, rng: random.Random) -> str:
        written = self._lines(rng)
        return "\n".join(rng.choice((written[:-1], [*written, "- more"], [line.lstrip() for line in written])))


@dataclass(frozen=True)
class LinePattern(Constraint):
    """The lines have the given numbers of words, one after another, and there are no other lines."""

    kind: ClassVar[str] = "layout:line_pattern"
    aspects: ClassVar[frozenset[str]] = _LINES | {"words", "end"}
    phrasings: ClassVar[tuple[str, ...]] = (
        "Write one line for each of these numbers, with that many words in it: {num_words}.",
        "Your answer has as many lines as there are numbers here, and the numbers say how many words go into each: "
        "{num_words}.",
    )
    num_words: tuple[int, ...]

    def __post_init__(self) -> None:
        value = self.num_words
        whole = isinstance(value, (list, tuple)) and all(type(item) is int and item >= 1 for item in value)
        if not whole or not value:
            raise DataError(f"{self.kind}: num_words={value!r} is no list of whole numbers from 1")
        object.__setattr__(self, "num_words", tuple(value))

    def spoken(self) -> dict[str, Any]:
        return {"num_words": ", ".join(map(str, self.num_words))}

    @classmethod
    def draw(cls, rng: random.Random) -> Self:
        return cls(tuple(rng.randint(1, 8) for _ in range(rng.randint(2, 6))))

    def holds(self, text: str) -> bool:
        return tuple(len(words(line)) for line in lines(text)) == self.num_words

    def witness(self, rng: random.Random) -> str:
        return "\n".join(" ".join(filler(rng, num)) for num in self.num_words)

    def violation(self, rng: random.Random) -> str:
        return f"{self.witness(rng)}{rng.choice((' ', chr(10)))}{rng.choice(FILLER)}"


@dataclass(frozen=True)
class LineAcrostic(Constraint):
    """The first letters of the lines spell a word, and each line has some words."""

    kind: ClassVar[str] = "layout:line_acrostic"
    aspects: ClassVar[frozenset[str]] = _LINES | {"end"}
    phrasings: ClassVar[tuple[str, ...]] = (
        "Write a poem whose lines begin with the letters of {word}, in order, with at least {least} words a line.",
        "Read downwards, the first letters of your lines must give {word}; no line may have fewer than {least} words.",
    )
    word: str
    least: int

    def __post_init__(self) -> None:
        self._require_text("word")
        self._require_number("least", 1)

    @classmethod
    def draw(cls, rng: random.Random) -> Self:
        return cls(rng.choice(_ACROSTIC_WORDS), rng.randint(1, 5))

    def holds(self, text: str) -> bool:
        found = [words(line) for line in lines(text)]
        if len(found) != len(self.word) or any(len(line) < self.least for line in found):
            return False
        return all(line[0][0].lower() == letter for line, letter in zip(found, self.word.lower(), strict=True))

    def _lines(self, rng: random.Random) -> list[str]:
        return [sentence_of([first_word(rng, letter), *filler(rng, self.least)]) for letter in self.word]

    def witness(self, rng: random.Random) -> str:
        return "\n".join(self._lines(rng))

    def violation(self, rng: random.Random) -> str:
        written = self._lines(rng)
        return rng.choice(("\n".join(written[:-1]), "\n".join([*written, prose(rng, 6)]), " ".join(written)))


@dataclass(frozen=True)
class Table(Constraint):
    """One markdown table with the exact number of columns and of rows below its head."""

    kind: ClassVar[str] = "layout:table"
    aspects: ClassVar[frozenset[str]] = _LINES
    phrasings: ClassVar[tuple[str, ...]] = (
        "Include one markdown table with {num_columns} columns and, below its head, {num_rows} rows.",
        "Give a table in markdown: a head, the line of dashes, then {num_rows} rows, {num_columns} cells in each.",
    )
    num_columns: int
    num_rows: int

    def __post_init__(self) -> None:
        self._require_number("num_columns", 2)
        self._require_number("num_rows", 1)

    @classmethod
    def draw(cls, rng: random.Random) -> Self:
        return cls(rng.randint(2, 5), rng.randint(1, 6))

    def holds(self, text: str) -> bool:
        rows = [
            [cell.strip() for cell in line[1:-1].split("|")]
            for line in lines(text)
            if len(line) > 2 and line.startswith("|") and line.endswith("|")
        ]
        if len(rows) != self.num_rows + 2 or any(len(row) != self.num_columns for row in rows):
            return False
        dashes = [all(re.fullmatch(":?-+:?", cell) for cell in row) for row in rows]
        return dashes == [False, True] + [False] * self.num_rows and all(cell for row in rows for cell in row)

    def _text(self, rng: random.Random, num_columns: int, num_rows: int) -> str:
        rows = [filler(rng, num_columns), ["---"] * num_columns, *(filler(rng, num_columns) for _ in range(num_rows))]
        return "\n".join(f"| {' | '.join(row)} |" for row in rows)

    def witness(self, rng: random.Random) -> str:
        return f"{prose(rng, 4)}\n\n{self._text(rng, self.num_columns, self.num_rows)}"

    def violation(self, rng: random.Random) -> str:
        if rng.random() < 0.5:
            return self._text(rng, self.num_columns + 1, self.num_rows)
        return self._text(rng, self.num_columns, self.num_rows + 1)


@dataclass(frozen=True)
class NestedBrackets(Constraint):
    """Round, square and curly brackets are balanced and nested to an exact depth; all three kinds occur."""

    kind: ClassVar[str] = "layout:nested_brackets"
    aspects: ClassVar[frozenset[str]] = frozenset({"brackets"})
    phrasings: ClassVar[tuple[str, ...]] = (
        "Use ( ), [ ] and {{ }} in your answer, correctly nested and at one place exactly {depth} deep.",
        "Nest brackets {depth} levels deep, no deeper, without leaving one open; all of ( ), [ ] and {{ }} must occur.",
    )
    depth: int

    def __post_init__(self) -> None:
        self._require_number("depth", 1)

    @classmethod
    def draw(cls, rng: random.Random) -> Self:
        return cls(rng.randint(3, 7))

    def holds(self, text: str) -> bool:
        stack: list[str] = []
        deepest = 0
        for sign in text:
            if sign in "([{":
                stack.append(sign)
                deepest = max(deepest, len(stack))
            elif sign in _PAIRS and (not stack or stack.pop() != _PAIRS[sign]):
                return False
        return not stack and deepest == self.depth and all(sign in text for sign in "([{")

    def _text(self, rng: random.Random, depth: int) -> str:
        text = rng.choice(FILLER)
        for level in range(depth):
            left, right = ("()", "[]", "{}")[level % 3]
            text = f"{left}{rng.choice(FILLER)} {text}{right}"
        return text if depth >= 3 else f"{text} (one) [two] {{three}}"

    def witness(self, rng: random.Random) -> str:
        return self._text(rng, self.depth)

    def violation(self, rng: random.Random) -> str:
        return rng.choice((self._text(rng, self.depth + 1), self._text(rng, self.depth)[:-1], prose(rng, 5)))


@dataclass(frozen=True)
class Staircase(Constraint):
    """Each line is indented by one blank more than the line before; the first is not."""

    kind: ClassVar[str] = "layout:staircase"
    aspects: ClassVar[frozenset[str]] = _LINES
    phrasings: ClassVar[tuple[str, ...]] = (
        "Write at least {least} lines; indent each by exactly one blank more than the line above it, the first not at "
        "all.",
        "Let your {least} or more lines form stairs: no blank before the first, one before the second, two before the "
        "third, and so on.",
    )
    least: int

    def __post_init__(self) -> None:
        self._require_number("least", 2)

    @classmethod
    def draw(cls, rng: random.Random) -> Self:
        return cls(rng.randint(2, 8))

    def holds(self, text: str) -> bool:
        indents = [len(line) - len(line.lstrip(" ")) for line in text.split("\n") if line.strip()]
        stairs = all(other == one + 1 for one, other in pairwise(indents))
        return len(indents) >= self.least and indents[0] == 0 and stairs

    def witness(self, rng: random.Random) -> str:
        return "\n".join(f"{' ' * i}{prose(rng, 3)}" for i in range(self.least))

    def violation(self, rng: random.Random) -> str:
        return rng.choice((f"{self.witness(rng)}\nflat", self.witness(rng).replace("\n ", "\n")))
