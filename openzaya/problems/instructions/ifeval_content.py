"""The IFEval constraints on words and letters (arXiv 2311.07911): keywords, counts, language, case, punctuation.

Names, arguments and meaning are those of the public checkers, also where these are lenient: a keyword counts
inside a longer word, a forbidden word only as a whole one. Keywords are plain texts here, never patterns.
"""

from __future__ import annotations

import random
import re
from dataclasses import dataclass
from typing import Any, ClassVar, Self

from openzaya.errors import DataError
from openzaya.problems.instructions.base import (
    RELATIONS,
    Constraint,
    filler,
    number_for,
    prose,
    related,
)
from openzaya.problems.instructions.language import LANGUAGES, detected_language, looks_english
from openzaya.problems.instructions.text import sentences

_COUNTED_WORD = re.compile(r"\w+")
_CASED_WORD = re.compile(r"[^\W_]+(?:['’.-][^\W_]+)*")


def _mixed(rng: random.Random, chosen: list[str], avoid: list[str]) -> str:
    """``chosen`` scattered over plain words, as one sentence in lower case."""
    all_words = [*chosen, *filler(rng, 12, avoid)]
    rng.shuffle(all_words)
    return " ".join(all_words) + "."


@dataclass(frozen=True)
class KeywordExistence(Constraint):
    """Every keyword occurs, in any case."""

    kind: ClassVar[str] = "keywords:existence"
    aspects: ClassVar[frozenset[str]] = frozenset({"keywords"})
    phrasings: ClassVar[tuple[str, ...]] = (
        "Use the keywords {keywords} in your answer.",
        "Make sure that {keywords} can be found in what you write.",
        "Your text has to mention {keywords}.",
    )
    keywords: tuple[str, ...]

    def __post_init__(self) -> None:
        self._require_texts("keywords")

    @classmethod
    def draw(cls, rng: random.Random) -> Self:
        return cls(tuple(sorted(set(filler(rng, rng.randint(1, 4))))))

    def holds(self, text: str) -> bool:
        lowered = text.lower()
        return all(keyword.lower() in lowered for keyword in self.keywords)

    def witness(self, rng: random.Random) -> str:
        return _mixed(rng, list(self.keywords), [])

    def violation(self, rng: random.Random) -> str:
        missing = rng.choice(self.keywords)
        kept = [keyword for keyword in self.keywords if missing.lower() not in keyword.lower()]
        return _mixed(rng, kept, [missing])


@dataclass(frozen=True)
class KeywordFrequency(Constraint):
    """A keyword occurs less than, or at least, a number of times."""

    kind: ClassVar[str] = "keywords:frequency"
    aspects: ClassVar[frozenset[str]] = frozenset({"keywords"})
    phrasings: ClassVar[tuple[str, ...]] = (
        "Let the word '{keyword}' occur {relation} {frequency} times.",
        "Count how often you write '{keyword}': it must be {relation} {frequency} times.",
    )
    keyword: str
    frequency: int
    relation: str

    def __post_init__(self) -> None:
        self._require_text("keyword")
        self._require_number("frequency")
        self._require_relation("relation")

    @classmethod
    def draw(cls, rng: random.Random) -> Self:
        return cls(filler(rng, 1)[0], rng.randint(1, 5), rng.choice(RELATIONS))

    def holds(self, text: str) -> bool:
        return related(text.lower().count(self.keyword.strip().lower()), self.relation, self.frequency)

    def witness(self, rng: random.Random) -> str:
        return self._text(rng, True)

    def violation(self, rng: random.Random) -> str:
        return self._text(rng, False)

    def _text(self, rng: random.Random, wanted: bool) -> str:
        return _mixed(rng, [self.keyword] * number_for(rng, self.relation, self.frequency, wanted), [self.keyword])


@dataclass(frozen=True)
class ForbiddenWords(Constraint):
    """None of the words occurs as a whole word, in any case."""

    kind: ClassVar[str] = "keywords:forbidden_words"
    aspects: ClassVar[frozenset[str]] = frozenset({"forbidden"})
    phrasings: ClassVar[tuple[str, ...]] = (
        "Do without the words {forbidden_words}.",
        "The words {forbidden_words} must not occur in your answer.",
    )
    forbidden_words: tuple[str, ...]

    def __post_init__(self) -> None:
        self._require_texts("forbidden_words")

    @classmethod
    def draw(cls, rng: random.Random) -> Self:
        return cls(tuple(sorted(set(filler(rng, rng.randint(1, 4))))))

    def holds(self, text: str) -> bool:
        return not any(re.search(rf"\b{re.escape(word)}\b", text, flags=re.IGNORECASE) for word in self.forbidden_words)

    def witness(self, rng: random.Random) -> str:
        return _mixed(rng, [], list(self.forbidden_words))

    def violation(self, rng: random.Random) -> str:
        return _mixed(rng, [rng.choice(self.forbidden_words)], [])


