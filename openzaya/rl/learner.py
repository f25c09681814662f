"""The learner: one update of the policy from the groups of a step (arXiv 2605.05365).

    advantages    MaxRL with the length reward, or GRPO (advantages.py)
    loss          DPPO's mask, importance weights against the engine's own log probabilities, sum over the tokens of
                  a rollout, mean over all rollouts of a full step: the denominator is fixed (loss.py)
    forward       with the experts that the engine chose, prompt tokens included; gates are the current router's own
    update        clip, Muon without momentum, AdamW

A rollout without verdict has no advantage and is left out. Groups whose rewards are all equal teach nothing; which
groups come here is decided in collect.py.

Shape suffixes: P groups, G rollouts a group, N tokens, M tokens that the policy wrote.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from openzaya.errors import TrainingError
from openzaya.model.balancing import Balancer, count_load, load_entropy
from openzaya.model.transformer import ForwardRecord, Zaya
from openzaya.rl.advantages import BestSolveRates, grpo, length_reward, maxrl
from openzaya.rl.batch import PolicyBatch, PolicySequence, make_batches
from openzaya.rl.loss import agreement, policy_loss
from openzaya.rl.recipe import RLConfig
from openzaya.rl.rollout import Group
from openzaya.runlog import Metric
from openzaya.train.loss import linear_token_logprobs
from openzaya.train.optim import MuonAdamW


@dataclass
class _Sums:
    """What the micro-batches of a step leave behind."""

    logprobs: list[Tensor]
    sampler_logprobs: list[Tensor]
    is_current: list[Tensor]
    entropy: float = 0.0
    ratio: float = 0.0
    masked_positive: int = 0
    num_positive: int = 0
    masked_negative: int = 0
    num_negative: int = 0
    num_tokens: int = 0


class Learner:
    """Policy, optimiser and what the algorithm remembers."""

    def __init__(self, model: Zaya, config: RLConfig) -> None:
        self.config = config
        self.model = model
        self.optimizer = MuonAdamW(model, config.optimizer, config.steps)
        self.balancer = Balancer(model, config.balancing)
        self.best_rates = BestSolveRates()
        self.step = 0

    def update(self, groups: Sequence[Group], drawn_rates: Mapping[str, float]) -> dict[str, Metric]:
        """One step on ``groups``; returns its metrics. Without a group nothing changes but the step's number.

        ``drawn_rates`` are the mean solve rates of all groups that were drawn for the step, by :func:`source_key`.
        """
        started = time.perf_counter()
        best = {key: self.best_rates.update(key, rate) for key, rate in drawn_rates.items()}
        metrics: dict[str, Metric] = {}
        sequences: list[PolicySequence] = []
        if groups:
            for group, row in zip(groups, self._advantages(groups, best, metrics).tolist(), strict=True):
                sequences += [
                    PolicySequence(group.prompt_tokens, rollout, advantage)
                    for rollout, advantage in zip(group.rollouts, row, strict=False)
                    if advantage != 0 and len(rollout.tokens)
                ]
        self.step += 1
        if sequences:
            metrics |= self._optimise(sequences)
        metrics["rl/trained_rollouts"] = len(sequences)
        metrics["time/update_s"] = time.perf_counter() - started
        return metrics

    def _advantages(self, groups: Sequence[Group], best: Mapping[str, float], metrics: dict[str, Metric]) -> Tensor:
        """(P, G) in float64; padding where a group has fewer rollouts than others."""
        num = max(len(group.rollouts) for group in groups)

        def table(values: Iterable[list[float]], padding: float) -> Tensor:
            return torch.tensor([row + [padding] * (num - len(row)) for row in values], dtype=torch.float64)

        rewards_PG = table(
            ([math.nan if entry.reward is None else entry.reward for entry in group.rollouts] for group in groups),
            math.nan,
        )
        if self.config.algorithm.advantage == "grpo":
            return grpo(rewards_PG)
        settings = self.config.algorithm.length
        share = self.step / max(1, self.config.steps - 1)
        coefficient = settings.coefficient + share * (settings.final_coefficient - settings.coefficient)
        metrics["rl/length_coefficient"] = coefficient
        if coefficient == 0:
            return maxrl(rewards_PG)
        shaping_PG = length_reward(
            rewards_PG,
            table(([float(len(entry.tokens)) for entry in group.rollouts] for group in groups), 0),
            best_solve_rate=torch.tensor([best.get(source_key(group), 0.0) for group in groups], dtype=torch.float64),
            coefficient=coefficient,
            max_length=settings.max_length,
            length_tolerance=settings.length_tolerance,
            accuracy_tolerance=settings.accuracy_tolerance,
        )
        metrics["rl/length_reward"] = float(shaping_PG.mean())
        return maxrl(rewards_PG, shaping_PG)

    # --- the update -------------------------------------------------------------------------------

    def _optimise(self, sequences: Sequence[PolicySequence]) -> dict[str, Metric]:
        config = self.config
        sums = _Sums([], [], [])
        loss, load_LX, num_tokens = 0.0, torch.zeros(0), 0
        for batch in make_batches(
            sequences,
            window_tokens=config.window_tokens,
            windows_per_batch=config.windows_per_batch,
            replay_experts=config.rollout.replay_experts,
        ):
            record = ForwardRecord()
            loss += self._forward_backward(batch.to(config.device), record, sums)
            micro_load_LX = count_load(record.routes, batch.was_run_N.to(config.device)).cpu()
            load_LX = micro_load_LX if load_LX.numel() == 0 else load_LX + micro_load_LX
            num_tokens += int((batch.document_ids >= 0).sum())
        metrics = self._agreement(sums)
        numbers = self.optimizer.step(self.step)
        if config.balancing.learning_rate:
            self.balancer.step(load_LX, numbers["optim/schedule_scale"])
        entropy_L = load_entropy(load_LX)
        return {
            **metrics,
            "loss/policy": loss,
            "rl/entropy_nats": sums.entropy / sums.num_tokens,
            "rl/mean_ratio": sums.ratio / sums.num_tokens,
            "rl/masked_share_positive": sums.masked_positive / max(1, sums.num_positive),
            "rl/masked_share_negative": sums.masked_negative / max(1, sums.num_negative),
            "train/policy_tokens": sums.num_tokens,
            "train/tokens": num_tokens,
            "route/load_entropy": entropy_L.tolist(),
            "route/load_entropy_min": float(entropy_L.min()),
            **{key: value for key, value in numbers.items() if key != "optim/schedule_scale"},
        }

    def _forward_backward(self, batch: PolicyBatch, record: ForwardRecord, sums: _Sums) -> float:
        """Add one micro-batch's gradient; returns its part of the loss."""
        logprobs_M, entropies_M = policy_logprobs(self.model, batch, record)
        sampler_M = batch.of_next(batch.sampler_logprobs)
        advantages_M = batch.of_next(batch.advantages)
        everywhere_M = torch.ones_like(advantages_M, dtype=torch.bool)
        config = self.config
        result = policy_loss(
            logprobs_M,
            sampler_M,
            advantages_M,
            everywhere_M,
            num_rollouts=config.prompts_per_step * config.rollout.group_size,
            delta=config.algorithm.delta,
            ratio_cap=config.algorithm.ratio_cap,
        )
        result.loss.backward()
        num = len(logprobs_M)
        sums.logprobs.append(logprobs_M.detach())
        sums.sampler_logprobs.append(sampler_M)
        sums.is_current.append(batch.of_next(batch.versions) == self.step - 1)
        sums.entropy += float(entropies_M.sum())
        sums.ratio += result.mean_ratio * num
        sums.masked_positive += result.masked_positive
        sums.num_positive += result.num_positive
        sums.masked_negative += result.masked_negative
        sums.num_negative += result.num_negative
        sums.num_tokens += num
        return float(result.loss.detach())

    def _agreement(self, sums: _Sums) -> dict[str, Metric]:
        """Engine against trainer: on all tokens, and on those of the very weights that are being trained.

        Raises:
            TrainingError: the two disagree on weights that should be the same.
        """
        logprobs, sampler = torch.cat(sums.logprobs), torch.cat(sums.sampler_logprobs)
        found = agreement(logprobs, sampler, torch.ones_like(logprobs, dtype=torch.bool))
        metrics: dict[str, Metric] = {
            "rl/engine_trainer_kl": found.kl_nats,
            "rl/engine_trainer_r": found.pearson_r,
            "rl/engine_trainer_largest_gap": found.largest_gap_nats,
        }
        current = agreement(logprobs, sampler, torch.cat(sums.is_current))
        if current.num_tokens:
            metrics["rl/on_policy_kl"] = current.kl_nats
            metrics["rl/on_policy_r"] = current.pearson_r
        limit = self.config.max_engine_trainer_kl
        if not current.kl_nats <= limit:
            raise TrainingError(
                f"engine and trainer are {current.kl_nats:.3g} nats a token apart on {current.num_tokens} tokens of "
                f"the same weights (limit {limit:g}) at step {self.step}; set rollout.replay_experts, use an engine "
                "of higher precision, or raise max_engine_trainer_kl"
            )
        return metrics

    # --- state ------------------------------------------------------------------------------------

    def weights(self) -> dict[str, Tensor]:
        """What rollout engines need: parameters and balancing biases, by name."""
        return {name: tensor.detach() for name, tensor in self.model.state_dict().items()}

    def state_dict(self) -> dict[str, Any]:
        return {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "balancer": self.balancer.state_dict(),
            "best_rates": self.best_rates.state_dict(),
            "step": self.step,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.balancer.load_state_dict(state["balancer"])
        self.best_rates.load_state_dict(state["best_rates"])
        self.step = state["step"]


def source_key(group: Group) -> str:
    """What solve rates are compared within: the source, and how the task was asked."""
    return f"{group.order.source}/{group.order.form}"


def policy_logprobs(model: Zaya, batch: PolicyBatch, record: ForwardRecord | None = None) -> tuple[Tensor, Tensor]:
    """Log probabilities (with gradient) and entropies of the tokens that the policy wrote, both (M,)."""
    hidden_BTD = model.hidden_states(
        batch.tokens,
        document_ids=batch.document_ids,
        positions=batch.positions,
        forced_experts=batch.experts,
        record=record,
    )
    rows_M = batch.predicts_N.nonzero()[:, 0]
    targets_M = batch.of_next(batch.tokens)
    return linear_token_logprobs(hidden_BTD.flatten(0, 1)[rows_M], model.head_weight, targets_M)
