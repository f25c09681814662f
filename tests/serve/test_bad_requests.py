"""No request, however wrong, makes the server fail, hang or forget the next one: errors are 4xx in OpenAI's form."""

from __future__ import annotations

import asyncio
import json
import os

import httpx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from openzaya.serve.errors import ApiError
from openzaya.serve.parsing import parse_json
from openzaya.serve.server import create_app
from openzaya.serve.settings import ServerSettings

from .bad_requests import requests
from .fake_engine import FakeEngine

CHAT = "/v1/chat/completions"
USER = {"role": "user", "content": "Hello"}
JSON = {"content-type": "application/json"}


def error_of(response) -> dict:
    body = response.json()
    assert set(body) == {"error"} and set(body["error"]) == {"message", "type", "param", "code"}
    assert body["error"]["message"] and response.headers["x-request-id"]
    return body["error"]


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"messages": []}, "messages"),
        ({"messages": None}, "messages"),
        ({"messages": [{"role": "nobody", "content": "x"}]}, "messages.0.role"),
        ({"messages": [{"role": "user"}]}, None),
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]}, None),
        ({"messages": [USER, {"role": "system", "content": "late"}]}, None),
        ({"max_tokens": -5}, "max_tokens"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": "5"}, "max_tokens"),
        ({"max_tokens": True}, "max_tokens"),
        ({"temperature": -1}, "temperature"),
        ({"temperature": "0.5"}, "temperature"),
        ({"top_p": 2}, "top_p"),
        ({"n": 0}, "n"),
        ({"n": 10**6}, "n"),
        ({"stream": "yes"}, "stream"),
        ({"stop": ["x"] * 17}, None),
        ({"stop": ""}, None),
        ({"logit_bias": {"x": 1}}, "logit_bias"),
        ({"logit_bias": {"999999": 1}}, "logit_bias"),
        ({"logit_bias": {"5": 101}}, "logit_bias.5"),
        ({"top_logprobs": 3}, "top_logprobs"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        ({"tools": [{"type": "retrieval"}]}, None),
        ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "tools.0.function.name"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"response_format": {"type": "json_schema"}}, "response_format"),
        ({"response_format": {"type": "xml"}}, "response_format.type"),
        ({"reasoning_effort": "extreme"}, "reasoning_effort"),
        ({"seed": 1.5}, "seed"),
        ({"stop_token_ids": [10**6]}, "stop_token_ids"),
    ],
)
def test_wrong_fields_are_named(ask, fields, param):
    response = ask("POST", CHAT, json={"messages": [USER]} | fields)
    assert response.status_code == 400
    error = error_of(response)
    assert error["type"] == "invalid_request_error"
    if param is not None:
        assert error["param"] == param
    assert response.engine.calls == []


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"null",
        b"[]",
        b'"x"',
        b"\xff\xfe",
        b'{"messages": [{"role": "user", "content": "\\ud800"}]}',
        b'{"messages": [{"role": "user", "content": "\\ud83d \\ude00"}]}',
        b'{"messages": [{"role": "user", "content": "x"}], "temperature": NaN}',
        b'{"messages": [{"role": "user", "content": "x"}], "temperature": 1e999}',
        b'{"messages": [{"role": "user", "content": "x"}], "temperature": -Infinity}',
        b'{"messages": [{"role": "user", "content": "x"}], "seed": ' + b"9" * 5000 + b"}",
        b'{"messages": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
        b'{"messages": [{"role": "user", "content": "x"}], "x": ' + b'{"a":' * 70 + b"1" + b"}" * 71,
    ],
)
def test_bodies_that_are_no_sound_json(ask, body):
    response = ask("POST", CHAT, content=body, headers=JSON)
    assert response.status_code == 400
    error_of(response)


@pytest.mark.parametrize("body", [b'{"x": [{"y": "\\uD800"}]}', b'{"x": {"\\udfff": 1}}', b'"\\ud83d"'])
def test_halves_of_characters_get_nowhere(body):
    with pytest.raises(ApiError, match="surrogate"):
        parse_json(body)


def test_a_whole_surrogate_pair_is_a_character(ask):
    body = b'{"messages": [{"role": "user", "content": "\\ud83d\\ude00"}]}'
    assert ask("POST", CHAT, content=body, headers=JSON).status_code == 200


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/nope", 404),
        ("GET", "/v1/models/other", 404),
        ("GET", CHAT, 405),
        ("POST", "/v1/models", 405),
        ("DELETE", "/", 405),
        ("POST", "/v1/chat/completions/", 404),
        ("GET", "/v1/models/%ff%00", 404),
    ],
)
def test_wrong_paths_and_methods(ask, method, path, status):
    response = ask(method, path)
    assert response.status_code == status
    error_of(response)


