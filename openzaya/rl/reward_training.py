"""Training a reward model from preference pairs, by the loop of all phases (openzaya/train/loop.py).

Bradley-Terry: the chosen conversation of a pair wins with probability sigmoid(r_chosen - r_rejected), so

    loss = mean over pairs of  -log sigmoid(r_chosen - r_rejected) + centring * (r_chosen + r_rejected)^2

The whole model is trained, and a vector that makes a score of the last token's hidden state (reward_model.py). Pairs
that are held out give the accuracy, for each kind of pair too, and the mean and deviation that scores are normalised
with. The log's supervised tokens are the scored ones, two a pair.

Shape suffixes: B windows, T tokens a window, P pairs, D hidden.
"""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from openzaya.config import Resolved
from openzaya.data.mixture import Mixture
from openzaya.data.packing import Batch
from openzaya.data.preference_recipe import build_pair_mixture, held_out_pairs
from openzaya.data.preferences import PairBatch, PairBatches
from openzaya.model.transformer import Zaya
from openzaya.rl.reward_model import RewardModel, ScoreStatistics, score_tokens
from openzaya.runlog import Metric
from openzaya.train.loop import Batches, Trainer, train
from openzaya.train.recipe import RewardModelConfig


def train_reward_model(recipe: Resolved[RewardModelConfig], directory: Path, *, resume: bool = True) -> Path:
    """Run the phase in ``directory`` as :func:`openzaya.train.loop.train` does; returns the reward model's path."""
    return train(recipe, directory, resume=resume, trainer_type=RewardTrainer)


def bradley_terry(chosen_P: Tensor, rejected_P: Tensor, *, centring: float = 0.0) -> Tensor:
    """The summed loss (scalar) of P pairs of scores."""
    losses_P = -F.logsigmoid(chosen_P - rejected_P)
    if centring:
        losses_P = losses_P + centring * (chosen_P + rejected_P).square()
    return losses_P.sum()


class ScoringModule(nn.Module):
    """The model and its reward head, as the optimiser sees them."""

    def __init__(self, model: Zaya, seed: int) -> None:
        super().__init__()
        self.model = model
        generator = torch.Generator().manual_seed(seed)
        drawn_D = torch.randn(model.config.hidden_size, generator=generator) * model.config.initializer_range
        self.reward_head = nn.Parameter(drawn_D.to(model.device))


class RewardTrainer(Trainer):
    """The loop's trainer with pairs for data and Bradley-Terry for its loss."""

    config: RewardModelConfig

    def __init__(self, config: RewardModelConfig, stages: Path) -> None:
        self._module: ScoringModule | None = None
        self._margins: list[Tensor] = []
        """Of the step in hand, (P,) a micro-batch."""
        self._evaluated: tuple[int, dict[str, Any], ScoreStatistics] | None = None
        super().__init__(config, stages)
        self._held_out = held_out_pairs(config.data, self.tokenizer, config.context_length)

    def open_data(self) -> tuple[Mixture, Batches]:
        mixture = build_pair_mixture(self.config.data, self.tokenizer, self.config.context_length)
        return mixture, PairBatches(mixture, self.config.context_length, self.config.windows_per_batch)

    def trained_module(self) -> ScoringModule:
        if self._module is None:
            self._module = ScoringModule(self.model, self.config.model.seed)
        return self._module

    def num_supervised(self, batch: Batch) -> int:
        return int(batch.loss_mask.sum())

    def loss(self, hidden_BTD: Tensor, batch: Batch, *, scale: float) -> Tensor:
        assert isinstance(batch, PairBatch)
        last_D = hidden_BTD.flatten(0, 1)[torch.cat([batch.chosen_P, batch.rejected_P])]
        chosen_P, rejected_P = (last_D.float() @ self.trained_module().reward_head).chunk(2)
        self._margins.append((chosen_P - rejected_P).detach())
        # The scale is that of a mean over scored tokens, of which a pair has two.
        return 2 * scale * bradley_terry(chosen_P, rejected_P, centring=self.config.centring)

    def loss_metrics(self, mean_loss: float) -> dict[str, Metric]:
        margins_P = torch.cat(self._margins)
        self._margins = []
        return {
            "rm/loss": mean_loss,
            "rm/accuracy": float((margins_P > 0).float().mean()),
            "rm/margin": float(margins_P.mean()),
        }

    def train_step(self) -> dict[str, Metric]:
        metrics = super().train_step()
        if self.step % self.config.evaluate_every == 0 or self.step == self.config.steps:
            found, _ = self.evaluate()
            metrics |= {f"rm/heldout_{name}": found[name] for name in ("loss", "accuracy", "margin")}
            self.last_metrics = metrics
        return metrics

    def evaluate(self) -> tuple[dict[str, Any], ScoreStatistics]:
        """Loss, accuracy and margin on the held-out pairs, accuracies by kind, and the scores' statistics."""
        if self._evaluated is not None and self._evaluated[0] == self.step:
            return self._evaluated[1:]
        conversations = [tokens for pair in self._held_out for tokens in pair.conversations]
        scores = score_tokens(self.model, self.trained_module().reward_head.detach(), conversations)
        margins_P = scores[::2] - scores[1::2]
        by_kind: dict[str, list[bool]] = defaultdict(list)
        for pair, margin in zip(self._held_out, margins_P.tolist(), strict=True):
            by_kind[pair.kind].append(margin > 0)
        found = {
            "pairs": len(self._held_out),
            "loss": float(bradley_terry(scores[::2], scores[1::2])) / len(self._held_out),
            "accuracy": float((margins_P > 0).float().mean()),
            "margin": float(margins_P.mean()),
            "accuracy_by_kind": {kind: sum(wins) / len(wins) for kind, wins in sorted(by_kind.items())},
        }
        statistics = ScoreStatistics.of(scores)
        self._evaluated = (self.step, found, statistics)
        return found, statistics

    def final_numbers(self) -> dict[str, Any]:
        found, statistics = self.evaluate()
        return {**super().final_numbers(), "held_out": {**found, "scores": vars(statistics)}}

    def export(self, path: Path) -> Path:
        """Save the reward model: the model, its head and the scores' statistics."""
        reward_model = RewardModel(
            self.model,
            self.tokenizer,
            self.trained_module().reward_head,
            statistics=self.evaluate()[1],
            with_reasoning=self.config.data.with_reasoning,
        )
        return reward_model.save(path)
