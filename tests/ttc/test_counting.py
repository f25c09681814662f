"""Tails and heads in exact tokens, for four tokenizers, with the tokenizer and over HTTP; and the estimate."""

from __future__ import annotations

import asyncio
import json
from functools import lru_cache
from pathlib import Path
from typing import Any

import httpx
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from openzaya.data.aggregation import aggregation_prompt
from openzaya.data.tokenizer import train_tokenizer
from openzaya.errors import RSAError
from openzaya.ttc.connection import Connection
from openzaya.ttc.counting import EstimateCounter, TokenizerCounter, split_at_tags
from openzaya.ttc.counting_server import ServerCounter

PROSE = "So the sum is 17 + 25 = 42.\nWait, check the carry: 7 + 5 = 12, write 2, carry 1.\n\n\tThe answer follows.  "
CODE = "def total(values):\n    result = 0\n    for value in values:\n        if value > 9:\n\t\t\tresult += value\n"
CHINESE = "检查每一步,然后计算结果。答案是四十二。\n重新检查进位:七加五等于十二。"
EMOJI = "so 🙂🙃 and 👩‍👩‍👧 then naïve café Ⅷ ﬁne ½\r\n"
CORPUS = [PROSE, CODE, CHINESE, EMOJI, Path(__file__).read_text(encoding="utf-8")]


@lru_cache(maxsize=1)
def own() -> Any:
    """As nano's: a byte-level BPE of 1024 tokens, digits single."""
    return train_tokenizer(CORPUS * 4, 1024)


@lru_cache(maxsize=1)
def code_and_chinese() -> Any:
    """A byte-level BPE whose tokens cross the borders of characters."""
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=900, initial_alphabet=alphabet, show_progress=False)
    made.train_from_iterator([CODE, CHINESE, EMOJI, CHINESE[::-1]] * 3, trainer)
    return wrapped(made)


@lru_cache(maxsize=1)
def unigram() -> Any:
    """As SentencePiece: normalising, with a blank before the first word, and bytes for unknown characters."""
    made = Tokenizer(models.Unigram())
    made.normalizer = normalizers.NFKC()
    made.pre_tokenizer = pre_tokenizers.Metaspace()
    made.decoder = decoders.Metaspace()
    trainer = trainers.UnigramTrainer(vocab_size=500, unk_token="<unk>", special_tokens=["<unk>"], show_progress=False)
    made.train_from_iterator(CORPUS * 4, trainer)
    return wrapped(made)


@lru_cache(maxsize=1)
def word_piece() -> Any:
    """The end of a word is written otherwise than the word that it would be by itself."""
    made = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    made.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    trainer = trainers.WordPieceTrainer(vocab_size=400, special_tokens=["[UNK]"], show_progress=False)
    made.train_from_iterator(CORPUS * 4, trainer)
    return wrapped(made)


def wrapped(made: Tokenizer) -> Any:
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast(tokenizer_object=made)


TOKENIZERS = {"own": own, "code_and_chinese": code_and_chinese, "unigram": unigram, "word_piece": word_piece}
BYTE_LEVEL = ("own", "code_and_chinese")
LONG = (PROSE + CODE + CHINESE + EMOJI) * 3
texts = st.one_of(
    st.text(max_size=80),
    st.lists(st.sampled_from([*PROSE.split(" "), *CHINESE, *EMOJI, "\n", "    ", "\t", "<think>", "</think>"])).map(
        "".join
    ),
)


def encoded(tokenizer: Any, text: str) -> list[int]:
    return tokenizer.backend_tokenizer.encode(text, add_special_tokens=False).ids


def run(coroutine: Any) -> Any:
    return asyncio.run(coroutine)


def server(tokenizer: Any, form: str = "vllm", faults: int = 0) -> ServerCounter:
    """A counter of an endpoint that has this tokenizer; its first ``faults`` answers are errors."""
    left = [faults]

    def answer(request: httpx.Request) -> httpx.Response:
        if left[0]:
            left[0] -= 1
            return httpx.Response(503, text="busy")
        body = json.loads(request.content)
        if request.url.path == "/detokenize":
            text = tokenizer.backend_tokenizer.decode(body["tokens"], skip_special_tokens=False)
            return httpx.Response(200, json={"prompt": text})
        ids = encoded(tokenizer, body["prompt"] if form == "vllm" else body["content"])
        if form == "vllm":
            return httpx.Response(200, json={"tokens": ids, "count": len(ids), "max_model_len": 4096})
        pieces = [{"id": token, "piece": piece(tokenizer, token)} for token in ids]
        return httpx.Response(200, json={"tokens": pieces})

    client = httpx.AsyncClient(transport=httpx.MockTransport(answer), trust_env=False)
    return ServerCounter(Connection("http://endpoint", client=client, retry_wait_s=0.001), "m", form)  # type: ignore