def test_a_model_that_is_not_served(ask):
    response = ask("POST", CHAT, json={"messages": [USER], "model": "gpt"})
    assert response.status_code == 404 and error_of(response)["code"] == "model_not_found"


def test_other_content_types(ask):
    body = b'{"messages": [{"role": "user", "content": "x"}]}'
    for content_type in ("text/plain", "application/x-www-form-urlencoded", ""):
        assert ask("POST", CHAT, content=body, headers={"content-type": content_type}).status_code == 415
    charset = {"content-type": "application/json; charset=utf-8"}
    assert ask("POST", CHAT, content=body, headers=charset).status_code == 200


def test_large_bodies(ask):
    body = json.dumps({"messages": [{"role": "user", "content": "x" * 5000}]}).encode()
    response = ask("POST", CHAT, content=body, headers=JSON, settings={"max_body_bytes": 4096})
    assert response.status_code == 413 and "4096" in error_of(response)["message"]

    async def in_pieces():
        for _ in range(10):
            yield body

    response = ask("POST", CHAT, content=in_pieces(), headers=JSON, settings={"max_body_bytes": 8192})
    assert response.status_code == 413


def test_ten_thousand_messages(ask):
    response = ask("POST", CHAT, json={"messages": [USER, {"role": "assistant", "content": "x"}] * 5000})
    assert response.status_code == 400 and error_of(response)["code"] == "context_length_exceeded"


@pytest.mark.parametrize("path", [CHAT, "/v1/completions"])
def test_a_text_that_cannot_fit_is_refused_before_it_is_tokenized(ask, monkeypatch, path):
    """A million characters are more than the context in tokens, whatever the tokens."""

    def tokenize(*arguments, **settings):
        raise AssertionError("tokenized")

    monkeypatch.setattr("openzaya.serve.prompts.encode_plain", tokenize)
    monkeypatch.setattr("openzaya.serve.prompts.render", tokenize)
    text = "a" * 1_000_000
    body = {"prompt": text} if path != CHAT else {"messages": [{"role": "user", "content": text}]}
    response = ask("POST", path, json=body)
    assert response.status_code == 400 and error_of(response)["code"] == "context_length_exceeded"


def test_what_the_engine_refuses_is_the_clients_fault(ask):
    tools = [{"type": "function", "function": {"name": "refuse", "parameters": {}}}]
    response = ask("POST", CHAT, json={"messages": [USER], "tools": tools, "tool_choice": "required"})
    assert response.status_code == 400 and "refused" in error_of(response)["message"]


def test_a_step_that_fails_is_not(ask, tokenizer):
    engine = FakeEngine(tokenizer)
    engine.breaks_after = 2
    response = ask("POST", CHAT, json={"messages": [USER]}, engine=engine)
    assert response.status_code == 500 and "step" not in error_of(response)["message"]
    response = ask("POST", CHAT, json={"messages": [USER], "stream": True}, engine=engine)
    last, done = response.text.split("\n\n")[-3:-1]
    assert response.status_code == 200 and done == "data: [DONE]"
    assert json.loads(last.removeprefix("data: "))["error"]["type"] == "server_error"
    response = ask("POST", "/v1/responses", json={"input": "x", "stream": True}, engine=engine)
    assert '"type":"response.failed"' in response.text.split("\n\n")[-2]


async def fine(client) -> None:
    """A good request, and its answer."""
    response = await client.post(CHAT, json={"messages": [USER]})
    assert response.json()["choices"][0]["message"]["content"] == "Fine."


def assert_all_answered(app, cases, good=fine) -> None:
    """Each case gets an answer below 500, and a ``good`` request its own after them."""

    async def send() -> None:
        transport = httpx.ASGITransport(app)
        async with httpx.AsyncClient(transport=transport, base_url="http://testserver", timeout=30) as client:
            for path, body in cases:
                response = await asyncio.wait_for(client.post(path, content=body, headers=JSON), 30)
                assert response.status_code < 500, (path, body, response.text)
                if response.status_code >= 400:
                    error_of(response)
            await good(client)

    asyncio.run(send())


def test_no_bad_request_is_answered_with_500(tokenizer):
    app = create_app(FakeEngine(tokenizer), ServerSettings())

    @settings(max_examples=30)
    @given(st.lists(requests(), min_size=5, max_size=10))
    def check(cases):
        assert_all_answered(app, cases)

    check()


@pytest.mark.slow
def test_ten_thousand_bad_requests(tokenizer):
    """OPENZAYA_BAD_REQUESTS changes the number."""
    app = create_app(FakeEngine(tokenizer), ServerSettings())

    @settings(max_examples=int(os.environ.get("OPENZAYA_BAD_REQUESTS", "10000")) // 20)
    @given(st.lists(requests(), min_size=20, max_size=20))
    def check(cases):
        assert_all_answered(app, cases)

    check()
