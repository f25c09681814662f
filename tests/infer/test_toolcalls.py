"""Tool calls: what the chat template writes is read back as the same call, in any pieces, and nothing is lost."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from transformers.utils.chat_template_utils import render_jinja_template

from openzaya.data.tokenizer import chat_template
from openzaya.errors import DataError
from openzaya.infer.toolcalls import (
    Content,
    Event,
    ToolCall,
    ToolCallParser,
    allowed_types,
    functions_of,
    json_text,
    parse_tool_calls,
)

quickly = settings(derandomize=True, max_examples=200, deadline=None)


def tool(name: str, properties: dict[str, Any] | None = None, **more: Any) -> dict[str, Any]:
    parameters = {"type": "object", "properties": properties or {}, **more}
    return {"type": "function", "function": {"name": name, "parameters": parameters}}


def rendered(content: str, calls: list[tuple[str, dict[str, Any]]]) -> str:
    """The assistant's text as the chat template writes it, without the turn's tags."""
    message = {
        "role": "assistant",
        "content": content,
        "tool_calls": [{"function": {"name": name, "arguments": arguments}} for name, arguments in calls],
    }
    texts, _ = render_jinja_template(conversations=[[message]], chat_template=chat_template(), bos_token="")
    text = texts[0]
    start = "<|im_start|>assistant\n<think></think>"
    assert text.startswith(start) and text.endswith("<|im_end|>\n")
    return text[len(start) : -len("<|im_end|>\n")]


def streamed(pieces: list[str], tools: list[dict[str, Any]]) -> tuple[str, list[tuple[str, Any]]]:
    parser = ToolCallParser(tools)
    events: list[Event] = []
    for piece in pieces:
        events += parser.feed(piece)
    events += parser.finish()
    assert parser.finish() == []
    calls = [event for event in events if isinstance(event, ToolCall)]
    assert [call.index for call in calls] == list(range(parser.num_calls))
    assert len({call.id for call in calls}) == len(calls)
    content = [event.text for event in events if isinstance(event, Content)]
    assert all(content)
    return "".join(content), [(call.name, json.loads(call.arguments)) for call in calls]


WEATHER = tool("weather", {"city": {"type": "string"}, "days": {"type": "integer"}})
CALL = (
    "<zyphra_tool_call>\n<function=weather>\n<parameter=city>\nParis\n</parameter>\n<parameter=days>\n3\n</parameter>\n"
    "</function>\n</zyphra_tool_call>"
)
READ = ("weather", {"city": "Paris", "days": 3})


def test_the_template_writes_this_form() -> None:
    assert rendered("", [READ]) == CALL
    assert rendered("Let me see.", [READ, READ]) == f"Let me see.\n{CALL}\n{CALL}"


@pytest.mark.parametrize(
    ("text", "content", "calls"),
    [
        (CALL, "", [READ]),
        (f"Let me see.\n{CALL}\n{CALL}\n", "Let me see.", [READ, READ]),
        (f"a  \n\n{CALL}\n\n b ", "a\n\n b ", [READ]),
        ("no call, a < b\n", "no call, a < b\n", []),
        (" \n", " \n", []),
        ("", "", []),
        ("<zyphra_tool_call>\n<function=now>\n</function>\n</zyphra_tool_call>", "", [("now", {})]),
        ("<zyphra_tool_call><function=now></function></zyphra_tool_call>", "", [("now", {})]),
        (
            "<zyphra_tool_call><function=weather> <parameter=city>a b</parameter></function></zyphra_tool_call>",
            "",
            [("weather", {"city": "a b"})],
        ),
    ],
)
def test_calls_are_found(text: str, content: str, calls: list[Any]) -> None:
    assert streamed([text], [WEATHER]) == (content, calls)
    assert streamed(list(text), [WEATHER]) == (content, calls)
    found, whole = parse_tool_calls(text, [WEATHER])
    assert (found, [(call.name, json.loads(call.arguments)) for call in whole]) == (content, calls)


MALFORMED = [
    CALL.replace("</zyphra_tool_call>", ""),
    CALL.replace("</function>\n", ""),
    CALL.replace("</parameter>\n<", "<"),
    CALL.replace("\n<function=weather>", " {"),
    CALL.replace("=weather", "="),
    CALL.replace("=weather", "=wea\nther"),
    CALL.replace("=days", "=city"),
    CALL.replace("</function>", "and more</function>"),
    CALL.replace("<parameter=city>", "now <parameter=city>"),
    CALL.replace("\n</function>", "</function> so"),
    CALL[:40],
    "<zyphra_tool_call>",
    "<zyphra_tool_call>\n\n",
    "<zyphra_tool_call>\n<func",
    "</zyphra_tool_call>",
    "the tag <zyphra_tool_call> begins a call",
]


@pytest.mark.parametrize("text", MALFORMED)
def test_what_is_no_call_comes_out_unchanged(text: str) -> None:
    for whole, calls in (
        (text, []),
        (f"x {text} y\n", []),
        (f"{text}\nthen\n{CALL}", [READ]),
        (f"{CALL}\n{text}", [READ]),
    ):
        content = whole.replace(f"\n{CALL}" if whole.endswith(CALL) else CALL, "")
        assert streamed([whole], [WEATHER]) == (content, calls), whole
        assert streamed(list(whole), [WEATHER]) == (content, calls), whole


def test_a_half_call_is_never_given_out_and_prose_is_not_held_back() -> None:
    parser = ToolCallParser([WEATHER])
    assert parser.feed(CALL[:-1]) == []
    assert parser.feed(">")[0].name == "weather"  # type: ignore[union-attr]
    parser = ToolCallParser([WEATHER])
    assert parser.feed("a <zyph") == [Content("a")]
    assert parser.feed("rb") == [Content(" <zyphrb")]
    assert parser.feed("<zyphra_tool_call>") == []
    assert parser.feed("is ") == [Content("<zyphra_tool_call>is")]


def test_without_tools_all_text_is_content() -> None:
    assert streamed([CALL], []) == (CALL, [])


def test_unknown_functions_and_parameters_are_read_by_guessing() -> None:
    text = rendered("", [("other", {"a": 1, "b": "x", "c": {"d": [None]}}), ("weather", {"city": "7", "new": True})])
    calls = [("other", {"a": 1, "b": "x", "c": {"d": [None]}}), ("weather", {"city": "7", "new": True})]
    assert streamed([text], [WEATHER]) == ("", calls)


# --- values -----------------------------------------------------------------------------------------

json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)
TAGS = ["</parameter>", "</function>", "<parameter=", "<function=f>", "\n", " ", "<", "a", "é", "\u2028", "5", "null"]
texts = st.text() | st.lists(st.sampled_from(TAGS), max_size=8).map("".join)
names = st.text(max_size=6).filter(lambda name: not set(name) & set(">\n"))


def type_of(value: Any) -> str:
    kinds = {bool: "boolean", int: "integer", float: "number", str: "string", list: "array", dict: "object"}
    return kinds.get(type(value), "null")


def cannot_be_carried(value: Any) -> bool:
    """The exceptions that the module names, for a value whose schema names its type."""
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    _, *rest = text.split("</parameter>")
    return any(part.lstrip().startswith("<parameter=") for part in rest) or "zyphra_tool_call>" in text


@quickly
@given(st.dictionaries(names, json_values | texts, max_size=4), st.text(max_size=5), st.data())
@example({"a": "x</parameter>\n</function>", "b": "\n\n", "": "</parameter>"}, "", None)
@example({"a": " 5 ", "b": 1e300, "c": 10**30, "d": -0.0}, "text", None)
def test_what_the_template_writes_is_read_back(arguments: dict[str, Any], content: str, data: Any) -> None:
    assume(not any(cannot_be_carried(value) or "zyphra" in name for name, value in arguments.items()))
    assume(content == content.strip() and (arguments or content))
    tools = [tool("f", {name: {"type": type_of(value)} for name, value in arguments.items()})]
    text = rendered(content, [("f", arguments)])
    assert streamed([text], tools) == (content, [("f", arguments)])
    pieces = list(text)
    if data is not None:
        cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=6)))
        pieces = [text[start:end] for start, end in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    assert streamed(pieces, tools) == (content, [("f", arguments)])


scraps = st.lists(
    st.sampled_from([*CALL.replace("\n", " \n ").split(" "), "x", " ", CALL, "<zyphra", "call>"]), max_size=14
)


@quickly
@given(scraps)
def test_any_text_in_any_pieces(pieces: list[str]) -> None:
    text = "".join(pieces)
    whole = streamed([text], [WEATHER])
    assert streamed(pieces, [WEATHER]) == whole == streamed(list(text), [WEATHER])
    content, calls = whole
    if not calls:
        assert content == text


@pytest.mark.parametrize(
    ("text", "schema", "value"),
    [
        ("5", {"type": "string"}, "5"),
        ("5", {"type": "integer"}, 5),
        ("5", {"type": "number"}, 5),
        ("5", {}, 5),
        ("5", True, 5),
        ("5", {"type": ["string", "integer"]}, 5),
        ("5", {"type": ["string", "null"]}, "5"),
        ("5.5", {"type": ["string", "integer"]}, "5.5"),
        ("null", {"type": ["string", "null"]}, None),
        ("null", {"type": "string"}, "null"),
        (" true ", {"type": "boolean"}, True),
        ("True", {"type": "boolean"}, True),
        ("None", {"anyOf": [{"type": "integer"}, {"type": "null"}]}, None),
        ("None", {"type": "string"}, "None"),
        ("yes", {"type": "boolean"}, "yes"),
        ("[1, 2", {"type": "array"}, "[1, 2"),
        ("[1,\n2]", {"type": "array"}, [1, 2]),
        ('"a"', {}, '"a"'),
        ("NaN", {"type": "number"}, "NaN"),
        ("01", {"type": "integer"}, "01"),
        ("", {"type": "integer"}, ""),
        ("3", {"enum": ["a", 3]}, 3),
        ("3", {"enum": ["3", 4]}, "3"),
        ("a", {"const": "a"}, "a"),
        ("1", {"const": "1"}, "1"),
        ("1", {"$ref": "#/$defs/number"}, 1),
        ("1", {"$ref": "#/$defs/text"}, "1"),
        ("1", {"$ref": "#/$defs/loop"}, 1),
        ("1", {"$ref": "http://elsewhere/"}, 1),
        ("1", {"allOf": [{"$ref": "#/$defs/text"}]}, "1"),
        ("1", {"type": 7, "enum": "x", "anyOf": {}, "$ref": None}, 1),
    ],
)
def test_values_are_read_by_their_schema(text: str, schema: Any, value: Any) -> None:
    root = {"$defs": {"number": {"type": "number"}, "text": {"type": "string"}, "loop": {"$ref": "#/$defs/loop"}}}
    read = json.loads(json_text(text, schema, root))
    assert read == value and type(read) is type(value)


def test_hostile_values_stay_strings_or_exact() -> None:
    deep = "[" * 100_000
    assert json.loads(json_text(deep, {}, {})) == deep
    digits = "1" * 10_000
    assert json_text(digits, {"type": "integer"}, {}) == digits
    assert json_text(f"[{digits}]", {"type": "array"}, {}) == f"[{digits}]"
    assert json_text("1e999", {"type": "number"}, {}) == "1e999"
    assert json_text('["\\ud800"]', {"type": "array"}, {}) == '["\\ud800"]'
    wide = {"anyOf": [{"$ref": "#"}] * 100}
    assert allowed_types(wide, wide) == allowed_types({}, {})


def test_a_long_answer_in_small_pieces_is_read_in_linear_time() -> None:
    """Seconds for a quadratic reader."""
    text = "<zyphra_tool_call>\n<function=weather>\n<parameter=city>\n" + "</parameter> \n x" * 20_000
    pieces = [text[i : i + 3] for i in range(0, len(text), 3)]
    assert streamed(pieces, [WEATHER]) == (text, [])
    hostile = "<zyphra_tool_call>\n<function=weather>" * 10_000
    assert streamed([hostile], [WEATHER]) == (hostile, [])


@pytest.mark.parametrize(
    "wrong",
    [
        None,
        "f",
        {},
        {"type": "function"},
        {"type": "function", "function": None},
        {"type": "function", "function": {"name": ""}},
        {"type": "function", "function": {"name": 7}},
        {"type": "function", "function": {"name": "a>b"}},
        {"type": "retrieval", "name": "f"},
        {"type": "function", "function": {"name": "g", "parameters": []}},
        {"type": "function", "function": {"name": "g", "parameters": {"properties": [1]}}},
        {"type": "function", "function": {"name": "weather"}},
    ],
)
def test_tools_that_are_none_are_refused(wrong: Any) -> None:
    with pytest.raises(DataError, match=r"tools\[1\]"):
        functions_of([WEATHER, wrong])


def test_both_forms_of_a_tool_are_known() -> None:
    flat = {"type": "function", "name": "f", "parameters": {"properties": {"a": {}}}}
    assert functions_of([WEATHER, flat])["f"] == flat["parameters"]
    assert functions_of([{"function": {"name": "f"}}]) == {"f": {}}
