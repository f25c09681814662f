"""RSA through the engine in this process: budgets, tails, accounts, constraints, cancelling."""

from __future__ import annotations

import asyncio
import json
from dataclasses import replace

import pytest

from openzaya.data.tokenizer import train_tokenizer
from openzaya.errors import CompletionFailed, RSAError
from openzaya.infer.engine import Engine
from openzaya.model.config import ZayaConfig
from openzaya.model.transformer import Zaya
from openzaya.ttc.completer import Call
from openzaya.ttc.config import RSAConfig, RSASampling
from openzaya.ttc.engine_completer import EngineCompleter
from openzaya.ttc.rsa import markovian_rsa

CONFIG = RSAConfig(n=5, c=2, t=2, beta=12, tau=6, final_budget=40, answer_budget=24, prompt_style="short", seed=2)
QUESTION = "What is six times seven?"
WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "parameters": {
            "type": "object",
            "properties": {"day": {"type": "integer", "minimum": 1, "maximum": 7}},
            "required": ["day"],
            "additionalProperties": False,
        },
    },
}


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(["What is six times seven? The answer is forty-two, so let us say it.\n\n  x = 42"] * 4, 320)


@pytest.fixture(scope="module")
def engine(tokenizer):
    config = ZayaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        moe_intermediate_size=32,
        num_experts=4,
        max_position_embeddings=1024,
        eos_token_id=tokenizer.eos_token_id,
    )
    with Engine(Zaya(config, seed=1), tokenizer, max_running=16) as engine:
        yield engine


def run(engine, config=CONFIG, messages=QUESTION, **more):
    return asyncio.run(markovian_rsa(messages, EngineCompleter(engine), config, **more))


def test_budgets_tails_and_account(engine, tokenizer):
    before = engine.stats()
    result = run(engine)
    for one in result.rounds:
        for candidate in one.candidates:
            rollout = candidate.rollout
            assert rollout.usage.completion <= (40 if one.is_final else 12)
            if one.is_final:
                assert rollout.is_closed and rollout.usage.reasoning <= 20 + 2, "two tags"
            else:
                source = rollout.reasoning or rollout.content
                ids = tokenizer(source, add_special_tokens=False)["input_ids"]
                assert candidate.tail.is_exact and candidate.tail.num_tokens <= 6
                assert source.endswith(candidate.tail.text)
                expected = str(tokenizer.decode(ids[-6:]))
                assert candidate.tail.text == expected or "\ufffd" in expected
    after = engine.stats()
    ended = sum(c.rollout.finish_reason == "stop" for one in result.rounds for c in one.candidates)
    # The engine counts the end-of-turn token that it chose; it is no part of the text.
    assert result.usage.completion <= after.tokens_generated - before.tokens_generated
    assert after.tokens_generated - before.tokens_generated <= result.usage.completion + ended
    run_tokens = after.prompt_tokens - before.prompt_tokens
    assert result.usage.prompt - result.usage.cached == run_tokens
    assert after.num_running == 0 and after.blocks_free == after.blocks_total


def test_the_result_does_not_depend_on_what_runs_together(engine):
    together = run(engine)
    alone = run(engine, limiter=asyncio.Semaphore(1))
    for one, other in zip(together.rounds, alone.rounds, strict=True):
        for left, right in zip(one.candidates, other.candidates, strict=True):
            assert replace(left.rollout, seconds=0, usage=None) == replace(right.rollout, seconds=0, usage=None)
            assert (left.tail, left.parents) == (right.tail, right.parents)


def test_a_tight_queue_is_waited_for(tokenizer, engine):
    with Engine(engine._model, tokenizer, max_running=2, max_waiting=1) as small:
        assert len(run(small).rounds[-1].done) == 5


def test_cancelling_frees_the_engine(engine):
    async def cancelled():
        config = CONFIG.model_copy(update={"beta": 400})
        task = asyncio.ensure_future(markovian_rsa(QUESTION, EngineCompleter(engine), config))
        while engine.stats().num_running == 0:
            await asyncio.sleep(0.001)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        for _ in range(500):
            if engine.stats().num_running == 0:
                break
            await asyncio.sleep(0.01)
        return engine.stats()

    stats = asyncio.run(cancelled())
    assert stats.num_running == stats.num_waiting == 0 and stats.blocks_free == stats.blocks_total


def test_a_schema_binds_the_final_answer_alone(engine):
    schema = {
        "type": "object",
        "properties": {"x": {"enum": [1, 2, 3]}},
        "required": ["x"],
        "additionalProperties": False,
    }
    final = {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}}
    result = run(engine, final=final)
    for candidate in result.rounds[-1].candidates:
        assert json.loads(candidate.rollout.content)["x"] in (1, 2, 3)
    assert not any(c.rollout.content.strip().startswith("{") for c in result.rounds[0].candidates)


def test_a_forced_tool_call_is_made_in_the_final_round_alone(engine):
    result = run(engine, CONFIG.model_copy(update={"final_budget": 600, "answer_budget": 300}), tools=[WEATHER],
                 final={"tool_choice": "required", "parallel_tool_calls": False})  # fmt: skip
    for candidate in result.rounds[-1].candidates:
        [call] = candidate.rollout.tool_calls
        assert candidate.rollout.finish_reason == "tool_calls"
        assert call["function"]["name"] == "weather" and json.loads(call["function"]["arguments"])["day"] in range(1, 8)
    assert not any(c.rollout.tool_calls for c in result.rounds[0].candidates)


def test_prefill_goes_on_inside_the_reasoning(engine):
    config = CONFIG.model_copy(update={"c": 1, "continuation": "prefill", "kept_head": 2})
    result = run(engine, config)
    assert [c.parents for c in result.rounds[1].candidates] == [(slot,) for slot in range(5)]
    call = Call(({"role": "user", "content": QUESTION},), 4, RSASampling(temperature=0), 0, prefill="so let us say")
    rollout = asyncio.run(EngineCompleter(engine).complete(call))
    plain = asyncio.run(EngineCompleter(engine).complete(replace(call, prefill="")))
    assert rollout.usage.prompt > plain.usage.prompt and rollout.usage.completion == 4
    assert not rollout.is_closed and rollout.usage.reasoning == 4
    completer = EngineCompleter(engine)
    assert completer._split(call, [], "\nand so on</think>\n\n42") == ("\nand so on", "42", True)


def test_what_cannot_be_run_is_a_failed_rollout(engine, tokenizer):
    call = Call(({"role": "user", "content": "a " * 5000},), 4, RSASampling(), 0)
    with pytest.raises(CompletionFailed, match="1024"):
        asyncio.run(EngineCompleter(engine).complete(call))
    with pytest.raises(RSAError, match=r"all 5 rollouts of round 0 failed.*1024"):
        run(engine, messages="a " * 5000)
    with (
        Engine(Zaya(engine.config, seed=0)) as without_tokenizer,
        pytest.raises(RSAError, match="no tokenizer"),
    ):
        EngineCompleter(without_tokenizer)
