"""Tokens to text, piece by piece: joined, the pieces are the text of all tokens at once.

A token may end in the middle of a character. What such a tail becomes depends on the tokens after it, so it is held
back until that is settled. Two kinds of tokenizers:

- byte-level ones (GPT-2's scheme, and ours): a token is a string of bytes; an incremental UTF-8 decoder holds back
  at most three bytes and replaces what is no UTF-8 by U+FFFD, as the tokenizer's own decoder does;
- others (Gemma's pieces with byte tokens ``<0xE2>`` for rare characters): a run of byte tokens is decoded as a whole,
  since one wrong byte changes how all of the run is read; other tokens are decoded behind their predecessor.

Hidden are tokens that are marked special (end of turn, padding, BOS). The tags of reasoning and tool calls always
appear in the text, however a tokenizer marks them: who reads the text needs them.
"""

from __future__ import annotations

import codecs
import re
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from openzaya.data.tokenizer import (
    THINK_CLOSE,
    THINK_OPEN,
    TOOL_CALL_CLOSE,
    TOOL_CALL_OPEN,
    TOOL_RESPONSE_CLOSE,
    TOOL_RESPONSE_OPEN,
)

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

VISIBLE_TAGS = frozenset(
    (THINK_OPEN, THINK_CLOSE, TOOL_CALL_OPEN, TOOL_CALL_CLOSE, TOOL_RESPONSE_OPEN, TOOL_RESPONSE_CLOSE)
)
_BYTE_TOKEN = re.compile(r"<0x[0-9A-Fa-f]{2}>\Z")
MAX_HELD_TOKENS = 8
"""No character has so many tokens: a U+FFFD at the end of more was meant."""


def _byte_alphabet() -> dict[str, int]:
    """GPT-2's scheme: printable Latin-1 characters stand for themselves, the other bytes for U+0100 and following."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + n): byte for n, byte in enumerate(others)}


_BYTE_OF = _byte_alphabet()


class _Vocabulary:
    """What the detokenisers of one tokenizer share."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast):
        from tokenizers import decoders

        self.rust: Any = tokenizer.backend_tokenizer
        self.is_byte_level = isinstance(self.rust.decoder, decoders.ByteLevel)
        self.hidden = frozenset(
            token
            for token, added in tokenizer.added_tokens_decoder.items()
            if added.special and added.content not in VISIBLE_TAGS
        )
        self._bytes: dict[int, bytes] = {}

    def bytes_of(self, token: int) -> bytes:
        """The bytes of a byte-level token; none for an id beyond the vocabulary."""
        found = self._bytes.get(token)
        if found is None:
            string: str = self.rust.id_to_token(token) or ""
            codes = [_BYTE_OF.get(character) for character in string]
            # A token outside the alphabet (an added one) is text as it stands.
            found = string.encode() if None in codes else bytes(code for code in codes if code is not None)
            self._bytes[token] = found
        return found

    def decode(self, tokens: list[int]) -> str:
        return str(self.rust.decode(tokens, skip_special_tokens=False))


def _vocabulary(tokenizer: PreTrainedTokenizerFast) -> _Vocabulary:
    cached = tokenizer.__dict__.get("_openzaya_vocabulary")
    if cached is None or cached.rust is not tokenizer.backend_tokenizer:
        cached = tokenizer.__dict__["_openzaya_vocabulary"] = _Vocabulary(tokenizer)
    return cached


def visible_text(tokenizer: PreTrainedTokenizerFast, tokens: Iterable[int]) -> str:
    """The text of ``tokens`` without hidden ones: what the pieces of a :class:`Detokeniser` add up to."""
    vocabulary = _vocabulary(tokenizer)
    return vocabulary.decode([token for token in tokens if token not in vocabulary.hidden])


class Detokeniser:
    """The text of a growing list of tokens. A token id beyond the vocabulary has no text."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast):
        self._vocabulary = _vocabulary(tokenizer)
        self._bytes = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._last: list[int] = []
        self._held: list[int] = []

    def push(self, token: int) -> str:
        """The text that ``token`` makes final; "" where it waits for more, or has none."""
        vocabulary = self._vocabulary
        if token in vocabulary.hidden:
            return ""
        if vocabulary.is_byte_level:
            return self._bytes.decode(vocabulary.bytes_of(token))
        string = vocabulary.rust.id_to_token(token)
        if string is None:
            return ""
        self._held.append(token)
        if _BYTE_TOKEN.match(string):
            return ""
        text = self._held_text()
        if text.endswith("\ufffd") and len(self._held) < MAX_HELD_TOKENS:
            return ""
        self._last, self._held = [token], []
        return text

    def flush(self) -> str:
        """What is still held back; a character that is not whole becomes U+FFFD."""
        if self._vocabulary.is_byte_level:
            return self._bytes.decode(b"", final=True)
        text = self._held_text()
        self._last, self._held = self._held[-1:] or self._last, []
        return text

    def _held_text(self) -> str:
        # Decoded behind the token before: a decoder may treat the first token of a text in its own way.
        before = self._vocabulary.decode(self._last)
        return self._vocabulary.decode(self._last + self._held)[len(before) :]
