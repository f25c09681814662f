"""verl's tensors to ours: MaxRL and GRPO advantages and the DPPO loss as functions of verl's registries.

    algorithm.adv_estimator                   openzaya_maxrl | openzaya_grpo        advantages.py
    actor...policy_loss.loss_mode             openzaya_dppo                         loss.py
    actor...loss_agg_mode                     seq-mean-token-sum: sum over tokens, mean over all rollouts of a step
    actor...clip_ratio, _low, _high           delta of DPPO's mask, all three the same; 0.1 is the published value
    actor...clip_ratio_c                      cap of the importance ratio; 20 is ours
    algorithm.rollout_correction.bypass_mode  true: the mask is against the log probabilities of the sampler itself

verl loads plugins of the entry point group ``verl.plugins`` whenever it is imported, in every worker process, and
says nothing when one fails; verl_plugin.py registers what is here, looks whether it is there, and does say so.

Tried with verl 0.9.1, whose registries and signatures these are; 0.10 may have others. That version asks for
transformers < 5.11, which does not know ZAYA, and OpenZAYA for a later one: install OpenZAYA into verl's environment
with ``pip install --no-deps``; nothing but torch is needed here.

Shape suffixes: B responses, T tokens of a response, P prompts, G responses a prompt.
"""

from __future__ import annotations

import importlib
import logging
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from openzaya.errors import ConfigError, DataError
from openzaya.rl.advantages import grpo, maxrl
from openzaya.rl.loss import agreement, policy_loss

TRIED_VERSIONS = "0.9."
"""verl's versions that this was tried with begin so."""
AGGREGATION = "seq-mean-token-sum"

log = logging.getLogger(__name__)


def maxrl_advantages(
    token_level_rewards: Tensor, response_mask: Tensor, index: Sequence[Any] | None = None, **_: Any
) -> tuple[Tensor, Tensor]:
    """MaxRL advantages in verl's form.

    Args:
        token_level_rewards: (B, T); a response's reward is the sum over its tokens, NaN without verdict.
        response_mask: (B, T), 1 where the policy wrote the token.
        index: B ids; responses of one prompt share one (verl's ``uid``).

    Returns:
        Advantages (B, T), 0 outside the mask, twice: verl asks for returns as well.

    Raises:
        DataError: a negative reward, as after a KL penalty in the reward; no ``index``.
    """
    return _spread(maxrl, token_level_rewards, response_mask, index)


def grpo_advantages(
    token_level_rewards: Tensor, response_mask: Tensor, index: Sequence[Any] | None = None, **_: Any
) -> tuple[Tensor, Tensor]:
    """GRPO advantages; see :func:`maxrl_advantages`. A prompt's only response has advantage 0."""
    return _spread(grpo, token_level_rewards, response_mask, index)


def _spread(
    estimate: Callable[[Tensor], Tensor],
    token_level_rewards: Tensor,
    response_mask: Tensor,
    index: Sequence[Any] | None,
) -> tuple[Tensor, Tensor]:
    if index is None or len(index) != len(token_level_rewards):
        found = "none" if index is None else str(len(index))
        raise DataError(f"{len(token_level_rewards)} responses and {found} uids; give each response its prompt's uid")
    if not len(index):
        empty_BT = torch.zeros_like(token_level_rewards)
        return empty_BT, empty_BT.clone()
    with torch.no_grad():
        is_response_BT = response_mask.bool()
        rewards_B = torch.where(is_response_BT, token_level_rewards, 0).sum(1).double()
        rows, columns = _places(index)
        num = max(columns) + 1
        # A prompt with fewer responses than others is filled up with some that have no verdict.
        rewards_PG = rewards_B.new_full((max(rows) + 1, num), torch.nan)
        rewards_PG[rows, columns] = rewards_B
        advantages_B = estimate(rewards_PG)[rows, columns].to(token_level_rewards.dtype)
        advantages_BT = advantages_B[:, None] * is_response_BT
    return advantages_BT, advantages_BT.clone()


def _places(index: Sequence[Any]) -> tuple[list[int], list[int]]:
    """Row and column of each response in a table with a row a prompt."""
    rows: dict[Any, int] = {}
    sizes: dict[Any, int] = {}
    places = []
    for uid in index:
        row, column = rows.setdefault(uid, len(rows)), sizes.get(uid, 0)
        sizes[uid] = column + 1
        places.append((row, column))
    return [row for row, _ in places], [column for _, column in places]


