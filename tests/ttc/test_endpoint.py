"""Rollouts over HTTP against the scripted endpoint: requests, budgets, reasoning wherever it is, faults, accounts."""

from __future__ import annotations

import asyncio
import dataclasses
import logging
from typing import Any

import httpx
import pytest

from openzaya.errors import CompletionFailed, RSAError
from openzaya.ttc.completer import Call, Rollout, Usage
from openzaya.ttc.config import RSASampling
from openzaya.ttc.connection import EndpointFailed
from openzaya.ttc.endpoint import EndpointCompleter
from tests.ttc.scripted_endpoint import ScriptedEndpoint, serving
from tests.ttc.scripted_model import Script, num_tokens

CONVERSATION = (
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "What is 17 + 25?"},
)
TOOL = {"type": "function", "function": {"name": "add", "parameters": {"type": "object", "properties": {}}}}


def call(**changes: Any) -> Call:
    made = Call(CONVERSATION, 300, RSASampling(temperature=0.7, top_k=20), seed=(1 << 60) + 5)
    return dataclasses.replace(made, **changes)


def completer(endpoint: ScriptedEndpoint, **settings: Any) -> EndpointCompleter:
    return EndpointCompleter("http://scripted/v1", client=endpoint.client(), retry_wait_s=0.001, **settings)


async def generated(endpoint: ScriptedEndpoint, *calls: Call, **settings: Any) -> list[Rollout]:
    """Rollouts of these calls, without the requests of probing in the endpoint's records."""
    made = completer(endpoint, **settings)
    await made.capabilities()
    endpoint.requests.clear()
    return await asyncio.gather(*(made.complete(one) for one in calls))


def rollouts(script: Script, *calls: Call, **settings: Any) -> tuple[list[Rollout], ScriptedEndpoint]:
    endpoint = ScriptedEndpoint(script)
    return asyncio.run(generated(endpoint, *calls, **settings)), endpoint


@pytest.mark.parametrize("reasoning", ["reasoning_content", "reasoning", "inline"])
@pytest.mark.parametrize("stream", [True, False])
def test_reasoning_and_answer_are_told_apart_wherever_they_stand(reasoning, stream):
    [one], endpoint = rollouts(Script(reasoning=reasoning), call(), stream=stream)
    assert one.reasoning.startswith("mark-")
    assert one.content.startswith("The answer is \\boxed{")
    assert (one.is_closed, one.finish_reason, one.num_calls) == (True, "stop", 1)
    assert 0 < one.usage.reasoning < one.usage.completion
    body = endpoint.requests[0]["body"]
    assert body["messages"] == list(CONVERSATION)
    assert (body["temperature"], body["top_p"], body["top_k"], body["max_tokens"]) == (0.7, 1.0, 20, 300)
    assert "min_p" not in body
    assert 0 <= body["seed"] < 2**31


@pytest.mark.parametrize("reasoning", ["reasoning_content", "inline"])
def test_a_rollout_that_is_cut_off_while_it_reasons(reasoning):
    [one], _ = rollouts(Script(reasoning=reasoning), call(max_tokens=30))
    assert (one.is_closed, one.finish_reason, one.content) == (False, "length", "")
    assert one.reasoning.startswith("mark-")
    assert one.usage.completion == one.usage.reasoning == 30


def test_streamed_and_plain_answers_are_the_same():
    both = [rollouts(Script(), call(), stream=stream)[0][0] for stream in (True, False)]
    assert dataclasses.replace(both[0], seconds=0) == dataclasses.replace(both[1], seconds=0)


@pytest.mark.parametrize(
    ("script", "means", "num_calls"),
    [
        (Script(), "thinking_token_budget", 1),
        (Script(thinking_field="thinking_budget_tokens"), "thinking_budget_tokens", 1),
        (Script(thinking_field=""), "completions", 2),
        (Script(thinking_field="", tokenize="llama", reasoning="inline"), "completions", 2),
        (Script(thinking_field="", completions=False), "continue_final_message", 2),
        (Script(thinking_field="", completions=False, reasoning="inline"), "continue_final_message", 2),
        (Script(thinking_field="", tokenize="none", continues="assistant"), "continue_final_message", 2),
    ],
)
def test_a_budget_of_thinking_is_kept_and_an_answer_follows(script, means, num_calls):
    [one], endpoint = rollouts(script, call(thinking_budget=25))
    assert 0 < num_tokens(one.reasoning) <= 25
    assert one.content.startswith("The answer is \\boxed{")
    assert (one.is_closed, one.finish_reason, one.num_calls) == (True, "stop", num_calls)
    bodies = [record["body"] for record in endpoint.requests]
    assert [body["max_tokens"] for body in bodies] == ([300] if num_calls == 1 else [25, 275])
    if num_calls == 1:
        assert bodies[0][means] == 25
    elif means == "completions":
        assert all(isinstance(token, int) for token in bodies[1]["prompt"])
    else:
        assert bodies[1]["messages"][-1]["content"].startswith("<think>\nmark-")
        assert bodies[1]["messages"][-1]["content"].endswith("\n</think>\n\n")


