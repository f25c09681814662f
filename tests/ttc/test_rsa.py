"""Markovian RSA against a plain twin and against the definitions of its special cases."""

from __future__ import annotations

import asyncio
from collections import Counter
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from openzaya.data.aggregation import aggregation_prompt
from openzaya.errors import RSAError
from openzaya.ttc.completer import Usage
from openzaya.ttc.config import RSAConfig, make_config
from openzaya.ttc.cost import Budget
from openzaya.ttc.journal import MemoryJournal
from openzaya.ttc.rsa import markovian_rsa
from openzaya.ttc.subsets import canonical_order, derive_seed, draw_subsets
from tests.ttc.fake_completer import FakeCompleter, rollout_of, steps, words

QUESTION = "what is six times seven"
SMALL = RSAConfig(n=6, c=3, t=2, beta=12, tau=5, final_budget=40, answer_budget=10, seed=3)


def run(config, completer=None, messages=QUESTION, **more):
    completer = completer or FakeCompleter()
    result = asyncio.run(markovian_rsa(messages, completer, config, **more))
    return result, completer


def plain_twin(question, config):
    """The report's algorithm in its plainest form: texts of the reasoning of each round."""
    rounds = []
    tails = []
    for index in range(config.t + 1):
        is_final = index == config.t
        subsets = canonical_order(draw_subsets(config.n, config.c, config.seed, index)) if index else [[]] * config.n
        generation = []
        for slot in range(config.n):
            prompt = aggregation_prompt(question, [tails[i] for i in subsets[slot]]) if index else question
            seed = derive_seed(config.seed, question_digest(question), "rollout", index, slot, 0)
            generation.append((prompt, seed))
        rounds.append(generation)
        budget = config.final_budget if is_final else config.beta
        tails = [" ".join([f"s{seed}.{i}" for i in range(20)][:budget][-config.tau :]) for _, seed in generation]
    return rounds


def question_digest(text):
    from openzaya.ttc.rounds import Question

    return Question.of(text).digest


def test_equals_the_plain_twin():
    result, completer = run(SMALL)
    asked = [(call.messages[-1]["content"], call.seed) for call in completer.calls]
    expected = [call for generation in plain_twin(QUESTION, SMALL) for call in generation]
    assert asked == expected
    assert [len(one.candidates) for one in result.rounds] == [6, 6, 6]
    assert [one.is_final for one in result.rounds] == [False, False, True]


@settings(max_examples=40, derandomize=True, deadline=None)
@given(n=st.integers(1, 9), c=st.integers(1, 5), t=st.integers(0, 3), tau=st.integers(0, 30), beta=st.integers(1, 30))
def test_no_prompt_exceeds_the_bound_and_the_account_is_the_completers_own(n, c, t, tau, beta):
    config = SMALL.model_copy(update={"n": n, "c": c, "t": t, "tau": tau, "beta": beta})
    result, completer = run(config)
    scaffold = len(words(aggregation_prompt("", ["x"] * min(c, n))))
    for call in completer.calls:
        assert len(words(call.messages[-1]["content"])) <= len(words(QUESTION)) + min(c, n) * tau + scaffold
    total = Usage()
    for call in completer.calls:
        total += steps(call).usage
    assert result.usage == total
    assert sum(one.usage.completion for one in result.rounds) == total.completion


def test_tails_stand_unchanged_in_the_prompts_of_those_who_drew_them():
    result, completer = run(SMALL)
    for before, after in zip(result.rounds, result.rounds[1:], strict=False):
        for candidate in after.candidates:
            call = completer.calls[6 * after.index + candidate.slot]
            texts = [before.candidates[parent].tail.text for parent in candidate.parents]
            assert call.messages[-1]["content"] == aggregation_prompt(QUESTION, texts)
            assert all(text.split() == before.candidates[p].rollout.reasoning.split()[-5:] for text, p in
                       zip(texts, candidate.parents, strict=True))  # fmt: skip
    assert result.rounds[-1].candidates[0].tail is None


# --- special cases ------------------------------------------------------------------------------------


def test_t_0_is_parallel_sampling_with_the_final_budget():
    result, completer = run(SMALL.model_copy(update={"t": 0}))
    assert len(completer.calls) == 6 and len(result.rounds) == 1
    assert {call.max_tokens for call in completer.calls} == {40}
    assert {call.messages[-1]["content"] for call in completer.calls} == {QUESTION}
    assert len({call.seed for call in completer.calls}) == 6


