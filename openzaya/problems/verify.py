"""Taking a response apart and comparing answers, shared by all families.

A response is ``<think>reasoning</think>answer`` (the opening tag may be missing, when it was part of
the prompt) or a bare answer. Only the text after the LAST closing tag is the answer, all of it: two
answers in a row or an answer with a remark are therefore not equal to the right one. Comparison is
by tokens (numbers by value, words in lower case, any other sign by itself), never by substring.
"""

from __future__ import annotations

import re

OPENING_TAG = "<think>"
CLOSING_TAG = "</think>"
UNCLOSED_REASONING = "unclosed reasoning"

_ANSWER_TOKEN = re.compile(r"-?[0-9]+|[a-z]+|[^\sa-z0-9]")


def split_response(response: str) -> tuple[str | None, str | None]:
    """Reasoning and answer of a response, both stripped.

    The reasoning is ``None`` for a bare answer; the answer is ``None`` where reasoning was opened
    and not closed.
    """
    closing = response.rfind(CLOSING_TAG)
    if response.rfind(OPENING_TAG) > closing:
        return None, None
    if closing < 0:
        return None, response.strip()
    reasoning = response[:closing].strip().removeprefix(OPENING_TAG).strip()
    return reasoning, response[closing + len(CLOSING_TAG) :].strip()


def normalise_spaces(text: str) -> str:
    """``text`` with every run of white space as one blank, none at the ends."""
    return " ".join(text.split())


def normalise_answer(text: str) -> tuple[str, ...]:
    """The tokens of an answer: ``"X=07  y=3"`` gives ``("x", "=", "7", "y", "=", "3")``.

    Numbers are compared by value without converting them, so their length is no limit.
    """
    return tuple(_normalise_token(token) for token in _ANSWER_TOKEN.findall(text.lower()))


def _normalise_token(token: str) -> str:
    if not token[-1].isdigit():
        return token
    digits = token.lstrip("-").lstrip("0")
    if not digits:
        return "0"
    return "-" + digits if token[0] == "-" else digits
