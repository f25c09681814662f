"""Answers of endpoints: whatever comes is read or refused as broken, never an accident; think tags by their rules."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from openzaya.ttc.completer import Usage
from openzaya.ttc.replies import Assembled, BrokenReply, Parts, error_message, read_reply, split_tags

TAGS = ("<think>", "</think>")
NAMES = [
    "choices",
    "message",
    "delta",
    "content",
    "text",
    "reasoning",
    "tool_calls",
    "function",
    "name",
    "arguments",
    "index",
    "usage",
    "completion_tokens",
    "completion_tokens_details",
    "reasoning_tokens",
    "finish_reason",
    "error",
]
anything = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 9) | st.floats(allow_nan=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(NAMES), inner, max_size=5),
    max_leaves=25,
)
bodies = st.fixed_dictionaries(
    {"choices": st.lists(st.fixed_dictionaries({"message": anything, "delta": anything, "finish_reason": anything}))},
    optional={"usage": anything, "error": anything},
)


@given(anything | bodies)
def test_any_json_is_read_or_broken(body):
    try:
        reply = read_reply(body)
    except BrokenReply as error:
        assert str(error)
        return
    assert isinstance(reply.content, str)
    assert isinstance(reply.reasoning, str)
    assert all(isinstance(call, dict) for call in reply.tool_calls)


@given(st.lists(anything | bodies, max_size=5))
def test_any_stream_is_read_or_broken(chunks):
    assembled = Assembled()
    try:
        for chunk in chunks:
            assembled.feed("data: " + json.dumps(chunk))
        read_reply(assembled.body())
    except BrokenReply as error:
        assert str(error)


@pytest.mark.parametrize("line", ["data: {", "data: 3", "data: " + "[" * 100_000, 'data: "x"'])
def test_a_broken_stream(line):
    with pytest.raises(BrokenReply, match="the stream holds"):
        Assembled().feed(line)


def test_a_stream_becomes_the_body_of_a_plain_answer():
    lines = [
        ": keepalive",
        "event: chunk",
        {"choices": [{"index": 0, "delta": {"role": "assistant", "reasoning": "because "}}]},
        {"choices": [{"index": 1, "delta": {"content": "another candidate"}}]},
        {"choices": [{"index": 0, "delta": {"reasoning": "so"}}]},
        {"choices": [{"index": 0, "delta": {"content": "yes"}}]},
        {"choices": [{"index": 0, "delta": {"tool_calls": [{"index": 1, "id": "b", "function": {"name": "g"}}]}}]},
        {"choices": [{"index": 0, "delta": {"tool_calls": [{"index": 0, "id": "a", "function": {"name": "f"}}]}}]},
        {"choices": [{"index": 0, "delta": {"tool_calls": [{"index": 0, "function": {"arguments": '{"x":'}}]}}]},
        {"choices": [{"index": 0, "delta": {"tool_calls": [{"index": 0, "function": {"arguments": "1}"}}]}}]},
        {"choices": [{"index": 0, "delta": {}, "finish_reason": "tool_calls"}]},
        {"choices": [], "usage": {"prompt_tokens": 3, "completion_tokens": 5}},
        "data: [DONE]",
    ]
    assembled = Assembled()
    for line in lines:
        assembled.feed(line if isinstance(line, str) else "data: " + json.dumps(line))
    assert assembled.is_done
    reply = read_reply(assembled.body())
    assert (reply.reasoning, reply.content, reply.finish_reason) == ("because so", "yes", "tool_calls")
    assert reply.usage == Usage(prompt=3, completion=5)
    assert [(call["id"], call["function"]) for call in reply.tool_calls] == [
        ("a", {"name": "f", "arguments": '{"x":1}'}),
        ("b", {"name": "g", "arguments": ""}),
    ]


def test_a_stream_that_breaks_off_keeps_its_usage():
    assembled = Assembled()
    assembled.feed('data: {"choices": [{"delta": {"content": "a"}}], "usage": {"completion_tokens": 4}}')
    with pytest.raises(BrokenReply, match="ended before") as caught:
        assembled.body()
    assert caught.value.usage == Usage(completion=4)


@pytest.mark.parametrize(
    ("message", "content"),
    [
        ({"content": [{"type": "text", "text": "a"}, {"type": "image"}, {"type": "text", "text": "b"}]}, "ab"),
        ({"content": None, "refusal": "no"}, "no"),
        ({"content": "half \ud83d of a pair"}, "half � of a pair"),
    ],
)
def test_contents_of_other_forms(message, content):
    assert read_reply({"choices": [{"message": message, "finish_reason": "stop"}]}).content == content


@pytest.mark.parametrize(
    ("text", "after", "parts"),
    [
        ("<think>\na\n</think>\n\nb", "start", Parts("a", "b", True)),
        ("<think>\na", "start", Parts("a", "", False)),
        ("b", "start", Parts("", "b", True)),
        ("a\n</think>b", "start", Parts("a", "b", True)),
        ("\na", "opening", Parts("a", "", False)),
        ("\na</think>b", "reasoning", Parts("\na", "b", True)),
        ("</think>b", "reasoning", Parts("", "b", True)),
        ("a <think> c", "closing", Parts("", "a <think> c", True)),
        ("x</think>y</think>", "start", Parts("x", "y</think>", True)),
    ],
)
def test_think_tags(text, after, parts):
    assert split_tags(text, TAGS, after) == parts
    other = text.replace("<think>", "[R]").replace("</think>", "[/R]")
    content = parts.content.replace("<think>", "[R]").replace("</think>", "[/R]")
    if "[/R]" not in content and "[R]" not in content:
        assert split_tags(other, ("[R]", "[/R]"), after) == Parts(parts.reasoning, content, parts.is_closed)


@pytest.mark.parametrize(
    "body",
    [
        {"error": {"message": "no luck"}},
        {"error": "no luck"},
        {"detail": "no luck"},
        {"message": "no luck"},
        "no\n luck",
    ],
)
def test_error_bodies(body):
    assert error_message(body) == "no luck"
