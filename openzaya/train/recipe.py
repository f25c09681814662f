"""What a training phase is: a recipe's schema. Pretraining, midtraining and SFT differ in these values only."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from openzaya.data.preference_recipe import PreferenceConfig
from openzaya.data.recipe import DataConfig
from openzaya.model.balancing import BalancingConfig
from openzaya.train.optim import OptimizerConfig


class ModelChoice(BaseModel):
    """Where the weights come from: an earlier stage or checkpoint, or fresh ones of a preset."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    start_from: str | None = None
    """An earlier stage's directory name, a checkpoint directory or a hub id; None draws fresh weights."""
    preset: str = "nano"
    """Shape of fresh weights."""
    changes: dict[str, Any] = {}
    """Fields of the model configuration to change, such as ``rope_theta`` between phases; with ``start_from``
    only those that change no tensor's shape."""
    seed: int = 0


class TrainConfig(BaseModel):
    """One phase of training."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Literal["train"] = "train"
    phase: str = "train"
    """Shown in progress and report: pretrain, midtrain, sft, ..."""
    model: ModelChoice = ModelChoice()
    tokenizer: str | None = None
    """An earlier stage's directory name or a directory with a tokenizer; None: the starting checkpoint's own."""
    context_length: int = Field(512, ge=2)
    """Tokens a window."""
    windows_per_batch: int = Field(16, ge=1)
    """Windows in one forward pass."""
    accumulation: int = Field(1, ge=1)
    """Forward passes a step."""
    steps: int = Field(1000, ge=1)
    data: DataConfig
    optimizer: OptimizerConfig = OptimizerConfig()
    balancing: BalancingConfig = BalancingConfig()
    checkpoint_every: int = Field(200, ge=1)
    keep_checkpoints: int = Field(2, ge=1)
    device: str = "cpu"
    """A PyTorch device. Other devices than the CPU were not tried."""
    threads: int = Field(0, ge=0)
    """CPU threads; 0 leaves PyTorch's choice. The same number gives the same bits."""


class RewardModelConfig(TrainConfig):
    """Training a reward model from preference pairs: the same phase with other data and another loss."""

    kind: Literal["reward_model"] = "reward_model"  # type: ignore[assignment]
    phase: str = "reward_model"
    windows_per_batch: int = Field(16, ge=2)
    """Most windows in one forward pass; both conversations of a pair are in the same one."""
    data: PreferenceConfig  # type: ignore[assignment]
    centring: float = Field(0.0, ge=0)
    """Weight of (chosen + rejected score)^2 in the loss, which keeps scores around 0."""
    evaluate_every: int = Field(50, ge=1)
    """Steps between measurements on the held-out pairs; the last step is always one."""
