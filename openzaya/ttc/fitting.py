"""Budgets that fit a model's context: presets are made for long ones.

A round fits when its longest prompt, |q| + c * tau and the scaffold, leaves room for what is to be written. Where a
preset does not fit, ``beta``, ``tau`` and ``final_budget`` are scaled down by one factor, the largest that does, so
that their proportions stay; settings that were chosen by hand are never changed.
"""

from __future__ import annotations

from collections.abc import Collection

from openzaya.errors import RSAError
from openzaya.ttc.config import RSAConfig
from openzaya.ttc.cost import prompt_bound

BUDGETS = ("beta", "tau", "final_budget")
SHORT_PROMPT_CONTEXT = 8192
"""Models of ours with at most so many positions get the short aggregation prompt: in theirs the full one is long."""
STEPS = 24
"""Halvings of the interval in which the factor lies."""


def needed_context(config: RSAConfig, num_prompt_tokens: int) -> int:
    """Most tokens of prompt and rollout together, over all rounds."""
    rounds = range(config.t + 1)
    needed = [prompt_bound(config, num_prompt_tokens, i) + _budget(config, i) for i in rounds]
    if config.select == "aggregate":
        needed.append(prompt_bound(config, num_prompt_tokens, config.t + 1) + config.final_budget)
    return max(needed)


def fit_context(
    config: RSAConfig, context: int | None, num_prompt_tokens: int, chosen: Collection[str] = ()
) -> tuple[RSAConfig, str | None]:
    """Settings that fit ``context`` tokens, and what to tell the user where they are not those given.

    Args:
        context: None where it is not known: nothing is changed.
        num_prompt_tokens: of the (longest) question as it is sent in round 0.
        chosen: names of settings that stay as they are.

    Raises:
        RSAError: what was chosen by hand does not fit, or the question leaves no room.
    """
    if context is None or needed_context(config, num_prompt_tokens) <= context:
        return config, None
    free = [name for name in BUDGETS if name not in chosen]
    if not free or needed_context(_scaled(config, free, 0.0), num_prompt_tokens) > context:
        raise RSAError(
            f"the model's context of {context:,} tokens cannot hold {needed_context(config, num_prompt_tokens):,}: a "
            f"question of {num_prompt_tokens:,}, c={config.c} tails of tau={config.tau}, and beta={config.beta} or "
            f"final_budget={config.final_budget} new ones; lower these, or shorten the question"
        )
    low, high = 0.0, 1.0
    for _ in range(STEPS):
        middle = (low + high) / 2
        fits = needed_context(_scaled(config, free, middle), num_prompt_tokens) <= context
        low, high = (middle, high) if fits else (low, middle)
    fitted = _scaled(config, free, low)
    changes = ", ".join(
        f"{name} {getattr(config, name):,} -> {getattr(fitted, name):,}"
        for name in free
        if getattr(config, name) != getattr(fitted, name)
    )
    return fitted, f"budgets are scaled to the model's context of {context:,} tokens: {changes}"


def _budget(config: RSAConfig, round_index: int) -> int:
    return config.final_budget if round_index == config.t else config.beta


def _scaled(config: RSAConfig, names: Collection[str], factor: float) -> RSAConfig:
    lowest = {"beta": 1, "tau": 0, "final_budget": 1}
    return config.model_copy(update={name: max(lowest[name], int(getattr(config, name) * factor)) for name in names})