def test_c_1_continues_its_own_tail():
    result, completer = run(SMALL.model_copy(update={"c": 1}))
    for one in result.rounds[1:]:
        assert [candidate.parents for candidate in one.candidates] == [(slot,) for slot in range(6)]
    last = completer.calls[-1].messages[-1]["content"]
    assert last == aggregation_prompt(QUESTION, [result.rounds[1].candidates[5].tail.text])


def test_tau_beta_is_full_chain_rsa():
    _, by_tau = run(SMALL.model_copy(update={"tau": 12}))
    result, by_name = run(SMALL.model_copy(update={"tau": 1, "compaction": "full"}))
    assert [call.messages for call in by_tau.calls] == [call.messages for call in by_name.calls]
    assert result.rounds[0].candidates[0].tail.text == result.rounds[0].candidates[0].rollout.reasoning


def test_pacore_hands_on_answers_and_narrows():
    config = make_config("pacore", {"widths": (5, 3, 1), "beta": 60, "tau": 9, "final_budget": 60, "answer_budget": 20})
    result, completer = run(config)
    assert [len(one.candidates) for one in result.rounds] == [5, 3, 1]
    for candidate in result.rounds[1].candidates:
        assert sorted(candidate.parents) == list(range(5)), "all messages of the round before"
    first = completer.calls[5].messages[-1]["content"]
    answers = [result.rounds[0].candidates[i].rollout.content for i in result.rounds[1].candidates[0].parents]
    assert first == aggregation_prompt(QUESTION, answers)
    assert "s0" not in first and result.selected == (result.rounds[2].candidates[0],)


def test_the_hybrid_hands_on_an_answer_where_there_is_one_and_else_the_tail():
    def script(call):
        is_closed = call.seed % 2 == 0 or call.thinking_budget is not None
        return rollout_of(" ".join(f"r{call.seed}.{i}" for i in range(9)), f"a{call.seed}", call, is_closed=is_closed)

    config = SMALL.model_copy(update={"carry": "answer_or_reasoning", "n": 12})
    result, _ = run(config, FakeCompleter(script))
    carried = {c.seed: c.tail.text for c in result.rounds[0].candidates}
    assert {seed % 2 for seed in carried} == {0, 1}
    for seed, text in carried.items():
        assert text == (f"a{seed}" if seed % 2 == 0 else " ".join(f"r{seed}.{i}" for i in range(4, 9)))


def test_answers_alone_skip_candidates_without_one():
    def script(call):
        is_closed = call.seed % 2 == 0 or call.thinking_budget is not None
        return rollout_of("r r r", f"a{call.seed}", call, is_closed=is_closed)

    result, _ = run(SMALL.model_copy(update={"carry": "answer", "n": 12}), FakeCompleter(script))
    with_answer = {c.slot for c in result.rounds[0].candidates if c.seed % 2 == 0}
    assert 0 < len(with_answer) < 12
    assert {p for c in result.rounds[1].candidates for p in c.parents} <= with_answer
    with pytest.raises(RSAError, match="nothing to carry"):
        run(SMALL.model_copy(update={"carry": "answer"}),
            FakeCompleter(lambda call: rollout_of("r", "", call, is_closed=False)))  # fmt: skip


def test_delethink_equals_its_definition():
    """Chunks: first beta tokens; then what was kept of the first chunk and the last tau tokens, and beta less those."""
    config = SMALL.model_copy(update={"c": 1, "continuation": "prefill", "kept_head": 2, "t": 3, "beta": 12})

    def endless(call):
        return rollout_of(" ".join(f"s{call.seed}.{i}" for i in range(99)), "done", call, is_closed=False)

    result, completer = run(config, FakeCompleter(endless))
    for slot in range(config.n):
        calls = completer.calls[slot :: config.n]
        first = trace = [f"s{calls[0].seed}.{i}" for i in range(12)]
        for index, call in enumerate(calls):
            assert call.messages[-1]["content"] == QUESTION
            assert words(call.prefill) == ([] if index == 0 else first[:2] + trace[-5:])
            expected = 40 if index == 3 else 12 if index == 0 else 12 - 7
            assert call.max_tokens == expected
            if index:
                trace = trace[-5:] + [f"s{call.seed}.{i}" for i in range(expected)]
    assert result.rounds[-1].is_final


def test_a_chain_of_delethink_that_has_ended_is_not_asked_again():
    config = SMALL.model_copy(update={"c": 1, "continuation": "prefill", "t": 2, "beta": 30})
    result, completer = run(config)
    assert len(completer.calls) == 6
    assert [c.rollout.content for c in result.rounds[2].candidates] == [
        c.rollout.content for c in result.rounds[0].candidates
    ]
    assert result.usage == result.rounds[0].usage


