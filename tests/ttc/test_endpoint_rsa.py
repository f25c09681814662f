"""Markovian RSA over HTTP: the account is the endpoint's own, tails stand unchanged in prompts, faults do no harm."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from openzaya.ttc.config import RSAConfig
from openzaya.ttc.endpoint import EndpointCompleter
from openzaya.ttc.results import RSAResult
from openzaya.ttc.rsa import markovian_rsa
from tests.ttc.scripted_endpoint import ScriptedEndpoint
from tests.ttc.scripted_model import Script, num_tokens, scripted_tokenizer, small_tokenizer

CONVERSATION = [
    {"role": "system", "content": "Answer with a digit."},
    {"role": "user", "content": "Which value?\n\tIndented, 中文."},
]
CONFIG = RSAConfig(n=6, c=3, t=2, beta=80, tau=24, final_budget=200, answer_budget=60, seed=4)


def ran(
    script: Script, config: RSAConfig = CONFIG, stream: bool = True, **settings: Any
) -> tuple[RSAResult, ScriptedEndpoint, Any]:
    """The result, and the endpoint with the records of the run alone."""
    endpoint = ScriptedEndpoint(script)

    async def run() -> tuple[RSAResult, Any]:
        completer = EndpointCompleter(
            "http://scripted", client=endpoint.client(), retry_wait_s=0.001, stream=stream, max_retries=30, **settings
        )
        capabilities = await completer.capabilities()
        endpoint.requests.clear()
        return await markovian_rsa(CONVERSATION, completer, config), capabilities

    result, capabilities = asyncio.run(run())
    return result, endpoint, capabilities


@pytest.mark.parametrize(
    "script",
    [
        Script(),
        Script(reasoning="inline", tokenize="llama"),
        Script(thinking_field="", completions=False, reasoning="reasoning"),
        Script(thinking_field="", completions=False, continues="none", tokenize="none"),
        Script(fail=0.2, hang=0.05, thinking_field=""),
        Script(reasoning="none"),
    ],
)
@pytest.mark.parametrize("stream", [True, False])
def test_the_account_is_the_endpoints_own(script, stream):
    result, endpoint, _ = ran(script, stream=stream, timeout_s=0.5)
    sums = endpoint.stats()
    assert result.usage.completion == sums["completion_tokens"]
    assert result.usage.prompt == sums["prompt_tokens"]
    assert sum(one.usage.completion for one in result.rounds) == result.usage.completion
    assert [len(one.done) for one in result.rounds] == [6, 6, 6]
    calls = sum(candidate.rollout.num_calls for one in result.rounds for candidate in one.done if candidate.rollout)
    assert calls == len(endpoint.requests)


@pytest.mark.parametrize("counting", ["server", "tokenizer", "llama", "estimate"])
def test_tails_stand_unchanged_in_the_prompts_of_those_who_drew_them(counting):
    script = Script(tokenize={"server": "vllm", "llama": "llama"}.get(counting, "none"))
    settings = {"tokenizer": scripted_tokenizer()} if counting == "tokenizer" else {}
    result, endpoint, capabilities = ran(script, **settings)
    assert capabilities.token_counting == ("server" if counting == "llama" else counting)
    prompts = [record["body"]["messages"][-1]["content"] for record in endpoint.requests if record["usage"]]
    scaffold = 400
    for before, after in zip(result.rounds, result.rounds[1:], strict=False):
        tails = {one.slot: one.tail for one in before.done}
        for one in before.done:
            assert one.rollout is not None
            assert one.tail is not None
            assert one.rollout.reasoning.endswith(one.tail.text)
            assert one.tail.is_exact == (counting != "estimate")
            if one.tail.is_exact:
                assert num_tokens(one.tail.text) == one.tail.num_tokens <= CONFIG.tau
        for one in after.done:
            drawn = [tails[parent] for parent in one.parents]
            assert len(drawn) == CONFIG.c
            assert any(all(tail is not None and tail.text in prompt for tail in drawn) for prompt in prompts)
    question = num_tokens(CONVERSATION[1]["content"])
    assert max(num_tokens(prompt) for prompt in prompts) <= question + CONFIG.c * CONFIG.tau + scaffold


def test_faults_change_nothing_where_seeds_are_honoured():
    undisturbed, _, _ = ran(Script())
    disturbed, endpoint, _ = ran(Script(fail=0.25, hang=0.05), timeout_s=0.5)
    assert endpoint.counts["failed"] > 0

    def told(result: RSAResult) -> list[Any]:
        return [(c.slot, c.parents, c.tail, c.rollout and c.rollout.content) for r in result.rounds for c in r.done]

    assert told(disturbed) == told(undisturbed)
    assert disturbed.answer.content == undisturbed.answer.content


@pytest.mark.parametrize("script", [Script(), Script(completions=False), Script(completions=False, continues="none")])
def test_delethink_over_http(script):
    """Each chunk is written on inside the reasoning, or after a quotation where that is not possible."""
    config = RSAConfig(n=2, c=1, t=3, beta=60, tau=20, final_budget=150, continuation="prefill", seed=2)
    result, endpoint, _ = ran(script, config)
    first = {one.slot: one for one in result.rounds[0].done}
    for one in result.rounds[1].done:
        assert one.parents == (one.slot,)
        if first[one.slot].rollout.is_closed:
            continue
        begun = first[one.slot].tail.text
        bodies = [record["body"] for record in endpoint.requests]
        texts = [str(message["content"]) for body in bodies for message in body.get("messages", ())]
        texts += [small_tokenizer().decode(body["prompt"]) for body in bodies if "prompt" in body]
        assert begun
        assert any(begun in text for text in texts)
    assert result.usage.completion == endpoint.stats()["completion_tokens"]
