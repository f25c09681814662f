"""Advantages of a group of rollouts, and the difficulty-scaled length reward (arXiv 2605.05365).

    MaxRL (arXiv 2602.02710)   A_i = (r_i + D_i - mean(r + D)) / mean(r)       0 where mean(r) = 0
    GRPO (behavioural stage)   A_i = (r_i - mean(r)) / std(r)                  0 where all are equal

r are task rewards, D the length reward, which is centred in the numerator and left out of the denominator. MaxRL's
estimator is unbiased for the maximum-likelihood series cut off after order G - 1: with r in {0, 1} and success rate p,
E[A * score] = grad p * sum over k = 1 .. G-1 of (1 - p)^(k-1).

A reward of NaN is a rollout without verdict: it has no advantage and counts in no mean.

Shape suffixes: P prompts, G rollouts a prompt.
"""

from __future__ import annotations

import torch
from torch import Tensor

from openzaya.errors import DataError


def maxrl(rewards: Tensor, shaping: Tensor | None = None) -> Tensor:
    """MaxRL advantages (P, G) in the rewards' dtype.

    Args:
        rewards: (P, G), 0 or more; NaN without verdict. Wrong answers that pass by luck are amplified by 1 / mean:
            use rewards that cannot be guessed.
        shaping: (P, G) added to the rewards in the numerator only.

    Raises:
        DataError: other shapes, or a negative reward.
    """
    rewards_PG = _checked(rewards, "rewards")
    if bool((rewards_PG < 0).any()):
        raise DataError(
            f"a reward is {float(rewards_PG[rewards_PG < 0][0])}; MaxRL divides by their mean: give 0 or more"
        )
    shaped_PG = rewards_PG
    if shaping is not None:
        if shaping.shape != rewards.shape:
            raise DataError(f"shaping is {tuple(shaping.shape)}, rewards {tuple(rewards.shape)}; give one for each")
        shaped_PG = rewards_PG + shaping
    mean_P1 = _mean(rewards_PG)
    centred_PG = shaped_PG - _mean(shaped_PG)
    return _without_verdict_0(torch.where(mean_P1 > 0, centred_PG / mean_P1, 0.0), rewards_PG)


def grpo(rewards: Tensor) -> Tensor:
    """GRPO advantages (P, G); the standard deviation is the sample's (G - 1), as in TRL and verl."""
    rewards_PG = _checked(rewards, "rewards")
    centred_PG = rewards_PG - _mean(rewards_PG)
    num_P1 = (~rewards_PG.isnan()).sum(1, keepdim=True)
    squares_P1 = centred_PG.nan_to_num().square().sum(1, keepdim=True)
    deviation_P1 = (squares_P1 / (num_P1 - 1).clamp(min=1)).sqrt()
    # Rounding in the mean of equal rewards must not be blown up to one.
    is_spread_P1 = deviation_P1 > 1e-6 * rewards_PG.nan_to_num().abs().amax(1, keepdim=True)
    return _without_verdict_0(torch.where(is_spread_P1, centred_PG / deviation_P1, 0.0), rewards_PG)


def length_reward(
    rewards: Tensor,
    lengths: Tensor,
    *,
    best_solve_rate: float | Tensor,
    coefficient: float,
    max_length: int,
    length_tolerance: float,
    accuracy_tolerance: float,
) -> Tensor:
    """The length reward (P, G), to be given to :func:`maxrl` as ``shaping``.

    With the group's solve rate p, the shortest correct length l_min and lambda_i = 1/2 - clamp((l_i - l_min) /
    (max_length - l_min), 0, 1), which is 1/2 up to ``length_tolerance`` tokens above l_min:

        D_i = coefficient * p * lambda_i    where p > best_solve_rate - accuracy_tolerance, p > 1/G, r_i = 1

    and 0 elsewhere: only right answers, only of groups that are solved about as often as their source ever was.

    Args:
        rewards: (P, G), 1 right, 0 wrong, NaN without verdict.
        lengths: (P, G) tokens of each rollout.
        best_solve_rate: highest solve rate of the prompts' data source so far, a number or (P,).
        coefficient: c, ramped up to 1 in the course of the stages.
        max_length: a constant of the run, in tokens.
    """
    rewards_PG, lengths_PG = _checked(rewards, "rewards"), lengths.to(rewards.dtype)
    if lengths.shape != rewards.shape:
        raise DataError(f"lengths are {tuple(lengths.shape)}, rewards {tuple(rewards.shape)}; give one for each")
    best = torch.as_tensor(best_solve_rate, dtype=rewards.dtype, device=rewards.device)
    best_P1 = best.reshape(-1, 1) if best.dim() else best
    rate_P1 = _mean(rewards_PG)
    is_right_PG = rewards_PG == 1
    shortest_P1 = torch.where(is_right_PG, lengths_PG, torch.inf).amin(1, keepdim=True)
    over_PG = lengths_PG - shortest_P1
    span_P1 = (max_length - shortest_P1).clamp(min=torch.finfo(rewards.dtype).tiny)
    lambda_PG = 0.5 - (over_PG / span_P1).clamp(0, 1)
    lambda_PG = torch.where(over_PG <= length_tolerance, 0.5, lambda_PG)
    num_P1 = (~rewards_PG.isnan()).sum(1, keepdim=True)
    is_open_P1 = (rate_P1 > best_P1 - accuracy_tolerance) & (rate_P1 * num_P1 > 1)
    return torch.where(is_right_PG & is_open_P1, coefficient * rate_P1 * lambda_PG, 0.0)


class BestSolveRates:
    """The running maximum of each data source's solve rate; part of a run's checkpoint."""

    def __init__(self) -> None:
        self._best: dict[str, float] = {}

    def update(self, source: str, solve_rate: float) -> float:
        """Takes a solve rate into account and returns the source's best so far, this one included."""
        self._best[source] = max(solve_rate, self._best.get(source, 0.0))
        return self._best[source]

    def state_dict(self) -> dict[str, float]:
        return dict(self._best)

    def load_state_dict(self, state: dict[str, float]) -> None:
        self._best = dict(state)


def _checked(rewards: Tensor, name: str) -> Tensor:
    if rewards.dim() != 2 or not rewards.is_floating_point():
        raise DataError(f"{name} are {tuple(rewards.shape)} {rewards.dtype}, expected (prompts, rollouts) in floats")
    return rewards


def _mean(values_PG: Tensor) -> Tensor:
    """(P, 1), over those with a verdict; 0 where there is none."""
    return values_PG.nanmean(1, keepdim=True).nan_to_num()


def _without_verdict_0(advantages_PG: Tensor, rewards_PG: Tensor) -> Tensor:
    return torch.where(rewards_PG.isnan(), 0.0, advantages_PG)