def test_without_any_means_the_reasoning_is_quoted():
    script = Script(thinking_field="", completions=False, continues="none")
    [one], endpoint = rollouts(script, call(thinking_budget=25))
    quoted = endpoint.requests[1]["body"]["messages"]
    assert [message["role"] for message in quoted] == ["system", "user"]
    assert one.reasoning in quoted[-1]["content"]
    assert quoted[-1]["content"].startswith("What is 17 + 25?")
    assert one.usage.completion == sum(record["usage"]["completion_tokens"] for record in endpoint.requests)


@pytest.mark.parametrize("script", [Script(reasoning="none"), Script(reasoning="none", thinking_field="")])
def test_a_model_that_does_not_reason_is_called_once(script):
    [one], endpoint = rollouts(script, call(thinking_budget=10))
    assert len(endpoint.requests) == 1
    assert one.content.startswith("The answer is")
    assert one.is_closed


def test_unprobed_a_model_that_does_not_reason_is_asked_again_in_full_once():
    calls = [call(thinking_budget=10), call(thinking_budget=10, seed=3)]

    async def one_by_one() -> tuple[list[Rollout], ScriptedEndpoint]:
        endpoint = ScriptedEndpoint(Script(reasoning="none"))
        made = completer(endpoint, probe=False)
        return [await made.complete(one) for one in calls], endpoint

    (first, second), endpoint = asyncio.run(one_by_one())
    assert [record["body"]["max_tokens"] for record in endpoint.requests] == [10, 300, 300]
    assert (first.num_calls, second.num_calls) == (2, 1)
    assert first.content.endswith(".")
    assert first.usage.completion == sum(r["usage"]["completion_tokens"] for r in endpoint.requests[:2])


@pytest.mark.parametrize(
    "script",
    [
        Script(),
        Script(reasoning="inline"),
        Script(completions=False),
        Script(reasoning="inline", completions=False, tokenize="none"),
    ],
)
def test_a_reasoning_that_is_begun_is_continued(script):
    begun = "mark-earlier 1 value=3\n计算"
    [one], endpoint = rollouts(script, call(prefill=begun))
    assert "mark-earlier" not in one.reasoning
    assert one.reasoning.startswith("mark-")
    assert one.content.startswith("The answer is \\boxed{3}"), "the model has seen what was begun"
    body = endpoint.requests[0]["body"]
    assert body.get("continue_final_message") or "prompt" in body


def test_a_line_break_after_what_was_begun_is_kept():
    def answer(request: httpx.Request) -> httpx.Response:
        message = {"role": "assistant", "content": "\nsecond line\n</think>\n\ndone"}
        return httpx.Response(200, json={"choices": [{"message": message, "finish_reason": "stop"}]})

    client = httpx.AsyncClient(transport=httpx.MockTransport(answer))
    made = EndpointCompleter("http://x", "m", client=client, probe=False, kind="completions")
    one = asyncio.run(made.complete(call(prefill="first line")))
    assert (one.reasoning, one.content) == ("\nsecond line", "done")


def test_the_opening_tag_in_the_prompt_is_learnt_from_a_reply():
    script = Script(reasoning="inline", opened=True, thinking_field="", tokenize="none", continues="none")

    async def one_by_one() -> list[Rollout]:
        made = completer(ScriptedEndpoint(script))
        return [await made.complete(one) for one in (call(), call(max_tokens=30))]

    whole, cut = asyncio.run(one_by_one())
    assert whole.reasoning.startswith("mark-")
    assert cut.reasoning.startswith("mark-")
    assert not cut.is_closed


