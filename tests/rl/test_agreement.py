"""The trainer's log probabilities against the engine's, token by token, on models that route every which way."""

from __future__ import annotations

import random
import time

import numpy as np
import pytest
import torch

from openzaya.environments.base import Environment, Task
from openzaya.model.transformer import Zaya
from openzaya.problems.base import Verdict
from openzaya.rl.batch import PolicyBatch, PolicySequence, make_batches
from openzaya.rl.learner import policy_logprobs
from openzaya.rl.loss import agreement
from openzaya.rl.pool import RolloutEngine
from openzaya.rl.rollout import Order, RolloutConfig, order_seed
from tests.infer.miniature import make_model
from tests.model.reference import TINY
from tests.rl.letters import tokenizer

GROUP, NEW_TOKENS = 3, 24


class TextEnvironment(Environment):
    """Ragged prompts; every other one begins alike, so that the prefix cache takes part."""

    name = "text"

    def task(self, difficulty, number):
        draw = random.Random(number)
        letters = "abcdefghijklmnopqrstuvwxyz 0123456789"
        own = "".join(draw.choice(letters) for _ in range(draw.choice((1, 2, 9, 30, 90))))
        shared = "the beginning that all of these have in common, long enough for several blocks of the cache "
        return Task(self.name, difficulty, number, [{"role": "user", "content": shared * (number % 2) + own}], None)

    def verify(self, task, response):
        return Verdict(1.0, "")


def policy(seed=0, sharpness=1.0):
    """``sharpness`` scales the logits."""
    tokens = tokenizer()
    changes = {"vocab_size": len(tokens), "eos_token_id": tokens.eos_token_id, "max_position_embeddings": 512}
    model = copy_of(make_model(seed, TINY.with_changes(**changes)))
    with torch.no_grad():
        model.get_parameter("model.norm.weight").mul_(sharpness)
    return model


def copy_of(model, dtype=torch.float32):
    copied = Zaya(model.config, seed=0)
    copied.load_state_dict(model.state_dict())
    return copied.to(dtype).eval()


def make_engine(model, *, dtype=torch.float32, new_tokens=NEW_TOKENS, **settings):
    config = RolloutConfig(group_size=GROUP, max_new_tokens=new_tokens, max_running=16)
    return RolloutEngine(
        copy_of(model, dtype), tokenizer(), {"a": {"text": TextEnvironment()}}, config, engine_settings=settings
    )


def orders(numbers):
    environment = TextEnvironment()
    return [
        Order(number, "a", "plain", environment.task(0, number), GROUP, order_seed(5, number)) for number in numbers
    ]


def collect(engine, num):
    groups = []
    while len(groups) < num:
        groups += engine.finished(timeout_s=120)
    return groups


def sequences_of(groups):
    return [PolicySequence(one.prompt_tokens, rollout, 1.0) for one in groups for rollout in one.rollouts]


def roll_out(model, num=12, **settings):
    """Sequences, and how many prompt tokens came from the prefix cache."""
    engine = make_engine(model, **settings)
    try:
        engine.start(orders(range(num)))
        return sequences_of(collect(engine, num)), engine._engine.stats().cached_tokens
    finally:
        engine.close()


@torch.no_grad()
def compare(model, sequences, *, replay=True, version=None):
    """Engine against trainer over all sampled tokens, or those of one version."""
    ours, theirs, chosen = [], [], []
    for batch in make_batches(sequences, window_tokens=384, windows_per_batch=4, replay_experts=True):
        asked = batch if replay else PolicyBatch(**{**vars(batch), "experts": None})
        ours.append(policy_logprobs(model, asked)[0].float())
        theirs.append(batch.of_next(batch.sampler_logprobs))
        versions = batch.of_next(batch.versions)
        chosen.append(torch.ones_like(versions, dtype=torch.bool) if version is None else versions == version)
    return agreement(torch.cat(ours), torch.cat(theirs), torch.cat(chosen))


def assert_same(found, num_at_least):
    assert found.num_tokens >= num_at_least
    assert found.kl_nats <= 1e-8 and found.largest_gap_nats <= 1e-4, found


@pytest.mark.parametrize("seed", [0, 1])
def test_fp32_agrees_on_ragged_prompts_and_prefix_hits(seed):
    model = policy(seed)
    sequences, cached = roll_out(model)
    assert cached > 100
    assert len({len(sequence.prompt_tokens) for sequence in sequences}) > 4
    experts = np.concatenate([sequence.rollout.experts for sequence in sequences])
    assert all(len(np.unique(layer)) > 2 for layer in experts.T)
    assert_same(compare(model, sequences), 300)
    # Both sides choose the same experts in fp32, but the check above must be one of the replayed ones.
    for sequence in sequences:
        sequence.rollout.experts[:] = (sequence.rollout.experts + 1) % (model.config.num_experts + 1)
    assert compare(model, sequences).kl_nats > 1e-3


def test_bf16_is_within_the_reports_figures_and_replay_is_why():
    model = policy(sharpness=0.7)
    sequences, _ = roll_out(model, 24, dtype=torch.bfloat16)
    trainer = copy_of(model, torch.bfloat16)
    found, without = compare(trainer, sequences), compare(trainer, sequences, replay=False)
    assert found.num_tokens >= 600
    assert found.kl_nats <= 1.3e-4 and found.pearson_r > 0.9996, found
    # A token close to the border between two experts is a token of another function without replay.
    assert without.kl_nats > 3 * found.kl_nats and without.largest_gap_nats > 3 * found.largest_gap_nats


def test_int8_engine_is_closer_with_replay():
    model = policy()
    sequences, _ = roll_out(model, 24, quantize="int8")
    found, without = compare(model, sequences), compare(model, sequences, replay=False)
    assert found.kl_nats < 5e-3 and found.pearson_r > 0.99
    assert without.kl_nats > 2 * found.kl_nats


def test_weights_swapped_in_flight_each_token_belongs_to_its_version():
    """The final norm alone is changed: what the old weights left in the cache is then what the new ones would."""
    old = policy()
    new = copy_of(old)
    with torch.no_grad():
        new.get_parameter("model.norm.weight").mul_(torch.linspace(0.6, 1.5, new.config.hidden_size))
    engine = make_engine(old, new_tokens=96)
    try:
        engine.start(orders(range(6)))
        until = time.monotonic() + 60
        while engine.num_steps < 8:
            assert time.monotonic() < until
        engine.update_weights(7, new.state_dict())
        engine.start(orders(range(6, 9)))
        groups = collect(engine, 9)
    finally:
        engine.close()
    sequences = sequences_of(groups)
    assert any(len(np.unique(sequence.rollout.versions)) == 2 for sequence in sequences)
    assert_same(compare(old, sequences, version=0), 20)
    assert_same(compare(new, sequences, version=7), 100)
    assert compare(new, sequences, version=0).kl_nats > 1e-4
    assert compare(old, sequences, version=7).kl_nats > 1e-4
