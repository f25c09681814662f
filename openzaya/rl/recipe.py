"""What a stage of RL is: a recipe's schema. Warm-up, curriculum, math-code-TTC and behaviour differ in values only."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from openzaya.environments.registry import EnvironmentSpec
from openzaya.model.balancing import BalancingConfig
from openzaya.rl.behaviour import BehaviourConfig
from openzaya.rl.curriculum import IRTSettings
from openzaya.rl.rollout import RolloutConfig
from openzaya.train.optim import OptimizerConfig
from openzaya.train.recipe import ModelChoice


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class AggregationForms(_Section):
    """Prompts that show the policy its own earlier rollouts of the same task (test-time compute).

    The candidates come from groups that this run has finished, each shown once; where there are none, tasks are asked
    plainly, so the shares are upper limits: every aggregation prompt needs a plain one before it.
    """

    tails_share: float = Field(0.0, ge=0, le=1)
    """Of the source's prompts, those with tails of the reasoning (Markovian RSA)."""
    answers_share: float = Field(0.0, ge=0, le=1)
    """Those with final answers only (PaCoRe)."""
    num_candidates: tuple[int, int] = (4, 4)
    """Lowest and highest, both included."""
    tau: int = Field(48, ge=1)
    """Tokens of a tail."""
    prompt_style: Literal["short", "full"] = "short"
    solve_rates: tuple[float, float] = (0.0, 0.95)
    """Lowest and highest solve rate of the groups whose rollouts are shown."""
    remembered_groups: int = Field(512, ge=1)

    @model_validator(mode="after")
    def _agrees(self) -> Self:
        if self.tails_share + self.answers_share > 1:
            raise ValueError("tails_share and answers_share are more than 1 together; lower one")
        if not 1 <= self.num_candidates[0] <= self.num_candidates[1]:
            raise ValueError(f"num_candidates={self.num_candidates}; give 1 or more, the lower first")
        if not 0 <= self.solve_rates[0] <= self.solve_rates[1] <= 1:
            raise ValueError(f"solve_rates={self.solve_rates}; give two of 0 to 1, the lower first")
        return self


class PromptSource(_Section):
    """Where prompts come from, and how hard they are."""

    name: str
    weight: float = Field(1.0, ge=0)
    """Share of the prompts, relative to the other sources."""
    environments: list[EnvironmentSpec] = Field(min_length=1)
    curriculum: Literal["fixed", "online"] = "fixed"
    """``online``: each environment has one difficulty, which follows the policy."""
    difficulties: tuple[int, int] = (0, 7)
    """With the fixed curriculum: lowest and highest, both included."""
    start: int | Literal["calibrated"] = "calibrated"
    """With the online curriculum: where every environment begins; ``calibrated`` asks the starting policy."""
    max_difficulty: int | None = Field(None, ge=0)
    """With the online curriculum: no higher, whatever the policy solves (a context has an end)."""
    max_prior_pass_rate: float = Field(1.0, gt=0, le=1)
    """With the fixed curriculum: levels that the starting policy solves more often are left out."""
    aggregation: AggregationForms = AggregationForms()

    @model_validator(mode="after")
    def _agrees(self) -> Self:
        if not 0 <= self.difficulties[0] <= self.difficulties[1]:
            raise ValueError(f"difficulties={self.difficulties}; give 0 or more, the lower first")
        if isinstance(self.start, int) and self.start < 0:
            raise ValueError(f"start={self.start}; give 0 or more, or calibrated")
        return self


class RLOptimizerConfig(OptimizerConfig):
    """Muon without memory at small rates, whatever else a recipe sets."""

    muon_learning_rate: float = Field(2e-3, ge=0)
    adamw_learning_rate: float = Field(3e-4, ge=0)
    momentum: float = Field(0.0, ge=0, lt=1)
    weight_decay: float = Field(0.0, ge=0)
    warmup_steps: int = Field(5, ge=0)


class RLBalancingConfig(BalancingConfig):
    """Biases stand still unless a recipe gives them a rate."""

    learning_rate: float = Field(0.0, ge=0)


class PriorConfig(_Section):
    """How the starting policy's pass rates are measured, for ``max_prior_pass_rate`` and for calibration."""

    tasks: int = Field(4, ge=1)
    """Tasks a level."""
    rollouts: int = Field(8, ge=1)
    """Rollouts a task."""
    queries: int = Field(8, ge=1)
    """Groups of ``rollouts`` that calibrate one environment."""
    model: IRTSettings = IRTSettings()


