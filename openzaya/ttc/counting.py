"""Counting and cutting text in a model's tokens: with its tokenizer, or by an estimate that learns from usage.

A tail is the last tau tokens of a text, cut out of the text itself. Encoded again by itself it may come out longer:
WordPiece and Unigram write a word's end differently from a word, and a byte-level cut may drop the first bytes of a
token. Then the front is trimmed further, until the tail alone encodes to at most tau tokens; so C tails never take
more than C * tau tokens of an aggregation prompt, but for what the scaffold around them adds.

Where neither the tokenizer nor the endpoint counts (counting_server.py), tokens are estimated from how many the
endpoint itself counted for what it wrote in this run, ASCII and other characters apart, and on the safe side.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, Protocol

from openzaya.data.aggregation import head_texts, tail_texts
from openzaya.data.chat import render
from openzaya.data.tokenizer import backend, encode_batch, encode_plain, load_tokenizer
from openzaya.errors import DataError, RSAError
from openzaya.ttc.completer import Tail

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

CountingKind = Literal["tokenizer", "server", "estimate"]
Messages = Sequence[Mapping[str, Any]]

TOKENS_A_TURN = 8
"""Scaffold of a message in an estimate."""
FIRST_ASCII_RATE = 0.5
"""Tokens a character, until usage says better: more than any usual tokenizer needs for prose."""
FIRST_WIDE_RATE = 2.0
SAFETY = 1.1
MAX_OBSERVATIONS = 256
SMALLEST_OBSERVATION = 16


class TokenCounter(Protocol):
    """Texts in tokens of one model. All methods may raise ``RSAError`` where the counting itself fails."""

    kind: CountingKind

    async def tails(self, texts: Sequence[str], tau: int) -> list[Tail]:
        """The last ``tau`` tokens of each text; encoded alone, none has more than ``tau``."""
        ...

    async def heads(self, texts: Sequence[str], num_tokens: int) -> list[str]:
        """The first ``num_tokens`` tokens of each text, in whole characters."""
        ...

    async def count_text(self, text: str) -> int: ...

    async def count(self, messages: Messages, tools: Messages) -> int:
        """Tokens of a conversation up to where the assistant writes."""
        ...

    async def prompt(self, messages: Messages, tools: Messages) -> list[int] | None:
        """Token ids of a conversation up to where the assistant writes; None where they are not to be had."""
        ...

    async def continuation(self, text: str, tags: tuple[str, str]) -> list[int] | None:
        """Token ids of the beginning of an assistant's turn, think tags as the tokens that they are."""
        ...

    async def ends_open(self, tokens: Sequence[int], tag: str) -> bool:
        """Whether a prompt ends with this tag, blanks aside."""
        ...

    def observe(self, text: str, num_tokens: int) -> None:
        """The endpoint counted so many tokens for a text that it wrote."""
        ...


class TokenizerCounter:
    """Counts with the model's own tokenizer.

    Args:
        tokenizer: a fast tokenizer, a folder that has one, or a hub id.
    """

    kind: CountingKind = "tokenizer"

    def __init__(self, tokenizer: PreTrainedTokenizerFast | str) -> None:
        self._tokenizer = load_tokenizer(tokenizer) if isinstance(tokenizer, str) else tokenizer
        if not getattr(self._tokenizer, "is_fast", False):
            raise RSAError("exact tails need a fast tokenizer (tokenizer.json); give one, or leave tokenizer out")
        backend(self._tokenizer)

    async def tails(self, texts: Sequence[str], tau: int) -> list[Tail]:
        return await asyncio.to_thread(self._tails, texts, tau)

    async def heads(self, texts: Sequence[str], num_tokens: int) -> list[str]:
        return await asyncio.to_thread(lambda: head_texts(texts, num_tokens, self._tokenizer))

    async def count_text(self, text: str) -> int:
        return len((await asyncio.to_thread(encode_plain, self._tokenizer, [text]))[0])

    async def count(self, messages: Messages, tools: Messages) -> int:
        tokens = await self.prompt(messages, tools)
        if tokens is not None:
            return len(tokens)
        texts = [*_texts(messages), *(str(tool) for tool in tools)]
        return sum([await self.count_text(text) for text in texts]) + TOKENS_A_TURN * len(texts)

    async def prompt(self, messages: Messages, tools: Messages) -> list[int] | None:
        if not self._tokenizer.chat_template:
            return None
        try:
            return await asyncio.to_thread(self._prompt, messages, tools)
        except DataError:
            return None

    async def continuation(self, text: str, tags: tuple[str, str]) -> list[int] | None:
        def encoded() -> list[int]:
            tokens: list[int] = []
            for piece, is_tag in split_at_tags(text, tags):
                tokens += (encode_batch if is_tag else encode_plain)(self._tokenizer, [piece])[0]
            return tokens

        return await asyncio.to_thread(encoded)

    async def ends_open(self, tokens: Sequence[int], tag: str) -> bool:
        return str(self._tokenizer.decode(list(tokens)[-16:])).rstrip().endswith(tag)

    def observe(self, text: str, num_tokens: int) -> None:
        """Nothing: the count is exact."""

    def _prompt(self, messages: Messages, tools: Messages) -> list[int]:
        return render(messages, self._tokenizer, tools=list(tools) or None, add_generation_prompt=True).tokens

    def _tails(self, texts: Sequence[str], tau: int) -> list[Tail]:
        found = tail_texts(texts, tau, self._tokenizer)
        counts = [len(tokens) for tokens in encode_plain(self._tokenizer, found)] if found else []
        while too_long := [i for i, count in enumerate(counts) if count > tau]:
            for i in too_long:
                found[i] = shorter(found[i], tail_texts([found[i]], tau, self._tokenizer)[0])
                counts[i] = len(encode_plain(self._tokenizer, [found[i]])[0]) if found[i] else 0
        return [Tail(text, count, True) for text, count in zip(found, counts, strict=True)]


