"""The policy loss: DPPO's mask, importance weights, Dr-GRPO aggregation; and how far engine and trainer are apart.

A token's probability under the current policy is p, under the policy that sampled it q (the engine's own log
probability, whatever version of the weights made it); its advantage is A.

    mask (DPPO, Binary-TV, arXiv 2602.04879)   dropped where |p - q| > delta and A pushes p further from q
    gradient                                   kept * min(p / q, cap) * A * grad log p       no clipping, no KL term
    aggregation (Dr-GRPO, arXiv 2503.20783)    sum over the tokens of a rollout, mean over rollouts
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from openzaya.errors import DataError

RATIO_CAP = 20.0
"""Importance ratios are truncated here, detached, as DPPO's authors do."""


def dppo_binary_tv_mask(logprobs: Tensor, sampler_logprobs: Tensor, advantages: Tensor, delta: float = 0.1) -> Tensor:
    """Which tokens are trained: bool in the shape of ``logprobs``, True = kept.

    Args:
        logprobs: natural logs of p, any shape.
        sampler_logprobs: of q, the same shape.
        advantages: one a token, or anything that broadcasts to it; (B, 1) for one a rollout.
    """
    _check_shapes(logprobs, sampler_logprobs)
    moved = logprobs.detach().exp() - sampler_logprobs.exp()
    pushes_further = ((advantages > 0) & (moved > delta)) | ((advantages < 0) & (moved < -delta))
    return ~pushes_further


@dataclass(frozen=True)
class PolicyLoss:
    """The loss, with what is logged of it."""

    loss: Tensor
    """Scalar; its gradient is the update's."""
    masked_positive: int
    """Tokens with positive advantage that DPPO dropped, of ``num_positive``."""
    num_positive: int
    masked_negative: int
    num_negative: int
    mean_ratio: float


def policy_loss(
    logprobs: Tensor,
    sampler_logprobs: Tensor,
    advantages: Tensor,
    token_mask: Tensor,
    *,
    num_rollouts: int,
    delta: float = 0.1,
    ratio_cap: float = RATIO_CAP,
) -> PolicyLoss:
    """The loss of one micro-batch.

    Args:
        logprobs: of the current policy, with gradient, any shape.
        sampler_logprobs: the same shape.
        advantages: one a token, or anything that broadcasts to it; (B, 1) for one a rollout.
        token_mask: bool, the same shape, True where the policy wrote the token.
        num_rollouts: of the whole step, dropped groups included: the same denominator whatever a micro-batch holds.
    """
    _check_shapes(logprobs, sampler_logprobs)
    if num_rollouts < 1:
        raise DataError(f"num_rollouts={num_rollouts}, expected at least 1")
    kept = dppo_binary_tv_mask(logprobs, sampler_logprobs, advantages, delta) & token_mask
    ratio = (logprobs.detach() - sampler_logprobs).exp().clamp(max=ratio_cap)
    # Where nothing is trained a log probability may be -inf, and 0 * inf would poison the sum.
    weighted = torch.where(kept, ratio * advantages * logprobs, 0.0)
    dropped = token_mask & ~kept
    is_positive, is_negative = token_mask & (advantages > 0), token_mask & (advantages < 0)
    ratios = ratio[token_mask]
    return PolicyLoss(
        -weighted.sum() / num_rollouts,
        int((dropped & is_positive).sum()),
        int(is_positive.sum()),
        int((dropped & is_negative).sum()),
        int(is_negative.sum()),
        float(ratios.mean()) if len(ratios) else 1.0,
    )


@dataclass(frozen=True)
class Agreement:
    """How well the trainer's log probabilities agree with the engine's, on tokens that the engine sampled."""

    kl_nats: float
    """KL(engine || trainer) a token, by the estimator ratio - 1 - log(ratio), which is never negative."""
    pearson_r: float
    """Of the probabilities; 1 where they are all alike."""
    largest_gap_nats: float
    num_tokens: int


def agreement(logprobs: Tensor, sampler_logprobs: Tensor, token_mask: Tensor) -> Agreement:
    """Compare the two where ``token_mask`` is True; shapes as in :func:`policy_loss`."""
    _check_shapes(logprobs, sampler_logprobs)
    ours = logprobs.detach()[token_mask].double()
    theirs = sampler_logprobs.detach()[token_mask].double()
    if not len(ours):
        return Agreement(0.0, 1.0, 0.0, 0)
    gap = ours - theirs
    kl = (gap.expm1() - gap).mean()
    p, q = ours.exp() - ours.exp().mean(), theirs.exp() - theirs.exp().mean()
    spread = p.norm() * q.norm()
    pearson = float((p * q).sum() / spread) if float(spread) > 0 else 1.0
    return Agreement(float(kl), pearson, float(gap.abs().max()), len(ours))


def _check_shapes(logprobs: Tensor, sampler_logprobs: Tensor) -> None:
    if logprobs.shape != sampler_logprobs.shape:
        raise DataError(
            f"logprobs are {tuple(logprobs.shape)}, the sampler's {tuple(sampler_logprobs.shape)}; they must be of the "
            "same tokens"
        )
