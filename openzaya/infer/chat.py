"""A model with its tokenizer, ready to talk: text in, pieces of text out."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch

from openzaya.data.chat import render
from openzaya.data.tokenizer import encode_plain, load_tokenizer
from openzaya.errors import ConfigError
from openzaya.infer.generate import stream
from openzaya.infer.sampling import SamplingParams
from openzaya.model import hf
from openzaya.model.hub import resolve
from openzaya.model.transformer import Zaya

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


class ChatSession:
    """A loaded checkpoint. Stateless between calls: the caller keeps the messages."""

    def __init__(self, model: Zaya, tokenizer: PreTrainedTokenizerFast):
        self.model, self.tokenizer = model, tokenizer

    @classmethod
    def load(cls, path_or_hub_id: str, *, dtype: Any = "auto", device: str = "cpu") -> ChatSession:
        """Load model and tokenizer; raises ``CheckpointError``, ``DataError`` or ``ConfigError`` with the reason."""
        try:
            torch.empty(0, device=device)
        except (RuntimeError, AssertionError) as error:
            reason = str(error).splitlines()[0]
            raise ConfigError(f"device '{device}' cannot be used here ({reason}); choose cpu, for example") from None
        path = resolve(path_or_hub_id)
        return cls(hf.load(path, dtype=dtype, device=device), load_tokenizer(path))

    def go_on(self, text: str, params: SamplingParams) -> Iterator[str]:
        """The continuation of ``text``."""
        bos = self.tokenizer.bos_token_id
        prefix = [] if bos is None else [bos]
        return self._pieces(prefix + encode_plain(self.tokenizer, [text])[0], params)

    def reply(
        self, messages: Sequence[dict[str, Any]], params: SamplingParams, *, enable_thinking: bool = True
    ) -> Iterator[str]:
        """The assistant's next turn, reasoning included."""
        rendered = render(messages, self.tokenizer, add_generation_prompt=True, enable_thinking=enable_thinking)
        return self._pieces(rendered.tokens, params)

    def _pieces(self, prompt: list[int], params: SamplingParams) -> Iterator[str]:
        """Text as it becomes final: a character of several byte tokens is held back until it is whole."""
        generated: list[int] = []
        shown = ""
        for token in stream(self.model, prompt, params):
            generated.append(token)
            text = self._text(generated)
            if not text.endswith("�"):
                yield text[len(shown) :]
                shown = text
        text = self._text(generated)
        if text != shown:
            yield text[len(shown) :]

    def _text(self, tokens: list[int]) -> str:
        # Cleaning up blanks may rewrite text that was already shown.
        return str(self.tokenizer.decode(tokens, clean_up_tokenization_spaces=False))