def piece(tokenizer: Any, token: int) -> Any:
    """As llama.cpp gives it: text, or bytes that are no whole characters."""
    text = tokenizer.backend_tokenizer.id_to_token(token)
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in plain]
    codes = {chr(byte): byte for byte in plain} | {chr(256 + i): byte for i, byte in enumerate(others)}
    if any(character not in codes for character in text):
        return text
    raw = bytes(codes[character] for character in text)
    try:
        return raw.decode()
    except UnicodeDecodeError:
        return list(raw)


def spelled(tokenizer: Any, tokens: list[int]) -> str:
    """What tokens spell, in whole characters: by the bytes, not by offsets."""
    pieces = [piece(tokenizer, token) for token in tokens]
    raw = b"".join(part.encode() if isinstance(part, str) else bytes(part) for part in pieces)
    return raw.decode(errors="ignore")


@pytest.mark.parametrize("name", TOKENIZERS)
@given(text=texts, tau=st.integers(0, 12))
@example(text=LONG, tau=40)
@example(text="", tau=3)
@example(text="检查", tau=1)
@settings(max_examples=60)
def test_a_tail_is_the_texts_own_end_and_fits(name, text, tau):
    tokenizer = TOKENIZERS[name]()
    [tail] = run(TokenizerCounter(tokenizer).tails([text], tau))
    assert tail.is_exact
    assert text.endswith(tail.text)
    assert tail.num_tokens <= tau
    if "<" not in text:  # tags are control strings, which are counted as the text that they are
        assert tail.num_tokens == len(encoded(tokenizer, tail.text))
        if len(encoded(tokenizer, text)) <= tau:
            assert tail.text == text


@pytest.mark.parametrize("name", BYTE_LEVEL)
@pytest.mark.parametrize("tau", [1, 2, 3, 7, 20, 50, 121])
def test_a_tail_of_bytes_is_what_the_last_tokens_spell(name, tau):
    tokenizer = TOKENIZERS[name]()
    for text in (LONG, CODE, CHINESE, EMOJI * 5):
        [tail] = run(TokenizerCounter(tokenizer).tails([text], tau))
        exact = spelled(tokenizer, encoded(tokenizer, text)[-tau:])
        assert exact.endswith(tail.text)
        # Only where the first bytes of a token were no whole character may it be trimmed further.
        assert tail.text == exact or len(encoded(tokenizer, exact)) > tau


@pytest.mark.parametrize("name", ["unigram", "word_piece"])
def test_some_tails_encode_longer_than_they_were_and_are_trimmed(name):
    """Without the trimming this test finds tails above tau."""
    from openzaya.data.aggregation import tail_texts

    tokenizer = TOKENIZERS[name]()
    untrimmed = [tail_texts([LONG[:end]], 9, tokenizer)[0] for end in range(60, 400, 3)]
    assert max(len(encoded(tokenizer, text)) for text in untrimmed) > 9
    tails = run(TokenizerCounter(tokenizer).tails([LONG[:end] for end in range(60, 400, 3)], 9))
    assert max(len(encoded(tokenizer, tail.text)) for tail in tails) <= 9
    assert min(tail.num_tokens for tail in tails) >= 6


@pytest.mark.parametrize("name", TOKENIZERS)
@given(tau=st.integers(1, 30), starts=st.lists(st.integers(10, len(LONG)), min_size=1, max_size=4))
@settings(max_examples=25)
def test_an_aggregation_prompt_has_its_bound(name, tau, starts):
    counter = TokenizerCounter(TOKENIZERS[name]())
    tails = run(counter.tails([LONG[:end] for end in starts], tau))
    question = "What is 17 + 25?\n" + CODE
    prompt = aggregation_prompt(question, [tail.text for tail in tails])
    scaffold = run(counter.count_text(aggregation_prompt("", [""] * len(tails))))
    # Two borders a tail, each of which may cost tokens that the parts alone do not.
    constant = scaffold + 8 * (len(tails) + 1)
    assert run(counter.count_text(prompt)) <= run(counter.count_text(question)) + len(tails) * tau + constant


