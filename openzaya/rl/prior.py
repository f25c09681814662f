"""What the starting policy solves: asked once, before a stage of RL.

    refilter    pass rate of each environment and level of a fixed curriculum; levels above ``max_prior_pass_rate`` are
                left out (of an environment with nothing left, its hardest level stays)
    calibrate   the difficulty at which an online environment is solved half of the time (curriculum.IRTPool)

Both roll out with the stage's own pool, at frozen weights; nothing of it is trained on.
"""

from __future__ import annotations

import itertools
from collections import Counter
from typing import Any

from openzaya.environments.base import Task
from openzaya.errors import DataError
from openzaya.rl.curriculum import IRTPool, kept_levels
from openzaya.rl.pool import RolloutPool
from openzaya.rl.prompts import PromptStream
from openzaya.rl.recipe import PriorConfig, PromptSource, RLConfig
from openzaya.rl.rollout import Group, Order, order_seed

FIRST_NUMBER = 1 << 40
"""Of orders and tasks that only measure: far from those that are trained on."""


def apply_prior(config: RLConfig, prompts: PromptStream, pool: RolloutPool) -> dict[str, Any] | None:
    """Measure what the recipe's sources ask for and set levels and difficulties by it; returns what was found."""
    numbers = itertools.count(FIRST_NUMBER)
    rates: dict[str, Any] = {}
    calibrations: dict[str, Any] = {}
    for name, state in prompts.sources.items():
        source = state.config
        if source.curriculum == "online" and source.start == "calibrated":
            found = calibrate(source, config.prior, prompts, pool, numbers, config.seed)
            fits = {environment: describe(one, source.max_difficulty) for environment, one in found.items()}
            calibrations[name] = fits
            for environment, fit in fits.items():
                state.online[environment].difficulty = fit["difficulty"]
        elif source.curriculum == "fixed" and source.max_prior_pass_rate < 1:
            rates[name] = pass_rates(source, config.prior, prompts, pool, numbers, config.seed)
            for environment, by_level in rates[name].items():
                state.levels[environment] = kept_levels(by_level, source.max_prior_pass_rate)
    return {"pass_rates": rates, "calibration": calibrations} if rates or calibrations else None


def pass_rates(
    source: PromptSource,
    prior: PriorConfig,
    prompts: PromptStream,
    pool: RolloutPool,
    numbers: itertools.count[int],
    seed: int,
) -> dict[str, dict[str, float]]:
    """Environment -> level (as text, as JSON has it) -> share of right answers; levels that cannot be asked lack."""
    low, high = source.difficulties
    orders = []
    for name in prompts.sources[source.name].environments:
        for level, index in itertools.product(range(low, high + 1), range(prior.tasks)):
            task = prompts.task(source.name, name, level, FIRST_NUMBER + index)
            if task is not None:
                orders.append(_order(next(numbers), source, task, prior, seed))
    right: Counter[tuple[str, int]] = Counter()
    total: Counter[tuple[str, int]] = Counter()
    for group in _roll(pool, orders):
        cell = (group.order.task.environment, group.order.task.difficulty)
        right[cell] += sum(verdict == 1 for verdict in group.verdicts)
        total[cell] += len(group.verdicts)
    rates: dict[str, dict[str, float]] = {}
    for name, level in sorted(total):
        rates.setdefault(name, {})[str(level)] = right[name, level] / max(1, total[name, level])
    return rates


def calibrate(
    source: PromptSource,
    prior: PriorConfig,
    prompts: PromptStream,
    pool: RolloutPool,
    numbers: itertools.count[int],
    seed: int,
) -> dict[str, IRTPool]:
    """One calibrated pool an environment. All environments are asked at once, ``prior.queries`` times."""
    names = list(prompts.sources[source.name].environments)
    pools = {name: IRTPool(prior.model, seed=order_seed(seed, index)) for index, name in enumerate(names)}
    for query in range(prior.queries):
        orders = []
        for name, one in pools.items():
            task = None
            wanted = one.ask()
            if source.max_difficulty is not None:
                wanted = min(wanted, source.max_difficulty)
            for level in range(wanted, -1, -1):
                if (task := prompts.task(source.name, name, level, FIRST_NUMBER + query)) is not None:
                    break
            if task is None:
                raise DataError(f"{name}: no level has a prompt that fits or can be made; raise window_tokens")
            orders.append(_order(next(numbers), source, task, prior, seed))
        for group in _roll(pool, orders):
            if group.verdicts:
                num_right = sum(verdict == 1 for verdict in group.verdicts)
                pools[group.order.task.environment].observe(group.order.task.difficulty, num_right, len(group.verdicts))
    return pools


def describe(pool: IRTPool, max_difficulty: int | None) -> dict[str, Any]:
    """A calibrated pool as JSON: where to begin, where half is solved, how sure that is, and what was observed.

    ``difficulty``, where to begin, is at most ``max_difficulty``; ``middle``, the estimate, may lie above it.
    """
    middle, slope = pool.estimate
    return {
        "difficulty": pool.difficulty if max_difficulty is None else min(pool.difficulty, max_difficulty),
        "middle": middle,
        "slope": slope,
        "deviation": pool.deviation,
        "observed": [list(group) for group in pool.history],
    }


def _order(number: int, source: PromptSource, task: Task, prior: PriorConfig, seed: int) -> Order:
    return Order(number, source.name, "plain", task, prior.rollouts, order_seed(seed, number))


def _roll(pool: RolloutPool, orders: list[Order]) -> list[Group]:
    """The groups of ``orders``, by number."""
    pool.submit(orders)
    groups: list[Group] = []
    while len(groups) < len(orders):
        groups += pool.collect()
    return sorted(groups, key=lambda group: group.order.number)
