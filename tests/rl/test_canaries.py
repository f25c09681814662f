"""The repetition canaries over loop periods, and on text that is none."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from openzaya.data.tokenizer import encode_plain, train_tokenizer
from openzaya.errors import DataError
from openzaya.rl.canaries import compression_ratios, rare_token_shares, repeated_shares, repetition

NUM_TOKENS = 2048
VOCABULARY = 262_144


def loop(period, num_tokens=NUM_TOKENS, seed=0):
    draw = random.Random(seed)
    once = [draw.randrange(VOCABULARY) for _ in range(period)]
    return (once * (num_tokens // period + 1))[:num_tokens]


@pytest.mark.parametrize("period", [1, 2, 3, 4, 6, 8, 10, 12])
def test_the_specified_compressor_fires_on_short_loops(period):
    found = repetition(loop(period))
    assert found.is_short_loop and found.lowest_ratio < 0.05


@pytest.mark.parametrize("period", [16, 20, 24, 32, 48, 64, 100, 128, 190, 200, 256, 300, 400])
def test_longer_loops_are_caught_by_our_second_signal(period):
    found = repetition(loop(period))
    assert found.lowest_ratio >= 0.04 and found.is_long_loop and found.fires


def test_the_window_sees_nothing_beyond_two_hundred_tokens():
    assert compression_ratios(loop(16))[-1] == pytest.approx(0.06, abs=0.01)
    assert min(compression_ratios(loop(190))) < 0.5 < min(compression_ratios(loop(220)))


def test_a_loop_that_begins_late_is_seen():
    draw = random.Random(1)
    ids = [draw.randrange(VOCABULARY) for _ in range(1500)]
    assert not repetition(ids).fires
    assert repetition(ids + loop(4, 1200)).is_short_loop
    assert repetition(ids + loop(250, 2000)).is_long_loop


@pytest.fixture(scope="module")
def texts():
    """Prose, code and counting, as tokens of an encoding that was trained on the first two."""
    code = Path(random.__file__).read_text(encoding="utf-8")
    prose = "\n".join(line.strip() for line in Path(__import__("pydoc").__file__).read_text().split('"""')[1::2])
    prose = (prose + "\n".join(part for part in code.split('"""')[1::2])) * 1
    counting = "\n".join(f"Step {i}: we add {i} to {i * (i - 1) // 2} and get {i * (i + 1) // 2}." for i in range(400))
    tokenizer = train_tokenizer([prose, code], 2048)
    return dict(zip(("prose", "code", "counting"), encode_plain(tokenizer, [prose, code, counting]), strict=True))


@pytest.mark.parametrize("kind", ["prose", "code", "counting"])
def test_prose_code_and_counting_are_no_loops(texts, kind):
    ids = texts[kind][:8000]
    assert len(ids) > 1500
    found = repetition(ids)
    assert not found.fires, found
    assert found.lowest_ratio > 0.1 and found.highest_repeated < 0.6


def test_chunks():
    assert compression_ratios([]) == [] and repeated_shares([]) == []
    assert not repetition([]).fires
    for num_tokens, expected in ((1, 1), (511, 1), (512, 1), (1023, 1), (1024, 2), (1025, 2)):
        assert len(compression_ratios(loop(400, num_tokens))) == expected, num_tokens
    assert len(compression_ratios(loop(7, 100), chunk_tokens=10)) == 10
    with pytest.raises(DataError, match="chunk_tokens=0"):
        compression_ratios([1], chunk_tokens=0)
    with pytest.raises(DataError, match="one rollout"):
        compression_ratios([[1, 2]])


def test_rare_tokens():
    shares = rare_token_shares([0, 899, 900, 950, 980, 990], 1000)
    assert shares == {0.10: 4 / 6, 0.05: 3 / 6, 0.02: 2 / 6, 0.01: 1 / 6}
    assert set(rare_token_shares([], 1000).values()) == {0.0}
