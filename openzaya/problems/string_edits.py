"""Carrying out a list of edits on a string of letters.

Edits: ``reverse``, ``left`` and ``right`` (rotate by one place), ``swap`` (the first and the last
letter) and ``replace x y`` (every x by y). They are numbered, and each line of the trace names one
and writes the whole string after it, ``1 left: b c d e a``. Difficulty d has d + 1 edits on
5 + d // 4 letters. From difficulty 1 there is a rotation, because the careless annotator rotates in
the wrong direction.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any, ClassVar

from openzaya.problems.base import Annotator, Family

_LETTERS = "abcdefghijklmnopqrstuvwxyz"
_EDITS = ("left", "right", "reverse", "swap", "replace")


def _apply(letters: list[str], edit: str) -> list[str]:
    if edit == "left":
        return letters[1:] + letters[:1]
    if edit == "right":
        return letters[-1:] + letters[:-1]
    if edit == "reverse":
        return letters[::-1]
    if edit == "swap":
        return [letters[-1], *letters[1:-1], letters[0]]
    _, old, new = edit.split()
    return [new if letter == old else letter for letter in letters]


class StringEdits(Family):
    """Data: the letters as one string, the edits as texts."""

    name: ClassVar[str] = "string"
    title: ClassVar[str] = "string edits"
    habit: ClassVar[str] = "rotates in the wrong direction"

    def _draw(self, rng: random.Random, difficulty: int) -> tuple[str, str, Sequence[Any]]:
        uniform = rng.random
        start = letters = rng.choices(_LETTERS, k=5 + difficulty // 4)
        num_edits = difficulty + 1
        rotation_at = int(uniform() * num_edits) if difficulty else -1
        edits = []
        for position in range(num_edits):
            edit = _EDITS[int(uniform() * (2 if position == rotation_at else len(_EDITS)))]
            if edit == "replace":
                old = letters[int(uniform() * len(letters))]
                new = _LETTERS[int(uniform() * len(_LETTERS))]
                edit = f"replace {old} {new}"
            letters = _apply(letters, edit)
            edits.append(edit)
        listed = " ".join([f"{number} {edit}" for number, edit in enumerate(edits, start=1)])
        prompt = f"Edit {' '.join(start)}: {listed}"
        return prompt, f"{''.join(start)} {listed}", ("".join(start), tuple(edits))

    def _work(self, data: Sequence[Any], annotator: Annotator | None) -> tuple[str, str]:
        letters = list(data[0])
        lines = []
        for number, edit in enumerate(data[1], start=1):
            applied = edit
            if annotator is not None and annotator.habit and edit in ("left", "right"):
                applied = "right" if edit == "left" else "left"
            letters = _apply(letters, applied)
            if annotator is not None and annotator.slips():
                place = int(annotator.rng.random() * (len(letters) - 1))
                letters[place : place + 2] = letters[place + 1], letters[place]
            lines.append(f"{number} {edit}: {' '.join(letters)}")
        return "\n".join(lines), " ".join(letters)
