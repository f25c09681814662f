"""Text in pieces is the text of all tokens at once, whatever the tokens."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from openzaya.data.tokenizer import THINK_CLOSE, THINK_OPEN, TURN_END, encode_batch
from openzaya.infer.text import Detokeniser, visible_text
from tests.infer.tokenizers_for_text import byte_fallback, byte_level

TOKENIZERS = pytest.mark.parametrize("make", [byte_level, byte_fallback], ids=["byte level", "byte fallback"])


def pieces_of(tokenizer: Any, tokens: list[int]) -> list[str]:
    detokeniser = Detokeniser(tokenizer)
    return [*(detokeniser.push(token) for token in tokens), detokeniser.flush()]


@TOKENIZERS
@given(data=st.data())
def test_the_pieces_of_any_tokens_are_the_text_of_all(make, data) -> None:
    tokenizer = make()
    bytes_first = st.integers(0, 270)  # nearly all single bytes: whole, cut and impossible characters
    tokens = data.draw(st.lists(st.one_of(bytes_first, st.integers(0, len(tokenizer) + 30)), max_size=40))
    assert "".join(pieces_of(tokenizer, tokens)) == visible_text(tokenizer, tokens)


@TOKENIZERS
@given(text=st.text(max_size=60))
def test_the_pieces_of_a_text_are_the_text(make, text) -> None:
    tokenizer = make()
    if make is byte_fallback:
        text = text.replace("▁", "_")  # which this kind of tokenizer takes for a blank
    tokens = encode_batch(tokenizer, [text])[0]
    assert "".join(pieces_of(tokenizer, tokens)) == visible_text(tokenizer, tokens) == text


def test_no_piece_of_a_byte_level_text_waits_longer_than_for_its_character() -> None:
    text = "naïve 日本 🙂👩‍👩‍👧!"
    tokenizer = byte_level()
    byte_tokens = [
        tokenizer.convert_tokens_to_ids(c)
        for c in tokenizer.backend_tokenizer.pre_tokenizer.pre_tokenize_str(text)[0][0]
    ]
    tokens = byte_tokens + encode_batch(tokenizer, [text])[0]
    detokeniser, shown = Detokeniser(tokenizer), ""
    for place, token in enumerate(tokens):
        shown += detokeniser.push(token)
        assert "�" not in shown
        assert visible_text(tokenizer, tokens[: place + 1]).rstrip("�") == shown


@TOKENIZERS
def test_tags_are_text_and_the_end_of_turn_is_not(make) -> None:
    tokenizer = make()
    text = f"{THINK_OPEN}the{THINK_CLOSE}the{TURN_END}"
    pieces = pieces_of(tokenizer, encode_batch(tokenizer, [text])[0])
    assert "".join(pieces) == f"{THINK_OPEN}the{THINK_CLOSE}the"


def test_tags_are_text_even_where_a_tokenizer_marks_them_special() -> None:
    from tokenizers import AddedToken
    from transformers import PreTrainedTokenizerFast

    tokenizer = PreTrainedTokenizerFast(tokenizer_object=byte_level().backend_tokenizer, eos_token=TURN_END)
    tokenizer.add_special_tokens({"additional_special_tokens": [AddedToken(THINK_OPEN, special=True)]})
    tokens = encode_batch(tokenizer, [f"{THINK_OPEN}a{TURN_END}"])[0]
    assert len(tokens) == 3
    assert "".join(pieces_of(tokenizer, tokens)) == f"{THINK_OPEN}a"


def test_bytes_that_never_become_a_character_take_no_more_time_than_others() -> None:
    """A token that is held back for ever must not be decoded again and again."""
    tokenizer = byte_fallback()
    byte = tokenizer.convert_tokens_to_ids("<0x80>")
    detokeniser = Detokeniser(tokenizer)
    decode, calls = detokeniser._vocabulary.decode, []
    detokeniser._vocabulary.decode = lambda tokens: calls.append(len(tokens)) or decode(tokens)  # type: ignore
    try:
        assert all(detokeniser.push(byte) == "" for _ in range(2000))
        assert detokeniser.flush() == "�" * 2000
    finally:
        del detokeniser._vocabulary.decode
    assert sum(calls) < 5000
    level = byte_level()
    byte = level.convert_tokens_to_ids("Ģ")
    assert "".join(pieces_of(level, [byte] * 2000)) == "�" * 2000
