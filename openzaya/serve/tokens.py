"""Single tokens as text and bytes, for log probabilities.

A token is a run of bytes that need not be whole characters. Two kinds of vocabulary are read: byte-level ones, where
each byte has a visible stand-in character (GPT-2's table), and those of the SentencePiece kind, where "▁" is a blank
and "<0x0A>" one byte.
"""

from __future__ import annotations

import re
from functools import lru_cache
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")


@lru_cache(maxsize=1)
def byte_of_character() -> dict[str, int]:
    """GPT-2's table: printable Latin-1 stands for itself, the other bytes for U+0100 and following."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in set(printable)]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}


class TokenTexts:
    """Bytes and text of each token of a tokenizer."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        self._tokenizer = tokenizer
        self._added = {index: token.content for index, token in tokenizer.added_tokens_decoder.items()}
        decoder = tokenizer.backend_tokenizer.decoder
        # Its state is the decoder's own part of tokenizer.json.
        self._is_byte_level = decoder is not None and b"ByteLevel" in bytes(decoder.__getstate__())

    def bytes_of(self, token: int) -> bytes:
        """b"" for an id without a token (padding of the vocabulary)."""
        if token in self._added:
            return self._added[token].encode()
        piece = self._tokenizer.convert_ids_to_tokens(token)
        if not isinstance(piece, str):
            return b""
        if self._is_byte_level:
            table = byte_of_character()
            return b"".join(bytes([table[c]]) if c in table else c.encode() for c in piece)
        one_byte = _BYTE_TOKEN.fullmatch(piece)
        return bytes([int(one_byte[1], 16)]) if one_byte else piece.replace("▁", " ").encode()

    def text_of(self, token: int) -> str:
        """The bytes as text; ones that are no whole character become U+FFFD."""
        return self.bytes_of(token).decode("utf-8", errors="replace")
