"""Counting and cutting text with the endpoint's own /tokenize: exact, where the model's tokenizer is not at hand.

Two forms are in use, both beside ``/v1``:

    vLLM, SGLang, ours  {"prompt"} or {"messages"} -> {"tokens", "count", "max_model_len"};  /detokenize {"tokens"}
    llama.cpp           {"content", "with_pieces"} -> {"tokens": [{"id", "piece"}]};  /apply-template {"messages"}

The border of a tail is found from the last tau tokens: their pieces' bytes, or their /detokenize text, must be the
end of the text. Where they are not (a normalising tokenizer), the border is searched for by counting. Either way the
tail is counted by itself and trimmed until it has at most tau tokens.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

from openzaya.errors import CompletionFailed
from openzaya.ttc.completer import Tail
from openzaya.ttc.connection import Connection, Refused, Unavailable
from openzaya.ttc.counting import TOKENS_A_TURN, CountingKind, Messages, shorter, split_at_tags
from openzaya.ttc.replies import BrokenReply

Form = Literal["vllm", "llama"]
SAMPLE = "one  two\n\tthree"
INCOMPLETE = "\ufffd"


class ServerCounter:
    """Counts over HTTP; made by :meth:`detect`."""

    kind: CountingKind = "server"

    def __init__(self, connection: Connection, model: str, form: Form) -> None:
        self._connection, self._model, self._form = connection, model, form
        self.context: int | None = None
        self._tags: dict[tuple[str, str], list[list[int]]] = {}

    @classmethod
    async def detect(cls, connection: Connection, model: str) -> ServerCounter | None:
        """The counter for an endpoint that has /tokenize in one of the forms; None for others."""
        for form in ("vllm", "llama"):
            counter = cls(connection, model, form)
            try:
                tokens, _ = await counter._tokenize(SAMPLE)
            except (Refused, Unavailable, BrokenReply):
                continue
            if 2 <= len(tokens) <= len(SAMPLE):
                return counter
        return None

    def observe(self, text: str, num_tokens: int) -> None:
        """Nothing: the count is exact."""

    async def tails(self, texts: Sequence[str], tau: int) -> list[Tail]:
        return [await self._tail(text, tau) for text in texts]

    async def heads(self, texts: Sequence[str], num_tokens: int) -> list[str]:
        return [await self._head(text, num_tokens) for text in texts]

    async def count_text(self, text: str) -> int:
        return len((await self._encode(text))[0]) if text else 0

    async def count(self, messages: Messages, tools: Messages) -> int:
        tokens = await self.prompt(messages, tools)
        if tokens is not None:
            return len(tokens)
        texts = [str(message.get("content") or "") for message in messages] + [str(tool) for tool in tools]
        return sum([await self.count_text(text) for text in texts]) + TOKENS_A_TURN * len(texts)

    async def prompt(self, messages: Messages, tools: Messages) -> list[int] | None:
        """None where the endpoint refuses; tried again where it does not answer, for the rollout depends on it."""
        for attempt in range(self._connection.num_attempts):
            try:
                return await self._prompt(messages, {"tools": list(tools)} if tools else {})
            except Refused:
                return None
            except (Unavailable, BrokenReply) as error:
                if attempt == self._connection.num_attempts - 1:
                    raise _failed(self._connection, error) from None
                await self._connection.pause(attempt)
        raise AssertionError("not reached")

    async def _prompt(self, messages: Messages, more: dict[str, Any]) -> list[int] | None:
        if self._form == "llama":
            body = await self._post("/apply-template", {"messages": list(messages), **more})
            text = body.get("prompt")
            return (await self._tokenize(text, parse_special=True))[0] if isinstance(text, str) else None
        return _ids(await self._post("/tokenize", self._conversation(messages) | more))

    async def continuation(self, text: str, tags: tuple[str, str]) -> list[int] | None:
        tokens: list[int] = []
        for piece, is_tag in split_at_tags(text, tags):
            found = await self._tag(tags, piece) if is_tag else (await self._encode(piece))[0]
            if found is None:
                return None
            tokens += found
        return tokens

    async def ends_open(self, tokens: Sequence[int], tag: str) -> bool:
        return (await self._spelled(list(tokens)[-16:])).rstrip().endswith(tag)

    # --- cutting --------------------------------------------------------------------------------------

    async def _tail(self, text: str, tau: int) -> Tail:
        if not text or tau == 0:
            return Tail("", 0, True)
        tokens, pieces = await self._encode(text)
        while len(tokens) > tau:
            start = await self._border(text, tokens, pieces, tau)
            text = shorter(text, text[start:])
            tokens, pieces = await self._encode(text) if text else ([], None)
        return Tail(text, len(tokens), True)

    async def _border(self, text: str, tokens: list[int], pieces: list[bytes] | None, tau: int) -> int:
        """The character at which the last ``tau`` of a text's tokens begin."""
        if pieces is not None:
            whole = text.encode(errors="replace")
            length = sum(len(piece) for piece in pieces[-tau:])
            if whole.endswith(b"".join(pieces)[-length:]):
                return len(text) - len(whole[len(whole) - length :].decode(errors="ignore"))
        else:
            spelled = (await self._spelled(tokens[-tau:])).lstrip(INCOMPLETE)
            if spelled and text.endswith(spelled):
                start = len(text) - len(spelled)
                # Some decoders leave out the blank in front of a first word.
                if start and text[start - 1] == " " and len((await self._encode(text[start - 1 :]))[0]) <= tau:
                    start -= 1
                return start
        return await self._searched(text, tau)

    async def _searched(self, text: str, tau: int) -> int:
        """The first character from which the rest has at most ``tau`` tokens, by halving."""
        low, high = 1, len(text)
        while low < high:
            middle = (low + high) // 2
            if len((await self._encode(text[middle:]))[0]) <= tau:
                high = middle
            else:
                low = middle + 1
        return low

    async def _head(self, text: str, num_tokens: int) -> str:
        if not text or num_tokens == 0:
            return ""
        tokens, pieces = await self._encode(text)
        if len(tokens) <= num_tokens:
            return text
        if pieces is not None:
            spelled = b"".join(pieces[:num_tokens]).decode(errors="ignore")
        else:
            spelled = (await self._spelled(tokens[:num_tokens])).rstrip(INCOMPLETE)
        if spelled and text.startswith(spelled):
            return spelled
        low, high = 0, len(text) - 1
        while low < high:
            middle = (low + high + 1) // 2
            if len((await self._encode(text[:middle]))[0]) <= num_tokens:
                low = middle
            else:
                high = middle - 1
        return text[:low]

    # --- requests -------------------------------------------------------------------------------------

    async def _tag(self, tags: tuple[str, str], tag: str) -> list[int] | None:
        """A think tag as one token: by itself, or as it stands in a prompt for an answer without thinking."""
        if tags not in self._tags:
            try:
                found = [(await self._tokenize(one, parse_special=True))[0] for one in tags]
                if any(len(tokens) != 1 for tokens in found):
                    found = await self._empty_block(tags)
            except (Refused, Unavailable, BrokenReply):
                return None
            self._tags[tags] = found
        found = self._tags[tags]
        return found[tags.index(tag)] if found else None

    async def _empty_block(self, tags: tuple[str, str]) -> list[list[int]]:
        if self._form != "vllm":
            return []
        conversation = self._conversation([{"role": "user", "content": "x"}])
        thinking = _ids(await self._post("/tokenize", conversation))
        switched = {"enable_thinking": False, "chat_template_kwargs": {"enable_thinking": False}}
        block = _ids(await self._post("/tokenize", conversation | switched))[len(thinking) :]
        spelled = [await self._decode([token]) for token in block[: len(tags) + 1]]
        return [[token] for token in block] if tuple(spelled) == tags else []

    def _conversation(self, messages: Messages) -> dict[str, Any]:
        return {"model": self._model, "messages": list(messages), "add_generation_prompt": True}

    async def _encode(self, text: str) -> tuple[list[int], list[bytes] | None]:
        """Token ids and, where the endpoint gives them, each token's bytes; tried again where it does not answer.

        Raises ``CompletionFailed``: the rollout whose text it is cannot be carried.
        """
        for attempt in range(self._connection.num_attempts):
            try:
                return await self._tokenize(text)
            except (Unavailable, BrokenReply) as error:
                if attempt == self._connection.num_attempts - 1:
                    raise _failed(self._connection, error) from None
                await self._connection.pause(attempt)
            except Refused as error:
                raise _failed(self._connection, error) from None
        raise AssertionError("not reached")

    async def _tokenize(self, text: str, parse_special: bool = False) -> tuple[list[int], list[bytes] | None]:
        if self._form == "vllm":
            body = {"model": self._model, "prompt": text, "add_special_tokens": False}
            answer = await self._post("/tokenize", body)
            if isinstance(answer.get("max_model_len"), int):
                self.context = answer["max_model_len"]
            return _ids(answer), None
        body = {"content": text, "add_special": False, "parse_special": parse_special, "with_pieces": True}
        tokens = (await self._post("/tokenize", body)).get("tokens")
        if isinstance(tokens, list) and all(isinstance(token, Mapping) for token in tokens):
            return _ids({"tokens": [token.get("id") for token in tokens]}), [_bytes(one.get("piece")) for one in tokens]
        return _ids({"tokens": tokens}), None

    async def _spelled(self, tokens: list[int]) -> str:
        """Text of tokens, "" where the endpoint does not tell it."""
        try:
            return await self._decode(tokens)
        except (Refused, Unavailable, BrokenReply):
            return ""

    async def _decode(self, tokens: list[int]) -> str:
        answer = await self._post("/detokenize", {"model": self._model, "tokens": tokens})
        text = answer.get("prompt", answer.get("content"))
        if not isinstance(text, str):
            raise BrokenReply("/detokenize gave no text")
        return text

    async def _post(self, path: str, body: Mapping[str, Any]) -> Mapping[str, Any]:
        answer = await self._connection.post(self._connection.root + path, body)
        if not isinstance(answer, Mapping):
            raise BrokenReply(f"{path} gave no object")
        return answer


def _failed(connection: Connection, error: Exception) -> CompletionFailed:
    return CompletionFailed(
        f"{connection.root}/tokenize failed ({connection.hide(str(error))}); give the model's tokenizer instead"
    )


def _ids(answer: Mapping[str, Any]) -> list[int]:
    tokens = answer.get("tokens")
    if not isinstance(tokens, list) or not all(isinstance(token, int) for token in tokens):
        raise BrokenReply("/tokenize gave no token ids")
    return tokens


def _bytes(piece: Any) -> bytes:
    """A piece is text, or a list of bytes where it is no whole characters."""
    if isinstance(piece, str):
        return piece.encode()
    if isinstance(piece, list) and all(isinstance(byte, int) and 0 <= byte < 256 for byte in piece):
        return bytes(piece)
    raise BrokenReply("/tokenize gave a piece that is neither text nor bytes")
