"""Shared by the model's tests: random shapes, models with well-spread weights, comparisons, the transformers twin.

Nothing here is taken from ``openzaya.model.hf``: the twin in ``transformers`` is configured and filled by hand, so
that a defect in our checkpoint code cannot hide one in the model.
"""

from __future__ import annotations

import random
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from openzaya.model.config import ZayaConfig
from openzaya.model.transformer import ForwardRecord, Zaya

TINY = ZayaConfig(
    vocab_size=48,
    hidden_size=24,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    num_experts=4,
    moe_intermediate_size=16,
    router_hidden_size=12,
    cca_time0=3,
    cca_time1=2,
    rope_theta=100.0,
    rope_theta_sliding=10.0,
    sliding_window=4,
    layer_types=("hybrid", "hybrid_sliding", "hybrid"),
    max_position_embeddings=128,
    eos_token_id=4,
)
"""A small model with every ingredient: both kinds of layers, unequal kernels, grouped heads."""


def random_config(draw: random.Random) -> ZayaConfig:
    """A random small shape: every field that changes the arithmetic varies."""
    num_key_value_heads = draw.choice((1, 1, 2, 3))
    num_layers = draw.randint(1, 4)
    head_dim = draw.choice((4, 8, 12, 16))
    return ZayaConfig(
        vocab_size=draw.randint(20, 60),
        hidden_size=draw.choice((12, 20, 32)),
        num_hidden_layers=num_layers,
        num_attention_heads=num_key_value_heads * draw.choice((1, 1, 2, 3, 4)),
        num_key_value_heads=num_key_value_heads,
        head_dim=head_dim,
        num_experts=draw.randint(1, 7),
        moe_intermediate_size=draw.choice((8, 12, 20)),
        router_hidden_size=draw.choice((8, 12)),
        cca_time0=draw.randint(1, 4),
        cca_time1=draw.randint(1, 4),
        rms_norm_eps=draw.choice((1e-6, 1e-5)),
        rope_theta=draw.choice((10.0, 10_000.0, 5_000_000.0)),
        rope_theta_sliding=draw.choice((7.0, 10_000.0)),
        partial_rotary_factor=draw.choice((0.5, 1.0)),
        sliding_window=draw.randint(1, 7),
        layer_types=tuple(draw.choice(("hybrid", "hybrid_sliding")) for _ in range(num_layers)),
        max_position_embeddings=128,
        eos_token_id=4,
    )


@torch.no_grad()
def perturb(model: nn.Module, generator: torch.Generator) -> None:
    """Weights at which every term of the model matters: matrices of gain about 1, scales, biases and temperatures
    away from their starting values, some temperatures negative."""

    def normal(like: Tensor) -> Tensor:
        return torch.randn(like.shape, generator=generator)

    for name, parameter in model.named_parameters():
        if name.endswith("temp"):
            parameter.copy_(1 + 0.5 * normal(parameter))
        elif name.endswith(("scale", "norm.weight", "layernorm.weight")):
            parameter.copy_(1 + 0.2 * normal(parameter))
        elif name.endswith("bias"):
            parameter.copy_(0.2 * normal(parameter))
        elif "embed_tokens" in name or "lm_head" in name:
            # Logits of a few units: a saturated softmax would leave gradients made of rounding.
            parameter.copy_(2 * normal(parameter) / parameter.shape[-1] ** 0.5)
        else:
            fan_in = parameter[0].numel() if "conv" in name else parameter.shape[-1]
            gain = 3.0 if "gate.router_mlp" in name or name.endswith("gate.out_proj.weight") else 1.0
            parameter.copy_(gain * normal(parameter) / fan_in**0.5)
    perturb_balancing(model, generator)


@torch.no_grad()
def perturb_balancing(model: nn.Module, generator: torch.Generator) -> None:
    """Balancing biases large enough to decide, the skip class's among them."""
    for name, buffer in model.named_buffers():
        if name.endswith("balancing_biases"):
            buffer.copy_(0.2 * torch.randn(buffer.shape, generator=generator))


