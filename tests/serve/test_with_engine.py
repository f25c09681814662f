"""The server on a real engine with a small random model: the same tokens as without the server, nothing left behind."""

from __future__ import annotations

import asyncio
import json
import os

import httpx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from openzaya.data.chat import render
from openzaya.infer.engine import Engine
from openzaya.infer.sampling import SamplingParams
from openzaya.model.transformer import Zaya
from openzaya.serve.server import create_app
from openzaya.serve.settings import ServerSettings
from tests.serve.bad_requests import SCHEMAS, requests
from tests.serve.conftest import wait_until
from tests.serve.test_bad_requests import JSON, assert_all_answered
from tests.train import miniature

CHAT = "/v1/chat/completions"
USER = {"role": "user", "content": "Hello"}
TOOL = {"type": "function", "function": {"name": "f", "parameters": {"properties": {"a": {"type": "integer"}}}}}


@pytest.fixture(scope="module")
def engine():
    import torch

    from tests.model.reference import perturb

    tokenizer = miniature.tokenizer()
    model = Zaya(miniature.config(max_position_embeddings=512), seed=0)
    perturb(model, torch.Generator().manual_seed(0))
    with Engine(model, tokenizer, max_running=16, max_waiting=64, cache_bytes=2**24) as one:
        yield one


def sampled(engine, seed: int, max_tokens: int) -> list[int]:
    prompt = render([USER], engine.tokenizer, add_generation_prompt=True).tokens
    params = SamplingParams(seed=seed, max_new_tokens=max_tokens)
    return engine.generate([prompt], params)[0].completions[0].tokens


def test_the_tokens_are_those_of_the_engine(serve, engine):
    server = serve(engine=engine)
    expected = {seed: sampled(engine, seed, 24) for seed in range(6)}

    async def ask_all():
        async with httpx.AsyncClient(base_url=server.url, timeout=60) as client:

            async def ask(seed):
                body = {"messages": [USER], "seed": seed, "max_tokens": 24, "return_token_ids": True}
                return (await client.post(CHAT, json=body)).json()["choices"][0]["token_ids"]

            return await asyncio.gather(*(ask(seed) for seed in range(6)))

    assert asyncio.run(ask_all()) == [expected[seed] for seed in range(6)]


def test_a_schema_and_a_forced_call_are_kept(serve, engine):
    server = serve(engine=engine)
    schema = {
        "type": "object",
        "properties": {"a": {"type": "integer", "minimum": 0, "maximum": 9}},
        "required": ["a"],
        "additionalProperties": False,
    }
    constrained = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    body = {"messages": [USER], "enable_thinking": False, "response_format": constrained, "seed": 1, "max_tokens": 400}
    choice = httpx.post(server.url + CHAT, json=body, timeout=60).json()["choices"][0]
    if choice["finish_reason"] == "stop":
        assert set(json.loads(choice["message"]["content"])) == {"a"}
    body = {"messages": [USER], "tools": [TOOL], "tool_choice": {"type": "function", "function": {"name": "f"}}}
    body |= {"thinking_budget": 3, "seed": 2, "max_tokens": 400}
    choice = httpx.post(server.url + CHAT, json=body, timeout=60).json()["choices"][0]
    if choice["finish_reason"] != "length":
        assert choice["finish_reason"] == "tool_calls" and choice["message"]["tool_calls"][0]["function"]["name"] == "f"


def test_clients_that_leave_free_all_blocks(serve, engine):
    server = serve(engine=engine)

    async def leave_some() -> None:
        async with httpx.AsyncClient(base_url=server.url, timeout=60) as client:

            async def ask(seed):
                body = {"messages": [USER], "seed": seed, "max_tokens": 300, "stream": True, "ignore_eos": True, "n": 2}
                async with client.stream("POST", CHAT, json=body) as stream:
                    number = 0
                    async for _ in stream.aiter_lines():
                        number += 1
                        if number > 5 * seed:
                            return

            await asyncio.gather(*(ask(seed) for seed in range(12)))

    asyncio.run(leave_some())
    wait_until(lambda: engine.stats().num_running == 0 and engine.stats().num_waiting == 0)
    assert engine.stats().blocks_free == engine.stats().blocks_total
    assert not server.service.jobs


def schema_requests():
    def body(schema):
        fixed = {"messages": [USER], "max_tokens": 3, "enable_thinking": False}
        constraint = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
        return CHAT, json.dumps(fixed | {"response_format": constraint}).encode("utf-8", "surrogatepass")

    return SCHEMAS.map(body)


def check_answers(engine, num_lists: int, size: int) -> None:
    app = create_app(engine, ServerSettings(request_timeout_s=20))

    async def good(client) -> None:
        assert (await client.post(CHAT, json={"messages": [USER], "max_tokens": 2})).status_code == 200

    @settings(max_examples=num_lists)
    @given(st.lists(requests() | schema_requests(), min_size=size, max_size=size))
    def check(cases):
        assert_all_answered(app, cases, good)

    check()
    assert engine.stats().blocks_free == engine.stats().blocks_total


def test_bad_requests(engine):
    check_answers(engine, 10, 8)


@pytest.mark.slow
def test_ten_thousand_bad_requests(engine):
    """OPENZAYA_BAD_REQUESTS changes the number."""
    check_answers(engine, int(os.environ.get("OPENZAYA_BAD_REQUESTS", "10000")) // 20, 20)


@pytest.mark.parametrize(
    "schema",
    [
        {"type": "string", "pattern": "(a|b){1,100000}c{1,100000}"},
        {"anyOf": [{"type": "string", "maxLength": 10**6}] * 50},
        {"$defs": {"a": {"$ref": "#/$defs/a"}}, "$ref": "#/$defs/a"},
        {"enum": ["x" * 1000] * 1000},
        {"type": "object", "properties": {f"p{i}": {"type": "integer"} for i in range(2000)}},
    ],
)
def test_absurd_schemas_end_soon(engine, schema):
    app = create_app(engine, ServerSettings())

    async def ask():
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://testserver") as client:
            constraint = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
            body = {"messages": [USER], "max_tokens": 3, "enable_thinking": False, "response_format": constraint}
            response = await asyncio.wait_for(client.post(CHAT, content=json.dumps(body), headers=JSON), 30)
            assert response.status_code in (200, 400), response.text

    asyncio.run(ask())
