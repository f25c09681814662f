"""Difficulty: where to begin in each environment, how to follow the policy, and which environment comes next.

An environment's difficulty is an integer d >= 0 without an upper end (arXiv 2605.05365, stage 2).

Calibration, before training, finds the difficulty that the policy solves half of the time, by an item-response model
p(d) = 1 / (1 + exp((d - mu) / s)) and a pool of candidates (mu, s):

    ask      draw a candidate by weight; ask at d = mu + s * log((1 - p_t) / p_t), p_t = 0.5, and with probability
             epsilon anywhere in 0.5 +- 0.25
    observe  k of G are right: each weight is multiplied by Binomial(k; G, p_m(d))
    renew    when the effective sample size is low: draw the pool anew with replacement, move each a little (ours), and
             weigh it by the whole history, older groups less

During training, after a group made at the current difficulty: one up if its pass rate is above 0.7, one down if it is
0. Groups of an earlier difficulty change nothing. (The report's formula asks this of the step up alone, its text of
both.)
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field

from openzaya.errors import DataError

SMALLEST_SLOPE = 0.1
MAX_HISTORY = 256


class IRTSettings(BaseModel):
    """The pool, its prior and how it is renewed."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    pool_size: int = Field(512, ge=2)
    prior_mean: float = 6.0
    """Of mu, in levels."""
    prior_deviation: float = Field(8.0, gt=0)
    slope_mean: float = Field(1.0, gt=0)
    slope_deviation: float = Field(0.7, gt=0)
    target: float = Field(0.5, gt=0, lt=1)
    epsilon: float = Field(0.1, ge=0, le=1)
    spread: float = Field(0.25, ge=0, lt=0.5)
    """Half the width of the range of targets that is asked with probability epsilon."""
    renew_below: float = Field(0.5, gt=0, le=1)
    """Effective sample size, as a share of the pool, below which the pool is drawn anew."""
    jitter: float = Field(0.3, ge=0)
    """Standard deviation, in levels, by which renewed candidates are moved; a third of it for slopes."""
    forgetting: float = Field(0.9, gt=0, le=1)
    """Weight of a group relative to the one after it, when the pool is renewed."""


