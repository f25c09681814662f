"""Packed policy batches against each sequence by itself, and the trainer's log probabilities against plain softmax."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from openzaya.environments.base import Task
from openzaya.errors import DataError
from openzaya.model.config import preset
from openzaya.model.transformer import Zaya
from openzaya.rl.batch import PolicySequence, make_batches
from openzaya.rl.collect import pack_group, unpack_group
from openzaya.rl.learner import policy_logprobs
from openzaya.rl.rollout import Group, Order, Rollout
from openzaya.train.loss import linear_token_logprobs


@pytest.fixture(scope="module")
def model():
    config = preset("smoke").with_changes(vocab_size=61, eos_token_id=4)
    return Zaya(config, seed=3)


def make_sequences(model, num=7, seed=0, *, with_experts=True):
    rng = np.random.default_rng(seed)
    layers, classes = model.config.num_hidden_layers, model.config.num_experts + 1
    sequences = []
    for index in range(num):
        num_prompt, num_sampled = int(rng.integers(1, 9)), int(rng.integers(1, 14))
        experts = rng.integers(0, classes, (num_prompt + num_sampled - 1, layers)).astype(np.uint8)
        rollout = Rollout(
            tokens=rng.integers(0, 61, num_sampled).astype(np.int32),
            logprobs=-rng.random(num_sampled).astype(np.float32),
            versions=np.full(num_sampled, index, dtype=np.int32),
            experts=experts if with_experts else None,
            text="",
            is_truncated=False,
            verdict=1.0,
            reward=1.0,
        )
        prompt = rng.integers(0, 61, num_prompt).astype(np.int32)
        sequences.append(PolicySequence(prompt, rollout, float(rng.normal())))
    return sequences


def alone(model, sequence, *, replay):
    """Log probabilities of a sequence's sampled tokens, by the textbook."""
    tokens = torch.from_numpy(np.concatenate([sequence.prompt_tokens, sequence.rollout.tokens])).long()[None]
    forced = None
    if replay:
        last = np.zeros((1, model.config.num_hidden_layers), dtype=np.uint8)
        forced = torch.from_numpy(np.concatenate([sequence.rollout.experts, last]))[None]
    logits = model(tokens, forced_experts=forced)
    start = len(sequence.prompt_tokens)
    return logits.log_softmax(-1)[0, start - 1 : -1].gather(1, tokens[0, start:, None])[:, 0]


@pytest.mark.parametrize("replay", [True, False])
@pytest.mark.parametrize("windows_per_batch", [1, 2, 50])
def test_packed_is_separate(model, replay, windows_per_batch):
    sequences = make_sequences(model)
    found = {}
    for batch in make_batches(sequences, window_tokens=24, windows_per_batch=windows_per_batch, replay_experts=replay):
        logprobs, _ = policy_logprobs(model, batch)
        versions = batch.of_next(batch.versions)
        for index in versions.unique().tolist():
            rows = versions == index
            found[index] = (
                logprobs[rows],
                batch.of_next(batch.sampler_logprobs)[rows],
                batch.of_next(batch.advantages)[rows],
                batch.of_next(batch.tokens)[rows],
            )
    assert sorted(found) == list(range(len(sequences)))
    for index, sequence in enumerate(sequences):
        logprobs, sampler, advantages, tokens = found[index]
        torch.testing.assert_close(logprobs, alone(model, sequence, replay=replay), atol=1e-5, rtol=1e-5)
        assert sampler.tolist() == sequence.rollout.logprobs.tolist()
        assert tokens.tolist() == sequence.rollout.tokens.tolist()
        assert advantages.tolist() == [np.float32(sequence.advantage)] * len(tokens)


def test_replay_changes_the_forward_pass(model):
    sequence = make_sequences(model, 1)[0]
    [batch] = make_batches([sequence], window_tokens=64, windows_per_batch=1, replay_experts=True)
    [live] = make_batches([sequence], window_tokens=64, windows_per_batch=1, replay_experts=False)
    assert not torch.allclose(policy_logprobs(model, batch)[0], policy_logprobs(model, live)[0], atol=1e-4)


