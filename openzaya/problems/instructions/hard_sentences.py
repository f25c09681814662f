"""Harder constraints on sentences and letters: lengths that grow, acrostics, letters left out, exact counts.

Of the kind that IFBench asks for (arXiv 2507.02833), with types, wording and checkers of our own.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from itertools import pairwise
from typing import ClassVar, Self

from openzaya.errors import DataError
from openzaya.problems.instructions.base import (
    FILLER,
    RELATIONS,
    Constraint,
    filler,
    number_for,
    prose,
    related,
    sentence_of,
)
from openzaya.problems.instructions.text import sentences, words

VOWELS = "aeiou"
_SENTENCES = frozenset({"sentences", "words", "word order", "end"})
_ACROSTIC_WORDS = ("BRAVE", "CLIMB", "DREAM", "FRIEND", "HOPE", "LIGHT", "MUSIC", "OCEAN", "SMILE", "WATER")


@dataclass(frozen=True)
class GrowingSentences(Constraint):
    """Each sentence has more words than the one before."""

    kind: ClassVar[str] = "sentences:growing"
    aspects: ClassVar[frozenset[str]] = _SENTENCES
    phrasings: ClassVar[tuple[str, ...]] = (
        "Write at least {least} sentences, each with more words than the one before.",
        "From sentence to sentence the number of words must rise; give {least} sentences or more.",
    )
    least: int

    def __post_init__(self) -> None:
        self._require_number("least", 2)

    @classmethod
    def draw(cls, rng: random.Random) -> Self:
        return cls(rng.randint(2, 6))

    def holds(self, text: str) -> bool:
        lengths = [len(words(sentence)) for sentence in sentences(text)]
        return len(lengths) >= self.least and lengths[0] > 0 and all(one < other for one, other in pairwise(lengths))

    def _sentences(self, rng: random.Random) -> list[str]:
        return [sentence_of(filler(rng, 2 * i + 1 + rng.randrange(2))) for i in range(self.least)]

    def witness(self, rng: random.Random) -> str:
        return " ".join(self._sentences(rng))

    def violation(self, rng: random.Random) -> str:
        return " ".join(reversed(self._sentences(rng)))


@dataclass(frozen=True)
class EqualSentences(Constraint):
    """Every sentence has the same given number of words, and there is an exact number of sentences."""

    kind: ClassVar[str] = "sentences:equal_length"
    aspects: ClassVar[frozenset[str]] = _SENTENCES
    phrasings: ClassVar[tuple[str, ...]] = (
        "Write exactly {num_sentences} sentences of exactly {num_words} words each.",
        "There must be {num_sentences} sentences; count {num_words} words in every one of them.",
    )
    num_sentences: int
    num_words: int

    def __post_init__(self) -> None:
        self._require_number("num_sentences", 1)
        self._require_number("num_words", 1)

    @classmethod
    def draw(cls, rng: random.Random) -> Self:
        return cls(rng.randint(2, 5), rng.randint(3, 12))

    def holds(self, text: str) -> bool:
        return [len(words(sentence)) for sentence in sentences(text)] == [self.num_words] * self.num_sentences

    def witness(self, rng: random.Random) -> str:
        return " ".join(sentence_of(filler(rng, self.num_words)) for _ in range(self.num_sentences))

    def violation(self, rng: random.Random) -> str:
        text = self.witness(rng)
        return rng.choice((f"{text} {sentence_of(filler(rng, self.num_words))}", f"{text[:-1]} {rng.choice(FILLER)}."))


@dataclass(frozen=True)
class SentenceAcrostic(Constraint):
    """The first letters of the sentences spell a word."""

    kind: ClassVar[str] = "sentences:acrostic"
    aspects: ClassVar[frozenset[str]] = _SENTENCES | {"start"}
    phrasings: ClassVar[tuple[str, ...]] = (
        "The first letters of your sentences, read in order, must spell {word}.",
        "Hide {word} in your answer: sentence one begins with its first letter, sentence two with its second, and so "
        "on, without any further sentence.",
    )
    word: str

    def __post_init__(self) -> None:
        self._require_text("word")

    @classmethod
    def draw(cls, rng: random.Random) -> Self:
        return cls(rng.choice(_ACROSTIC_WORDS))

    def holds(self, text: str) -> bool:
        firsts = [next((sign for sign in sentence if sign.isalpha()), "") for sentence in sentences(text)]
        return "".join(firsts).lower() == self.word.lower() and all(firsts)

    def _sentences(self, rng: random.Random) -> list[str]:
        return [sentence_of([first_word(rng, letter), *filler(rng, 3)]) for letter in self.word.lower()]

    def witness(self, rng: random.Random) -> str:
        return " ".join(self._sentences(rng))

    def violation(self, rng: random.Random) -> str:
        written = self._sentences(rng)
        return " ".join(rng.choice((written[:-1], [*written, prose(rng, 4)], ["Zephyr xylo.", *written[1:]])))


@dataclass(frozen=True)
class Questions(Constraint):
    """The exact number of questions among the exact number of sentences."""

    kind: ClassVar[str] = "sentences:questions"
    aspects: ClassVar[frozenset[str]] = _SENTENCES
    phrasings: ClassVar[tuple[str, ...]] = (
        "Write {num_sentences} sentences, exactly {num_questions} of which end with a question mark.",
        "Of your {num_sentences} sentences (no more, no fewer), {num_questions} must be questions.",
    )
    num_questions: int
    num_sentences: int

    def __post_init__(self) -> None:
        self._require_number("num_questions")
        self._require_number("num_sentences", max(1, int(self.num_questions)))

    @classmethod
    def draw(cls, rng: random.Random) -> Self:
        num = rng.randint(2, 7)
        return cls(rng.randint(1, num), num)

    def holds(self, text: str) -> bool:
        found = sentences(text)
        questions = sum(sentence.rstrip("\"'”’)]").endswith("?") for sentence in found)
        return len(found) == self.num_sentences and questions == self.num_questions

    def _text(self, rng: random.Random, num_questions: int, num_sentences: int) -> str:
        ends = ["?"] * num_questions + ["."] * (num_sentences - num_questions)
        rng.shuffle(ends)
        return " ".join(sentence_of(filler(rng, 5), end) for end in ends)

    def witness(self, rng: random.Random) -> str:
        return self._text(rng, self.num_questions, self.num_sentences)

    def violation(self, rng: random.Random) -> str:
        if self.num_questions and rng.random() < 0.5:
            return self._text(rng, self.num_questions - 1, self.num_sentences)
        return self._text(rng, self.num_questions, self.num_sentences + 1)


@dataclass(frozen=True)
class WithoutLetter(Constraint):
    """A letter, in either case, does not occur in a text of some length."""

    kind: ClassVar[str] = "letters:without"
    aspects: ClassVar[frozenset[str]] = frozenset({"letters", "keywords", "words", "language"})
    phrasings: ClassVar[tuple[str, ...]] = (
        "Write at least {least} words without once using the letter {letter}.",
        "The letter {letter} is out of bounds, small or capital; still use {least} words or more.",
    )
    letter: str
    least: int

    def __post_init__(self) -> None:
        self._require_text("letter")
        if len(self.letter) != 1:
            raise DataError(f"{self.kind}: letter={self.letter!r} is not a single letter")
        self._require_number("least", 1)

    @classmethod
    def draw(cls, rng: random.Random) -> Self:
        return cls(rng.choice("aeiorstn"), rng.randint(6, 40))

    def holds(self, text: str) -> bool:
        return self.letter.lower() not in text.lower() and len(words(text)) >= self.least

    def witness(self, rng: random.Random) -> str:
        return sentence_of(filler(rng, self.least, [self.letter]))

    def violation(self, rng: random.Random) -> str:
        with_letter = [word for word in FILLER if self.letter.lower() in word] or [self.letter]
        if self.least > 1 and rng.random() < 0.5:
            return sentence_of(filler(rng, self.least - 1, [self.letter]))
        return f"{self.witness(rng)} {rng.choice(with_letter).upper()}"


@dataclass(frozen=True)
class ExactCharacters(Constraint):
    """The exact number of characters, blanks and signs included."""

    kind: ClassVar[str] = "letters:number_characters"
    aspects: ClassVar[frozenset[str]] = frozenset({"letters", "words", "sentences", "end"})
    phrasings: ClassVar[tuple[str, ...]] = (
        "Your answer must be exactly {num_characters} characters long, counting blanks and signs.",
        "Count every character, blanks too: there are to be {num_characters}.",
    )
    num_characters: int

    def __post_init__(self) -> None:
        self._require_number("num_characters", 1)

    @classmethod
    def draw(cls, rng: random.Random) -> Self:
        return cls(rng.randint(20, 160))

    def holds(self, text: str) -> bool:
        return len(text) == self.num_characters

    def witness(self, rng: random.Random) -> str:
        text = prose(rng, self.num_characters)[: self.num_characters]
        return text if text == text.strip() else f"{text.rstrip()}{'.' * (len(text) - len(text.rstrip()))}"

    def violation(self, rng: random.Random) -> str:
        return f"{self.witness(rng)} more"


@dataclass(frozen=True)
class VowelCount(Constraint):
    """The exact number of vowels (a, e, i, o, u in either case) in a text of some length."""

    kind: ClassVar[str] = "letters:number_vowels"
    aspects: ClassVar[frozenset[str]] = frozenset({"letters", "words"})
    phrasings: ClassVar[tuple[str, ...]] = (
        "Use at least {least} words that hold exactly {num_vowels} vowels (a, e, i, o, u) in all.",
        "Counting every a, e, i, o and u, your answer of {least} or more words must come to {num_vowels}.",
    )
    num_vowels: int
    least: int

    def __post_init__(self) -> None:
        self._require_number("num_vowels")
        self._require_number("least", 1)

    @classmethod
    def draw(cls, rng: random.Random) -> Self:
        num = rng.randint(8, 40)
        return cls(num, num // 3)

    def holds(self, text: str) -> bool:
        return sum(map(text.lower().count, VOWELS)) == self.num_vowels and len(words(text)) >= self.least

    def witness(self, rng: random.Random) -> str:
        chosen: list[str] = []
        left = self.num_vowels
        while left:
            fitting = [word for word in FILLER if sum(map(word.count, VOWELS)) <= min(left, 3)]
            chosen.append(rng.choice(fitting) if fitting else "a")
            left -= sum(map(chosen[-1].count, VOWELS))
        return sentence_of([*chosen, *["my"] * (self.least - len(chosen))])

    def violation(self, rng: random.Random) -> str:
        return f"{self.witness(rng)} {rng.choice(FILLER)}"


@dataclass(frozen=True)
class SameInitial(Constraint):
    """The number of words that begin with a letter is less than, or at least, a number, in a text of some length."""

    kind: ClassVar[str] = "letters:number_initials"
    aspects: ClassVar[frozenset[str]] = frozenset({"letters", "words", "keywords"})
    phrasings: ClassVar[tuple[str, ...]] = (
        "In a text of at least {least} words, let {relation} {num_words} begin with the letter {letter}.",
        "Words that start with {letter} are to be {relation} {num_words} in number, out of {least} or more words.",
    )
    letter: str
    num_words: int
    relation: str
    least: int

    def __post_init__(self) -> None:
        self._require_text("letter")
        self._require_number("num_words", 1)
        self._require_relation("relation")
        self._require_number("least", 1)

    @classmethod
    def draw(cls, rng: random.Random) -> Self:
        return cls(rng.choice("abcefghlmoprstw"), rng.randint(2, 9), rng.choice(RELATIONS), 20)

    def holds(self, text: str) -> bool:
        found = words(text)
        num = sum(word[0].lower() == self.letter.lower() for word in found)
        return len(found) >= self.least and related(num, self.relation, self.num_words)

    def _text(self, rng: random.Random, wanted: bool) -> str:
        num = number_for(rng, self.relation, self.num_words, wanted)
        others = [word for word in FILLER if word[0] != self.letter.lower()]
        chosen = [*(first_word(rng, self.letter) for _ in range(num)), *rng.choices(others, k=self.least)]
        rng.shuffle(chosen)
        return sentence_of(chosen)

    def witness(self, rng: random.Random) -> str:
        return self._text(rng, True)

    def violation(self, rng: random.Random) -> str:
        return self._text(rng, False)


def first_word(rng: random.Random, letter: str) -> str:
    """A plain word that begins with ``letter``; one is made up where there is none."""
    fitting = [word for word in FILLER if word[0] == letter.lower()]
    return rng.choice(fitting) if fitting else f"{letter.lower()}ena"
