"""One update against the textbook: every rollout by itself, the gradient written out."""

from __future__ import annotations

import copy
import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from openzaya.environments.base import Task
from openzaya.errors import TrainingError
from openzaya.model.config import preset
from openzaya.model.transformer import Zaya
from openzaya.rl.learner import Learner
from openzaya.rl.recipe import RLConfig
from openzaya.rl.rollout import Group, Order, Rollout

VOCAB = 61


def config(**values):
    base = {
        "model": {"start_from": "x"},
        "steps": 10,
        "prompts_per_step": 4,
        "sources": [{"name": "a", "environments": [{"kind": "problems"}]}],
        "rollout": {"group_size": 4},
        "window_tokens": 32,
        "windows_per_batch": 2,
    }
    return RLConfig(**(base | values))


def make_model(seed=3):
    return Zaya(preset("smoke").with_changes(vocab_size=VOCAB, eos_token_id=4), seed=seed)


def trainer_logprobs(model, prompt, tokens, experts):
    """(T) of the sampled tokens, one sequence, no packing."""
    whole = torch.from_numpy(np.concatenate([prompt, tokens])).long()[None]
    last = np.zeros((1, model.config.num_hidden_layers), dtype=np.uint8)
    logits = model(whole, forced_experts=torch.from_numpy(np.concatenate([experts, last]))[None])
    return logits.log_softmax(-1)[0, len(prompt) - 1 : -1].gather(1, whole[0, len(prompt) :, None])[:, 0]


def make_groups(model, rewards, seed=0, *, noise=0.1, version=0):
    """Groups whose sampler's log probabilities are the model's own with some noise."""
    rng = np.random.default_rng(seed)
    groups = []
    for number, row in enumerate(rewards):
        prompt = rng.integers(0, VOCAB, 5).astype(np.int32)
        rollouts = []
        for reward in row:
            tokens = rng.integers(0, VOCAB, int(rng.integers(2, 12))).astype(np.int32)
            experts = rng.integers(
                0, model.config.num_experts + 1, (len(prompt) + len(tokens) - 1, model.config.num_hidden_layers)
            ).astype(np.uint8)
            with torch.no_grad():
                logprobs = trainer_logprobs(model, prompt, tokens, experts).numpy()
            logprobs = np.minimum(logprobs + noise * rng.normal(size=len(tokens)), 0).astype(np.float32)
            versions = np.full(len(tokens), version, dtype=np.int32)
            rollouts.append(Rollout(tokens, logprobs, versions, experts, "", False, reward, reward))
        task = Task("addition", 1, number, [{"role": "user", "content": "?"}], {})
        groups.append(Group(Order(number, "a", "plain", task, len(row), number), prompt, rollouts))
    return groups


REWARDS = [[1.0, 0.0, 0.0, 1.0], [0.0, 1.0, None, 0.0], [1.0, 1.0, 1.0, 0.0]]


def captured_gradients(learner, groups, monkeypatch):
    """The gradients that reach the optimiser."""
    kept = {}

    def step(number):
        kept.update({name: p.grad.clone() for name, p in learner.model.named_parameters() if p.grad is not None})
        learner.optimizer.zero_grad()
        return {"optim/schedule_scale": 1.0}

    monkeypatch.setattr(learner.optimizer, "step", step)
    metrics = learner.update(groups, {})
    return kept, metrics


def test_gradient_is_the_textbook(monkeypatch):
    model = make_model()
    groups = make_groups(model, REWARDS)
    learner = Learner(copy.deepcopy(model), config(max_engine_trainer_kl=10))
    ours, metrics = captured_gradients(learner, groups, monkeypatch)
    loss = torch.zeros(())
    num_sequences = 0
    for group in groups:
        known = [rollout.reward for rollout in group.rollouts if rollout.reward is not None]
        mean = sum(known) / len(known)
        for rollout in group.rollouts:
            if rollout.reward is None:
                continue
            num_sequences += 1
            advantage = (rollout.reward - mean) / mean
            logprobs = trainer_logprobs(model, group.prompt_tokens, rollout.tokens, rollout.experts)
            for logprob, sampled in zip(logprobs, torch.from_numpy(rollout.logprobs), strict=True):
                p, q = float(logprob.detach().exp()), float(sampled.exp())
                if (advantage > 0 and p - q > 0.1) or (advantage < 0 and p - q < -0.1):
                    continue
                loss = loss - advantage * (p / q) * logprob
    # The denominator is the recipe's, 4 prompts of 4 rollouts, however many groups there are.
    (loss / 16).backward()
    assert metrics["rl/trained_rollouts"] == num_sequences == 11
    assert metrics["loss/policy"] == pytest.approx(float(loss.detach()) / 16, abs=1e-5)
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            torch.testing.assert_close(ours[name], parameter.grad, atol=1e-5, rtol=1e-4)


def test_micro_batches_do_not_change_the_gradient(monkeypatch):
    groups = make_groups(make_model(), REWARDS)
    found = []
    for windows in (1, 3, 100):
        learner = Learner(make_model(), config(windows_per_batch=windows, max_engine_trainer_kl=10))
        found.append(captured_gradients(learner, groups, monkeypatch)[0])
    for other in found[1:]:
        for name, gradient in found[0].items():
            torch.testing.assert_close(gradient, other[name], atol=1e-6, rtol=1e-4)