def shorter(text: str, cut: str) -> str:
    """``cut``, or ``text`` without its first character where nothing was cut off."""
    return cut if len(cut) < len(text) else text[1:]


def split_at_tags(text: str, tags: tuple[str, str]) -> list[tuple[str, bool]]:
    """A turn's beginning in pieces: the opening tag in front and the first closing tag are tags, all else is text."""
    opening, closing = tags
    pieces = []
    if text.startswith(opening):
        pieces.append((opening, True))
        text = text[len(opening) :]
    head, closed, rest = text.partition(closing)
    pieces += [(head, False), (closed, True), (rest, False)]
    return [(piece, is_tag) for piece, is_tag in pieces if piece]


def _texts(messages: Messages) -> list[str]:
    return [
        content if isinstance(content := message.get("content"), str) else "" if content is None else str(content)
        for message in messages
    ]


@dataclass(frozen=True)
class _Observation:
    """What one answer took."""

    ascii: int
    wide: int
    tokens: int


class EstimateCounter:
    """Estimates tokens from the usage that the endpoint has reported; tails are meant to be a little too short."""

    kind: CountingKind = "estimate"

    def __init__(self) -> None:
        self._observations: deque[_Observation] = deque(maxlen=MAX_OBSERVATIONS)
        self._rates: tuple[float, float] | None = FIRST_ASCII_RATE, FIRST_WIDE_RATE

    def observe(self, text: str, num_tokens: int) -> None:
        if num_tokens < SMALLEST_OBSERVATION or not text:
            return
        num_ascii = len(text.encode("ascii", "ignore"))
        self._observations.append(_Observation(num_ascii, len(text) - num_ascii, num_tokens))
        self._rates = None

    @property
    def rates(self) -> tuple[float, float]:
        """Tokens of an ASCII character and of any other, margin included."""
        if self._rates is None:
            self._rates = _fitted(list(self._observations))
        return self._rates

    def estimate(self, text: str) -> int:
        """Tokens of a text, rounded up."""
        num_ascii = len(text.encode("ascii", "ignore"))
        ascii_rate, wide_rate = self.rates
        cost = num_ascii * ascii_rate + (len(text) - num_ascii) * wide_rate
        return int(cost) + (cost != int(cost))

    async def tails(self, texts: Sequence[str], tau: int) -> list[Tail]:
        return [Tail(tail, self.estimate(tail), False) for tail in (self._from_end(text, tau) for text in texts)]

    async def heads(self, texts: Sequence[str], num_tokens: int) -> list[str]:
        return [text[: self._fitting(text.__getitem__, len(text), num_tokens)] for text in texts]

    async def count_text(self, text: str) -> int:
        return self.estimate(text)

    async def count(self, messages: Messages, tools: Messages) -> int:
        texts = [*_texts(messages), *(str(tool) for tool in tools)]
        return sum(self.estimate(text) + TOKENS_A_TURN for text in texts)

    async def prompt(self, messages: Messages, tools: Messages) -> list[int] | None:
        return None

    async def continuation(self, text: str, tags: tuple[str, str]) -> list[int] | None:
        return None

    async def ends_open(self, tokens: Sequence[int], tag: str) -> bool:
        return False

    def _from_end(self, text: str, tau: int) -> str:
        kept = self._fitting(lambda index: text[len(text) - 1 - index], len(text), tau)
        return text[len(text) - kept :]

    def _fitting(self, character: Callable[[int], str], length: int, limit: int) -> int:
        """How many characters, taken in this order, cost at most ``limit`` tokens."""
        ascii_rate, wide_rate = self.rates
        cost = 0.0
        for index in range(length):
            cost += ascii_rate if character(index).isascii() else wide_rate
            if cost > limit:
                return index
        return length


def _fitted(observations: Sequence[_Observation]) -> tuple[float, float]:
    """Rates of least squares, then scaled so that they cover the densest of the texts seen, and a margin.

    Answers in one script tell nothing of the other: its rate keeps the first ratio to the known one.
    """
    num_ascii = sum(one.ascii for one in observations)
    num_wide = sum(one.wide for one in observations)
    tokens = sum(one.tokens for one in observations)
    ratio = FIRST_WIDE_RATE / FIRST_ASCII_RATE
    ascii_rate = tokens / (num_ascii + ratio * num_wide)
    wide_rate = ratio * ascii_rate
    squares = sum(one.ascii**2 for one in observations), sum(one.wide**2 for one in observations)
    mixed = sum(one.ascii * one.wide for one in observations)
    determinant = squares[0] * squares[1] - mixed**2
    if determinant > 1e-3 * max(1, squares[0] * squares[1]):
        by_ascii = sum(one.ascii * one.tokens for one in observations)
        by_wide = sum(one.wide * one.tokens for one in observations)
        fitted = (
            (squares[1] * by_ascii - mixed * by_wide) / determinant,
            (squares[0] * by_wide - mixed * by_ascii) / determinant,
        )
        if min(fitted) > 0:
            ascii_rate, wide_rate = fitted
    densest = max(one.tokens / (one.ascii * ascii_rate + one.wide * wide_rate) for one in observations)
    factor = max(1.0, densest) * SAFETY
    return ascii_rate * factor, wide_rate * factor
