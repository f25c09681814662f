"""A model with its tokenizer, ready to talk: text in, pieces of text out.

    with ChatSession.load("path/or/hub-id", quantize="int8") as session:
        for piece in session.reply([{"role": "user", "content": "Hello"}], SamplingParams()): ...

One engine lives as long as the session, so what a conversation has said already comes from the prefix cache.
"""

from __future__ import annotations

import queue
from collections.abc import Iterator, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from openzaya.data.chat import render
from openzaya.data.tokenizer import load_tokenizer
from openzaya.errors import EngineError
from openzaya.infer.engine import Engine
from openzaya.infer.outputs import Delta, RequestOutput
from openzaya.infer.sampling import SamplingParams
from openzaya.infer.setup import load_model
from openzaya.model.hub import resolve
from openzaya.model.transformer import Zaya

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


class ChatSession:
    """A loaded checkpoint. The caller keeps the messages; :meth:`close` gives the cache's memory back."""

    def __init__(self, model: Zaya, tokenizer: PreTrainedTokenizerFast):
        self.model, self.tokenizer = model, tokenizer
        self.engine = Engine(model, tokenizer, max_running=1)
        self.num_cached_tokens = 0
        """Tokens of the last prompt that came from the prefix cache."""

    @classmethod
    def load(
        cls, path_or_hub_id: str, *, dtype: Any = "auto", device: str = "cpu", quantize: str | None = None
    ) -> ChatSession:
        """Load model and tokenizer, with weights in ``quantize`` (``int8``, ``int4`` or a mixture) where given.

        Raises ``CheckpointError``, ``DataError`` or ``ConfigError`` with the reason.
        """
        path = resolve(path_or_hub_id)
        model, tokenizer = load_model(path, None, quantize, dtype, device)
        # Says which file is missing.
        return cls(model, load_tokenizer(path) if tokenizer is None else tokenizer)

    def go_on(self, text: str, params: SamplingParams) -> Iterator[str]:
        """The continuation of ``text``."""
        return self._pieces(self.engine.encode(text), params)

    def reply(
        self, messages: Sequence[dict[str, Any]], params: SamplingParams, *, enable_thinking: bool = True
    ) -> Iterator[str]:
        """The assistant's next turn, reasoning included."""
        rendered = render(messages, self.tokenizer, add_generation_prompt=True, enable_thinking=enable_thinking)
        return self._pieces(rendered.tokens, params)

    def _pieces(self, prompt: list[int], params: SamplingParams) -> Iterator[str]:
        """Text as it becomes final; an iterator that is closed before its end ends the generation."""
        pieces: queue.SimpleQueue[Delta | RequestOutput | EngineError] = queue.SimpleQueue()
        name = self.engine.submit(prompt, params, on_delta=pieces.put, on_end=pieces.put)
        try:
            while not isinstance(piece := pieces.get(), RequestOutput):
                if isinstance(piece, EngineError):
                    raise piece
                if piece.text:
                    yield piece.text
            self.num_cached_tokens = piece.num_cached_tokens
        finally:
            self.engine.cancel(name)

    def close(self) -> None:
        """End what is running and the engine with it."""
        self.engine.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