def test_tools_and_formats_are_passed_on_and_calls_come_back():
    final = {"tool_choice": "required", "parallel_tool_calls": False}
    [one], endpoint = rollouts(Script(), call(tools=(TOOL,), final=final))
    assert endpoint.requests[0]["body"]["tools"] == [TOOL]
    assert endpoint.requests[0]["body"]["tool_choice"] == "required"
    assert one.finish_reason == "tool_calls"
    assert one.tool_calls[0]["function"]["name"] == "add"
    assert one.is_closed
    schema = {"response_format": {"type": "json_object"}}
    [plain], _ = rollouts(Script(thinking_field=""), call(final=schema, thinking_budget=25))
    assert plain.content.startswith('{"answer":'), "the second call is held to the format too"
    with pytest.raises(CompletionFailed, match="tools"):
        rollouts(Script(), call(tools=(TOOL,)), kind="completions")


@pytest.mark.parametrize("faults", ["500", "429", "drop", "garbage", "empty", "500,429,drop,garbage,empty"])
@pytest.mark.parametrize("stream", [True, False])
def test_failed_attempts_are_repeated(faults, stream):
    script = Script(fail=0.4, faults=faults)
    calls = [call(seed=seed) for seed in range(12)]
    found, endpoint = rollouts(script, *calls, stream=stream, max_retries=30)
    undisturbed, _ = rollouts(Script(), *calls)
    assert [one.content for one in found] == [one.content for one in undisturbed]
    assert sum(one.num_calls for one in found) == len(endpoint.requests) > len(calls)
    assert sum((one.usage for one in found), Usage()).completion == endpoint.stats()["completion_tokens"]


def test_a_call_that_hangs_is_ended_and_repeated():
    found, endpoint = rollouts(Script(hang=0.3), *(call(seed=seed) for seed in range(8)), timeout_s=0.3, max_retries=20)
    assert len(found) == 8
    assert endpoint.counts["left"] + endpoint.counts["hung"] > 0
    assert endpoint.in_flight == 0


def test_a_refusal_is_final_and_carries_the_endpoints_words():
    with pytest.raises(
        EndpointFailed, match=r"http://scripted/v1 refused the call \(HTTP 400\): .*above the context"
    ) as e:
        rollouts(Script(max_model_len=150), call())
    assert e.value.status == 400


def test_after_all_retries_the_failure_says_what_was_tried():
    endpoint = ScriptedEndpoint(Script())

    async def disturbed() -> None:
        made = completer(endpoint, max_retries=2)
        await made.capabilities()
        endpoint.script = Script(fail=1.0, faults="500")
        await made.complete(call())

    with pytest.raises(CompletionFailed, match=r"no answer in 3 attempts; at last: HTTP 500: planned failure"):
        asyncio.run(disturbed())


def test_tokens_of_failed_attempts_count_where_they_are_reported():
    usage = {"prompt_tokens": 7, "completion_tokens": 5}
    empty = {"choices": [{"message": {"content": None}, "finish_reason": "stop"}], "usage": usage}
    good = {"choices": [{"message": {"content": "yes"}, "finish_reason": "stop"}], "usage": usage}
    answers = [empty, {"choices": [], "usage": usage}, {"error": {"message": "overloaded"}, "usage": usage}, good]

    def answer(request: httpx.Request) -> httpx.Response:
        return httpx.Response(200, json=answers.pop(0))

    client = httpx.AsyncClient(transport=httpx.MockTransport(answer))
    made = EndpointCompleter("http://x", "m", client=client, probe=False, retry_wait_s=0.001)
    one = asyncio.run(made.complete(call()))
    assert (one.content, one.num_calls, one.usage) == ("yes", 4, Usage(prompt=28, completion=20))


def test_a_failure_carries_the_tokens_of_the_call_before_it():
    message = {"content": None, "reasoning": "first"}
    usage = {"prompt_tokens": 9, "completion_tokens": 10}
    first = {"choices": [{"message": message, "finish_reason": "length"}], "usage": usage}
    answers = [httpx.Response(200, json=first), httpx.Response(400, text="no more")]
    client = httpx.AsyncClient(transport=httpx.MockTransport(lambda request: answers.pop(0)))
    made = EndpointCompleter("http://x", "m", client=client, probe=False)
    with pytest.raises(EndpointFailed, match="no more") as caught:
        asyncio.run(made.complete(call(thinking_budget=10)))
    assert caught.value.usage == Usage(prompt=9, completion=10, reasoning=10)