@dataclass(frozen=True)
class LetterFrequency(Constraint):
    """A letter, in either case, occurs less than, or at least, a number of times."""

    kind: ClassVar[str] = "keywords:letter_frequency"
    aspects: ClassVar[frozenset[str]] = frozenset({"letters"})
    phrasings: ClassVar[tuple[str, ...]] = (
        "Use the letter {letter} {let_relation} {let_frequency} times.",
        "How often the letter {letter} appears matters: {let_relation} {let_frequency} times, please.",
    )
    letter: str
    let_frequency: int
    let_relation: str

    def __post_init__(self) -> None:
        self._require_text("letter")
        if len(self.letter.strip()) != 1:
            raise DataError(f"{self.kind}: letter={self.letter!r} is not a single sign")
        self._require_number("let_frequency")
        self._require_relation("let_relation")

    @classmethod
    def draw(cls, rng: random.Random) -> Self:
        return cls(rng.choice("abcdefghilmnoprstuw"), rng.randint(1, 12), rng.choice(RELATIONS))

    def holds(self, text: str) -> bool:
        return related(text.lower().count(self.letter.strip().lower()), self.let_relation, self.let_frequency)

    def witness(self, rng: random.Random) -> str:
        return self._text(rng, True)

    def violation(self, rng: random.Random) -> str:
        return self._text(rng, False)

    def _text(self, rng: random.Random, wanted: bool) -> str:
        num = number_for(rng, self.let_relation, self.let_frequency, wanted)
        rest = filler(rng, 5, [self.letter]) if self.letter.strip().isalpha() else ["plain"]
        return " ".join([*rest, *[self.letter] * num])


@dataclass(frozen=True)
class ResponseLanguage(Constraint):
    """The text is in a language (ISO 639-1 code), as ``langdetect`` finds; an undetectable text passes."""

    kind: ClassVar[str] = "language:response_language"
    aspects: ClassVar[frozenset[str]] = frozenset(
        {"language", "case", "keywords", "forbidden", "letters", "words", "sentences"}
    )
    phrasings: ClassVar[tuple[str, ...]] = (
        "Write the whole answer in {language}, and nothing in another language.",
        "Only {language} may be used, from the first word to the last.",
    )
    language: str

    def __post_init__(self) -> None:
        self._require_text("language")

    @classmethod
    def draw(cls, rng: random.Random) -> Self:
        return cls(rng.choice(sorted(LANGUAGES)))

    def spoken(self) -> dict[str, Any]:
        return {"language": LANGUAGES[self.language][0] if self.language in LANGUAGES else self.language}

    def holds(self, text: str) -> bool:
        return detected_language(text) in (self.language, None)

    def witness(self, rng: random.Random) -> str:
        if self.language not in LANGUAGES:
            raise DataError(f"{self.kind}: no sample text in language '{self.language}'")
        return LANGUAGES[self.language][1]

    def violation(self, rng: random.Random) -> str:
        return LANGUAGES[rng.choice([code for code in sorted(LANGUAGES) if code != self.language])][1]


@dataclass(frozen=True)
class NumberSentences(Constraint):
    """The number of sentences."""

    kind: ClassVar[str] = "length_constraints:number_sentences"
    aspects: ClassVar[frozenset[str]] = frozenset({"sentences"})
    phrasings: ClassVar[tuple[str, ...]] = (
        "Write {relation} {num_sentences} sentences.",
        "The number of sentences must be {relation} {num_sentences}.",
    )
    num_sentences: int
    relation: str

    def __post_init__(self) -> None:
        self._require_number("num_sentences")
        self._require_relation("relation")

    @classmethod
    def draw(cls, rng: random.Random) -> Self:
        return cls(rng.randint(2, 12), rng.choice(RELATIONS))

    def holds(self, text: str) -> bool:
        return related(len(sentences(text)), self.relation, self.num_sentences)

    def witness(self, rng: random.Random) -> str:
        return prose(rng, 8 * max(1, number_for(rng, self.relation, self.num_sentences, True)))

    def violation(self, rng: random.Random) -> str:
        return prose(rng, 8 * max(1, number_for(rng, self.relation, self.num_sentences, False)))


