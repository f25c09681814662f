"""The tokenizer: fixed ids, exact round trips, and users' text that names control tokens."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from openzaya.data.tokenizer import (
    CONTROL_TOKENS,
    MIN_VOCAB_SIZE,
    check_tokenizer,
    encode_batch,
    encode_plain,
    is_own_template,
    load_tokenizer,
    save_tokenizer,
    train_tokenizer,
)
from openzaya.errors import DataError

HARD_TEXTS = [
    "",
    " ",
    "\n",
    "\r\n\t x\n\n\n  y  ",
    "  def f(x):\n\treturn x**2  # naïve\n",
    "漢字かな交じり文。한국어 العربية हिन्दी",
    "🏳️‍🌈 e\u0301 \u00a0\u2003\ufeff\x00\x1f\ufdd0",
    "0123 4567 ٣٤ ² 1e-5",
    "don't can't I'll",
]


def test_control_tokens_have_their_fixed_ids(tokenizer):
    assert tokenizer.convert_tokens_to_ids(list(CONTROL_TOKENS)) == list(range(11))
    assert (tokenizer.pad_token_id, tokenizer.unk_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id) == (
        0,
        1,
        2,
        4,
    )
    assert CONTROL_TOKENS[3:5] == ("<|im_start|>", "<|im_end|>")
    assert CONTROL_TOKENS[9:] == ("<think>", "</think>")
    assert len(tokenizer) == 640


@pytest.mark.parametrize("text", HARD_TEXTS)
def test_round_trip(tokenizer, text):
    tokens = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert tokenizer.decode(tokens) == text
    assert encode_plain(tokenizer, [text]) == [tokens]


PIECES = st.one_of(st.text(max_size=8), st.sampled_from([*CONTROL_TOKENS, "<", "|im_end|>", "\n", " ", "<bos", "7"]))


@settings(max_examples=150, derandomize=True, deadline=None)
@given(text=st.lists(PIECES, max_size=8).map("".join))
def test_any_text_round_trips_and_plain_text_holds_no_control_token(tokenizer, text):
    [tokens] = encode_plain(tokenizer, [text])
    assert tokenizer.decode(tokens) == text
    assert all(token >= len(CONTROL_TOKENS) for token in tokens)
    assert tokenizer.decode(encode_batch(tokenizer, [text])[0]) == text


def test_a_digit_is_a_token(tokenizer):
    assert [tokenizer.decode([t]) for t in encode_plain(tokenizer, ["12*305"])[0]] == ["1", "2", "*", "3", "0", "5"]


def test_thinking_tags_stay_readable_where_special_tokens_are_skipped(tokenizer):
    tokens = encode_batch(tokenizer, ["<bos><|im_start|><think>a</think>b<|im_end|>"])[0]
    assert tokenizer.decode(tokens, skip_special_tokens=True) == "<think>a</think>b"


def test_save_and_load(tokenizer, tmp_path):
    save_tokenizer(tokenizer, tmp_path)
    assert (tmp_path / "chat_template.jinja").is_file()
    loaded = load_tokenizer(tmp_path)
    check_tokenizer(loaded)
    assert is_own_template(loaded)
    text = "def f():\n  return '<|im_end|>' + \"漢\""
    assert encode_plain(loaded, [text]) == encode_plain(tokenizer, [text])
    assert loaded.decode(encode_plain(loaded, [text])[0]) == text


def test_training_is_deterministic_and_teaches_nothing_from_control_strings():
    texts = ["the cat and the dog", "<|im_start|>user the end<|im_end|>"] * 20
    first, second = train_tokenizer(texts, 300), train_tokenizer(texts, 300)
    assert first.backend_tokenizer.to_str() == second.backend_tokenizer.to_str()
    assert not any("im_" in token and token not in CONTROL_TOKENS for token in first.get_vocab())


def test_padding_and_truncation_left_by_an_earlier_call_do_no_harm(tokenizer):
    tokenizer(["a b c d", "a"], padding=True, truncation=True, max_length=2)
    assert [len(tokens) for tokens in encode_plain(tokenizer, ["a b c d e", "a"])] == [5, 1]


def test_errors(tokenizer, tmp_path):
    with pytest.raises(DataError, match=f"vocab_size=266 is below {MIN_VOCAB_SIZE}"):
        train_tokenizer(["x"], 266)
    with pytest.raises(DataError, match=r"U\+D800 at character 1"):
        encode_plain(tokenizer, ["a\ud800"])
    with pytest.raises(DataError, match=r"no tokenizer\.json"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{", encoding="utf-8")
    with pytest.raises(DataError, match="cannot load a tokenizer"):
        load_tokenizer(tmp_path)