class LengthRewardConfig(_Section):
    """The length reward; off where ``coefficient`` and ``final_coefficient`` are 0."""

    coefficient: float = Field(0.0, ge=0)
    """At the stage's first step; it goes evenly to ``final_coefficient``."""
    final_coefficient: float = Field(0.0, ge=0)
    max_length: int = Field(256, ge=1)
    """Tokens; a constant of all stages."""
    length_tolerance: float = Field(8, ge=0)
    accuracy_tolerance: float = Field(0.05, ge=0)


class AlgorithmConfig(_Section):
    """Advantages and loss."""

    advantage: Literal["maxrl", "grpo"] = "maxrl"
    delta: float = Field(0.1, gt=0)
    """DPPO: largest change of a token's probability that may still be pushed further."""
    ratio_cap: float = Field(20.0, gt=0)
    length: LengthRewardConfig = LengthRewardConfig()
    drop_equal_groups: bool = True
    """Dynamic sampling: a group whose rewards are all equal is replaced."""
    max_draws: float = Field(3.0, ge=1)
    """Groups that may be drawn for a step, as a multiple of ``prompts_per_step``."""


class PipelineConfig(_Section):
    """Who rolls out, and how far ahead of the learner."""

    workers: int = Field(0, ge=0)
    """Rollout processes; 0: in the learner's own process, in turns, deterministic."""
    pool: Literal["processes", "ray", "remote"] = "processes"
    endpoints: list[str] = []
    """Of ``pool = "remote"``: base URLs of OpenAI-compatible rollout servers."""
    publish_every: int = Field(2, ge=1)
    """Learner steps between swaps of the rollout engines' weights."""
    max_staleness: int = Field(2, ge=0)
    """Learner steps that the oldest token of a group may be behind; older groups are dropped. 0 is synchronous."""
    start_batches: float = Field(1.0, ge=0)
    """Batches that lie in the buffer when a step starts."""
    buffer_batches: float = Field(3.0, ge=1)
    """The buffer's size; when it is full the oldest group goes."""
    worker_threads: int = Field(1, ge=1)
    """CPU threads of a rollout process."""

    @model_validator(mode="after")
    def _agrees(self) -> Self:
        if self.max_staleness and self.publish_every > self.max_staleness:
            raise ValueError(
                f"publish_every={self.publish_every} is above max_staleness={self.max_staleness}: groups would be too "
                "old before they are used; lower the one or raise the other"
            )
        if self.start_batches > self.buffer_batches:
            raise ValueError(f"start_batches={self.start_batches} is above buffer_batches={self.buffer_batches}")
        return self

    @property
    def is_synchronous(self) -> bool:
        return self.max_staleness == 0 or (self.workers == 0 and self.pool == "processes")


class RLConfig(_Section):
    """One stage of RL."""

    kind: Literal["rl"] = "rl"
    phase: str = "rl"
    model: ModelChoice
    """``start_from`` names the stage or checkpoint to go on from."""
    tokenizer: str | None = None
    steps: int = Field(100, ge=1)
    prompts_per_step: int = Field(32, ge=1)
    sources: list[PromptSource] = Field(min_length=1)
    rollout: RolloutConfig = RolloutConfig()
    algorithm: AlgorithmConfig = AlgorithmConfig()
    behaviour: BehaviourConfig | None = None
    """Rewards are a reward model's or a judge's, gated by verifiers; None: the verifiers' own."""
    prior: PriorConfig = PriorConfig()
    pipeline: PipelineConfig = PipelineConfig()
    optimizer: RLOptimizerConfig = RLOptimizerConfig()
    balancing: RLBalancingConfig = RLBalancingConfig()
    window_tokens: int = Field(512, ge=2)
    windows_per_batch: int = Field(8, ge=1)
    """Windows in one forward pass."""
    max_engine_trainer_kl: float = Field(0.05, gt=0)
    """Nats a token between engine and trainer on tokens of the trainer's own weights; more stops the run."""
    samples_every: int = Field(10, ge=1)
    """Steps between rollouts that are kept for reading."""
    seed: int = 0
    checkpoint_every: int = Field(20, ge=1)
    keep_checkpoints: int = Field(2, ge=1)
    device: str = "cpu"
    threads: int = Field(0, ge=0)

    @model_validator(mode="after")
    def _agrees(self) -> Self:
        names = [source.name for source in self.sources]
        if len(set(names)) < len(names):
            raise ValueError(f"sources are called {', '.join(names)}; give each a name of its own")
        if self.model.start_from is None:
            raise ValueError("model.start_from is not set; RL goes on from a trained model")
        return self