def test_router_learns_under_replay(model):
    """The gate of a replayed choice is the live router's probability: its gradient must not vanish."""
    [batch] = make_batches(make_sequences(model), window_tokens=200, windows_per_batch=1, replay_experts=True)
    policy_logprobs(model, batch)[0].sum().backward()
    gradients = [p.grad.abs().max() for name, p in model.named_parameters() if ".gate." in name and p.grad is not None]
    model.zero_grad()
    assert gradients and max(gradients) > 0


def test_last_tokens_were_never_run(model):
    sequences = make_sequences(model)
    batches = list(make_batches(sequences, window_tokens=24, windows_per_batch=2, replay_experts=True))
    assert sum(int(batch.was_run_N.sum()) for batch in batches) == sum(one.num_tokens - 1 for one in sequences)
    for batch in batches:
        ends = batch.document_ids >= 0
        ends[:, :-1] &= batch.document_ids[:, 1:] != batch.document_ids[:, :-1]
        assert not batch.was_run_N.reshape(ends.shape)[ends].any()
        assert not batch.was_run_N.reshape(ends.shape)[batch.document_ids < 0].any()


def test_refuses_what_does_not_fit(model):
    sequences = make_sequences(model)
    with pytest.raises(DataError, match="window_tokens"):
        list(make_batches(sequences, window_tokens=5, windows_per_batch=1, replay_experts=True))
    bare = make_sequences(model, with_experts=False)
    with pytest.raises(DataError, match="replay_experts"):
        list(make_batches(bare, window_tokens=64, windows_per_batch=1, replay_experts=True))
    mixed = [*sequences[:1], *bare[1:]]
    with pytest.raises(DataError, match="recorded experts None"):
        list(make_batches(mixed, window_tokens=64, windows_per_batch=1, replay_experts=True))


@pytest.mark.parametrize("num_tokens", [1, 511, 512, 513, 1300])
def test_token_logprobs_are_log_softmax(num_tokens):
    generator = torch.Generator().manual_seed(num_tokens)
    hidden = torch.randn(num_tokens, 16, generator=generator, dtype=torch.float32, requires_grad=True)
    head = torch.randn(53, 16, generator=generator, requires_grad=True)
    targets = torch.randint(0, 53, (num_tokens,), generator=generator)
    weights = torch.randn(num_tokens, generator=generator)
    logprobs, entropies = linear_token_logprobs(hidden, head, targets)
    ours = torch.autograd.grad((logprobs * weights).sum(), (hidden, head))
    plain = (hidden @ head.T).log_softmax(-1)
    expected = plain.gather(1, targets[:, None])[:, 0]
    theirs = torch.autograd.grad((expected * weights).sum(), (hidden, head), retain_graph=True)
    torch.testing.assert_close(logprobs, expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(entropies, -(plain.exp() * plain).sum(1).detach(), atol=1e-5, rtol=1e-5)
    for gradient, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(gradient, other, atol=1e-4, rtol=1e-5)


def test_groups_survive_packing(model):
    task = Task("addition", 3, 7, [{"role": "user", "content": "1+1"}], {"a": [1, 2]})
    sequences = make_sequences(model, 3)
    order = Order(5, "reasoning", "tails", task, 3, 99)
    group = Group(order, sequences[0].prompt_tokens, [sequence.rollout for sequence in sequences], 1.5)
    again = unpack_group(pack_group(group))
    assert again.order == order and again.seconds == 1.5 and again.solve_rate == 1
    for before, after in zip(group.rollouts, again.rollouts, strict=True):
        assert (before.tokens == after.tokens).all() and (before.experts == after.experts).all()
        assert before.logprobs.dtype == after.logprobs.dtype and before.reward == after.reward
