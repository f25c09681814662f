"""Exact tails and aggregation prompts."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from openzaya.data.aggregation import aggregation_prompt, tail_text, tail_texts, tails
from openzaya.data.tokenizer import encode_plain
from openzaya.errors import DataError


def test_tails_of_tokens():
    assert tails([1, 2, 3], 2) == [2, 3]
    assert tails([1, 2, 3], 9) == [1, 2, 3]
    assert tails([1, 2, 3], 0) == []
    with pytest.raises(DataError, match="tau=-1"):
        tails([1], -1)


@settings(max_examples=200, derandomize=True, deadline=None)
@given(
    text=st.lists(st.one_of(st.text(max_size=6), st.sampled_from(["漢", "🏳️‍🌈", "</think>", "\n  x"])), max_size=8).map(
        "".join
    ),
    tau=st.integers(0, 12),
)
def test_tail_text_is_what_the_last_tokens_spell(tokenizer, text, tau):
    tail = tail_text(text, tau, tokenizer)
    [tokens] = encode_plain(tokenizer, [text])
    spelled = tokenizer.decode(tails(tokens, tau))
    assert text.endswith(tail)
    # A character cut by the tail's first token decodes to replacement signs; the tail leaves it out.
    assert spelled == tail or (spelled.endswith(tail) and set(spelled[: len(spelled) - len(tail)]) == {"\ufffd"})
    assert tail_texts([text, "abc"], tau, tokenizer) == [tail, tail_text("abc", tau, tokenizer)]


def test_prompts_hold_question_and_candidates_unchanged_and_in_order():
    candidates = ["  def f():\n\treturn 1\n", "二"]
    for style in ("full", "short"):
        for task in ("general", "math", "code", "multiple_choice"):
            prompt = aggregation_prompt("What is {x}?\n", candidates, task, style=style)
            places = [prompt.index(part) for part in ("What is {x}?\n", *candidates)]
            assert places == sorted(places)
    full = {aggregation_prompt("q", candidates, task) for task in ("general", "math", "code", "multiple_choice")}
    assert len(full) == 4
    assert "2 earlier attempts" in aggregation_prompt("q", candidates)
    assert "an earlier attempt" in aggregation_prompt("q", candidates[:1])


def test_the_scaffold_costs_a_constant(tokenizer):
    def length(prompt):
        return len(encode_plain(tokenizer, [prompt])[0])

    short = [length(aggregation_prompt("q", ["x"] * num, style="short")) for num in (1, 2, 3)]
    assert short[1] - short[0] == short[2] - short[1] <= 6
    assert short[0] < 12


def test_errors():
    with pytest.raises(DataError, match="0 candidates"):
        aggregation_prompt("q", [])
    with pytest.raises(DataError, match="unknown task kind 'poetry'"):
        aggregation_prompt("q", ["a"], "poetry")
    with pytest.raises(DataError, match="unknown prompt style"):
        aggregation_prompt("q", ["a"], style="long")
