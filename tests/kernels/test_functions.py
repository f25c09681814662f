"""Every kernel against its plain twin: outputs and all gradients, on odd sizes."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from openzaya.kernels import build, experts, functions
from openzaya.model.attention import Attention, attend_documents
from openzaya.model.config import ZayaConfig
from openzaya.model.experts import loop_experts
from openzaya.model.layers import LearnedResidual, rotary_tables
from openzaya.model.layout import make_layout
from openzaya.train import loss
from openzaya.train.loss import linear_cross_entropy, plain_cross_entropy

TOLERANCE = 1e-5
CANCELLING = {"qk_norm.temp": 3e-5}
"""Gradients that are one number a head: their terms, one a token, nearly cancel."""
pytestmark = pytest.mark.skipif(not build.available(), reason="no C++ compiler on this machine")


def assert_close(ours: Tensor, twin: Tensor, name: str, tolerance: float = TOLERANCE) -> None:
    """The largest difference, relative to the largest entry."""
    assert ours.shape == twin.shape, name
    scale = max(float(twin.abs().max()), 1e-6) if twin.numel() else 1.0
    difference = float((ours - twin).abs().max()) / scale if twin.numel() else 0.0
    assert math.isfinite(difference) and difference < tolerance, f"{name} differs by {difference:.2e}"


def compare(ours: Callable[..., Tensor], twin: Callable[..., Tensor], inputs: dict[str, Tensor], seed: int = 0) -> None:
    """Outputs and gradients of both functions of the same leaves (floating-point ones get gradients)."""
    results = []
    for function in (ours, twin):
        leaves = {k: v.clone().requires_grad_() if v.is_floating_point() else v for k, v in inputs.items()}
        output = function(**leaves)
        weights = torch.randn(output.shape, generator=torch.Generator().manual_seed(seed))
        (output * weights).sum().backward()
        results.append((output.detach(), {k: v.grad for k, v in leaves.items() if v.is_floating_point()}))
    assert_close(results[0][0], results[1][0], "output")
    for name, gradient in results[1][1].items():
        assert results[0][1][name] is not None, name
        assert_close(results[0][1][name], gradient, f"gradient of {name}", CANCELLING.get(name, TOLERANCE))


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed + sum(shape)))


@pytest.mark.parametrize("tokens,fan_in,fan_out", [(1, 1, 1), (33, 7, 5), (100, 64, 32), (257, 130, 77), (40, 600, 33)])
@pytest.mark.parametrize("bias", [True, False])
def test_linear(tokens: int, fan_in: int, fan_out: int, bias: bool) -> None:
    inputs = {"x": normal(tokens, fan_in), "weight": normal(fan_out, fan_in)}
    if bias:
        inputs["bias"] = normal(fan_out)
    compare(functions.linear, lambda x, weight, bias=None: F.linear(x, weight, bias), inputs)


def test_linear_takes_strided_inputs() -> None:
    inputs = {"x": normal(24, 50), "weight": normal(24, 9)}
    compare(lambda x, weight: functions.linear(x.T, weight.T), lambda x, weight: x.T @ weight, inputs)


@pytest.mark.parametrize("tokens,size", [(1, 3), (37, 5), (65, 128)])
def test_rms_norm(tokens: int, size: int) -> None:
    inputs = {"x": normal(tokens, size) * 3, "weight": normal(size)}
    compare(
        lambda x, weight: functions.rms_norm(x, weight, 1e-5),
        lambda x, weight: F.rms_norm(x, (size,), weight, 1e-5),
        inputs,
    )


@pytest.mark.parametrize("tokens,size", [(1, 3), (37, 5), (65, 128)])
def test_merge(tokens: int, size: int) -> None:
    names = ("hidden_states_scale", "hidden_states_bias", "residual_scale", "residual_bias")
    inputs = {"output": normal(tokens, size), "residual": normal(tokens, size, seed=9)}
    inputs |= {name: normal(size, seed=index) for index, name in enumerate(names)}

    def twin(output: Tensor, residual: Tensor, **vectors: Tensor) -> Tensor:
        with functions.disabled():
            return torch.func.functional_call(LearnedResidual(size), vectors, (output, residual))

    def ours(output: Tensor, residual: Tensor, **vectors: Tensor) -> Tensor:
        return functions.merge(output, residual, *(vectors[name] for name in names))

    compare(ours, twin, inputs)


@pytest.mark.parametrize("heads,key_heads,head_dim", [(4, 2, 32), (3, 1, 6), (2, 2, 40), (8, 2, 16)])
@pytest.mark.parametrize("window", [None, 2, 20])
def test_attention(heads: int, key_heads: int, head_dim: int, window: int | None) -> None:
    lengths = [1, 70, 2, 33, 1, 24]
    tokens = sum(lengths)
    inputs = {
        "queries_keys": normal(tokens, heads + key_heads, head_dim) * 2,
        "values": normal(tokens, key_heads, head_dim),
    }

    def twin(queries_keys: Tensor, values: Tensor) -> Tensor:
        return attend_documents(queries_keys[:, :heads], queries_keys[:, heads:], values, lengths, window)

    compare(lambda queries_keys, values: functions.attend(queries_keys, values, lengths, window), twin, inputs)


@pytest.mark.parametrize("kernel0,kernel1", [(1, 1), (2, 2), (1, 3), (4, 1), (3, 4)])
@pytest.mark.parametrize("heads,key_heads,head_dim,rotary", [(4, 2, 32, 0.5), (3, 3, 6, 1.0), (4, 1, 20, 0.1)])
@pytest.mark.parametrize("packed", [True, False])
def test_cca_attention(
    kernel0: int, kernel1: int, heads: int, key_heads: int, head_dim: int, rotary: float, packed: bool
) -> None:
    """The whole attention block: projection, convolutions, QK-mean, QK-norm, RoPE, value shift, attention."""
    config = ZayaConfig(
        hidden_size=24, num_hidden_layers=1, num_attention_heads=heads, num_key_value_heads=key_heads,
        head_dim=head_dim, cca_time0=kernel0, cca_time1=kernel1, partial_rotary_factor=rotary,
    )  # fmt: skip
    block = Attention(config, 0)
    ids = torch.tensor([0, 1, 1] + [2] * 60 + [3] * 5)[None].repeat(2, 1) if packed else None
    layout = make_layout(torch.zeros(2, 68, dtype=torch.long), document_ids=ids)
    tables = rotary_tables(layout.positions_N, config.rotary_dim, 10_000.0)
    inputs = {name: normal(*parameter.shape) for name, parameter in block.named_parameters()}
    inputs["hidden"] = normal(136, 24)

    def run(hidden: Tensor, **parameters: Tensor) -> Tensor:
        return torch.func.functional_call(block, parameters, (hidden, layout, tables, None))

    def twin(**leaves: Tensor) -> Tensor:
        with functions.disabled():
            return run(**leaves)

    compare(run, twin, inputs)


def test_cca_without_length_and_with_temperature_zero() -> None:
    """All-zero keys (the start in some checkpoints) and all-zero hidden states give finite, equal gradients."""
    config = ZayaConfig(hidden_size=24, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2, head_dim=8)
    block = Attention(config, 0)
    layout = make_layout(torch.zeros(1, 40, dtype=torch.long))
    tables = rotary_tables(layout.positions_N, config.rotary_dim, 10_000.0)
    inputs = {name: normal(*parameter.shape) for name, parameter in block.named_parameters()}
    inputs["qk_norm.temp"] = torch.tensor([0.0, 1.5])
    inputs["hidden"] = normal(40, 24)

    def run(hidden: Tensor, **parameters: Tensor) -> Tensor:
        return torch.func.functional_call(block, parameters, (hidden, layout, tables, None))

    def twin(**leaves: Tensor) -> Tensor:
        with functions.disabled():
            return run(**leaves)

    compare(run, twin, inputs)
    output = run(**{**inputs, "hidden": torch.zeros(40, 24), "qkv_proj.conv_qk_grouped.bias": torch.zeros(32)})
    assert bool(output.isfinite().all())


@pytest.mark.parametrize("hidden_size,width,num_experts", [(16, 24, 4), (5, 3, 3), (128, 192, 8), (33, 50, 1)])
@pytest.mark.parametrize("skewed", [True, False])
@pytest.mark.parametrize("large", [True, False])
def test_experts(
    hidden_size: int, width: int, num_experts: int, skewed: bool, large: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Experts without a token, experts with one, and tokens of the skip class."""
    monkeypatch.setattr(experts, "LARGE_EXPERT", 0 if large else 1 << 20)
    generator = torch.Generator().manual_seed(num_experts)
    choice = torch.randint(0, num_experts + 1, (150,), generator=generator)
    if skewed:
        choice = torch.where(choice == 0, num_experts, num_experts - 1)
        choice[3] = 0
    inputs = {
        "hidden": normal(150, hidden_size),
        "gate": normal(150).abs(),
        "gate_up": normal(num_experts, 2 * width, hidden_size) * 0.3,
        "down": normal(num_experts, hidden_size, width) * 0.3,
    }
    compare(
        lambda hidden, gate, gate_up, down: functions.experts(hidden, choice, gate, gate_up, down),
        lambda hidden, gate, gate_up, down: loop_experts(hidden, choice, gate, gate_up, down),
        inputs,
    )


