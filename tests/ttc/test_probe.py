"""What is found out about an endpoint, and at what cost; endpoints that cannot be used at all."""

from __future__ import annotations

import asyncio
from typing import Any

import httpx
import pytest

from openzaya.errors import RSAError
from openzaya.ttc.completer import Capabilities
from openzaya.ttc.endpoint import EndpointCompleter
from tests.ttc.scripted_endpoint import ScriptedEndpoint
from tests.ttc.scripted_model import Script, scripted_tokenizer


def found(script: Script, **settings: Any) -> tuple[Capabilities, ScriptedEndpoint]:
    endpoint = ScriptedEndpoint(script)

    async def ask() -> Capabilities:
        made = EndpointCompleter("http://scripted", client=endpoint.client(), retry_wait_s=0.001, **settings)
        first, second = await asyncio.gather(made.capabilities(), made.capabilities())
        assert first is not None
        assert first == second
        return first

    return asyncio.run(ask()), endpoint


def test_an_endpoint_that_can_everything():
    capabilities, endpoint = found(Script(max_model_len=9000))
    assert capabilities == Capabilities(
        kind="chat",
        model="scripted",
        token_counting="server",
        thinking_budget="thinking_token_budget",
        seeds=True,
        n=True,
        prefill="completions",
        context=9000,
        notes=capabilities.notes,
    )
    assert len(endpoint.requests) <= 12
    assert all(record["body"]["max_tokens"] <= 16 for record in endpoint.requests)
    stats = endpoint.stats()
    [note] = [note for note in capabilities.notes if note.startswith("probing")]
    assert f"{stats['requests']} requests, {stats['prompt_tokens']} prompt and" in note
    assert f"{stats['completion_tokens']} generated" in note


@pytest.mark.parametrize(
    ("script", "expected"),
    [
        (Script(thinking_field=""), {"thinking_budget": "two_calls"}),
        (Script(thinking_field="thinking_budget"), {"thinking_budget": "thinking_budget"}),
        (
            Script(thinking_field="thinking_budget_tokens", reasoning="inline"),
            {"thinking_budget": "thinking_budget_tokens"},
        ),
        (Script(reasoning="none"), {"thinking_budget": "none"}),
        (Script(honours_seed=False), {"seeds": False}),
        (Script(n=False), {"n": False}),
        (Script(tokenize="none"), {"token_counting": "estimate", "prefill": "continue_final_message"}),
        (Script(tokenize="llama"), {"token_counting": "server", "prefill": "completions"}),
        (Script(completions=False), {"prefill": "continue_final_message"}),
        (Script(completions=False, continues="none"), {"prefill": "none"}),
        (Script(completions=False, continues="refuse"), {"prefill": "none"}),
        (Script(usage=False), {"seeds": True, "prefill": "completions"}),
        (Script(fail=0.3), {"seeds": True, "thinking_budget": "thinking_token_budget", "prefill": "completions"}),
        (Script(max_model_len=20), {}),
    ],
)
def test_what_is_missing_is_seen(script, expected):
    if not expected:
        with pytest.raises(RSAError, match="above the context of 20"):
            found(script)
        return
    capabilities, _ = found(script)
    assert {name: getattr(capabilities, name) for name in expected} == expected


def test_notes_say_what_is_not_the_endpoints_count():
    assert "tokens of texts are estimated from usage" in found(Script(tokenize="none"))[0].notes
    assert any("no usage" in note for note in found(Script(usage=False))[0].notes)


def test_a_tokenizer_wins_over_the_endpoint():
    capabilities, endpoint = found(Script(tokenize="none"), tokenizer=scripted_tokenizer())
    assert (capabilities.token_counting, capabilities.prefill) == ("tokenizer", "completions")
    assert endpoint.counts["tokenize"] == 0


def test_plain_completions_by_choice_and_where_there_is_no_chat():
    assert found(Script(), kind="completions")[0].kind == "completions"

    def answer(request: httpx.Request) -> httpx.Response:
        if request.url.path != "/v1/completions":
            return httpx.Response(404, json={"detail": "Not Found"})
        return httpx.Response(200, json={"choices": [{"text": "one two", "finish_reason": "length"}]})

    client = httpx.AsyncClient(transport=httpx.MockTransport(answer))
    capabilities = asyncio.run(EndpointCompleter("http://x", "m", client=client).capabilities())
    assert (capabilities.kind, capabilities.prefill) == ("completions", "completions")


@pytest.mark.parametrize(
    ("refused", "left"), [("max_tokens", "max_completion_tokens"), ("stream_options", "max_tokens")]
)
def test_fields_that_an_endpoint_does_not_take_are_left_out(refused, left):
    bodies = []

    def answer(request: httpx.Request) -> httpx.Response:
        import json

        if request.method == "GET" or not request.url.path.endswith("chat/completions"):
            return httpx.Response(404)
        bodies.append(json.loads(request.content))
        if refused in bodies[-1]:
            text = "Unsupported parameter: 'max_tokens'. Use 'max_completion_tokens' instead."
            return httpx.Response(
                400, json={"error": {"message": text if refused == "max_tokens" else "stream_options"}}
            )
        return httpx.Response(200, json={"choices": [{"message": {"content": "words"}, "finish_reason": "stop"}]})

    client = httpx.AsyncClient(transport=httpx.MockTransport(answer))
    made = EndpointCompleter("http://x", "m", client=client)
    assert asyncio.run(made.capabilities()).kind == "chat"
    assert refused not in bodies[-1]
    assert left in bodies[-1]


def test_unprobed_nothing_is_sent_and_only_what_works_everywhere_is_used():
    capabilities, endpoint = found(Script(), probe=False)
    assert endpoint.requests == []
    assert (capabilities.model, capabilities.thinking_budget, capabilities.prefill) == ("scripted", "two_calls", "none")
    assert (capabilities.token_counting, capabilities.seeds, capabilities.n) == ("estimate", None, None)
    assert "not probed" in capabilities.notes


def test_an_endpoint_that_is_not_there():
    made = EndpointCompleter("http://user:secret@127.0.0.1:9/v1", "m", retry_wait_s=0.001)
    with pytest.raises(RSAError, match=r"cannot reach http://127\.0\.0\.1:9/v1 \(ConnectError.*check the URL"):
        asyncio.run(made.capabilities())


def test_a_key_that_is_refused():
    with pytest.raises(
        RSAError, match=r"http://scripted/v1 refuses the key \(HTTP 401\): wrong key Bearer \*\*\*; give"
    ):
        found(Script(api_key="right-key"), api_key="wrong-key")
    assert found(Script(api_key="right-key"), api_key="right-key")[0].seeds


def test_a_model_must_be_named_where_there_are_several():
    def answer(request: httpx.Request) -> httpx.Response:
        return httpx.Response(200, json={"data": [{"id": "one"}, {"id": "two"}]})

    client = httpx.AsyncClient(transport=httpx.MockTransport(answer))
    with pytest.raises(RSAError, match=r"lists 2 models \(one, two\); name the model"):
        asyncio.run(EndpointCompleter("http://x", client=client).capabilities())


def test_an_endpoint_that_is_something_else():
    def answer(request: httpx.Request) -> httpx.Response:
        return httpx.Response(200, text="<html>hello</html>")

    client = httpx.AsyncClient(transport=httpx.MockTransport(answer))
    made = EndpointCompleter("http://x", "m", client=client, retry_wait_s=0.001)
    with pytest.raises(RSAError, match=r"broken JSON.*first small request"):
        asyncio.run(made.capabilities())
