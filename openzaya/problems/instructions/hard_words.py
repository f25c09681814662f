"""Harder constraints on words: their order, length, spelling and place.

Of the kind that IFBench asks for (arXiv 2507.02833), with types, wording and checkers of our own. A word is a
run of letters and digits with apostrophes and hyphens inside; where a short text would satisfy a constraint by
itself, a least number of words is part of it.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from itertools import pairwise
from typing import ClassVar, Self

from openzaya.problems.instructions.base import FILLER, Constraint, filler, prose, sentence_of
from openzaya.problems.instructions.text import words

_LETTER_PALINDROMES = ("level", "radar", "civic", "kayak", "madam", "refer", "rotor", "noon", "deed", "stats", "tenet")
_WORDS = frozenset({"words", "word order"})


def lowered_words(text: str) -> list[str]:
    """The words of ``text`` in small letters."""
    return [word.lower() for word in words(text)]


@dataclass(frozen=True)
class EveryNthWord(Constraint):
    """Each n-th word is the given one, at least three times."""

    kind: ClassVar[str] = "words:every_nth"
    aspects: ClassVar[frozenset[str]] = _WORDS
    phrasings: ClassVar[tuple[str, ...]] = (
        "Counting words from the start, numbers {step}, {twice}, {thrice} and so on must all be '{word}'; write at "
        "least {thrice} words.",
        "Use at least {thrice} words, of which every one at a multiple of {step} is '{word}'.",
    )
    word: str
    step: int

    def __post_init__(self) -> None:
        self._require_text("word")
        self._require_number("step", 2)

    def spoken(self) -> dict[str, object]:
        return {**self.arguments(), "twice": 2 * self.step, "thrice": 3 * self.step}

    @classmethod
    def draw(cls, rng: random.Random) -> Self:
        return cls(rng.choice(FILLER), rng.randint(2, 7))

    def holds(self, text: str) -> bool:
        at_places = lowered_words(text)[self.step - 1 :: self.step]
        return len(at_places) >= 3 and set(at_places) == {self.word.lower()}

    def _words(self, rng: random.Random) -> list[str]:
        chosen = filler(rng, 3 * self.step + rng.randrange(self.step), [self.word])
        chosen[self.step - 1 :: self.step] = [self.word] * 3
        return chosen

    def witness(self, rng: random.Random) -> str:
        return sentence_of(self._words(rng))

    def violation(self, rng: random.Random) -> str:
        chosen = self._words(rng)
        chosen.insert(rng.randrange(2 * self.step), filler(rng, 1, [self.word])[0])
        return sentence_of(chosen)


@dataclass(frozen=True)
class AlternatingLengths(Constraint):
    """Words with an odd and an even number of letters take turns."""

    kind: ClassVar[str] = "words:alternating_lengths"
    aspects: ClassVar[frozenset[str]] = _WORDS
    phrasings: ClassVar[tuple[str, ...]] = (
        "Let words with an odd and with an even number of letters take turns, for at least {least} words.",
        "Write {least} or more words so that no two neighbours both have an odd, or both an even, number of letters.",
    )
    least: int

    def __post_init__(self) -> None:
        self._require_number("least", 2)

    @classmethod
    def draw(cls, rng: random.Random) -> Self:
        return cls(rng.randint(4, 14))

    def holds(self, text: str) -> bool:
        odd = [len(word) % 2 for word in words(text)]
        return len(odd) >= self.least and all(one != other for one, other in pairwise(odd))

    def witness(self, rng: random.Random) -> str:
        kinds = [[word for word in FILLER if len(word) % 2 == rest] for rest in (0, 1)]
        first = rng.randrange(2)
        return sentence_of([rng.choice(kinds[(first + i) % 2]) for i in range(self.least)])

    def violation(self, rng: random.Random) -> str:
        chosen = self.witness(rng).split()
        place = rng.randrange(len(chosen) - 1)
        return " ".join([*chosen[: place + 1], *chosen[place:]])


@dataclass(frozen=True)
class WordLengths(Constraint):
    """All words have a number of letters within bounds."""

    kind: ClassVar[str] = "words:lengths_between"
    aspects: ClassVar[frozenset[str]] = _WORDS
    phrasings: ClassVar[tuple[str, ...]] = (
        "Use at least {least} words, none shorter than {shortest} or longer than {longest} letters.",
        "Every word must have {shortest} to {longest} letters, and there must be {least} words or more.",
    )
    shortest: int
    longest: int
    least: int

    def __post_init__(self) -> None:
        self._require_number("shortest", 1)
        self._require_number("longest", max(1, int(self.shortest)))
        self._require_number("least", 1)

    @classmethod
    def draw(cls, rng: random.Random) -> Self:
        shortest = rng.randint(4, 6)
        return cls(shortest, shortest + rng.randint(0, 2), rng.randint(4, 20))

    def holds(self, text: str) -> bool:
        lengths = [len(word) for word in words(text)]
        return len(lengths) >= self.least and all(self.shortest <= length <= self.longest for length in lengths)

    def witness(self, rng: random.Random) -> str:
        usable = [word for word in FILLER if self.shortest <= len(word) <= self.longest] or ["a" * self.shortest]
        return sentence_of(rng.choices(usable, k=self.least))

    def violation(self, rng: random.Random) -> str:
        return (
            f"{self.witness(rng)[:-1]} {'o' * rng.choice((self.longest + 1, self.shortest - 1 or self.longest + 2))}."
        )


@dataclass(frozen=True)
class NoRepeatedWord(Constraint):
    """No word occurs twice, in any case."""

    kind: ClassVar[str] = "words:none_twice"
    aspects: ClassVar[frozenset[str]] = frozenset({"words", "word order", "keywords"})
    phrasings: ClassVar[tuple[str, ...]] = (
        "Write at least {least} words and use none of them twice.",
        "All words must differ, capitals aside, and there must be {least} or more.",
    )
    least: int

    def __post_init__(self) -> None:
        self._require_number("least", 2)

    @classmethod
    def draw(cls, rng: random.Random) -> Self:
        return cls(rng.randint(8, 40))

    def holds(self, text: str) -> bool:
        found = lowered_words(text)
        return len(found) >= self.least and len(set(found)) == len(found)

    def witness(self, rng: random.Random) -> str:
        chosen = rng.sample(FILLER, min(self.least, len(FILLER)))
        return sentence_of([*chosen, *(f"extra{i}" for i in range(self.least - len(chosen)))])

    def violation(self, rng: random.Random) -> str:
        chosen = self.witness(rng)[:-1].split()
        return sentence_of([*chosen, rng.choice(chosen).upper()])


@dataclass(frozen=True)
class UniqueWords(Constraint):
    """The exact number of different words."""

    kind: ClassVar[str] = "words:number_different"
    aspects: ClassVar[frozenset[str]] = _WORDS
    phrasings: ClassVar[tuple[str, ...]] = (
        "Use exactly {different} different words; each may come back as often as you like, and at least {least} "
        "words must be there in all.",
        "With a stock of exactly {different} different words, write {least} words or more.",
    )
    different: int
    least: int

    def __post_init__(self) -> None:
        self._require_number("different", 1)
        self._require_number("least", max(1, int(self.different)))

    @classmethod
    def draw(cls, rng: random.Random) -> Self:
        different = rng.randint(3, 9)
        return cls(different, different + rng.randint(3, 20))

    def holds(self, text: str) -> bool:
        found = lowered_words(text)
        return len(found) >= self.least and len(set(found)) == self.different

    def witness(self, rng: random.Random) -> str:
        stock = rng.sample(FILLER, self.different)
        return sentence_of([*stock, *rng.choices(stock, k=self.least - self.different)])

    def violation(self, rng: random.Random) -> str:
        text = self.witness(rng)[:-1]
        return f"{text} {filler(rng, 1, lowered_words(text))[0]}."


@dataclass(frozen=True)
class EveryOtherCapitalised(Constraint):
    """Every second word begins with a capital, all else is in small letters."""

    kind: ClassVar[str] = "words:every_other_capitalised"
    aspects: ClassVar[frozenset[str]] = frozenset({"case", "words"})
    phrasings: ClassVar[tuple[str, ...]] = (
        "Begin the second, fourth, sixth word and so on with a capital and use small letters for all else; write at "
        "least {least} words.",
        "In a text of {least} or more words, capitalise every other word, starting with the second, and no other "
        "letter.",
    )
    least: int

    def __post_init__(self) -> None:
        self._require_number("least", 2)

    @classmethod
    def draw(cls, rng: random.Random) -> Self:
        return cls(rng.randint(4, 20))

    def holds(self, text: str) -> bool:
        found = words(text)
        wanted = [word[0].upper() + word[1:].lower() if i % 2 else word.lower() for i, word in enumerate(found)]
        return len(found) >= self.least and found == wanted

    def witness(self, rng: random.Random) -> str:
        chosen = filler(rng, self.least)
        return " ".join(word.capitalize() if i % 2 else word for i, word in enumerate(chosen)) + "."

    def violation(self, rng: random.Random) -> str:
        return rng.choice((self.witness(rng).lower(), self.witness(rng).swapcase()))


@dataclass(frozen=True)
class AlphabeticalWords(Constraint):
    """The words are in alphabetical order, in any case, and not all the same."""

    kind: ClassVar[str] = "words:alphabetical"
    aspects: ClassVar[frozenset[str]] = _WORDS
    phrasings: ClassVar[tuple[str, ...]] = (
        "Write at least {least} different words, all in alphabetical order and none twice.",
        "No word may come before its predecessor in the dictionary or repeat it; use {least} words or more.",
    )
    least: int

    def __post_init__(self) -> None:
        self._require_number("least", 2)

    @classmethod
    def draw(cls, rng: random.Random) -> Self:
        return cls(rng.randint(4, 16))

    def holds(self, text: str) -> bool:
        found = lowered_words(text)
        return len(found) >= self.least and all(one < other for one, other in pairwise(found))

    def witness(self, rng: random.Random) -> str:
        return sentence_of(sorted(rng.sample(FILLER, min(self.least, len(FILLER)))))

    def violation(self, rng: random.Random) -> str:
        chosen = self.witness(rng)[:-1].lower().split()
        place = rng.randrange(len(chosen) - 1)
        chosen[place], chosen[place + 1] = chosen[place + 1], chosen[place]
        return sentence_of(chosen)


@dataclass(frozen=True)
class WordChain(Constraint):
    """Each word begins with the last letter of the word before it; no word follows itself."""

    kind: ClassVar[str] = "words:chain"
    aspects: ClassVar[frozenset[str]] = _WORDS
    phrasings: ClassVar[tuple[str, ...]] = (
        "Write a chain of at least {least} words in which each begins with the last letter of the one before; never "
        "the same word twice in a row.",
        "Let every word start with the letter that its predecessor ends on, for {least} or more words, without "
        "saying a word twice in a row.",
    )
    least: int

    def __post_init__(self) -> None:
        self._require_number("least", 2)

    @classmethod
    def draw(cls, rng: random.Random) -> Self:
        return cls(rng.randint(3, 10))

    def holds(self, text: str) -> bool:
        found = lowered_words(text)
        pairs = pairwise(found)
        return len(found) >= self.least and all(one[-1] == other[0] and one != other for one, other in pairs)

    def witness(self, rng: random.Random) -> str:
        chain = [rng.choice(FILLER)]
        while len(chain) < self.least:
            following = [word for word in FILLER if word[0] == chain[-1][-1] and word != chain[-1]]
            chain.append(rng.choice(following) if following else chain[-1][-1] + "a")
        return " ".join(chain)

    def violation(self, rng: random.Random) -> str:
        chain = self.witness(rng).split()
        wrong = [word for word in FILLER if word[0] != chain[-1][-1]]
        return " ".join([*chain, rng.choice(wrong)])


@dataclass(frozen=True)
class Palindromes(Constraint):
    """At least a number of different words of four or more letters that read the same from behind."""

    kind: ClassVar[str] = "words:palindromes"
    aspects: ClassVar[frozenset[str]] = frozenset({"keywords"})
    phrasings: ClassVar[tuple[str, ...]] = (
        "Use at least {num_palindromes} different palindromes of four letters or more.",
        "Work in {num_palindromes} or more words (each at least four letters long, no two the same) that read the "
        "same backwards.",
    )
    num_palindromes: int

    def __post_init__(self) -> None:
        self._require_number("num_palindromes", 1)

    @classmethod
    def draw(cls, rng: random.Random) -> Self:
        return cls(rng.randint(1, 5))

    def holds(self, text: str) -> bool:
        found = {word for word in lowered_words(text) if len(word) >= 4 and word.isalpha() and word == word[::-1]}
        # A run of one letter is no word.
        return sum(len(set(word)) > 1 for word in found) >= self.num_palindromes

    def witness(self, rng: random.Random) -> str:
        chosen = [*rng.sample(_LETTER_PALINDROMES, self.num_palindromes), *filler(rng, 6)]
        rng.shuffle(chosen)
        return sentence_of(chosen)

    def violation(self, rng: random.Random) -> str:
        one = rng.choice(_LETTER_PALINDROMES)
        return sentence_of(
            [*rng.sample(_LETTER_PALINDROMES, self.num_palindromes - 1)] * 2 or [f"{one}s", *filler(rng, 6)]
        )


@dataclass(frozen=True)
class KeywordAt(Constraint):
    """A given word at a given place, counted from the start; it occurs nowhere else."""

    kind: ClassVar[str] = "words:keyword_at"
    aspects: ClassVar[frozenset[str]] = frozenset({"keywords", "word order"})
    phrasings: ClassVar[tuple[str, ...]] = (
        "Word number {place} of your answer must be '{word}', which may not occur anywhere else.",
        "Use '{word}' once only: as word {place} from the start.",
    )
    word: str
    place: int

    def __post_init__(self) -> None:
        self._require_text("word")
        self._require_number("place", 1)

    @classmethod
    def draw(cls, rng: random.Random) -> Self:
        return cls(rng.choice(FILLER), rng.randint(1, 20))

    def holds(self, text: str) -> bool:
        found = lowered_words(text)
        word = self.word.lower()
        return found.count(word) == 1 and found.index(word) == self.place - 1

    def witness(self, rng: random.Random) -> str:
        chosen = filler(rng, self.place + 4, [self.word])
        chosen[self.place - 1] = self.word
        return sentence_of(chosen)

    def violation(self, rng: random.Random) -> str:
        text = self.witness(rng)
        return rng.choice((f"well {text}", f"{text} {self.word}.", prose(rng, self.place + 3, [self.word])))
