"""RMSNorm, residual merging, rotary positions, initialisation: against formulas written out, and gradcheck in fp64."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from openzaya.errors import DataError
from openzaya.model.layers import LearnedResidual, PlainResidual, RMSNorm, rotary_tables, rotate
from openzaya.model.transformer import ForwardRecord, Zaya
from tests.model.reference import TINY, perturb, random_tokens


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def randomised(module: nn.Module, seed: int = 1) -> nn.Module:
    """Every parameter random, in fp64."""
    module.double()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    return module


def gradcheck_module(module: nn.Module, *inputs: torch.Tensor) -> None:
    """Numerical against analytical gradients of all inputs and parameters."""
    names = [name for name, _ in module.named_parameters()]

    def call(*values: torch.Tensor) -> torch.Tensor:
        parameters = dict(zip(names, values[len(inputs) :], strict=True))
        return torch.func.functional_call(module, parameters, values[: len(inputs)])

    values = (*inputs, *(parameter.detach().clone() for parameter in module.parameters()))
    assert torch.autograd.gradcheck(call, tuple(value.requires_grad_() for value in values))


def test_rms_norm_is_its_formula_and_its_gradient() -> None:
    norm = randomised(RMSNorm(6, 1e-2))
    x = normal(5, 6)
    x[0] = 0
    expected = x / (x.square().mean(-1, keepdim=True) + 1e-2).sqrt() * norm.weight
    torch.testing.assert_close(norm(x), expected)
    gradcheck_module(norm, x)


def test_rms_norm_of_bfloat16_weights_computes_in_fp32() -> None:
    norm = RMSNorm(64, 1e-5).to(torch.bfloat16)
    x = normal(3, 64, dtype=torch.float32) * 100
    assert norm(x).dtype == torch.bfloat16
    torch.testing.assert_close(norm(x), (x / x.square().mean(-1, keepdim=True).sqrt()).to(torch.bfloat16))


def test_learned_residual_adds_the_bias_before_it_scales() -> None:
    merge = randomised(LearnedResidual(6))
    output, residual = normal(4, 6, seed=2), normal(4, 6, seed=3)
    expected = (output + merge.hidden_states_bias) * merge.hidden_states_scale
    expected = expected + (residual + merge.residual_bias) * merge.residual_scale
    torch.testing.assert_close(merge(output, residual), expected)
    gradcheck_module(merge, output, residual)
    gradcheck_module(PlainResidual(6), output, residual)


def test_a_fresh_learned_residual_is_the_plain_one() -> None:
    output, residual = normal(4, 6, dtype=torch.float32), normal(4, 6, seed=1, dtype=torch.float32)
    assert torch.equal(LearnedResidual(6)(output, residual), PlainResidual(6)(output, residual))


def test_residuals_add_bfloat16_outputs_in_fp32() -> None:
    residual = normal(2, 6, dtype=torch.float32) * 1000
    output = normal(2, 6, seed=1, dtype=torch.bfloat16)
    merge = LearnedResidual(6).to(torch.bfloat16)
    assert merge(output, residual).dtype == torch.float32
    assert torch.equal(merge(output, residual), residual + output.float())


def test_rotate_turns_pairs_of_half_distance_and_leaves_the_rest() -> None:
    positions, rotary_dim, base = torch.tensor([0, 1, 5, 1000]), 4, 50.0
    x = normal(4, 3, 6)
    turned = rotate(x, rotary_tables(positions, rotary_dim, base))
    for token, position in enumerate(positions.tolist()):
        for pair in range(2):
            angle = position * base ** (-2 * pair / rotary_dim)
            first, second = x[token, :, pair], x[token, :, pair + 2]
            expected = first * math.cos(angle) - second * math.sin(angle)
            torch.testing.assert_close(turned[token, :, pair], expected, atol=1e-4, rtol=1e-4)
            expected = second * math.cos(angle) + first * math.sin(angle)
            torch.testing.assert_close(turned[token, :, pair + 2], expected, atol=1e-4, rtol=1e-4)
    assert torch.equal(turned[..., 4:], x[..., 4:])


def test_a_seed_fixes_the_weights() -> None:
    first, same, other = Zaya(TINY, seed=5), Zaya(TINY, seed=5), Zaya(TINY, seed=6)
    weights = [dict(model.named_parameters()) for model in (first, same, other)]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    assert not torch.equal(weights[0]["model.embed_tokens.weight"], weights[2]["model.embed_tokens.weight"])


def test_fresh_weights_start_where_training_should() -> None:
    """Scales, norms and temperatures at 1, biases at 0, matrices of deviation 0.02, skip bias -1."""
    model = Zaya(TINY, seed=0)
    for name, parameter in model.named_parameters():
        if parameter.dim() >= 2:
            assert abs(float(parameter.detach().std()) - 0.02) < 0.005, name
        elif name.endswith("bias"):
            assert not parameter.any(), name
        else:
            assert bool((parameter == 1).all()), name
    for block in model.model.layers:
        assert block.mlp.gate.balancing_biases.tolist() == [0.0] * TINY.num_experts + [-1.0]


def test_every_parameter_gets_a_gradient_from_the_start() -> None:
    """No temperature of 0 or the like that starves a part of the model."""
    model = Zaya(TINY, seed=0)
    model(random_tokens(TINY, 4, 16, torch.Generator().manual_seed(0))).square().sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and bool(parameter.grad.isfinite().all()), name
        assert bool(parameter.grad.any()), name


def test_record_holds_a_route_and_a_residual_size_a_layer() -> None:
    model, record = Zaya(TINY, seed=0), ForwardRecord(measure_residual=True)
    perturb(model, torch.Generator().manual_seed(0))
    model(random_tokens(TINY, 2, 5, torch.Generator().manual_seed(0)), record=record)
    assert len(record.routes) == len(record.residual_rms) == TINY.num_hidden_layers
    assert record.experts_NL().shape == (10, TINY.num_hidden_layers)
    assert record.experts_NL().dtype == torch.uint8
    assert all(float(size) > 0 and not size.requires_grad for size in record.residual_rms)


@pytest.mark.parametrize("shape", [(1, 1), (1, 5), (4, 1)])
def test_single_rows_and_single_tokens(shape: tuple[int, int]) -> None:
    model = Zaya(TINY, seed=0)
    logits = model(random_tokens(TINY, *shape, torch.Generator().manual_seed(0)))
    assert logits.shape == (*shape, TINY.vocab_size)
    assert bool(logits.isfinite().all())


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        (torch.tensor([1, 2, 3]), r"shape \(3,\).*\(rows, tokens\)"),
        (torch.zeros(2, 0, dtype=torch.int64), r"shape \(2, 0\).*at least one token"),
        (torch.tensor([[1, 48]]), r"range from 1 to 48.*vocabulary holds 48.*tokenizer"),
        (torch.tensor([[-1, 3]]), r"range from -1 to 3"),
        (torch.tensor([[1.0, 2.0]]), r"dtype torch.float32.*int"),
    ],
)
def test_tokens_that_are_none_are_refused(tokens: torch.Tensor, message: str) -> None:
    with pytest.raises(DataError, match=message):
        Zaya(TINY)(tokens)
