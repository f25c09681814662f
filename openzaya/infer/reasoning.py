"""Reasoning apart from the answer, while the text still streams in.

An assistant turn is ``<think>reasoning</think>answer`` (openzaya/data/chat_template.jinja); the opening tag may stand
in the prompt, and either part may be missing. The splitter reads pieces of any size and gives each character to one
of the two at once, except for text that may yet turn out to be a tag, which waits for the next piece.

    before      blanks, then <think>: reasoning begins. Anything else: all of it is content.
    reasoning   up to the first </think>; a <think> in there is text.
    content     the rest; further tags are text, for a stream cannot be taken back.

Line breaks that touch a tag belong to it (models write ``<think>\\n...\\n</think>\\n\\nanswer``): those right after
``<think>``, before ``</think>`` and right after ``</think>`` are dropped, as is white space before ``<think>``. Every
other character comes out once, in order.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from openzaya.data.tokenizer import THINK_CLOSE, THINK_OPEN

Kind = Literal["reasoning", "content"]


@dataclass(frozen=True)
class Piece:
    """Text that is certain; never empty."""

    kind: Kind
    text: str


class ReasoningSplitter:
    """Splits one candidate's text; feed it the pieces in order, then call :meth:`finish` once.

    Args:
        starts_inside: the prompt has opened a think block and not closed it.
        enabled: False where thinking is off (the prompt holds a closed think block): everything is content.
    """

    def __init__(self, starts_inside: bool = False, enabled: bool = True) -> None:
        self._state: Literal["before", "reasoning", "content"] = "before"
        if not enabled:
            self._state = "content"
        elif starts_inside:
            self._state = "reasoning"
        self._after_tag = starts_inside and enabled
        self._held = ""

    @classmethod
    def after_prompt(cls, prompt: str) -> ReasoningSplitter:
        """The splitter for what follows ``prompt``, which may be its last characters only (its tags and blanks)."""
        tail = prompt.rstrip()
        return cls(starts_inside=tail.endswith(THINK_OPEN), enabled=not tail.endswith(THINK_CLOSE))

    @property
    def is_reasoning(self) -> bool:
        """Whether the next character would be reasoning, as far as is known; for counting reasoning tokens."""
        return self._state == "reasoning"

    def feed(self, text: str) -> list[Piece]:
        """What became certain with ``text``: at most one piece of reasoning and one of content."""
        if self._state == "content":
            return self._content(text)
        text = self._held + text
        self._held = ""
        if self._state == "before":
            start = text.lstrip()
            if start.startswith(THINK_OPEN):
                self._state, self._after_tag = "reasoning", True
                text = start[len(THINK_OPEN) :]
            elif THINK_OPEN.startswith(start):
                self._held = text
                return []
            else:
                self._state = "content"
                return self._content(text)
        return self._reasoning(text)

    def finish(self) -> list[Piece]:
        """What was held back: the text has ended, so it is no tag. An unclosed block stays reasoning."""
        held, self._held = self._held, ""
        if not held:
            return []
        return [Piece("reasoning" if self._state == "reasoning" else "content", held)]

    def _reasoning(self, text: str) -> list[Piece]:
        if self._after_tag:
            text = text.lstrip("\r\n")
            self._after_tag = not text
        close = text.find(THINK_CLOSE)
        if close < 0:
            certain = _length_before(text, THINK_CLOSE)
            text, self._held = text[:certain], text[certain:]
            return [Piece("reasoning", text)] if text else []
        self._state, self._after_tag = "content", True
        reasoning = text[:close].rstrip("\r\n")
        pieces = [Piece("reasoning", reasoning)] if reasoning else []
        return pieces + self._content(text[close + len(THINK_CLOSE) :])

    def _content(self, text: str) -> list[Piece]:
        if self._after_tag:
            text = text.lstrip("\r\n")
            self._after_tag = not text
        return [Piece("content", text)] if text else []


def split_reasoning(text: str, starts_inside: bool = False, enabled: bool = True) -> tuple[str, str]:
    """Reasoning and content of a whole text, each "" where there is none."""
    splitter = ReasoningSplitter(starts_inside, enabled)
    pieces = splitter.feed(text) + splitter.finish()
    return (
        "".join(piece.text for piece in pieces if piece.kind == "reasoning"),
        "".join(piece.text for piece in pieces if piece.kind == "content"),
    )


def partial_tag_length(text: str, tag: str) -> int:
    """How many characters at the end of ``text`` may be the beginning of ``tag``."""
    for length in range(min(len(tag) - 1, len(text)), 0, -1):
        if text.endswith(tag[:length]):
            return length
    return 0


def _length_before(text: str, tag: str) -> int:
    """The length of ``text`` without an end that may be line breaks and the beginning of ``tag``."""
    without_tag = text[: len(text) - partial_tag_length(text, tag)]
    return len(without_tag.rstrip("\r\n"))
