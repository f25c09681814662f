"""AP trimming: the four steps, the exact fit, answers kept whole, and the report."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from openzaya.data.chat import render
from openzaya.data.trim import TrimReport, ap_trim
from openzaya.errors import DataError

TURN = st.tuples(st.text(max_size=12), st.text(max_size=30), st.text(max_size=12))


def chat(turns):
    return [
        message
        for question, reasoning, answer in turns
        for message in (
            {"role": "user", "content": question},
            {"role": "assistant", "reasoning_content": reasoning, "content": answer},
        )
    ]


@settings(max_examples=200, derandomize=True, deadline=None)
@given(turns=st.lists(TURN, min_size=1, max_size=3), share=st.floats(0.0, 1.1))
def test_trimming_keeps_answers_whole_and_fits_the_budget(tokenizer, turns, share):
    messages = chat(turns)
    full = render(messages, tokenizer)
    budget = max(1, int(len(full.tokens) * share))
    trimmed, action = ap_trim(messages, tokenizer, budget)
    last_thought = full.think_spans[-1][1] - full.think_spans[-1][0]
    bare = render(chat([(q, "", a) for q, _, a in turns[:-1]] + turns[-1:]), tokenizer)

    # Which step applies, from the lengths alone.
    if len(full.tokens) <= budget:
        expected = "kept"
    elif len(full.tokens) - last_thought <= budget:
        expected = "tail_trimmed"
    elif any(reasoning for _, reasoning, _ in turns[:-1]) and len(bare.tokens) - last_thought <= budget:
        expected = "think_dropped"
    else:
        expected = "dropped"
    assert action == expected
    if action == "dropped":
        assert trimmed is None
        return

    assert trimmed is not None and len(trimmed.tokens) == len(trimmed.loss_mask) <= budget
    if action == "tail_trimmed" or (action == "think_dropped" and len(bare.tokens) > budget):
        assert len(trimmed.tokens) == budget, "a cut makes it fit exactly"
    base = bare if action == "think_dropped" else full
    start, end = trimmed.think_spans[-1]
    base_start, base_end = base.think_spans[-1]
    # All before the last thought's end and all after it is untouched, answers and masks included.
    assert start == base_start and trimmed.tokens[:end] == base.tokens[:end]
    assert trimmed.tokens[end:] == base.tokens[base_end:]
    assert trimmed.loss_mask[end:] == base.loss_mask[base_end:]
    assert trimmed.loss_mask[:end] == base.loss_mask[:end]
    assert trimmed.think_spans[:-1] == base.think_spans[:-1]
    if action == "think_dropped":
        assert all(start == end for start, end in trimmed.think_spans[:-1])


def test_without_a_think_block_it_is_dropped_never_cut(tokenizer):
    messages = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a long answer " * 5}]
    size = len(render(messages, tokenizer).tokens)
    assert ap_trim(messages, tokenizer, size)[1] == "kept"
    assert ap_trim(messages, tokenizer, size - 1) == (None, "dropped")
    assert ap_trim([messages[0]], tokenizer, 2) == (None, "dropped")


def test_embedded_think_blocks_and_tools(tokenizer):
    tools = [{"type": "function", "function": {"name": "f", "parameters": {}}}]
    messages = [
        {"role": "user", "content": "q"},
        {"role": "assistant", "content": "<think>first thought of some length</think>", "tool_calls": [{"name": "f"}]},
        {"role": "tool", "content": "1"},
        {"role": "assistant", "content": "<think>ab</think>done"},
    ]
    full = render(messages, tokenizer, tools=tools)
    trimmed, action = ap_trim(messages, tokenizer, len(full.tokens) - 6, tools=tools)
    assert action == "think_dropped"
    text = tokenizer.decode(trimmed.tokens)
    assert "first" not in text and "<think>ab</think>done<|im_end|>" in text and "<function=f>" in text


def test_report_adds_up(tokenizer):
    report = TrimReport()
    sizes_in = sizes_out = 0
    for length in range(0, 60, 3):
        messages = chat([("q", "1" * 10, "a"), ("q", "2" * length, "3" * (length // 2))])
        full = render(messages, tokenizer)
        trimmed, action = ap_trim(messages, tokenizer, 64, rendered=full)
        after = len(trimmed.tokens) if trimmed else 0
        report.record(action, len(full.tokens), after)
        sizes_in, sizes_out = sizes_in + len(full.tokens), sizes_out + after
    assert report.num_samples == 20
    assert min(report.kept, report.tail_trimmed, report.think_dropped, report.dropped) > 0
    assert report.tokens_in == sizes_in and report.tokens_lost == sizes_in - sizes_out
    both = report + report
    assert both.num_samples == 40 and both.tokens_lost == 2 * report.tokens_lost
    assert TrimReport(**report.as_dict()) == report
    assert "\n" not in str(report) and f"{report.dropped} dropped" in str(report)


def test_a_budget_below_one_is_an_error(tokenizer):
    with pytest.raises(DataError, match="budget=0"):
        ap_trim(chat([("q", "r", "a")]), tokenizer, 0)