def test_system_prompt_history_tools_and_images_stay_and_the_format_binds_the_last_call_alone():
    image = {"type": "image_url", "image_url": {"url": "data:"}}
    messages = [
        {"role": "system", "content": "be brief"},
        {"role": "user", "content": "hello"},
        {"role": "assistant", "content": "hi"},
        {"role": "user", "content": [{"type": "text", "text": QUESTION}, image]},
    ]
    tools = [{"type": "function", "function": {"name": "f", "parameters": {}}}]
    final = {"response_format": {"type": "json_object"}}
    _, completer = run(SMALL, messages=messages, tools=tools, final=final)
    for index, call in enumerate(completer.calls):
        assert list(call.messages[:3]) == messages[:3] and list(call.tools) == tools
        assert call.final == (final if index >= 12 else {})
        assert image in call.messages[-1]["content"]
        assert call.thinking_budget == (30 if index >= 12 else None)
    _, completer = run(SMALL.model_copy(update={"select": "aggregate"}), messages=messages, final=final)
    assert [call.final == final for call in completer.calls] == [False] * 18 + [True]


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([], "no messages"),
        ("   ", "no text"),
        ([{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}], "ends with role 'assistant'"),
    ],
)
def test_what_is_no_question_is_refused(messages, message):
    with pytest.raises(RSAError, match=message):
        run(SMALL, messages=messages)


# --- faults and deviations ----------------------------------------------------------------------------


def failing(slots):
    """Fails every first attempt of these slots of round 0."""
    digest = question_digest(QUESTION)
    seeds = {derive_seed(SMALL.seed, digest, "rollout", 0, slot, 0) for slot in slots}
    return lambda call: call.seed in seeds


def test_refill_draws_a_failed_rollout_again():
    result, completer = run(SMALL, FakeCompleter(fails=failing({1, 4})))
    assert [c.status for c in result.rounds[0].candidates] == ["done"] * 6
    assert len(completer.calls) == 20


def test_a_round_goes_on_with_those_left():
    result, _ = run(SMALL.model_copy(update={"on_failure": "continue"}), FakeCompleter(fails=failing({1, 4})))
    assert [c.status for c in result.rounds[0].candidates] == ["done", "failed", "done", "done", "failed", "done"]
    assert "script" in result.rounds[0].candidates[1].error
    assert all(set(c.parents).isdisjoint({1, 4}) and len(c.parents) == 3 for c in result.rounds[1].candidates)


def test_a_round_without_any_result_is_an_error():
    with pytest.raises(RSAError, match=r"all 6 rollouts of round 0 failed.*script"):
        run(SMALL, FakeCompleter(fails=lambda call: True))


def test_asynchronous_rounds_draw_the_same():
    waiting, _ = run(SMALL)
    completer = FakeCompleter(delay=lambda call: (call.seed % 7) / 500)
    flowing, _ = run(SMALL.model_copy(update={"asynchronous": True}), completer)
    for one, other in zip(waiting.rounds, flowing.rounds, strict=True):
        assert one.candidates == other.candidates
    failed, _ = run(
        SMALL.model_copy(update={"asynchronous": True, "on_failure": "continue"}), FakeCompleter(fails=failing({2}))
    )
    assert all(2 not in c.parents and len(c.parents) == 3 for c in failed.rounds[1].candidates)


def test_early_stop_on_agreement():
    agreeing = FakeCompleter(lambda call: rollout_of("thinking", "42", call))
    result, completer = run(SMALL.model_copy(update={"early_stop": 0.9}), agreeing)
    assert len(result.rounds) == 1 and result.rounds[0].is_final and len(completer.calls) == 6
    assert "6 of 6" in result.stopped_early and result.to_dict()["deviations"] == ["early_stop"]
    result, _ = run(SMALL.model_copy(update={"early_stop": 1.0}))
    assert len(result.rounds) == 3 and result.stopped_early is None


def test_a_quorum_ends_a_round_and_cancels_the_rest():
    digest = question_digest(QUESTION)
    slow = {derive_seed(SMALL.seed, digest, "rollout", index, 0, 0) for index in range(3)}
    completer = FakeCompleter(delay=lambda call: 60.0 if call.seed in slow else 0.0)
    result, _ = run(SMALL.model_copy(update={"quorum": 0.8}), completer)
    assert result.rounds[0].candidates[0].status == "cancelled"
    assert all(0 not in c.parents for c in result.rounds[1].candidates)
    assert completer.num_running == 0


