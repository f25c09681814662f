"""MaxRL, GRPO and the length reward against their formulas."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from openzaya.errors import DataError
from openzaya.rl.advantages import BestSolveRates, grpo, length_reward, maxrl

NAN = math.nan


@pytest.mark.parametrize("num_rollouts", [2, 4, 8, 12])
@pytest.mark.parametrize("p", [0.05, 0.3, 0.8])
def test_maxrl_is_unbiased_for_the_series_of_order_n_minus_1(num_rollouts, p):
    """Exact, over all 2^N outcomes of a policy that is right with probability p = sigmoid(x).

    The score of a right rollout is d log p / dx = 1 - p, of a wrong one d log (1 - p) / dx = -p.
    """
    estimate = 0.0
    for outcome in itertools.product((0.0, 1.0), repeat=num_rollouts):
        num_right = int(sum(outcome))
        probability = p**num_right * (1 - p) ** (num_rollouts - num_right)
        advantages = maxrl(torch.tensor([outcome], dtype=torch.float64))[0]
        scores = torch.tensor([1 - p if right else -p for right in outcome], dtype=torch.float64)
        estimate += probability * float((advantages * scores).mean())
    gradient = p * (1 - p)

    def series(order):
        return gradient * sum((1 - p) ** (k - 1) for k in range(1, order + 1))

    assert estimate == pytest.approx(series(num_rollouts - 1), rel=1e-9)
    # One term of the series more is (1 - p)^(N - 1) of the gradient, which the check above would see.
    if (1 - p) ** (num_rollouts - 1) > 1e-6:
        assert estimate != pytest.approx(series(num_rollouts), rel=1e-7), "not of order N"


def test_maxrl_by_hand():
    rewards = torch.tensor([[1.0, 0, 0, 0], [0, 0, 0, 0], [1, 1, 1, 1], [1, NAN, 0, NAN]])
    expected = [[3.0, -1, -1, -1], [0, 0, 0, 0], [0, 0, 0, 0], [1, 0, -1, 0]]
    assert torch.equal(maxrl(rewards), torch.tensor(expected))
    one_of_16 = maxrl(torch.tensor([[1.0] + [0.0] * 15]))[0]
    assert one_of_16[0] == 15 and (one_of_16[1:] == -1).all()


def test_shaping_is_centred_in_the_numerator_and_left_out_of_the_denominator():
    rewards, shaping = torch.tensor([[1.0, 1, 0, 0]]), torch.tensor([[0.25, -0.25, 0, 0]])
    assert torch.allclose(maxrl(rewards, shaping), torch.tensor([[1.5, 0.5, -1, -1]]))
    generator = torch.Generator().manual_seed(0)
    random_rewards = (torch.rand(20, 8, generator=generator, dtype=torch.float64) > 0.5).double()
    random_shaping = torch.rand(20, 8, generator=generator, dtype=torch.float64)
    assert maxrl(random_rewards, random_shaping).sum(1).abs().max() < 1e-12
    assert maxrl(torch.zeros(1, 4), torch.rand(1, 4)).abs().max() == 0, "nothing right: no signal, whatever the length"


@settings(max_examples=60, derandomize=True)
@given(st.lists(st.sampled_from([0.0, 1.0, 0.3, NAN]), min_size=2, max_size=8))
def test_grpo_is_standardised(rewards):
    advantages = grpo(torch.tensor([rewards], dtype=torch.float64))[0]
    verdicts = [reward for reward in rewards if not math.isnan(reward)]
    kept = advantages[[not math.isnan(reward) for reward in rewards]]
    assert advantages.isfinite().all()
    if len(set(verdicts)) > 1:
        assert float(kept.sum()) == pytest.approx(0, abs=1e-9) and float(kept.std()) == pytest.approx(1)
    else:
        assert not advantages.any()


def test_grpo_of_equal_rewards_is_no_signal_whatever_rounding_makes_of_their_mean():
    assert not grpo(torch.full((1, 3), 0.1)).any()
    assert not grpo(torch.full((4, 7), 1e6 + 0.1)).any()


# --- length reward ------------------------------------------------------------------------------------

GATES = {
    "best_solve_rate": 0.5,
    "coefficient": 1.0,
    "max_length": 100,
    "length_tolerance": 5,
    "accuracy_tolerance": 0.1,
}


def lengths_of(*lengths):
    return torch.tensor([lengths])


def test_length_reward_by_hand():
    rewards = torch.tensor([[1.0, 1, 1, 0]])
    found = length_reward(rewards, lengths_of(20, 24, 60, 10), **GATES)
    # p = 0.75; shortest right 20; within tolerance 1/2; (60 - 20) / 80 = 1/2 gives 0; wrong answers get nothing.
    assert torch.allclose(found, torch.tensor([[0.375, 0.375, 0.0, 0.0]]))
    found = length_reward(rewards, lengths_of(20, 100, 500, 10), **GATES | {"coefficient": 0.5})
    assert torch.allclose(found, torch.tensor([[0.1875, -0.1875, -0.1875, 0.0]]))


@pytest.mark.parametrize(
    ("rewards", "best", "is_open"),
    [
        ([1.0, 1, 0, 0], 0.5, True),
        ([1.0, 1, 0, 0], 0.59, True),
        ([1.0, 1, 0, 0], 0.61, False),
        ([1.0, 0, 0, 0], 0.0, False),
        ([0.0, 0, 0, 0], 0.0, False),
        ([1.0, NAN, 1, NAN], 1.0, True),
    ],
    ids=["at its best", "inside the tolerance", "worse than it was", "one of G right", "none right", "no verdicts"],
)
def test_length_reward_gates(rewards, best, is_open):
    found = length_reward(torch.tensor([rewards]), lengths_of(10, 10, 10, 10), **GATES | {"best_solve_rate": best})
    assert found.isfinite().all()
    assert bool((found > 0).any()) == is_open
    assert not found[torch.tensor([rewards]) != 1].any()


def test_length_reward_takes_a_best_rate_a_prompt_and_survives_lengths_beyond_the_constant():
    rewards = torch.ones(2, 3)
    best = torch.tensor([1.0, 1.2])
    found = length_reward(rewards, torch.full((2, 3), 150), **GATES | {"best_solve_rate": best})
    assert torch.allclose(found, torch.tensor([[0.5] * 3, [0.0] * 3]))


def test_best_solve_rates_only_rise_and_survive_a_checkpoint():
    best = BestSolveRates()
    assert [best.update("a", rate) for rate in (0.2, 0.6, 0.4)] == [0.2, 0.6, 0.6]
    again = BestSolveRates()
    again.load_state_dict(best.state_dict())
    assert again.update("a", 0.1) == 0.6 and again.update("b", 0.1) == 0.1


def test_what_is_no_group_is_refused():
    with pytest.raises(DataError, match="expected \\(prompts, rollouts\\)"):
        maxrl(torch.ones(3))
    with pytest.raises(DataError, match="a reward is -1"):
        maxrl(torch.tensor([[1.0, -1.0]]))
    with pytest.raises(DataError, match="shaping is"):
        maxrl(torch.ones(1, 3), torch.ones(1, 2))
    with pytest.raises(DataError, match="lengths are"):
        length_reward(torch.ones(1, 3), lengths_of(1), **GATES)
