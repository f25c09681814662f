"""The grammar of forced calls takes what the template writes and refuses all else; what it lets through is read."""

from __future__ import annotations

import random
from typing import Any

import pytest

from openzaya.data.tokenizer import encode_plain, train_tokenizer
from openzaya.errors import DataError
from openzaya.infer.toolcalls import parse_tool_calls
from openzaya.infer.toolgrammar import tool_grammar

llguidance = pytest.importorskip("llguidance")

PROPERTIES = {
    "city": {"type": "string"},
    "days": {"type": "integer", "minimum": 0},
    "unit": {"enum": ["c", "a b"]},
    "place": {"$ref": "#/$defs/place"},
    "any": {},
    "one": {"oneOf": [{"type": "null"}, {"type": "boolean"}], "unknown-keyword": 3},
}
PLACE = {"type": "object", "properties": {"x": {"type": "array", "items": {"type": "number"}}}, "required": ["x"]}
TOOLS: list[dict[str, Any]] = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "parameters": {
                "type": "object",
                "properties": PROPERTIES,
                "required": ["city"],
                "$defs": {"place": PLACE},
            },
        },
    },
    {"type": "function", "function": {"name": 'now"é\\'}},
]
NOW = '<zyphra_tool_call>\n<function=now"é\\>\n</function>\n</zyphra_tool_call>'


def call(**values: str) -> str:
    lines = "".join(f"<parameter={name}>\n{value}\n</parameter>\n" for name, value in values.items())
    return f"<zyphra_tool_call>\n<function=weather>\n{lines}</function>\n</zyphra_tool_call>"


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return train_tokenizer([NOW, call(city="Paris", days="3")] * 3, 300)


@pytest.fixture(scope="module")
def ll_tokenizer(tokenizer: Any) -> Any:
    from llguidance.hf import from_tokenizer

    return from_tokenizer(tokenizer)


def accepts(grammar: str, text: str, tokenizer: Any, ll_tokenizer: Any) -> bool:
    matcher = llguidance.LLMatcher(ll_tokenizer, grammar)
    assert not matcher.is_error(), matcher.get_error()
    tokens = tokenizer.encode(text, add_special_tokens=False)
    return matcher.try_consume_tokens(tokens) == len(tokens) and matcher.is_accepting()


ALLOWED = [
    NOW,
    call(city="Paris"),
    call(city=""),
    call(city="\n a\n\n"),
    call(city="a\n</function>\n<b>é"),
    call(city="5", days="12", unit="a b", place='{"x": [1, 2.5]}', any="any\ntext", one="null"),
    f"{NOW}\n{call(city='x')}\n{NOW}",
]
FORBIDDEN = [
    "",
    "Paris",
    "\n" + NOW,
    NOW + "\n",
    NOW + NOW,
    NOW[:-1],
    call(),
    call(days="3"),
    call(days="3", city="x"),
    call(city="x", days="x"),
    call(city="x", days="-1"),
    call(city="x", days=" 1"),
    call(city="x", unit="f"),
    call(city="x", place='{"y": 1}'),
    call(city="x", one="3"),
    call(city="x", other="1"),
    call(city="a</parameter>b"),
    call(city="</zyphra_tool_call>"),
    call(city="x").replace("weather", "climate"),
]


def test_calls_and_nothing_else(tokenizer: Any, ll_tokenizer: Any) -> None:
    grammar = tool_grammar(TOOLS, tokenizer=tokenizer)
    assert not llguidance.LLMatcher.validate_grammar(grammar, ll_tokenizer)
    for text in ALLOWED:
        assert accepts(grammar, text, tokenizer, ll_tokenizer), text
        assert "zyphra" not in parse_tool_calls(text, TOOLS)[0]
    for text in FORBIDDEN:
        assert not accepts(grammar, text, tokenizer, ll_tokenizer), text


def test_a_value_cannot_spell_a_tag_in_ordinary_tokens(tokenizer: Any, ll_tokenizer: Any) -> None:
    """It would end the call where it is read back."""
    before, after = call(city="|").split("|")
    for text, is_allowed in (("</zyphra_tool_call>", False), ("<zyphra_tool_call>", False), ("<zyphra>", True)):
        matcher = llguidance.LLMatcher(ll_tokenizer, tool_grammar(TOOLS, tokenizer=tokenizer))
        tokens = [*tokenizer.encode(before), *encode_plain(tokenizer, [text])[0], *tokenizer.encode(after)]
        assert (matcher.try_consume_tokens(tokens) == len(tokens)) is is_allowed


def test_the_named_function_only_and_once(tokenizer: Any, ll_tokenizer: Any) -> None:
    named = tool_grammar(TOOLS, "weather", tokenizer=tokenizer)
    assert accepts(named, call(city="x"), tokenizer, ll_tokenizer)
    assert not accepts(named, NOW, tokenizer, ll_tokenizer)
    assert not accepts(named, f"{call(city='x')}\n{call(city='x')}", tokenizer, ll_tokenizer)
    single = tool_grammar(TOOLS, tokenizer=tokenizer, parallel=False)
    assert accepts(single, NOW, tokenizer, ll_tokenizer)
    assert not accepts(single, f"{NOW}\n{NOW}", tokenizer, ll_tokenizer)


def test_whatever_the_grammar_lets_through_is_read_as_calls(tokenizer: Any, ll_tokenizer: Any) -> None:
    grammar = tool_grammar(TOOLS, tokenizer=tokenizer)
    shuffled = random.Random(0)
    ends = {tokenizer.encode(sign, add_special_tokens=False)[0] for sign in ("\n", "<", "</", ">", "}", "]")}
    num_finished = 0
    for _ in range(30):
        matcher = llguidance.LLMatcher(ll_tokenizer, grammar)
        tokens: list[int] = []
        for _ in range(300):
            mask = matcher.compute_bitmask()
            allowed = [token for token in range(len(tokenizer)) if mask[token // 8] >> token % 8 & 1]
            preferred = [token for token in allowed if token in ends or token == tokenizer.eos_token_id]
            token = shuffled.choice(preferred if preferred and shuffled.random() < 0.5 else allowed)
            if token == tokenizer.eos_token_id:
                num_finished += 1
                content, calls = parse_tool_calls(tokenizer.decode(tokens), TOOLS)
                assert content == "" and calls
                break
            assert matcher.consume_token(token)
            tokens.append(token)
    assert num_finished > 5


def test_tags_that_are_no_tokens_are_text(tokenizer: Any) -> None:
    class Wordy:
        def get_vocab(self) -> dict[str, int]:
            return {}

    assert '"<zyphra_tool_call>"' in tool_grammar(TOOLS, tokenizer=Wordy())  # type: ignore[arg-type]
    assert "call: <[5]>" in tool_grammar(TOOLS, tokenizer=tokenizer)
    assert "call: <zyphra_tool_call> " in tool_grammar(TOOLS)


@pytest.mark.parametrize(
    ("tools", "choice"),
    [
        ([], None),
        (TOOLS, "climate"),
        ([{"type": "function", "function": {"name": "f", "parameters": {"properties": {"a>b": {}}}}}], None),
    ],
)
def test_what_cannot_be_forced_is_refused(tools: list[Any], choice: str | None) -> None:
    with pytest.raises(DataError):
        tool_grammar(tools, choice)