def dppo_loss(
    old_log_prob: Tensor,
    log_prob: Tensor,
    advantages: Tensor,
    response_mask: Tensor,
    loss_agg_mode: str = "token-mean",
    config: Any = None,
    rollout_is_weights: Tensor | None = None,
) -> tuple[Tensor, dict[str, float]]:
    """The loss of one micro-batch in verl's form; its gradient, summed over micro-batches, is the update's.

    Args:
        old_log_prob: (B, T) of the policy that sampled.
        log_prob: (B, T) of the current policy, with gradient.
        advantages: (B, T)
        response_mask: (B, T)
        config: verl's actor configuration; None: delta 0.1, cap 20, mean over the B responses.

    Raises:
        ConfigError: settings under which this would be another algorithm.
    """
    if loss_agg_mode != AGGREGATION:
        raise ConfigError(f"loss_agg_mode={loss_agg_mode} with openzaya_dppo; set actor.loss_agg_mode={AGGREGATION}")
    if rollout_is_weights is not None:
        raise ConfigError(
            "rollout_is_weights with openzaya_dppo, which weighs tokens itself; set algorithm.rollout_correction to "
            "bypass_mode=true and rollout_is=null"
        )
    delta, ratio_cap, num_rollouts, num_ranks = _settings(config, len(log_prob))
    is_response_BT = response_mask.bool()
    result = policy_loss(
        log_prob,
        old_log_prob,
        advantages,
        is_response_BT,
        num_rollouts=num_rollouts,
        delta=delta,
        ratio_cap=ratio_cap,
    )
    found = agreement(log_prob, old_log_prob, is_response_BT)
    metrics = {
        "actor/ppo_kl": found.kl_nats,
        "actor/pearson_r": found.pearson_r,
        "actor/masked_share_positive": result.masked_positive / max(1, result.num_positive),
        "actor/masked_share_negative": result.masked_negative / max(1, result.num_negative),
        "actor/mean_ratio": result.mean_ratio,
    }
    # verl averages gradients over its ranks, where the loss is one over the whole step.
    return result.loss * num_ranks, metrics


def _settings(config: Any, num_responses: int) -> tuple[float, float, int, int]:
    """Delta, cap, rollouts of the step, ranks that gradients are averaged over."""
    if config is None:
        return 0.1, 20.0, max(1, num_responses), 1
    found = [getattr(config, name, None) for name in ("clip_ratio", "clip_ratio_low", "clip_ratio_high")]
    deltas = {float(value) for value in found if value is not None}
    if len(deltas) != 1:
        raise ConfigError(
            f"clip_ratio, clip_ratio_low and clip_ratio_high are {sorted(deltas)} with openzaya_dppo, whose mask has "
            "one delta; set all three to it (0.1 is the published value)"
        )
    batch = getattr(config, "global_batch_info", None) or {}
    num_ranks = int(batch.get("dp_size") or 1)
    whole = batch.get("global_batch_size")
    if whole is None and num_ranks > 1:
        raise ConfigError(f"no global_batch_size with dp_size={num_ranks}; every rank needs the same denominator")
    if batch.get("loss_scale_factor") is not None:
        raise ConfigError("loss_scale_factor with openzaya_dppo, which would ignore it; leave it out")
    num_rollouts = max(1, num_responses) if whole is None else int(whole)
    return deltas.pop(), float(getattr(config, "clip_ratio_c", 20.0)), num_rollouts, num_ranks


ADVANTAGES = {"openzaya_maxrl": maxrl_advantages, "openzaya_grpo": grpo_advantages}
LOSSES = {"openzaya_dppo": dppo_loss}


def register(core_algos: Any = None) -> None:
    """Register all of it in verl's registries, and look whether it is there; safe to call twice.

    Args:
        core_algos: verl's module of that name, or one with the same four functions; None imports verl.

    Raises:
        ConfigError: verl has registered something else under one of these names, or lost it.
    """
    if core_algos is None:
        import verl

        core_algos = importlib.import_module("verl.trainer.ppo.core_algos")
        version = getattr(verl, "__version__", "unknown")
        if not version.startswith(TRIED_VERSIONS):
            log.warning("verl %s: OpenZAYA's plugin was tried with %sx only", version, TRIED_VERSIONS)
    kinds = (
        (ADVANTAGES, core_algos.register_adv_est, core_algos.get_adv_estimator_fn),
        (LOSSES, core_algos.register_policy_loss, core_algos.get_policy_loss_fn),
    )
    for functions, put, get in kinds:
        for name, function in functions.items():
            if _registered(get, name) is None:
                put(name)(function)
            if _registered(get, name) is not function:
                raise ConfigError(f"verl's registry has {_registered(get, name)} under '{name}'; load one plugin of it")


def _registered(get: Callable[[str], Any], name: str) -> Any:
    try:
        return get(name)
    except (ValueError, KeyError):
        return None
