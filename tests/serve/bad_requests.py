"""Requests that no sane client sends, drawn by hypothesis; shared by the short and the long property test."""

from __future__ import annotations

import json

from hypothesis import strategies as st

PATHS = ("/v1/chat/completions", "/v1/completions", "/v1/responses", "/tokenize", "/detokenize")
NUMBERS = st.one_of(
    st.integers(-5, 5),
    st.sampled_from([2**31, 2**63, -(2**63), 2**64, 10**30, 10**400, 1e308, -1e308, 0.1, -0.5]),
    st.floats(allow_nan=True, allow_infinity=True),
)
TEXTS = st.one_of(
    st.text(max_size=20),
    st.sampled_from(["\ud800", "\udfff x", "\x00", "<|im_end|>", "<think>", "</think>", "\ufdd0", "é" * 500, "", "{"]),
)
SCALARS = st.one_of(st.none(), st.booleans(), NUMBERS, TEXTS)
VALUES = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(TEXTS, inner, max_size=4), max_leaves=12
)
ROLES = st.one_of(st.sampled_from(["system", "developer", "user", "assistant", "tool", "function", "", "x"]), VALUES)
CALLS = st.lists(st.fixed_dictionaries({"function": st.fixed_dictionaries({"name": TEXTS, "arguments": VALUES})}))
MESSAGES = st.lists(
    st.fixed_dictionaries(
        {
            "role": ROLES,
            "content": VALUES | st.lists(st.fixed_dictionaries({"type": TEXTS, "text": TEXTS}), max_size=2),
        },
        optional={"tool_calls": CALLS | VALUES, "reasoning_content": VALUES, "tool_call_id": VALUES},
    ),
    max_size=4,
)
SCHEMAS = st.one_of(
    VALUES,
    st.sampled_from(
        [
            {"type": "nonsense"},
            {"$ref": "#"},
            {"allOf": [{"$ref": "#"}]},
            {"enum": []},
            {"type": "string", "pattern": "(((("},
            {"type": "string", "pattern": "a{1000000}"},
            {"type": "array", "minItems": 10**9},
            {"type": "integer", "minimum": 5, "maximum": 1},
            {"properties": {"a": {"$ref": "http://localhost/"}}},
            {"not": {}},
        ]
    ),
)
TOOLS = st.lists(
    st.fixed_dictionaries(
        {"type": TEXTS | st.just("function"), "function": st.fixed_dictionaries({"name": TEXTS, "parameters": SCHEMAS})}
    )
    | VALUES,
    max_size=3,
)
GOOD_MESSAGES = st.just([{"role": "user", "content": "x"}])
FIELDS = {
    "messages": GOOD_MESSAGES | MESSAGES | VALUES,
    "prompt": st.just("x") | TEXTS | st.lists(TEXTS | st.lists(NUMBERS, max_size=3), max_size=3) | VALUES,
    "input": st.just("x") | MESSAGES | VALUES,
    "tokens": st.lists(NUMBERS, max_size=4) | VALUES,
    "model": st.just("zaya") | VALUES,
    "stream": VALUES,
    "stream_options": VALUES,
    "tools": TOOLS | VALUES,
    "tool_choice": st.sampled_from(["none", "auto", "required"]) | VALUES,
    "response_format": st.fixed_dictionaries(
        {"type": st.sampled_from(["text", "json_object", "json_schema"]), "json_schema": VALUES}
    )
    | st.fixed_dictionaries(
        {"type": st.just("json_schema"), "json_schema": st.fixed_dictionaries({"name": TEXTS, "schema": SCHEMAS})}
    )
    | VALUES,
    "text": VALUES | st.fixed_dictionaries({"format": st.fixed_dictionaries({"type": TEXTS, "schema": SCHEMAS})}),
    "stop": TEXTS | st.lists(TEXTS, max_size=3) | VALUES,
    "logit_bias": st.dictionaries(TEXTS | st.just("5"), NUMBERS, max_size=3) | VALUES,
    "stop_token_ids": st.lists(NUMBERS, max_size=3) | VALUES,
    "reasoning": VALUES,
    "reasoning_effort": TEXTS | st.just("low"),
    "chat_template_kwargs": VALUES,
    "metadata": VALUES,
    "include": VALUES,
    "instructions": VALUES,
}
NUMERIC = [
    "n",
    "max_tokens",
    "max_completion_tokens",
    "max_output_tokens",
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "presence_penalty",
    "frequency_penalty",
    "repetition_penalty",
    "seed",
    "logprobs",
    "top_logprobs",
    "min_tokens",
    "thinking_budget",
    "best_of",
]
FLAGS = [
    "logprobs",
    "echo",
    "ignore_eos",
    "return_token_ids",
    "return_experts",
    "enable_thinking",
    "parallel_tool_calls",
]
FIELDS |= {name: NUMBERS | VALUES for name in NUMERIC}
FIELDS |= {name: st.booleans() | VALUES for name in FLAGS}
REQUIRED = {
    "/v1/chat/completions": "messages",
    "/v1/completions": "prompt",
    "/v1/responses": "input",
    "/tokenize": "prompt",
    "/detokenize": "tokens",
}


@st.composite
def requests(draw) -> tuple[str, bytes]:
    """A path and a body: mostly JSON objects with one or two fields that are wrong, sometimes no JSON at all."""
    path = draw(st.sampled_from(PATHS))
    kind = draw(st.integers(0, 9))
    if kind == 0:
        return path, draw(st.binary(max_size=40))
    if kind == 1:
        depth = draw(st.sampled_from([10, 63, 64, 65, 1000, 200_000]))
        opening, closing = draw(st.sampled_from([("[", "]"), ('{"a":', "1}")]))
        return path, f'{{"{REQUIRED[path]}":'.encode() + (opening * depth + closing * depth).encode() + b"}"
    good = {"messages": [{"role": "user", "content": "x"}], "tokens": [5]}.get(REQUIRED[path], "x")
    body = {REQUIRED[path]: good, "max_tokens": 4}
    names = draw(st.lists(st.sampled_from(sorted(FIELDS)), min_size=1, max_size=3))
    body |= {name: draw(FIELDS[name]) for name in names}
    # With escapes, a lone surrogate can be sent; without, a few bytes that are not UTF-8 appear.
    escapes = draw(st.booleans())
    return path, json.dumps(body, ensure_ascii=escapes).encode("utf-8", "surrogatepass")