def random_tokens(config: ZayaConfig, rows: int, length: int, generator: torch.Generator) -> Tensor:
    """int64 (rows, length) without the padding id 0: ``transformers`` gives its embedding no gradient."""
    return torch.randint(1, config.vocab_size, (rows, length), generator=generator)


def left_padding(rows: int, length: int, draw: random.Random) -> Tensor:
    """int64 0/1 (rows, length): row 0 unpadded, the others with random left padding, at least one token left."""
    mask = torch.ones(rows, length, dtype=torch.int64)
    for row in range(1, rows):
        mask[row, : draw.randint(1, length - 1)] = 0
    return mask


def transformers_config(config: ZayaConfig) -> Any:
    """The ``transformers`` configuration of the same shape."""
    from transformers import ZayaConfig as TransformersConfig

    shared = set(TransformersConfig().to_dict()) & set(ZayaConfig.model_fields)
    bases = {"hybrid": config.rope_theta, "hybrid_sliding": config.rope_theta_sliding}
    return TransformersConfig(
        **{name: getattr(config, name) for name in sorted(shared - {"layer_types"})},
        layer_types=list(config.layer_types),
        rope_parameters={
            kind: {"rope_type": "default", "rope_theta": base, "partial_rotary_factor": config.partial_rotary_factor}
            for kind, base in bases.items()
        },
    )


def transformers_twin(model: Zaya) -> Any:
    """``transformers``' ZayaForCausalLM with the weights of ``model``; every key must find its place."""
    from transformers import ZayaForCausalLM

    twin = ZayaForCausalLM(transformers_config(model.config)).eval()
    weights = dict(model.state_dict())
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"]
    twin.load_state_dict(weights, strict=True)
    return twin


def token_loss(logits: Tensor, tokens: Tensor, is_token: Tensor) -> Tensor:
    """Mean cross-entropy over real tokens; each predicts the next of its row, the last one the first."""
    real = is_token.bool()
    return F.cross_entropy(logits[real], tokens.roll(-1, dims=1)[real])


def logits_error(found: Tensor, expected: Tensor) -> float:
    """The larger of two relative errors: largest difference to largest logit, and norm to norm."""
    found, expected = found.detach(), expected.detach()
    difference = found - expected
    largest = difference.abs().max() / expected.abs().max()
    norm = difference.norm() / expected.norm()
    return max(float(largest), float(norm))


def gradients(model: nn.Module) -> dict[str, Tensor]:
    """A copy of each parameter's gradient (zeros where there is none); clears them."""
    found = {}
    for name, parameter in model.named_parameters():
        found[name] = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad.clone()
        parameter.grad = None
    return found


def worst_gradient_error(found: dict[str, Tensor], expected: dict[str, Tensor]) -> tuple[float, str]:
    """The largest per-parameter relative error in the norm, and whose it is.

    Gradients of less than a thousandth of the whole gradient's norm are measured against that: at a tolerance of
    1e-4 this forgives 1e-7 of the whole, one fp32 rounding, which is all there is where the true gradient is zero.
    """
    assert found.keys() == expected.keys()
    whole = torch.stack([gradient.norm() for gradient in expected.values()]).norm()
    floor = 1e-3 * float(whole) + 1e-30
    return max(
        (float((found[name] - expected[name]).norm()) / max(float(expected[name].norm()), floor), name)
        for name in expected
    )


def smallest_margin(record: ForwardRecord, model: Zaya) -> float:
    """How far the best class is ahead of the second over all tokens and layers: above rounding, no choice can flip."""
    margins = [torch.tensor(1.0)]
    for route, block in zip(record.routes, model.model.layers, strict=True):
        if route.shares_NX.shape[1] > 1:
            best = (route.shares_NX.detach() + block.mlp.gate.balancing_biases).topk(2, dim=-1).values
            margins.append((best[:, 0] - best[:, 1]).min())
    return float(torch.stack(margins).min())
