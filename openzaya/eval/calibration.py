"""``openzaya calibrate``: where a model solves half of what each environment asks, before anything is trained.

Takes a recipe of a stage of RL, and fits its sources whose difficulty follows the policy, or a recipe of its own with
nothing but a model and environments. The fit is that of the stage itself (``openzaya/rl/prior.py``). Leaves
``calibration.json``: of every environment the fitted curve and the groups that were observed.
"""

from __future__ import annotations

import itertools
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import Tensor

from openzaya.config import Resolved
from openzaya.environments.registry import EnvironmentSpec
from openzaya.errors import ConfigError
from openzaya.eval.report_rl import calibration_table
from openzaya.rl.loop import RLRun, make_pool
from openzaya.rl.pool import RolloutPool
from openzaya.rl.prior import FIRST_NUMBER, calibrate, describe
from openzaya.rl.recipe import PriorConfig, PromptSource, RLConfig
from openzaya.rl.rollout import Group, Order, RolloutConfig
from openzaya.runlog import RunLog, format_duration, write_json
from openzaya.train.recipe import ModelChoice


class CalibrateConfig(BaseModel):
    """A model and the environments that it is asked in."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Literal["calibrate"] = "calibrate"
    model: ModelChoice
    """``start_from`` names an earlier stage, a checkpoint directory or a hub id."""
    tokenizer: str | None = None
    environments: list[EnvironmentSpec] = Field(min_length=1)
    max_difficulty: int | None = Field(None, ge=0)
    """No harder tasks than these."""
    rollout: RolloutConfig = RolloutConfig()
    prior: PriorConfig = PriorConfig()
    window_tokens: int = Field(512, ge=2)
    """Most tokens of a prompt and its response."""
    seed: int = 0
    device: str = "cpu"
    threads: int = Field(0, ge=0)

    @model_validator(mode="after")
    def _agrees(self) -> Self:
        if self.model.start_from is None:
            raise ValueError("model.start_from is not set; name the model that is to be asked")
        return self

    def as_rl(self) -> RLConfig:
        """The stage of RL that would ask the same."""
        source = PromptSource(
            name="environments",
            environments=self.environments,
            curriculum="online",
            max_difficulty=self.max_difficulty,
        )
        shared = ("model", "tokenizer", "rollout", "prior", "window_tokens", "seed", "device", "threads")
        return RLConfig(sources=[source], **{name: getattr(self, name) for name in shared})


def run_calibration(recipe: Resolved[Any], directory: Path) -> dict[str, Any]:
    """Calibrate what ``recipe`` asks for (kind ``rl`` or ``calibrate``); returns the content of ``calibration.json``.

    Names of earlier stages are looked up beside ``directory``.

    Raises:
        OpenZayaError: a recipe without a source to calibrate; a checkpoint or environment that cannot be used.
    """
    config = recipe.value.as_rl() if isinstance(recipe.value, CalibrateConfig) else recipe.value
    config = _online_sources(config)
    if config.threads:
        import torch

        torch.set_num_threads(config.threads)
    started = time.perf_counter()
    with (
        RunLog(
            *(directory,), total_steps=1, phase="calibrate", resolved_toml=recipe.to_toml(), tensorboard=False
        ) as log,
        RLRun(config, directory.parent) as run,
    ):
        num_environments = sum(len(state.environments) for state in run.prompts.sources.values())
        prior = config.prior
        _say(f"calibrate: {num_environments} environments, {prior.queries} groups of {prior.rollouts} rollouts each")
        run.pool = make_pool(config, run.learner, run.tokenizer, run.prompts, directory.parent)
        pool = _Watched(run.pool, config.prior.queries * num_environments, _say)
        numbers = itertools.count(FIRST_NUMBER)
        found = {
            source.name: calibrate(source, config.prior, run.prompts, pool, numbers, config.seed)
            for source in config.sources
        }
        result = {
            "model": config.model.start_from,
            "seed": config.seed,
            "rollouts": config.prior.rollouts,
            "seconds": round(time.perf_counter() - started, 1),
            "calibration": {
                source.name: {name: describe(one, source.max_difficulty) for name, one in found[source.name].items()}
                for source in config.sources
            },
        }
        write_json(directory / "calibration.json", result)
        log.set_final(seconds=result["seconds"], groups=pool.num_groups)
    return result


def _online_sources(config: RLConfig) -> RLConfig:
    """With only the sources that can be calibrated."""
    sources = [source for source in config.sources if source.curriculum == "online"]
    if not sources:
        raise ConfigError(
            f"none of the sources {', '.join(source.name for source in config.sources)} has curriculum 'online': there "
            "is nothing to calibrate; set it, or write a recipe of kind 'calibrate'"
        )
    return config.model_copy(update={"sources": sources})


class _Watched:
    """A pool that says how many of the expected groups have come."""

    def __init__(self, pool: RolloutPool, expected: int, say: Callable[[str], None]) -> None:
        self._pool, self._expected, self._say = pool, expected, say
        self._began = time.perf_counter()
        self.num_groups = 0
        self._right = self._asked = 0

    def publish(self, step: int, weights: Mapping[str, Tensor]) -> None:
        self._pool.publish(step, weights)

    def submit(self, orders: Sequence[Order]) -> None:
        self._pool.submit(orders)

    def collect(self, timeout_s: float | None = None) -> list[Group]:
        groups = self._pool.collect(timeout_s)
        self.num_groups += len(groups)
        self._right += sum(verdict == 1 for group in groups for verdict in group.verdicts)
        self._asked += sum(len(group.verdicts) for group in groups)
        if groups:
            seconds = time.perf_counter() - self._began
            left = format_duration(seconds / self.num_groups * max(0, self._expected - self.num_groups))
            solved = f"{100 * self._right / max(1, self._asked):.0f} % right"
            self._say(f"calibrate: {self.num_groups} of {self._expected} groups, {solved}, ETA {left}")
        return groups

    def outstanding(self) -> list[Order]:
        return self._pool.outstanding()

    def metrics(self) -> dict[str, float]:
        return self._pool.metrics()

    def close(self) -> None:
        self._pool.close()


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def calibration_text(result: dict[str, Any]) -> str:
    """The table for a terminal."""
    table = calibration_table(result)
    lines = [table.header, *table.rows]
    widths = [max(len(line[column]) for line in lines) for column in range(len(table.header))]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if column < table.num_text_columns else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    )
