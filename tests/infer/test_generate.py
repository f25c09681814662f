"""Cached, batched generation equals the naive loop; a row's tokens belong to its prompt and seed alone."""

from __future__ import annotations

import random

import pytest
import torch

from openzaya.errors import DataError
from openzaya.infer import loop as loop_module
from openzaya.infer.generate import Completion, generate, stream
from openzaya.infer.sampling import SamplingParams, draw, uniforms
from openzaya.model.transformer import Zaya
from tests.model.reference import TINY, perturb

GREEDY = {"temperature": 0.0}


@pytest.fixture(scope="module")
def model() -> Zaya:
    """Random weights that give varied text, in which the EOS token comes up now and then."""
    made = Zaya(TINY, seed=0)
    perturb(made, torch.Generator().manual_seed(0))
    return made


def prompts(num: int, lengths: tuple[int, int] = (1, 30), seed: int = 0) -> list[list[int]]:
    draw_number = random.Random(seed)
    return [
        [draw_number.randrange(5, TINY.vocab_size) for _ in range(draw_number.randint(*lengths))] for _ in range(num)
    ]


@torch.inference_mode()
def naive(model: Zaya, prompt: list[int], params: SamplingParams) -> Completion:
    """No cache, no batch: the whole sequence again for every token."""
    tokens: list[int] = []
    numbers = uniforms([params.seed], params.max_new_tokens)
    for step in range(min(params.max_new_tokens, model.config.max_position_embeddings - len(prompt))):
        logits = model(torch.tensor([[*prompt, *tokens]]))[:, -1]
        token = int(draw(logits, params, numbers[:, step]))
        if token == model.config.eos_token_id:
            return Completion(tokens, "stop")
        tokens.append(token)
    return Completion(tokens, "length")


def test_greedy_generation_is_the_naive_loop_for_ragged_prompts(model: Zaya) -> None:
    asked = prompts(12)
    params = SamplingParams(**GREEDY, max_new_tokens=12)
    found = generate(model, asked, params)
    assert [row[0] for row in found] == [naive(model, prompt, params) for prompt in asked]
    assert len({tuple(row[0].tokens) for row in found}) > 6, "the model repeats itself: the test shows too little"


def test_sampled_generation_is_the_naive_loop_with_the_row_s_seed(model: Zaya) -> None:
    asked = prompts(6)
    params = SamplingParams(temperature=1.5, top_p=0.98, max_new_tokens=16, seed=100)
    found = generate(model, asked, params, num_samples=3)
    reasons = set()
    for index, prompt in enumerate(asked):
        for sample, completion in enumerate(found[index]):
            assert completion == naive(model, prompt, params.model_copy(update={"seed": 100 + 3 * index + sample}))
            reasons.add(completion.finish_reason)
    assert reasons == {"stop", "length"}


@pytest.mark.parametrize("max_rows", [1, 2, 3, 7, 256])
def test_the_batch_does_not_show_in_the_tokens(model: Zaya, max_rows: int) -> None:
    asked = prompts(7)
    params = SamplingParams(temperature=1.0, top_p=1.0, max_new_tokens=10, seed=7)
    whole = generate(model, asked, params, num_samples=3)
    assert generate(model, asked, params, num_samples=3, max_rows=max_rows) == whole


@pytest.fixture
def widths(monkeypatch) -> list[int]:
    """How many rows got a token, step by step."""
    seen: list[int] = []
    plain = loop_module.choose

    def recording(logits_BV, states):
        seen.append(len(states))
        return plain(logits_BV, states)

    monkeypatch.setattr(loop_module, "choose", recording)
    return seen


def test_no_more_rows_are_decoded_together_than_asked(model: Zaya, widths: list[int]) -> None:
    found = generate(model, prompts(3), SamplingParams(max_new_tokens=2), num_samples=10, max_rows=4)
    assert max(widths) == 4 and sum(widths) >= 30
    assert [len(row) for row in found] == [10, 10, 10]


def test_other_prompts_and_their_order_do_not_show(model: Zaya) -> None:
    """A row keeps its seed by its place in the list, so the same places are compared."""
    asked = prompts(6)
    params = SamplingParams(temperature=1.0, top_p=1.0, max_new_tokens=10, seed=3)
    alone = [
        list(stream(model, prompt, params.model_copy(update={"seed": 3 + index}))) for index, prompt in enumerate(asked)
    ]
    others = prompts(6, (1, 60), seed=9)
    for kept in range(6):
        mixed = [prompt if index == kept else others[index] for index, prompt in enumerate(asked)]
        assert generate(model, mixed, params)[kept][0].tokens == alone[kept]
    assert [row[0].tokens for row in generate(model, asked, params)] == alone


def test_stream_is_generate(model: Zaya) -> None:
    for index, prompt in enumerate(prompts(5)):
        params = SamplingParams(temperature=1.2, top_p=0.95, max_new_tokens=15, seed=index)
        assert list(stream(model, prompt, params)) == generate(model, [prompt], params)[0][0].tokens


