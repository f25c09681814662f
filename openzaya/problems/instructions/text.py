"""Words, sentences and paragraphs of a text, without data files and in time linear in its length.

A sentence ends at a run of ``. ! ? …`` (with closing quotes or brackets) before white space or the end, but
not behind an abbreviation, a single initial or a list number; a full stop also needs a following word that
does not go on in lower case when the word before it is short and unusual. Line breaks do not end sentences.
"""

from __future__ import annotations

import re

WORD = re.compile(r"[^\W_]+(?:['’-][^\W_]+)*")
"""A word: letters and digits, with apostrophes and hyphens inside."""

# Possessive, and never from within a run: a failed match must not be tried again from each of its signs.
_END = re.compile(r"(?<![.!?…])[.!?…]++[\"'”’)\]]*+(?=\s|$)")
_LAST_WORD = re.compile(r"[^\s\"'“‘(\[]+$")
_ABBREVIATION_TEXT = (
    "mr mrs ms dr prof st sr jr sgt capt lt rev hon gov sen rep vs etc inc ltd co corp dept est vol pp ed eds approx "
    "e.g i.e cf a.m p.m u.s u.k u.n jan feb mar apr jun jul aug sep sept oct nov dec"
)
_ABBREVIATIONS = frozenset(_ABBREVIATION_TEXT.split())
# Behind these a capital letter begins a new sentence all the same.
_MAY_END = frozenset(("etc", "inc", "ltd", "co", "corp", "jr", "sr", "a.m", "p.m", "u.s", "u.k", "u.n"))
_LOOK_BACK = 40


def words(text: str) -> list[str]:
    """The words of ``text`` as written."""
    return WORD.findall(text)


def lines(text: str) -> list[str]:
    """The lines that are not blank, stripped."""
    return [line.strip() for line in text.splitlines() if line.strip()]


def paragraphs(text: str) -> list[str]:
    """The blocks between blank lines, stripped."""
    blocks: list[list[str]] = [[]]
    for line in text.splitlines():
        if line.strip():
            blocks[-1].append(line)
        elif blocks[-1]:
            blocks.append([])
    return ["\n".join(block).strip() for block in blocks if block]


def sentences(text: str) -> list[str]:
    """The sentences of ``text``, stripped; what follows the last end sign counts as one."""
    found = []
    start = 0
    for end in _END.finditer(text):
        if (
            end[0][0] == "."
            and len(end[0].rstrip("\"'”’)]")) == 1
            and not _full_stop_ends(text, end.start(), end.end())
        ):
            continue
        found.append(text[start : end.end()].strip())
        start = end.end()
    rest = text[start:].strip()
    return [sentence for sentence in [*found, rest] if sentence]


def _full_stop_ends(text: str, stop: int, end: int) -> bool:
    """Whether the full stop at ``stop`` ends a sentence; ``end`` is behind closing signs."""
    before = _LAST_WORD.search(text[max(0, stop - _LOOK_BACK) : stop])
    word = before[0].lower() if before else ""
    following = text[end : end + _LOOK_BACK].lstrip()
    goes_on_small = following[:1].islower()
    if word in _ABBREVIATIONS:
        return not following or (word in _MAY_END and not goes_on_small)
    if len(word) == 1 and word.isalpha() and word != "i":
        return not following
    if word.isdigit():
        # A list number begins its line or its sentence: "1. First".
        head = text[max(0, stop - len(word) - 2) : stop - len(word)]
        begins = not head.strip(" ") or head.endswith("\n") or head.rstrip(" ")[-1:] in ".!?:"
        return not (begins and following) and not goes_on_small
    return True
