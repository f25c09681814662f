"""DPPO's mask, the policy gradient, and the agreement of engine and trainer."""

from __future__ import annotations

import math

import pytest
import torch

from openzaya.errors import DataError
from openzaya.rl.loss import agreement, dppo_binary_tv_mask, policy_loss


@pytest.mark.parametrize(
    ("before", "now", "advantage", "is_kept"),
    [
        (0.50, 0.65, +1, False),
        (0.50, 0.65, -1, True),
        (0.50, 0.35, -1, False),
        (0.50, 0.35, +1, True),
        (0.001, 0.01, +1, True),
        (0.85, 0.97, +1, False),
        (0.85, 0.94, +1, True),
        (0.5, 0.5, +1, True),
        (0.5, 0.9, 0, True),
    ],
)
def test_mask_drops_what_is_pushed_further_away(before, now, advantage, is_kept):
    mask = dppo_binary_tv_mask(
        torch.tensor([math.log(now)]), torch.tensor([math.log(before)]), torch.tensor([advantage])
    )
    assert mask.dtype == torch.bool and mask.tolist() == [is_kept]


def test_delta_is_the_border():
    now, before = torch.tensor([0.70]).log(), torch.tensor([0.5]).log()
    assert not dppo_binary_tv_mask(now, before, torch.tensor([1.0]), delta=0.19)
    assert dppo_binary_tv_mask(now, before, torch.tensor([1.0]), delta=0.21)


def setting(seed=0):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(4, 6, 9, generator=generator, dtype=torch.float64, requires_grad=True)
    tokens = torch.randint(0, 9, (4, 6, 1), generator=generator)
    logprobs = logits.log_softmax(-1).gather(-1, tokens)[..., 0]
    sampler = (logprobs + 0.4 * torch.randn(4, 6, generator=generator, dtype=torch.float64)).detach().clamp(max=0)
    mask = torch.rand(4, 6, generator=generator) > 0.3
    advantages = torch.randn(4, 1, generator=generator, dtype=torch.float64)
    return logits, tokens, logprobs, sampler, mask, advantages


def test_gradient_is_the_formula():
    """kept * ratio * A * grad log p, summed over a rollout's tokens, divided by all rollouts of the step."""
    logits, tokens, logprobs, sampler, mask, advantages = setting()
    loss = policy_loss(logprobs, sampler, advantages, mask, num_rollouts=10, delta=0.05)
    [gradient] = torch.autograd.grad(loss.loss, logits)
    expected = torch.zeros_like(logits)
    probabilities = logits.softmax(-1).detach()
    num_dropped = 0
    for b in range(4):
        for t in range(6):
            p, q, a = float(logprobs[b, t].detach().exp()), float(sampler[b, t].exp()), float(advantages[b])
            if not mask[b, t]:
                continue
            if abs(p - q) > 0.05 and a * (p - q) > 0:
                num_dropped += 1
                continue
            one_hot = torch.zeros(9, dtype=torch.float64)
            one_hot[tokens[b, t, 0]] = 1
            expected[b, t] = -min(p / q, 20.0) * a * (one_hot - probabilities[b, t]) / 10
    assert num_dropped > 0
    assert torch.allclose(gradient, expected, atol=1e-12)
    assert loss.masked_positive + loss.masked_negative > 0


def test_ratios_are_truncated_and_impossible_tokens_outside_the_mask_do_no_harm():
    logprobs = torch.tensor([[-0.1, -math.inf]], requires_grad=True)
    sampler = torch.tensor([[-9.0, 0.0]])
    mask = torch.tensor([[True, False]])
    loss = policy_loss(logprobs, sampler, torch.tensor([-1.0]), mask, num_rollouts=1).loss
    loss.backward()
    assert logprobs.grad[0, 0] == 20.0 and logprobs.grad[0, 1] == 0.0


def test_a_rollout_s_weight_does_not_depend_on_its_length():
    """Dr-GRPO: no division by length; twice the tokens, twice the sum."""
    logprobs = torch.full((1, 8), -1.0)
    short = policy_loss(
        logprobs[:, :4], logprobs[:, :4], torch.ones(1), torch.ones(1, 4, dtype=torch.bool), num_rollouts=2
    )
    long = policy_loss(logprobs, logprobs, torch.ones(1), torch.ones(1, 8, dtype=torch.bool), num_rollouts=2)
    assert float(short.loss) == 2.0 and float(long.loss) == 4.0


def test_agreement():
    _, _, logprobs, _, mask, _ = setting()
    same = agreement(logprobs, logprobs.detach(), mask)
    assert same.kl_nats == 0 and same.pearson_r == pytest.approx(1) and same.largest_gap_nats == 0
    assert same.num_tokens == int(mask.sum())
    off = agreement(logprobs, logprobs.detach() + 0.1, mask)
    assert off.kl_nats == pytest.approx(math.exp(-0.1) - 1 + 0.1) and off.largest_gap_nats == pytest.approx(0.1)
    assert agreement(logprobs, logprobs.flip(0), mask).pearson_r < 0.9
    assert agreement(logprobs, logprobs, torch.zeros_like(mask)).num_tokens == 0


def test_the_kl_estimate_is_the_divergence_in_the_mean():
    generator = torch.Generator().manual_seed(1)
    engine = torch.randn(20, generator=generator, dtype=torch.float64).log_softmax(0)
    trainer = (engine + 0.3 * torch.randn(20, generator=generator, dtype=torch.float64)).log_softmax(0)
    exact = float((engine.exp() * (engine - trainer)).sum())
    tokens = torch.multinomial(engine.exp(), 200_000, replacement=True, generator=generator)
    found = agreement(trainer[tokens][None], engine[tokens][None], torch.ones(1, 200_000, dtype=torch.bool))
    assert found.kl_nats == pytest.approx(exact, rel=0.03)


def test_other_shapes_are_refused():
    with pytest.raises(DataError, match="of the same tokens"):
        dppo_binary_tv_mask(torch.zeros(2, 3), torch.zeros(2, 4), torch.ones(2, 1))
    with pytest.raises(DataError, match="num_rollouts=0"):
        policy_loss(
            torch.zeros(1, 1), torch.zeros(1, 1), torch.ones(1), torch.ones(1, 1, dtype=torch.bool), num_rollouts=0
        )