@dataclass(frozen=True)
class NumberWords(Constraint):
    """The number of words (runs of letters, digits and underscores)."""

    kind: ClassVar[str] = "length_constraints:number_words"
    aspects: ClassVar[frozenset[str]] = frozenset({"words"})
    phrasings: ClassVar[tuple[str, ...]] = (
        "Use {relation} {num_words} words.",
        "Keep your answer to {relation} {num_words} words.",
        "The length should be {relation} {num_words} words.",
    )
    num_words: int
    relation: str

    def __post_init__(self) -> None:
        self._require_number("num_words")
        self._require_relation("relation")

    @classmethod
    def draw(cls, rng: random.Random) -> Self:
        return cls(10 * rng.randint(2, 40), rng.choice(RELATIONS))

    def holds(self, text: str) -> bool:
        return related(len(_COUNTED_WORD.findall(text)), self.relation, self.num_words)

    def witness(self, rng: random.Random) -> str:
        return prose(rng, max(1, number_for(rng, self.relation, self.num_words, True)))

    def violation(self, rng: random.Random) -> str:
        return prose(rng, max(1, number_for(rng, self.relation, self.num_words, False)))


@dataclass(frozen=True)
class CapitalWordFrequency(Constraint):
    """The number of words in capitals; a hyphenated or dotted one counts once."""

    kind: ClassVar[str] = "change_case:capital_word_frequency"
    aspects: ClassVar[frozenset[str]] = frozenset({"case"})
    phrasings: ClassVar[tuple[str, ...]] = (
        "Write {capital_relation} {capital_frequency} words in capitals.",
        "Words in ALL CAPITALS are to appear {capital_relation} {capital_frequency} times.",
    )
    capital_frequency: int
    capital_relation: str

    def __post_init__(self) -> None:
        self._require_number("capital_frequency")
        self._require_relation("capital_relation")

    @classmethod
    def draw(cls, rng: random.Random) -> Self:
        return cls(rng.randint(1, 10), rng.choice(RELATIONS))

    def holds(self, text: str) -> bool:
        return related(sum(map(str.isupper, _CASED_WORD.findall(text))), self.capital_relation, self.capital_frequency)

    def witness(self, rng: random.Random) -> str:
        return self._text(rng, True)

    def violation(self, rng: random.Random) -> str:
        return self._text(rng, False)

    def _text(self, rng: random.Random, wanted: bool) -> str:
        num = number_for(rng, self.capital_relation, self.capital_frequency, wanted)
        return _mixed(rng, [word.upper() for word in filler(rng, num)], [])


class _WholeCase(Constraint):
    """The whole text is in one case, and in English as far as that can be told."""

    aspects: ClassVar[frozenset[str]] = frozenset({"case", "language"})
    upper: ClassVar[bool]

    @classmethod
    def draw(cls, rng: random.Random) -> Self:
        return cls()

    def holds(self, text: str) -> bool:
        return (text.isupper() if self.upper else text.islower()) and looks_english(text)

    def witness(self, rng: random.Random) -> str:
        text = f"{LANGUAGES['en'][1]} {prose(rng, 5)}"
        return text.upper() if self.upper else text.lower()

    def violation(self, rng: random.Random) -> str:
        text = self.witness(rng)
        place = rng.choice([i for i, sign in enumerate(text) if sign.isalpha()])
        return text[:place] + text[place].swapcase() + text[place + 1 :]


@dataclass(frozen=True)
class EnglishCapital(_WholeCase):
    """English, in capitals only."""

    kind: ClassVar[str] = "change_case:english_capital"
    upper: ClassVar[bool] = True
    phrasings: ClassVar[tuple[str, ...]] = (
        "Write in English, with every letter a capital.",
        "Your whole answer must be English and must not hold a single small letter.",
    )


@dataclass(frozen=True)
class EnglishLowercase(_WholeCase):
    """English, in small letters only."""

    kind: ClassVar[str] = "change_case:english_lowercase"
    upper: ClassVar[bool] = False
    phrasings: ClassVar[tuple[str, ...]] = (
        "Write in English and only in small letters.",
        "Your whole answer must be English and must not hold a single capital.",
    )


@dataclass(frozen=True)
class NoComma(Constraint):
    """No comma."""

    kind: ClassVar[str] = "punctuation:no_comma"
    aspects: ClassVar[frozenset[str]] = frozenset({"commas"})
    phrasings: ClassVar[tuple[str, ...]] = ("Do not use commas.", "There must be no comma anywhere in your answer.")

    @classmethod
    def draw(cls, rng: random.Random) -> Self:
        return cls()

    def holds(self, text: str) -> bool:
        return "," not in text

    def witness(self, rng: random.Random) -> str:
        return prose(rng, 20)

    def violation(self, rng: random.Random) -> str:
        return prose(rng, 20).replace(" ", ", ", 1)