def test_an_update_makes_right_rollouts_likelier_and_wrong_ones_less():
    model = make_model()
    groups = make_groups(model, [[1.0, 0.0, 0.0, 1.0]], noise=0.0)
    learner = Learner(model, config(optimizer={"muon_learning_rate": 1e-3, "momentum": 0, "warmup_steps": 0}))

    def totals():
        with torch.no_grad():
            return [
                float(trainer_logprobs(model, groups[0].prompt_tokens, one.tokens, one.experts).sum())
                for one in groups[0].rollouts
            ]

    before = totals()
    learner.update(groups, {})
    moved = [after - start for after, start in zip(totals(), before, strict=True)]
    assert min(moved[0], moved[3]) > 0 > max(moved[1], moved[2])
    assert learner.step == 1


def test_muon_keeps_no_momentum_and_biases_stay():
    model = make_model()
    learner = Learner(model, config())
    biases = [buffer.clone() for name, buffer in model.named_buffers() if "balancing" in name]
    learner.update(make_groups(model, REWARDS, noise=0.0), {})
    assert not learner.optimizer.muon.state
    after = [buffer for name, buffer in model.named_buffers() if "balancing" in name]
    assert all(torch.equal(one, other) for one, other in zip(biases, after, strict=True))


def test_without_groups_nothing_changes_but_the_step():
    model = make_model()
    learner = Learner(model, config())
    before = copy.deepcopy(model.state_dict())
    metrics = learner.update([], {})
    assert learner.step == 1 and metrics["rl/trained_rollouts"] == 0
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def test_disagreement_on_the_same_weights_stops_the_run():
    model = make_model()
    with pytest.raises(TrainingError, match="nats a token apart"):
        Learner(model, config()).update(make_groups(model, REWARDS, noise=1.5), {})
    # Older weights may be as far away as they like: that is what the importance ratio is for.
    learner = Learner(make_model(), config())
    learner.step = 2
    metrics = learner.update(make_groups(model, REWARDS, noise=1.5, version=0), {})
    assert metrics["rl/engine_trainer_kl"] > 0.05 and "rl/on_policy_kl" not in metrics


def test_a_setting_of_the_optimiser_leaves_the_other_defaults_of_rl():
    one = config(optimizer={"muon_learning_rate": 1e-3}, balancing={"kind": "sign"})
    assert one.optimizer.model_copy(update={"muon_learning_rate": 2e-3}) == config().optimizer
    assert one.optimizer.momentum == one.optimizer.weight_decay == one.balancing.learning_rate == 0


def test_a_group_without_verdicts_is_worth_nothing():
    model = make_model()
    groups = make_groups(model, [[1.0, 0.0, 1.0, 1.0], [None] * 4], noise=0.0)
    groups[1] = replace(groups[1], order=replace(groups[1].order, source="broken"))
    settings = {"drop_equal_groups": False, "length": {"coefficient": 1.0, "final_coefficient": 1.0}}
    metrics = Learner(model, config(algorithm=settings)).update(groups, {"a/plain": 0.75})
    assert 0 < metrics["rl/trained_rollouts"] <= 4


def test_masked_shares_are_of_the_tokens_of_their_sign():
    model = make_model()
    groups = make_groups(model, [[1.0, 0.0, 0.0, 0.0], [1.0, 1.0, 1.0, 0.0]], noise=1.5)
    learner = Learner(copy.deepcopy(model), config(windows_per_batch=1, max_engine_trainer_kl=10))
    metrics = learner.update(groups, {})
    dropped = {1: [], -1: []}
    for group in groups:
        mean = sum(one.reward for one in group.rollouts) / len(group.rollouts)
        for rollout in group.rollouts:
            sign = 1 if rollout.reward > mean else -1
            p = trainer_logprobs(model, group.prompt_tokens, rollout.tokens, rollout.experts).detach().exp().numpy()
            dropped[sign] += (sign * (p - np.exp(rollout.logprobs)) > 0.1).tolist()
    assert sum(map(sum, dropped.values())) > 0
    assert metrics["rl/masked_share_positive"] == pytest.approx(np.mean(dropped[1]))
    assert metrics["rl/masked_share_negative"] == pytest.approx(np.mean(dropped[-1]))


def test_length_reward_prefers_the_shorter_of_two_right_rollouts():
    model = make_model()
    groups = make_groups(model, [[1.0, 1.0, 0.0, 0.0]], noise=0.0)
    settings = {"length": {"coefficient": 1.0, "final_coefficient": 1.0, "max_length": 20, "length_tolerance": 0}}
    learner = Learner(model, config(algorithm=settings))
    metrics = {}
    advantages = learner._advantages(groups, {"a/plain": 0.5}, metrics)[0].tolist()
    lengths = [len(one.tokens) for one in groups[0].rollouts]
    shorter = 0 if lengths[0] < lengths[1] else 1
    assert lengths[0] != lengths[1] and advantages[shorter] > advantages[1 - shorter] > 0
    assert math.isclose(sum(advantages), 0, abs_tol=1e-9) and metrics["rl/length_reward"] > 0


def test_state_continues():
    first, second = make_model(), make_model(seed=9)
    groups = make_groups(first, REWARDS, noise=0.0)
    one, other = Learner(first, config()), Learner(second, config())
    one.update(groups, {"a/plain": 0.4})
    other.load_state_dict(copy.deepcopy(one.state_dict()))
    following = make_groups(first, REWARDS, seed=5, noise=0.05, version=1)
    for learner in (one, other):
        learner.update(following, {"a/plain": 0.3})
    assert other.step == 2 and other.best_rates.update("a/plain", 0.0) == 0.4
    for name, tensor in first.state_dict().items():
        assert torch.equal(tensor, second.state_dict()[name]), name