def test_cancelling_ends_the_request_at_the_endpoint():
    with serving(hang=1.0, fault_seed=1, tokenize="none") as url:

        async def cancelled() -> dict[str, Any]:
            made = EndpointCompleter(url, "scripted", probe=False)
            task = asyncio.create_task(made.complete(call()))
            async with httpx.AsyncClient() as client:
                while (await client.get(url + "/stats")).json()["in_flight"] == 0:
                    await asyncio.sleep(0.02)
                task.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await task
                for _ in range(250):
                    stats: dict[str, Any] = (await client.get(url + "/stats")).json()
                    if stats["in_flight"] == 0:
                        break
                    await asyncio.sleep(0.02)
            await made.close()
            return stats

        stats = asyncio.run(cancelled())
        assert (stats["in_flight"], stats["requests"]) == (0, 1)


def test_a_stream_that_stalls_is_given_up():
    class Stalling(httpx.AsyncByteStream):
        async def __aiter__(self):
            yield b'data: {"choices": [{"delta": {"content": "a"}}]}\n\n'
            await asyncio.sleep(60)

    def answer(request: httpx.Request) -> httpx.Response:
        return httpx.Response(200, headers={"content-type": "text/event-stream"}, stream=Stalling())

    client = httpx.AsyncClient(transport=httpx.MockTransport(answer))
    made = EndpointCompleter("http://x", "m", client=client, probe=False, idle_timeout_s=0.05, max_retries=0)
    with pytest.raises(CompletionFailed, match="1 attempts"):
        asyncio.run(asyncio.wait_for(made.complete(call()), 10))


def test_not_more_calls_at_once_than_allowed():
    found, endpoint = rollouts(Script(latency_s=0.02), *(call(seed=seed) for seed in range(10)), concurrency=3)
    assert len(found) == 10
    assert endpoint.max_in_flight <= 3


SECRET = "sk-Very+Secret/Key"


@pytest.mark.parametrize(
    ("url", "settings"),
    [
        ("http://scripted/v1", {"api_key": SECRET}),
        ("http://user:sk-Very%2BSecret%2FKey@scripted/v1", {}),
        ("http://scripted/v1?key=sk-Very%2BSecret%2FKey", {}),
        ("http://scripted/v1", {"headers": {"X-Api-Key": SECRET}}),
        ("http://scripted/v1", {"headers": {"Authorization": "Bearer " + SECRET}}),
    ],
)
def test_no_key_is_ever_shown(url, settings, caplog):
    """The endpoint refuses and repeats what it was sent, in every place where it could show."""
    seen = []

    def answer(request: httpx.Request) -> httpx.Response:
        seen.append(f"{request.url} {dict(request.headers)}")
        return httpx.Response(int(request.headers.get("x-status", 400)), json={"error": {"message": seen[-1]}})

    caplog.set_level(logging.DEBUG)
    shown = []
    for probe in (True, False):
        for status in ("400", "401", "500"):
            client = httpx.AsyncClient(transport=httpx.MockTransport(answer), headers={"x-status": status})
            made = EndpointCompleter(
                url, "m", client=client, probe=probe, retry_wait_s=0.001, max_retries=1, **settings
            )
            shown += [repr(made), made.url, str(vars(made))]
            with pytest.raises(RSAError) as error:
                asyncio.run(made.complete(call()))
            chain: BaseException | None = error.value
            while chain is not None:
                shown.append(f"{chain!r} {chain}")
                chain = None if chain.__suppress_context__ else chain.__cause__ or chain.__context__
    spellings = (SECRET, "Very+Secret", "sk-Very%2BSecret", "dXNlcjpzay1WZXJ5")
    assert any(spelling in line for line in seen for spelling in spellings), "the endpoint did get the key"
    for text in (*shown, caplog.text):
        assert not any(spelling in text for spelling in spellings), text


@pytest.mark.parametrize("url", ["", "localhost:8000", "ftp://x", "http://"])
def test_a_url_of_another_form_is_refused(url):
    with pytest.raises(RSAError, match="http"):
        EndpointCompleter(url)


def test_settings_out_of_range_are_refused():
    for settings in ({"concurrency": 0}, {"max_retries": -1}, {"timeout_s": 0}, {"kind": "other"}):
        with pytest.raises(RSAError, match="="):
            EndpointCompleter("http://x", **settings)