class IRTPool:
    """Calibrates one environment; ``state_dict`` is part of a checkpoint."""

    def __init__(self, settings: IRTSettings | None = None, *, seed: int = 0) -> None:
        self.settings = settings or IRTSettings()
        self._rng = np.random.default_rng(seed)
        size = self.settings.pool_size
        self._mu = self._rng.normal(self.settings.prior_mean, self.settings.prior_deviation, size)
        self._slope = self._positive(self._rng.normal(self.settings.slope_mean, self.settings.slope_deviation, size))
        self._log_weight = np.zeros(size)
        self._history: list[tuple[int, int, int]] = []

    def ask(self) -> int:
        """The difficulty to try next (Thompson sampling)."""
        settings = self.settings
        chosen = self._rng.choice(len(self._mu), p=self._weights())
        target = settings.target
        if self._rng.random() < settings.epsilon:
            target += self._rng.uniform(-settings.spread, settings.spread)
        wanted = self._mu[chosen] + self._slope[chosen] * math.log((1 - target) / target)
        return max(0, round(float(wanted)))

    def observe(self, difficulty: int, num_right: int, num_rollouts: int) -> None:
        """Take a group into account: ``num_right`` of ``num_rollouts`` with a verdict were right."""
        if difficulty < 0 or not 0 <= num_right <= num_rollouts or num_rollouts < 1:
            raise DataError(
                f"observed {num_right} of {num_rollouts} right at difficulty {difficulty}; expected 0 <= right <= "
                "rollouts, at least 1 rollout, difficulty 0 or more"
            )
        self._history = [*self._history, (difficulty, num_right, num_rollouts)][-MAX_HISTORY:]
        self._log_weight += self._log_likelihood(difficulty, num_right, num_rollouts)
        if self.effective_size < self.settings.renew_below * len(self._mu):
            self._renew()

    @property
    def effective_size(self) -> float:
        """1 / sum of squared weights: between 1 and the pool's size."""
        return float(1 / np.square(self._weights()).sum())

    @property
    def estimate(self) -> tuple[float, float]:
        """Mean of (mu, s) over the pool."""
        weights = self._weights()
        return float(weights @ self._mu), float(weights @ self._slope)

    @property
    def deviation(self) -> float:
        """Standard deviation of mu over the pool, in levels."""
        weights = self._weights()
        return math.sqrt(float(weights @ np.square(self._mu - weights @ self._mu)))

    @property
    def difficulty(self) -> int:
        """The level to begin at: where half of the rollouts should be right."""
        return max(0, round(self.estimate[0]))

    @property
    def history(self) -> list[tuple[int, int, int]]:
        """The observed groups: difficulty, right ones, all with a verdict."""
        return list(self._history)

    def pass_rate(self, difficulty: float) -> float:
        """Expected pass rate at a difficulty."""
        return float(self._weights() @ self._probability(difficulty))

    def state_dict(self) -> dict[str, Any]:
        return {
            "mu": self._mu.tolist(),
            "slope": self._slope.tolist(),
            "log_weight": self._log_weight.tolist(),
            "history": [list(group) for group in self._history],
            "rng": self._rng.bit_generator.state,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._mu, self._slope = np.array(state["mu"]), np.array(state["slope"])
        self._log_weight = np.array(state["log_weight"])
        self._history = [(int(d), int(k), int(g)) for d, k, g in state["history"]]
        self._rng.bit_generator.state = state["rng"]

    def _renew(self) -> None:
        chosen = self._rng.choice(len(self._mu), len(self._mu), p=self._weights())
        jitter = self.settings.jitter
        self._mu = self._mu[chosen] + self._rng.normal(0, jitter, len(chosen)) if jitter else self._mu[chosen]
        moved = self._slope[chosen] + self._rng.normal(0, jitter / 3, len(chosen)) if jitter else self._slope[chosen]
        self._slope = self._positive(moved)
        self._log_weight = np.zeros(len(chosen))
        share = 1.0
        for group in reversed(self._history):
            self._log_weight += share * self._log_likelihood(*group)
            share *= self.settings.forgetting

    def _weights(self) -> NDArray[np.float64]:
        raised = np.exp(self._log_weight - self._log_weight.max())
        return np.asarray(raised / raised.sum())

    def _probability(self, difficulty: float) -> NDArray[np.float64]:
        scaled = np.clip((difficulty - self._mu) / self._slope, -30, 30)
        return np.asarray(1 / (1 + np.exp(scaled)))

    def _log_likelihood(self, difficulty: int, num_right: int, num_rollouts: int) -> NDArray[np.float64]:
        # The binomial coefficient is the same for all candidates.
        p = self._probability(difficulty)
        return np.asarray(num_right * np.log(p) + (num_rollouts - num_right) * np.log1p(-p))

    @staticmethod
    def _positive(slopes: NDArray[np.float64]) -> NDArray[np.float64]:
        return np.maximum(np.abs(slopes), SMALLEST_SLOPE)


@dataclass
class OnlineDifficulty:
    """One environment's difficulty during training."""

    difficulty: int = 0
    up_above: float = 0.7
    num_groups: int = 0
    """Groups that counted."""

    def update(self, group_difficulty: int, pass_rate: float) -> int:
        """Take a group that was made at ``group_difficulty`` into account; returns the difficulty from now on."""
        if not 0 <= pass_rate <= 1:
            raise DataError(f"pass_rate={pass_rate}, expected 0 to 1")
        if group_difficulty != self.difficulty:
            return self.difficulty
        self.num_groups += 1
        if pass_rate > self.up_above:
            self.difficulty += 1
        elif pass_rate == 0:
            self.difficulty = max(0, self.difficulty - 1)
        return self.difficulty

    def state_dict(self) -> dict[str, int]:
        return {"difficulty": self.difficulty, "num_groups": self.num_groups}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        self.difficulty, self.num_groups = state["difficulty"], state["num_groups"]


def kept_levels(pass_rates: Mapping[str, float], limit: float) -> list[int]:
    """The levels of an environment (keys) that are solved at most so often, ascending; else the highest alone."""
    levels = sorted(int(level) for level, rate in pass_rates.items() if rate <= limit)
    return levels or [max(map(int, pass_rates))]


class LeastSampledFirst:
    """Which environment comes next: drawn among those that were sampled least."""

    def __init__(self, names: Iterable[str]) -> None:
        self.counts = dict.fromkeys(names, 0)
        if not self.counts:
            raise DataError("there are no environments to sample; give at least one")

    def next(self, rng: random.Random) -> str:
        """Draw an environment and count it."""
        least = min(self.counts.values())
        chosen = rng.choice([name for name, count in self.counts.items() if count == least])
        self.counts[chosen] += 1
        return chosen

    def state_dict(self) -> dict[str, int]:
        return dict(self.counts)

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Environments that are new since then begin where the least sampled one stands."""
        least = min(state.values(), default=0)
        self.counts = {name: state.get(name, least) for name in self.counts}
