"""Keeping the experts evenly loaded without an auxiliary loss (arXiv 2605.05365, balancing).

After each optimiser step, per layer, with f_e the share of the global batch's tokens routed to expert e, the
"gradient" of the balancing bias b_e is f_e - 1/E and an AdamW instance steps b: read as a controller, AdamW's
first moment integrates the error and its second moment sets the gain. The skip class keeps its bias of -1.

Kinds: ``adamw_pid`` (ZAYA), ``sign`` (b_e <- b_e - rate * sign(f_e - 1/E), DeepSeek-V3), ``aux_loss`` (no bias
steps; E * sum_e f_e * mean share_e is added to the loss, Switch Transformer), ``none``.

Shape suffixes: L layers, E experts, X = E + 1 classes, N tokens.
"""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from openzaya.model.router import Route, Router
from openzaya.model.transformer import Zaya


class BalancingConfig(BaseModel):
    """How the load is balanced. The published settings of the bias optimiser are not known: these are ours."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Literal["adamw_pid", "sign", "aux_loss", "none"] = "adamw_pid"
    learning_rate: float = Field(2e-3, ge=0)
    """Step of a bias a step, in units of softmax share."""
    beta1: float = Field(0.9, ge=0, lt=1)
    beta2: float = Field(0.95, ge=0, lt=1)
    aux_loss_coefficient: float = Field(0.01, ge=0)


class Balancer:
    """Owns the balancing biases of a model during training."""

    def __init__(self, model: Zaya, config: BalancingConfig):
        self.config = config
        self.routers = [module for module in model.modules() if isinstance(module, Router)]
        self.biases_LE = torch.nn.Parameter(self._read())
        self.optimizer = torch.optim.AdamW(
            [self.biases_LE], lr=config.learning_rate, betas=(config.beta1, config.beta2), weight_decay=0.0
        )

    def _read(self) -> Tensor:
        return torch.stack([router.balancing_biases[:-1].clone() for router in self.routers])

    @torch.no_grad()
    def step(self, load_LX: Tensor, scale: float = 1.0) -> None:
        """Move the biases against the error of one global batch.

        Args:
            load_LX: tokens a layer and class, summed over micro-batches and ranks.
            scale: factor on the learning rate (the schedule's).
        """
        if self.config.kind in ("aux_loss", "none"):
            return
        error_LE = load_shares(load_LX) - 1 / (load_LX.shape[1] - 1)
        if self.config.kind == "sign":
            self.biases_LE.sub_(error_LE.sign(), alpha=self.config.learning_rate * scale)
        else:
            self.optimizer.param_groups[0]["lr"] = self.config.learning_rate * scale
            self.biases_LE.grad = error_LE.to(self.biases_LE)
            self.optimizer.step()
        for router, biases_E in zip(self.routers, self.biases_LE, strict=True):
            router.balancing_biases[:-1] = biases_E

    def auxiliary_loss(self, routes: list[Route], is_token_N: Tensor) -> Tensor | None:
        """The Switch loss of one micro-batch, summed over layers and tokens; None for the other kinds."""
        if self.config.kind != "aux_loss":
            return None
        total = torch.zeros((), device=is_token_N.device)
        for route in routes:
            shares_NX = route.shares_NX[is_token_N]
            num_experts = shares_NX.shape[1] - 1
            load_E = torch.bincount(route.choice_N[is_token_N], minlength=num_experts + 1)[:num_experts]
            total = total + num_experts * (load_E * shares_NX[:, :num_experts].mean(0)).sum()
        return self.config.aux_loss_coefficient * total

    def state_dict(self) -> dict[str, Any]:
        """The bias optimiser's state; the biases themselves are saved with the model."""
        return self.optimizer.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore; call after the model's own weights are loaded."""
        with torch.no_grad():
            self.biases_LE.copy_(self._read())
        self.optimizer.load_state_dict(state)


def count_load(routes: list[Route], is_token_N: Tensor) -> Tensor:
    """int64 (L, X): how many real tokens chose each class in each layer."""
    num_classes = routes[0].shares_NX.shape[1]
    return torch.stack([torch.bincount(route.choice_N[is_token_N], minlength=num_classes) for route in routes])


def load_shares(load_LX: Tensor) -> Tensor:
    """f_e, fp32 (L, E): the experts' shares of all tokens, the skip class's tokens included in the total."""
    return load_LX[:, :-1].float() / load_LX.sum(1, keepdim=True).clamp_min(1)


def load_entropy(load_LX: Tensor) -> Tensor:
    """H(f) / ln E per layer, fp32 (L): 1 = all experts equally loaded. 1 by definition for a single expert."""
    num_experts = load_LX.shape[1] - 1
    if num_experts == 1:
        return torch.ones(load_LX.shape[0])
    counts_LE = load_LX[:, :-1].float()
    shares_LE = counts_LE / counts_LE.sum(1, keepdim=True).clamp_min(1)
    return torch.special.entr(shares_LE).sum(1) / math.log(num_experts)