@pytest.mark.parametrize("name", TOKENIZERS)
@pytest.mark.parametrize("form", ["vllm", "llama"])
def test_the_endpoints_tokens_cut_as_the_tokenizers_do(name, form):
    if form == "llama" and name not in BYTE_LEVEL:
        pytest.skip("pieces of a normalising tokenizer do not spell the text")
    tokenizer = TOKENIZERS[name]()
    samples = [LONG, CODE, CHINESE, EMOJI * 4, PROSE, "", " ", "x"]
    for tau in (0, 1, 5, 33):
        there = run(server(tokenizer, form).tails(samples, tau))
        here = run(TokenizerCounter(tokenizer).tails(samples, tau))
        for text, one, other in zip(samples, there, here, strict=True):
            assert text.endswith(one.text)
            assert one.num_tokens == len(encoded(tokenizer, one.text)) <= tau
            if name in BYTE_LEVEL:
                assert one == other
            else:  # a normalising tokenizer's border may be a blank off
                assert abs(one.num_tokens - other.num_tokens) <= 2


@given(text=texts, tau=st.integers(0, 9))
@settings(max_examples=40)
def test_the_endpoints_tails_fit_for_any_text(text, tau):
    for form in ("vllm", "llama"):
        [tail] = run(server(code_and_chinese(), form).tails([text], tau))
        assert text.endswith(tail.text)
        assert len(encoded(code_and_chinese(), tail.text)) == tail.num_tokens <= tau


@pytest.mark.parametrize("name", BYTE_LEVEL)
def test_heads_are_whole_characters_of_the_first_tokens(name):
    tokenizer = TOKENIZERS[name]()
    for text in (LONG, CHINESE, EMOJI, "", "x"):
        for number in (0, 1, 2, 9, 10_000):
            [head] = run(TokenizerCounter(tokenizer).heads([text], number))
            assert text.startswith(head)
            assert len(head) == len(text) or len(encoded(tokenizer, head)) <= number
            for form in ("vllm", "llama"):
                assert run(server(tokenizer, form).heads([text], number)) == [head]


def test_counting_over_http_survives_a_busy_endpoint_and_says_when_it_does_not():
    assert run(server(own(), faults=2).tails([PROSE], 3))[0].num_tokens == 3
    with pytest.raises(RSAError, match=r"endpoint/tokenize failed .*503.*tokenizer"):
        run(server(own(), faults=99).tails([PROSE], 3))


def test_the_estimate_learns_from_usage_and_stays_below():
    """Tails by estimate fit once it has seen a few answers, in English, code and Chinese."""
    tokenizer = own()
    counter = EstimateCounter()
    before = counter.rates
    for text in (PROSE * 3, CODE * 2, CHINESE * 2, LONG):
        counter.observe(text, len(encoded(tokenizer, text)))
    assert counter.rates != before
    for text in (LONG, PROSE * 5, CODE * 5, CHINESE * 5):
        [tail] = run(counter.tails([text], 60))
        assert not tail.is_exact
        assert text.endswith(tail.text)
        assert tail.num_tokens <= 60
        assert 20 <= len(encoded(tokenizer, tail.text)) <= 60
    assert run(counter.heads([LONG], 60))[0] == LONG[: len(run(counter.heads([LONG], 60))[0])]
    assert run(counter.tails(["abc", ""], 0)) == run(counter.tails(["", ""], 5))


def test_no_estimate_is_fixed():
    """The same text is given another length in the tokens of a model that writes one token a character."""
    dense = EstimateCounter()
    dense.observe(PROSE, len(PROSE))
    assert len(run(dense.tails([LONG], 50))[0].text) < 50 < run(dense.count_text(PROSE))
    dense.observe("hi", 1)  # too little to learn from
    assert run(dense.count([{"role": "user", "content": None}, {"role": "user", "content": PROSE}], [])) > len(PROSE)


def test_tags_are_found_once_and_other_tags_are_text():
    tags = ("<think>", "</think>")
    assert split_at_tags("<think>\na<think>b</think>c</think>", tags) == [
        ("<think>", True),
        ("\na<think>b", False),
        ("</think>", True),
        ("c</think>", False),
    ]
    tokens = run(TokenizerCounter(own()).continuation("<think>a<|im_end|>b</think>", tags))
    ids = {tag: own().convert_tokens_to_ids(tag) for tag in (*tags, "<|im_end|>")}
    assert tokens[0] == ids["<think>"]
    assert tokens[-1] == ids["</think>"]
    assert ids["<|im_end|>"] not in tokens
