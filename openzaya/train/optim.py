"""The optimiser: Muon for matrices, AdamW for everything else, one warm-up-stable-decay schedule.

Muon (momentum, then the nearest semi-orthogonal matrix by five quintic Newton-Schulz steps) replaces a
gradient G = U S V^T by about U V^T. Its step is scaled to AdamW's size, lr * 0.2 * sqrt(max(rows, columns)), so
that both halves share a scale of learning rate. ``torch.optim.Muon`` takes 2-D parameters only and always
keeps a momentum buffer; experts are stacks of matrices and the grouped convolution is one matrix a head and
tap, so this is a batched form, with ``torch.optim.Muon`` as its twin in the tests.

Which parameter goes where is decided by name and shape in :func:`is_muon_parameter`; the groups are checked to
cover every parameter exactly once.
"""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn

from openzaya.errors import TrainingError

NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)
"""Quintic coefficients (Keller Jordan, Muon): fast growth of small singular values towards 1."""


class OptimizerConfig(BaseModel):
    """Learning rates and their schedule. Where the report states no value, the default is ours."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    muon_learning_rate: float = Field(3e-3, ge=0)
    adamw_learning_rate: float = Field(3e-3, ge=0)
    muon_scales: dict[str, float] = {}
    """Factors on Muon's rate for parameters whose name contains the key, such as ``".experts." = 0.3``. Muon's step
    has one size whatever the gradient's noise, and an expert's gradient comes from its share of the tokens only."""
    momentum: float = Field(0.95, ge=0, lt=1)
    """0 keeps no buffer (as in RL)."""
    nesterov: bool = True
    betas: tuple[float, float] = (0.9, 0.95)
    epsilon: float = Field(1e-8, gt=0)
    weight_decay: float = Field(0.01, ge=0)
    """Decoupled, on matrices only."""
    split_gate_up: bool = True
    """Orthogonalise the gate and the up matrix of an expert apart; False: as stored, as one matrix."""
    newton_schulz_dtype: Literal["float32", "bfloat16", "auto"] = "float32"
    """``auto``: bfloat16 where the processor multiplies it natively (twice as fast), else float32."""
    gradient_clip: float = Field(1.0, gt=0)
    """Largest global gradient norm."""
    warmup_steps: int = Field(50, ge=0)
    decay_steps: int = Field(0, ge=0)
    """Steps of decay at the end; the rest is stable."""
    decay_shape: Literal["linear", "sqrt"] = "linear"
    final_scale: float = Field(0.0, ge=0, le=1)


def schedule_scale(config: OptimizerConfig, step: int, total_steps: int) -> float:
    """Warm-up, stable, decay: the factor on the learning rates at ``step`` (1 .. total_steps)."""
    if step <= config.warmup_steps:
        return step / config.warmup_steps
    # In a run cut short the decay begins right behind the warm-up.
    start = max(config.warmup_steps, total_steps - config.decay_steps)
    if step <= start or config.decay_steps == 0:
        return 1.0
    progress = (step - start) / (total_steps - start)
    remaining = 1 - progress if config.decay_shape == "linear" else 1 - math.sqrt(progress)
    return config.final_scale + (1 - config.final_scale) * remaining


def is_muon_parameter(name: str, parameter: Tensor) -> bool:
    """Matrices, except embeddings and heads and the depthwise convolution (one short filter a channel)."""
    return parameter.dim() >= 2 and not any(part in name for part in ("embed_tokens", "lm_head", "conv_qk_depthwise"))


def parameter_groups(model: nn.Module) -> tuple[dict[str, nn.Parameter], dict[str, nn.Parameter]]:
    """(Muon's, AdamW's) parameters by name; together every trainable parameter exactly once."""
    named = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    muon = {name: parameter for name, parameter in named.items() if is_muon_parameter(name, parameter)}
    adamw = {name: parameter for name, parameter in named.items() if name not in muon}
    counted = sum(parameter.numel() for group in (muon, adamw) for parameter in group.values())
    if counted != sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad):
        raise RuntimeError("the optimiser's groups do not cover the model's parameters exactly once")
    return muon, adamw


class Muon(torch.optim.Optimizer):
    """Batched Muon over named parameters of two or three dimensions."""

    def __init__(self, named: dict[str, nn.Parameter], config: OptimizerConfig):
        self.config = config
        self.names = list(named)
        defaults = {"lr": config.muon_learning_rate, "weight_decay": config.weight_decay}
        super().__init__(list(named.values()), defaults)

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """One step; parameters without a gradient are left alone."""
        group = self.param_groups[0]
        # Matrices of one shape from all layers form one batch: few large products instead of many small ones.
        batches: dict[tuple[int, int], list[tuple[Tensor, Tensor, float]]] = {}
        for name, parameter in zip(self.names, group["params"], strict=True):
            if parameter.grad is None:
                continue
            weights, update = self._matrices(name, parameter), self._matrices(name, self._momentum(parameter))
            rate = group["lr"] * math.prod(scale for key, scale in self.config.muon_scales.items() if key in name)
            batches.setdefault((weights.shape[-2], weights.shape[-1]), []).append((weights, update, rate))
        for (rows, columns), pairs in batches.items():
            stacked = torch.cat([update.reshape(-1, rows, columns) for _, update, _ in pairs])
            directions = orthogonalize(stacked, dtype=newton_schulz_dtype(self.config, stacked.device))
            counts = [weights.numel() // (rows * columns) for weights, _, _ in pairs]
            for (weights, _, rate), direction in zip(pairs, directions.split(counts), strict=True):
                weights.mul_(1 - rate * group["weight_decay"])
                weights.add_(direction.view(weights.shape), alpha=-rate * 0.2 * math.sqrt(max(rows, columns)))

    def _momentum(self, parameter: nn.Parameter) -> Tensor:
        gradient = parameter.grad
        assert gradient is not None
        if self.config.momentum == 0:
            return gradient
        state = self.state[parameter]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(gradient)
        buffer: Tensor = state["momentum_buffer"]
        buffer.lerp_(gradient, 1 - self.config.momentum)
        return gradient.lerp(buffer, self.config.momentum) if self.config.nesterov else buffer

    def _matrices(self, name: str, tensor: Tensor) -> Tensor:
        """``tensor`` as a view (..., rows, columns) of the matrices that are orthogonalised one by one."""
        if "conv_qk_grouped" in name:
            # (C, d, kernel) is a d x d matrix a head and tap.
            return tensor.unflatten(0, (-1, tensor.shape[1])).permute(0, 3, 1, 2)
        if "gate_up_proj" in name and self.config.split_gate_up:
            return tensor.unflatten(1, (2, -1))
        return tensor


def newton_schulz_dtype(config: OptimizerConfig, device: torch.device) -> torch.dtype:
    """The type that the iteration runs in on ``device``."""
    wanted = config.newton_schulz_dtype
    if wanted == "auto":
        is_native = device.type != "cpu" or torch.ops.mkldnn._is_mkldnn_bf16_supported()
        wanted = "bfloat16" if is_native else "float32"
    return torch.bfloat16 if wanted == "bfloat16" else torch.float32


def orthogonalize(matrices_BRC: Tensor, steps: int = 5, dtype: torch.dtype = torch.float32) -> Tensor:
    """About U V^T of each matrix U S V^T in a batch, by Newton-Schulz in ``dtype``; shape and dtype are kept."""
    a, b, c = NEWTON_SCHULZ
    x = matrices_BRC.float()
    # The products are over the rows, so the short side comes first.
    transposed = x.shape[1] > x.shape[2]
    if transposed:
        x = x.transpose(1, 2)
    x = (x / torch.linalg.matrix_norm(x, keepdim=True).clamp_min(1e-7)).to(dtype)
    for _ in range(steps):
        gram = x @ x.transpose(1, 2)
        polynomial = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        x = torch.baddbmm(x, polynomial, x, beta=a)
    if transposed:
        x = x.transpose(1, 2)
    return x.to(matrices_BRC.dtype).contiguous()


class MuonAdamW:
    """Both halves of the optimiser as one, with clipping and the schedule."""

    def __init__(self, model: nn.Module, config: OptimizerConfig, total_steps: int):
        self.config, self.total_steps = config, total_steps
        muon, adamw = parameter_groups(model)
        self.parameters = [*muon.values(), *adamw.values()]
        self.muon = Muon(muon, config)
        self.adamw = torch.optim.AdamW(
            list(adamw.values()),
            lr=config.adamw_learning_rate,
            betas=config.betas,
            eps=config.epsilon,
            weight_decay=0.0,
            fused=True,
        )

    def step(self, step: int) -> dict[str, float]:
        """Clip, set both learning rates for ``step`` (from 1), update, clear gradients; returns what it did."""
        scale = schedule_scale(self.config, step, self.total_steps)
        norm = torch.nn.utils.clip_grad_norm_(self.parameters, self.config.gradient_clip)
        if not math.isfinite(norm):
            # Stop before the weights: the last checkpoint is still good.
            raise TrainingError(
                f"the gradient's norm is {float(norm)} at step {step}; lower the learning rates or lengthen the "
                "warm-up, and go on from the last checkpoint"
            )
        self.muon.param_groups[0]["lr"] = self.config.muon_learning_rate * scale
        self.adamw.param_groups[0]["lr"] = self.config.adamw_learning_rate * scale
        self.muon.step()
        self.adamw.step()
        self.zero_grad()
        return {
            "optim/gradient_norm": float(norm),
            "optim/lr_muon": self.config.muon_learning_rate * scale,
            "optim/lr_adamw": self.config.adamw_learning_rate * scale,
            "optim/schedule_scale": scale,
        }

    def zero_grad(self) -> None:
        for parameter in self.parameters:
            parameter.grad = None

    def state_dict(self) -> dict[str, Any]:
        return {"muon": self.muon.state_dict(), "adamw": self.adamw.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.muon.load_state_dict(state["muon"])
        self.adamw.load_state_dict(state["adamw"])
