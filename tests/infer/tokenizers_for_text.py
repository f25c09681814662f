"""Two tokenizers for tests of text: a byte-level one like ours, and one of pieces with byte tokens, like Gemma's."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

from openzaya.data.tokenizer import TURN_END, TURN_START, train_tokenizer

SAMPLE = [
    'The answer is {"name": "value", "count": 12}. Think twice; then write the rest of the sentence.',
    "naïve café, 日本語の文, emoji 🙂🙃 and 👩‍👩‍👧, Ελληνικά, русский текст",
] * 4


@lru_cache(maxsize=1)
def byte_level() -> Any:
    """Every tag is one token."""
    return train_tokenizer(SAMPLE, 400)


@lru_cache(maxsize=1)
def byte_fallback() -> Any:
    """Letters and a few words, bytes ``<0x00>`` to ``<0xFF>`` for the rest; ``<think>`` is several tokens."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers
    from transformers import PreTrainedTokenizerFast

    letters = [chr(code) for code in range(0x21, 0x7F)] + ["▁", "é", "日", "\n"]
    merges = [("t", "h"), ("th", "e"), ("▁", "the"), ("th", "i"), ("n", "k"), ("thi", "nk"), ("<", "/"), (">", "{")]
    pieces = ["<pad>", "<eos>", *(f"<0x{byte:02X}>" for byte in range(256)), *letters]
    pieces += ["".join(pair) for pair in merges]
    rust = Tokenizer(
        models.BPE({piece: place for place, piece in enumerate(pieces)}, merges, byte_fallback=True, fuse_unk=True)
    )
    rust.normalizer = normalizers.Replace(" ", "▁")
    rust.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    rust.add_special_tokens([AddedToken(text, special=True) for text in (TURN_START, TURN_END)])
    return PreTrainedTokenizerFast(tokenizer_object=rust, eos_token=TURN_END, clean_up_tokenization_spaces=False)
