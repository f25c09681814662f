"""One candidate's answer as it grows: reasoning, content, tool calls, log probabilities and counts.

The engine's text first passes the reasoning splitter, then, where tools were offered, the parser of tool calls. What
comes out is final: streams send it as it comes, other answers gather it.
"""

from __future__ import annotations

import base64
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from openzaya.data.tokenizer import THINK_CLOSE, encode_batch, encode_plain
from openzaya.infer.outputs import Completion, Delta, TokenLogprob
from openzaya.infer.reasoning import Piece, ReasoningSplitter
from openzaya.infer.toolcalls import Content, ToolCall, ToolCallParser
from openzaya.serve.jobs import Service
from openzaya.serve.prompts import Prompt
from openzaya.serve.tokens import TokenTexts


@dataclass(frozen=True)
class Part:
    """A piece of an answer that will not change."""

    kind: Literal["reasoning", "content", "call"]
    text: str = ""
    call: ToolCall | None = None


class Answer:
    """Reads one candidate; feed it the deltas in order.

    Args:
        parallel_calls: False drops all tool calls but the first.
    """

    def __init__(self, service: Service, prompt: Prompt, index: int, *, parallel_calls: bool = True) -> None:
        self.index = index
        self.reasoning = ""
        self.content = ""
        self.calls: list[ToolCall] = []
        self.logprobs: list[TokenLogprob] = []
        self.completion: Completion | None = None
        self._service = service
        self._parallel_calls = parallel_calls
        self._splitter = ReasoningSplitter.after_prompt(prompt.tail)
        self._parser = ToolCallParser(prompt.tools)

    @property
    def is_finished(self) -> bool:
        return self.completion is not None

    @property
    def finish_reason(self) -> str | None:
        """``stop``, ``length`` or ``tool_calls``; None while the answer grows."""
        if self.completion is None:
            return None
        if self.calls and self.completion.finish_reason == "stop":
            return "tool_calls"
        return self.completion.finish_reason

    def feed(self, delta: Delta) -> list[Part]:
        """What became certain with ``delta``."""
        self.logprobs += delta.logprobs or []
        pieces = self._splitter.feed(delta.text) if delta.text else []
        if delta.finish_reason is not None:
            self.completion = delta.completion
            pieces = pieces + self._splitter.finish()
        parts: list[Part] = []
        for piece in pieces:
            parts += self._parts(piece)
        if delta.finish_reason is not None:
            parts += self._from_events(self._parser.finish())
        return parts

    def count_tokens(self) -> tuple[int, int]:
        """Generated tokens, and how many of them were reasoning, tags included; once the answer is finished."""
        tokens = self.completion.tokens if self.completion is not None else []
        if not self.reasoning:
            return len(tokens), 0
        closing = encode_batch(self._service.tokenizer, [THINK_CLOSE])[0]
        if len(closing) == 1:
            return len(tokens), tokens.index(closing[0]) + 1 if closing[0] in tokens else len(tokens)
        reasoning = encode_plain(self._service.tokenizer, [self.reasoning])[0]
        return len(tokens), min(len(tokens), len(reasoning))

    def _parts(self, piece: Piece) -> list[Part]:
        if piece.kind == "reasoning":
            self.reasoning += piece.text
            return [Part("reasoning", piece.text)]
        return self._from_events(self._parser.feed(piece.text))

    def _from_events(self, events: Sequence[Content | ToolCall]) -> list[Part]:
        parts = []
        for event in events:
            if isinstance(event, Content):
                self.content += event.text
                parts.append(Part("content", event.text))
            elif self._parallel_calls or not self.calls:
                self.calls.append(event)
                parts.append(Part("call", call=event))
        return parts


def usage(answers: Sequence[Answer], num_prompt_tokens: int, num_cached_tokens: int) -> dict[str, Any]:
    """The ``usage`` object of chat completions."""
    counts = [answer.count_tokens() for answer in answers]
    generated = sum(count for count, _ in counts)
    return {
        "prompt_tokens": num_prompt_tokens,
        "completion_tokens": generated,
        "total_tokens": num_prompt_tokens + generated,
        "prompt_tokens_details": {"cached_tokens": num_cached_tokens, "audio_tokens": 0},
        "completion_tokens_details": {"reasoning_tokens": sum(count for _, count in counts), "audio_tokens": 0},
    }


def chat_logprobs(texts: TokenTexts, logprobs: Sequence[TokenLogprob], num_top: int) -> list[dict[str, Any]]:
    """Log probabilities in the form of chat completions and responses."""
    return [
        _token_record(texts, one.token, one.logprob)
        | {"top_logprobs": [_token_record(texts, token, value) for token, value in one.top[:num_top]]}
        for one in logprobs
    ]


def _token_record(texts: TokenTexts, token: int, logprob: float) -> dict[str, Any]:
    raw = texts.bytes_of(token)
    return {"token": raw.decode("utf-8", errors="replace"), "logprob": finite(logprob), "bytes": list(raw)}


def finite(logprob: float) -> float:
    """JSON has no infinity; -9999 is what OpenAI gives for an impossible token."""
    return max(logprob, -9999.0)


def experts_object(completion: Completion) -> dict[str, Any] | None:
    """The experts of every token that was run, prompt first: uint8 (tokens, layers), row by row in base64."""
    if completion.experts is None:
        return None
    data = base64.b64encode(completion.experts.tobytes()).decode("ascii")
    return {"shape": list(completion.experts.shape), "dtype": "uint8", "data": data}