def test_all_tokens_skip() -> None:
    hidden = normal(40, 8).requires_grad_()
    choice = torch.full((40,), 2)
    output = functions.experts(hidden, choice, torch.ones(40), normal(2, 6, 8), normal(2, 8, 3))
    output.sum().backward()
    assert not output.any() and not hidden.grad.any()


@pytest.mark.parametrize("tokens,size,vocabulary", [(33, 8, 50), (100, 33, 1000), (64, 256, 400), (70, 16, 7)])
@pytest.mark.parametrize("kernel", [True, False])
@pytest.mark.parametrize("scale", [1.0, 0.3])
def test_cross_entropy(
    tokens: int, size: int, vocabulary: int, kernel: bool, scale: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Kernel and plain block alike, in one block and in several."""
    monkeypatch.setattr(loss, "BLOCK_TOKENS", 40)
    generator = torch.Generator().manual_seed(tokens)
    targets = torch.randint(0, vocabulary, (tokens,), generator=generator)
    mask = torch.rand(tokens, generator=generator) < 0.9
    inputs = {"hidden": normal(tokens, size) * 2, "head": normal(vocabulary, size)}

    def ours(hidden: Tensor, head: Tensor) -> Tensor:
        with contextlib.nullcontext() if kernel else functions.disabled():
            return linear_cross_entropy(hidden, head, targets, mask, scale=scale)

    compare(ours, lambda hidden, head: scale * plain_cross_entropy(hidden, head, targets, mask), inputs)


def test_embedding() -> None:
    tokens = torch.tensor([3, 0, 3, 3, 59])
    compare(
        lambda weight: functions.embedding(tokens, weight),
        lambda weight: F.embedding(tokens, weight),
        {"weight": normal(60, 7)},
    )


def test_kernels_refuse_what_they_cannot_do() -> None:
    tokens = normal(64, 8)
    assert functions.suits(tokens, None)
    assert not functions.suits(tokens.double())
    assert not functions.suits(tokens, tokens.bfloat16())
    assert not functions.suits(tokens.to("meta"))
    assert not functions.suits(tokens[:1])
    with functions.disabled():
        assert not functions.suits(tokens)


def test_not_a_number_stays_one() -> None:
    """A broken step must be seen in the loss, not be clamped away."""
    hidden, head = normal(40, 16), normal(50, 16)
    hidden[7, 3] = math.nan
    targets = torch.arange(40)
    assert linear_cross_entropy(hidden, head, targets, torch.ones(40, dtype=torch.bool)).isnan()


def test_same_bits_twice() -> None:
    choice = torch.randint(0, 5, (300,), generator=torch.Generator().manual_seed(1))
    inputs = (normal(300, 32), normal(300).abs(), normal(4, 48, 32), normal(4, 32, 24))
    runs = []
    for _ in range(2):
        leaves = [tensor.clone().requires_grad_() for tensor in inputs]
        output = functions.experts(leaves[0], choice, *leaves[1:])
        output.square().sum().backward()
        runs.append([output.detach(), *(leaf.grad for leaf in leaves)])
    assert all(torch.equal(first, second) for first, second in zip(*runs, strict=True))