def test_cancelling_the_run_ends_its_calls():
    completer = FakeCompleter(delay=lambda call: 60.0)

    async def cancelled():
        task = asyncio.ensure_future(markovian_rsa(QUESTION, completer, SMALL))
        while completer.num_running < 6:
            await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        return len(asyncio.all_tasks())

    assert asyncio.run(cancelled()) == 1
    assert completer.num_running == 0


def test_a_limiter_bounds_all_problems_together():
    completer = FakeCompleter(delay=lambda call: 0.001)

    async def several():
        limiter = asyncio.Semaphore(4)
        return await asyncio.gather(
            *(markovian_rsa(f"{QUESTION} {i}", completer, SMALL, limiter=limiter) for i in range(3))
        )

    results = asyncio.run(several())
    assert completer.most_running == 4 and len(completer.calls) == 54
    assert len({call.seed for call in completer.calls}) == 54, "problems do not share their seeds"
    assert [len(result.rounds) for result in results] == [3, 3, 3]


# --- selection and scores -----------------------------------------------------------------------------


def answering(answers):
    """The final round's slots give these answers."""
    digest = question_digest(QUESTION)
    by_seed = {derive_seed(SMALL.seed, digest, "rollout", 2, slot, 0): text for slot, text in enumerate(answers)}
    return FakeCompleter(lambda call: rollout_of("so", by_seed.get(call.seed, "0"), call))


def test_selections():
    completer = answering(["7", "8", "8", "9", "8", "7"])
    result, _ = run(SMALL, completer)
    assert [c.slot for c in result.selected] == [1] and result.answer.content == "8"
    result, _ = run(SMALL.model_copy(update={"select": "all"}), completer)
    assert [c.slot for c in result.selected] == list(range(6))
    result, _ = run(SMALL.model_copy(update={"select": "random"}), completer)
    assert len(result.selected) == 1

    def verifier(rollout):
        return {"9": 1.0, "7": None}.get(rollout.content, 0.0)

    result, _ = run(SMALL.model_copy(update={"select": "verifier"}), completer, verifier=verifier)
    assert result.answer.content == "9" and result.score == 0.25, "no verdict counts for nothing"
    with pytest.raises(RSAError, match="needs a verifier"):
        run(SMALL.model_copy(update={"select": "verifier"}), completer)


def test_self_aggregation_is_one_call_more():
    result, completer = run(SMALL.model_copy(update={"select": "aggregate"}))
    assert len(completer.calls) == 19
    texts = [" ".join(words(result.rounds[2].candidates[c.slot].rollout.reasoning)[-5:]) for c in result.selected]
    assert completer.calls[-1].messages[-1]["content"] == aggregation_prompt(QUESTION, texts)
    assert result.answer == steps(completer.calls[-1])
    assert result.usage.completion == sum(steps(call).usage.completion for call in completer.calls)


def test_events_tell_the_whole_story():
    events = []
    result, _ = run(SMALL, on_event=events.append)
    kinds = Counter(event.kind for event in events)
    assert kinds == {"started": 1, "launched": 18, "candidate": 18, "round": 3, "selected": 1}
    finished = {(e.round_index, e.slot): e.candidate for e in events if e.kind == "candidate"}
    for one in result.rounds:
        for candidate in one.candidates:
            assert replace(finished[one.index, candidate.slot], answer=candidate.answer) == candidate


def test_a_run_that_is_begun_again_repeats_nothing():
    journal = MemoryJournal()
    config = SMALL.model_copy(update={"select": "aggregate"})
    first, completer = run(config, journal=journal)
    assert len(completer.calls) == 19
    again, idle = run(config, journal=journal)
    assert idle.calls == [] and all(c.is_resumed for one in again.rounds for c in one.candidates)
    assert [[replace(c, is_resumed=False) for c in one.candidates] for one in again.rounds] == [
        list(one.candidates) for one in first.rounds
    ]
    assert again.answer == first.answer
    _, other = run(config.model_copy(update={"seed": 4}), journal=journal)
    assert len(other.calls) == 19


def test_a_cap_is_never_exceeded_and_the_run_ends_with_what_there_is():
    cap = run(SMALL)[0].usage.completion * 6 // 10
    result, completer = run(SMALL, budget=Budget(max_tokens=cap))
    last = result.rounds[-1]
    assert last.is_final and (last.index < 2 or any(c.status == "cancelled" for c in last.candidates))
    assert result.stopped_early and result.usage.completion <= cap
    assert len(completer.calls) == sum(len(one.done) for one in result.rounds)
    with pytest.raises(RSAError, match="round 0"):
        run(SMALL, budget=Budget(max_tokens=3))
