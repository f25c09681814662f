"""Forms that a short answer may be asked to take: in brackets, backwards, twice, in words, and so on.

A form is a pure change of a text, so that forms compose: they are applied in the order of their ``slot``
(backwards, then its parts, their case, repeats, signs around it, words before and after), one form a slot at
most. ``undo`` takes a form off again, or tells that it is not there: this is what judges a wrong answer, whose
right form nobody knows. Each form has one short sentence, so that a small model with a small vocabulary can
learn it.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from openzaya.errors import DataError

DIGIT_WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
FIRST_WORDS = ("answer", "result", "so", "here")
LAST_WORDS = ("done", "end", "ok", "right")
SLOTS = ("order", "layout", "case", "repeat", "wrap", "first", "last")
"""In the order in which forms are applied."""

_DIGIT_OF = {word: str(digit) for digit, word in enumerate(DIGIT_WORDS)} | {"minus": "-"}
_PART = re.compile(r"[0-9]|[A-Za-z]+|[^\s]")

Change = Callable[[str], str]
Undo = Callable[[str], "str | None"]


@dataclass(frozen=True, slots=True)
class AnswerForm:
    """One form. ``checkable`` tells whether ``undo`` can see, without the right answer, that it is missing."""

    name: str
    slot: str
    phrase: str
    apply: Change
    undo: Undo
    checkable: bool = True

    def describe(self) -> str:
        """The sentence of a prompt."""
        return self.phrase

    def check(self, text: str) -> bool:
        """Whether ``text``, an answer alone, has this form as its outermost one."""
        return self.undo(text.strip()) is not None


def parts_of(text: str) -> list[str]:
    """What a layout puts apart: the words, or the signs of a text that is one word."""
    words = text.split()
    return words if len(words) > 1 else list(text.strip())


def _digit_words(text: str) -> str:
    words = []
    for part in _PART.findall(text):
        words.append("minus" if part == "-" else DIGIT_WORDS[int(part)] if part.isdigit() else part)
    return " ".join(words) if re.search("[0-9]", text) else text


def _undo_digit_words(text: str) -> str | None:
    words = _PART.findall(text)
    if re.search("[0-9]", text) or not any(word.lower() in _DIGIT_OF for word in words):
        return None
    return re.sub(r"(?<=[0-9-]) (?=[0-9])", "", " ".join(_DIGIT_OF.get(word.lower(), word) for word in words))


def _undo_upper(text: str) -> str | None:
    return text.lower() if text.upper() == text and text.lower() != text else None


def _undo_no_blanks(text: str) -> str | None:
    return text if text and not re.search(r"\s", text) else None


def _joined(separator: str) -> tuple[Change, Undo]:
    def apply(text: str) -> str:
        return separator.join(parts_of(text))

    def undo(text: str) -> str | None:
        parts = [part.strip() for part in text.split(separator.strip(" "))]
        if len(parts) < 2 or any(not part or re.search(r"\s", part) for part in parts):
            return None
        return " ".join(parts)

    return apply, undo


def _repeated(num: int, separator: str) -> tuple[Change, Undo]:
    def apply(text: str) -> str:
        return separator.join([text] * num)

    def undo(text: str) -> str | None:
        pieces = text.split(separator.strip() if separator.strip() == "," else separator)
        if len(pieces) % num:
            return None
        size = len(pieces) // num
        copies = [",".join(piece.strip() for piece in pieces[i * size : (i + 1) * size]) for i in range(num)]
        return copies[0] if copies[0] and len(set(copies)) == 1 else None

    return apply, undo


def _between(left: str, right: str) -> tuple[Change, Undo]:
    def apply(text: str) -> str:
        return f"{left}{text}{right}"

    def undo(text: str) -> str | None:
        if len(text) <= len(left) + len(right) or not (text.startswith(left) and text.endswith(right)):
            return None
        return text[len(left) : len(text) - len(right)].strip() or None

    return apply, undo


def _forms() -> list[AnswerForm]:
    forms = [
        AnswerForm(
            "backwards", "order", "Write it backwards.", lambda text: text[::-1], lambda text: text[::-1], False
        ),
        AnswerForm("digit_words", "layout", "Write digits as words.", _digit_words, _undo_digit_words),
        AnswerForm("capitals", "case", "Use capital letters.", str.upper, _undo_upper),
        AnswerForm("no_blanks", "layout", "Leave out blanks.", lambda text: "".join(text.split()), _undo_no_blanks),
        AnswerForm("commas", "layout", "Put commas between the parts.", *_joined(", ")),
        AnswerForm("dashes", "layout", "Put dashes between the parts.", *_joined("-")),
        AnswerForm("lines", "layout", "Put each part on its own line.", *_joined("\n")),
        AnswerForm("twice", "repeat", "Write it twice, with a comma between.", *_repeated(2, ", ")),
        AnswerForm("twice_and", "repeat", "Write it twice, with the word and between.", *_repeated(2, " and ")),
        AnswerForm("three_times", "repeat", "Write it three times, with commas between.", *_repeated(3, ", ")),
        AnswerForm("brackets", "wrap", "Put it in brackets [ ].", *_between("[", "]")),
        AnswerForm("parentheses", "wrap", "Put it in parentheses ( ).", *_between("(", ")")),
        AnswerForm("stars", "wrap", "Put a star * on both sides.", *_between("*", "*")),
        AnswerForm("quotes", "wrap", 'Put it in quotes " ".', *_between('"', '"')),
        AnswerForm("full_stop", "last", "End with a full stop.", *_between("", ".")),
        AnswerForm("exclamation", "last", "End with an exclamation mark !", *_between("", "!")),
        AnswerForm("hash", "first", "Begin with the sign #", *_between("# ", "")),
    ]
    for word in FIRST_WORDS:
        forms.append(AnswerForm(f"first_{word}", "first", f"Begin with the word {word}.", *_between(f"{word} ", "")))
    for word in LAST_WORDS:
        forms.append(AnswerForm(f"last_{word}", "last", f"End with the word {word}.", *_between("", f" {word}")))
    return forms


ANSWER_FORMS: dict[str, AnswerForm] = {form.name: form for form in _forms()}
ALWAYS_APPLY = ("repeat", "wrap", "first", "last")
"""Slots whose forms change every answer."""


def get_form(name: str) -> AnswerForm:
    """The form called ``name``; an unknown name raises :class:`DataError` with the nearest known one."""
    form = ANSWER_FORMS.get(name)
    if form is None:
        near = difflib.get_close_matches(str(name), ANSWER_FORMS, n=1)
        hint = f"did you mean '{near[0]}'?" if near else f"choose one of: {', '.join(ANSWER_FORMS)}"
        raise DataError(f"unknown form of an answer '{name}'; {hint}")
    return form


def in_order(forms: Sequence[AnswerForm]) -> list[AnswerForm]:
    """``forms`` in the order in which they are applied; two of one slot raise :class:`DataError`."""
    taken: dict[str, str] = {}
    for form in forms:
        if form.slot in taken:
            raise DataError(f"forms '{taken[form.slot]}' and '{form.name}' exclude each other; keep one of them")
        taken[form.slot] = form.name
    return sorted(forms, key=lambda form: SLOTS.index(form.slot))


def apply_forms(forms: Sequence[AnswerForm], answer: str) -> str:
    """``answer`` in all of ``forms``, which are in order."""
    for form in forms:
        answer = form.apply(answer)
    return answer
