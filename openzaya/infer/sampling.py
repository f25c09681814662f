"""How the next token is chosen from logits.

Filters are applied in the usual order: temperature, top-k, top-p, min-p. A token is then drawn by inverting the
cumulative distribution at a uniform number that belongs to the row's own seed and step, so a row's tokens do not
depend on what else is in the batch.

Shape suffixes: B rows, V vocabulary.
"""

from __future__ import annotations

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

SMALLEST_TEMPERATURE = 1e-30
"""Below it fp32 could not hold the temperature itself."""


class SamplingParams(BaseModel):
    """Sampling settings of a request. The defaults are ZAYA1's: temperature 1, top-p 0.95."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    temperature: float = Field(1.0, ge=0, allow_inf_nan=False)
    """0 is greedy: the most likely token, whatever the other settings."""
    top_p: float = Field(0.95, gt=0, le=1)
    """Keep the smallest set of most likely tokens with at least this share; 1 keeps all."""
    top_k: int = Field(0, ge=0)
    """Keep the k most likely tokens; 0 keeps all."""
    min_p: float = Field(0.0, ge=0, le=1)
    """Drop tokens below this share of the most likely one's probability."""
    max_new_tokens: int = Field(256, ge=1)
    seed: int = 0


def probabilities(logits_BV: Tensor, params: SamplingParams) -> Tensor:
    """The distribution (B, V), fp32, that tokens are drawn from; for temperature 0 all weight on the maximum."""
    if params.temperature == 0:
        best_B = logits_BV.argmax(dim=-1, keepdim=True)
        return torch.zeros_like(logits_BV, dtype=torch.float32).scatter_(1, best_B, 1.0)
    # The best token's logit becomes 0 first: no temperature, however small, then overflows.
    logits_BV = logits_BV.float() - logits_BV.float().amax(dim=-1, keepdim=True)
    shares_BV = (logits_BV / max(params.temperature, SMALLEST_TEMPERATURE)).softmax(dim=-1)
    if params.top_k and params.top_k < shares_BV.shape[1]:
        kth_B1 = shares_BV.topk(params.top_k, dim=-1).values[:, -1:]
        shares_BV = shares_BV.masked_fill(shares_BV < kth_B1, 0)
    if params.top_p < 1:
        sorted_BV, order_BV = shares_BV.sort(dim=-1, descending=True)
        # A token stays while the tokens before it have not reached the share.
        before_BV = sorted_BV.cumsum(dim=-1) - sorted_BV
        target_B1 = params.top_p * sorted_BV.sum(dim=-1, keepdim=True)
        shares_BV = torch.zeros_like(shares_BV).scatter_(1, order_BV, sorted_BV.masked_fill(before_BV >= target_B1, 0))
    if params.min_p > 0:
        shares_BV = shares_BV.masked_fill(shares_BV < params.min_p * shares_BV.amax(dim=-1, keepdim=True), 0)
    return shares_BV / shares_BV.sum(dim=-1, keepdim=True)


def draw(logits_BV: Tensor, params: SamplingParams, uniform_B: Tensor) -> Tensor:
    """One token id a row (int64 B); ``uniform_B`` in [0, 1) decides, and greedy decoding ignores it."""
    if params.temperature == 0:
        return logits_BV.argmax(dim=-1)
    cumulative_BV = probabilities(logits_BV, params).cumsum(dim=-1)
    # Rounding may leave the total a little off 1; scaled, the last kept token closes the range.
    threshold_B1 = uniform_B[:, None] * cumulative_BV[:, -1:]
    return torch.searchsorted(cumulative_BV, threshold_B1, right=True)[:, 0].clamp_max(logits_BV.shape[1] - 1)


def uniforms(seeds: list[int], num_steps: int) -> Tensor:
    """Uniform numbers (rows, steps) in fp32: row i depends on ``seeds[i]`` alone."""
    generator = torch.Generator()
    return torch.stack([torch.rand(num_steps, generator=generator.manual_seed(seed)) for seed in seeds])