def test_forks_are_separate_runs(model: Zaya) -> None:
    prompt = prompts(1)[0]
    params = SamplingParams(temperature=1.0, top_p=1.0, max_new_tokens=20, seed=40)
    forks = generate(model, [prompt], params, num_samples=6)[0]
    separate = [generate(model, [prompt], params.model_copy(update={"seed": 40 + j}))[0][0] for j in range(6)]
    assert forks == separate
    assert len({tuple(completion.tokens) for completion in forks}) == 6


def test_the_end_of_a_text_stops_its_row_alone(model: Zaya) -> None:
    params = SamplingParams(temperature=1.5, top_p=1.0, max_new_tokens=30)
    found = [completion for row in generate(model, prompts(4), params, num_samples=16) for completion in row]
    eos = model.config.eos_token_id
    assert all(eos not in completion.tokens for completion in found)
    stopped = [completion for completion in found if completion.finish_reason == "stop"]
    assert all(len(completion.tokens) == 30 for completion in found if completion not in stopped)
    assert 0 < len(stopped) < len(found)
    assert len({len(completion.tokens) for completion in stopped}) > 3


def test_rows_that_are_done_leave_the_batch(model: Zaya, widths: list[int]) -> None:
    params = SamplingParams(temperature=1.5, top_p=1.0, max_new_tokens=40)
    found = [completion for row in generate(model, prompts(5), params, num_samples=8) for completion in row]
    assert widths[0] == 40 and widths == sorted(widths, reverse=True)
    # One number a token, and one for the token that ends a text.
    assert sum(widths) == sum(len(row.tokens) + (row.finish_reason == "stop") for row in found)
    assert len(set(widths)) > 5


@pytest.mark.parametrize("max_new_tokens", [1, 2, 9])
def test_max_new_tokens_is_a_limit(model: Zaya, max_new_tokens: int) -> None:
    params = SamplingParams(**GREEDY, max_new_tokens=max_new_tokens)
    for row in generate(model, prompts(6), params):
        assert len(row[0].tokens) == max_new_tokens or row[0].finish_reason == "stop"


def test_the_positions_end_each_row_by_its_own_prompt(model: Zaya) -> None:
    """A short prompt beside a long one keeps all its room: padding takes none of it."""
    limit = model.config.max_position_embeddings
    asked = [prompts(1, (limit - 3, limit - 3))[0], prompts(1, (limit - 1, limit - 1))[0], prompts(1, (2, 2))[0]]
    params = SamplingParams(**GREEDY, max_new_tokens=12)
    found = [row[0] for row in generate(model, asked, params)]
    assert found == [naive(model, prompt, params) for prompt in asked]
    assert all(
        len(completion.tokens) == room or completion.finish_reason == "stop"
        for completion, room in zip(found, (3, 1, 12), strict=True)
    )


@pytest.mark.parametrize("length", [0, TINY.max_position_embeddings, TINY.max_position_embeddings + 50])
def test_a_prompt_that_cannot_go_on_is_refused(model: Zaya, length: int) -> None:
    with pytest.raises(DataError, match=f"{length} tokens.*at least 1 and fewer than the model's 128 positions"):
        generate(model, [[5, 6], [7] * length], SamplingParams())
    with pytest.raises(DataError, match=f"{length} tokens.*at least 1 and fewer than the model's 128 positions"):
        next(stream(model, [7] * length, SamplingParams()))


def test_a_token_outside_the_vocabulary_is_refused(model: Zaya) -> None:
    with pytest.raises(DataError, match="the vocabulary holds 48"):
        generate(model, [[5, 48]], SamplingParams())


def test_no_prompts_give_no_completions(model: Zaya) -> None:
    assert generate(model, [], SamplingParams()) == []


def test_progress_counts_prompts_and_tokens(model: Zaya) -> None:
    calls: list[tuple[int, int]] = []
    params = SamplingParams(temperature=1.0, max_new_tokens=5)
    found = generate(
        model, prompts(7), params, num_samples=2, max_rows=4, progress=lambda done, tokens: calls.append((done, tokens))
    )
    assert [done for done, _ in calls] == list(range(1, 8))
    assert calls[-1][1] == sum(len(completion.tokens) for row in found for completion in row)


def test_bfloat16_generates_and_repeats_itself(model: Zaya) -> None:
    rounded = Zaya(TINY, seed=0)
    rounded.load_state_dict(model.state_dict())
    rounded.to(torch.bfloat16)
    asked = prompts(3, (9, 9))
    found = generate(rounded, asked, SamplingParams(**GREEDY, max_new_tokens=4))
    assert all(len(row[0].tokens) == 4 or row[0].finish_reason == "stop" for row in found)
    assert generate(rounded, asked, SamplingParams(**GREEDY, max_new_tokens=4)) == found
