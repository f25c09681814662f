"""The optimiser: groups, the batched Muon against plain twins, the schedule, clipping."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import Tensor, nn

from openzaya.model.config import PRESETS, preset
from openzaya.model.transformer import Zaya
from openzaya.train.optim import (
    NEWTON_SCHULZ,
    Muon,
    MuonAdamW,
    OptimizerConfig,
    is_muon_parameter,
    newton_schulz_dtype,
    orthogonalize,
    parameter_groups,
)
from tests.train import miniature

VARIANTS = [
    {"attention": attention, "router": router, "residual": residual}
    for attention in ("cca", "gqa", "mha", "mla")
    for router in ("mlp+eda", "mlp", "linear")
    for residual in ("learned", "plain")
]


# --- groups ---------------------------------------------------------------------------------------


def assert_covered_once(model: nn.Module) -> None:
    muon, adamw = parameter_groups(model)
    grouped = [id(parameter) for group in (muon, adamw) for parameter in group.values()]
    assert len(grouped) == len(set(grouped))
    assert set(grouped) == {id(parameter) for parameter in model.parameters()}


@pytest.mark.parametrize("name", PRESETS)
def test_groups_cover_every_parameter_of_every_preset_once(name: str) -> None:
    with torch.device("meta"):
        assert_covered_once(Zaya(preset(name).with_changes(num_hidden_layers=4)))


@pytest.mark.parametrize("variant", VARIANTS, ids=lambda variant: "-".join(variant.values()))
def test_groups_cover_every_parameter_of_every_variant_once(variant: dict) -> None:
    with torch.device("meta"):
        model = Zaya(miniature.config(**variant, mla_latent_size=8))
        assert_covered_once(model)
    for name, parameter in model.named_parameters():
        last = name.rsplit(".", 1)[-1]
        assert parameter.dim() >= 2 or not is_muon_parameter(name, parameter), name
        assert last != "bias" or not is_muon_parameter(name, parameter), name


def test_each_kind_of_parameter_is_where_the_report_says() -> None:
    with torch.device("meta"):
        muon, adamw = parameter_groups(Zaya(miniature.config()))
    in_muon = {name.split(".", 3)[-1] for name in muon}
    assert in_muon == {
        "self_attn.qkv_proj.q_proj.weight",
        "self_attn.qkv_proj.k_proj.weight",
        "self_attn.qkv_proj.v_proj_current.weight",
        "self_attn.qkv_proj.v_proj_delayed.weight",
        "self_attn.qkv_proj.conv_qk_grouped.weight",
        "self_attn.o_proj.weight",
        "mlp.gate.down_proj.weight",
        "mlp.gate.router_mlp.fc1.weight",
        "mlp.gate.router_mlp.fc2.weight",
        "mlp.gate.router_mlp.out_proj.weight",
        "mlp.experts.gate_up_proj",
        "mlp.experts.down_proj",
    }
    assert {"model.embed_tokens.weight", "model.norm.weight"} <= adamw.keys()
    assert any(name.endswith("conv_qk_depthwise.weight") for name in adamw)
    assert any(name.endswith("qk_norm.temp") for name in adamw)
    assert not any("balancing_biases" in name for name in (*muon, *adamw))


def test_frozen_parameters_are_left_out() -> None:
    model = Zaya(miniature.config())
    model.model.embed_tokens.weight.requires_grad_(False)
    muon, adamw = parameter_groups(model)
    assert "model.embed_tokens.weight" not in muon | adamw


# --- Muon -----------------------------------------------------------------------------------------


def plain_newton_schulz(matrix: Tensor) -> Tensor:
    """One matrix, written out from the formula."""
    a, b, c = NEWTON_SCHULZ
    x = matrix.clone()
    transposed = x.shape[0] > x.shape[1]
    x = x.T if transposed else x
    x = x / (x.square().sum().sqrt() + 1e-30)
    for _ in range(5):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.T if transposed else x


class PlainMuon:
    """Muon for one matrix in fp64, a step at a time."""

    def __init__(self, weight: Tensor, config: OptimizerConfig):
        self.weight, self.config = weight.detach().double().clone(), config
        self.buffer = torch.zeros_like(self.weight)

    def step(self, gradient: Tensor) -> None:
        gradient, config = gradient.double(), self.config
        self.buffer = config.momentum * self.buffer + (1 - config.momentum) * gradient
        nested = (1 - config.momentum) * gradient + config.momentum * self.buffer
        update = nested if config.nesterov else self.buffer
        self.weight *= 1 - config.muon_learning_rate * config.weight_decay
        rows, columns = self.weight.shape
        self.weight -= config.muon_learning_rate * 0.2 * math.sqrt(max(rows, columns)) * plain_newton_schulz(update)


def matrices_of(name: str, tensor: Tensor, split_gate_up: bool) -> list[Tensor]:
    """Views of every matrix that is orthogonalised by itself, by slicing one after the other."""
    if tensor.dim() == 2:
        return [tensor]
    if "conv_qk_grouped" in name:
        size = tensor.shape[1]
        return [
            tensor[head * size : (head + 1) * size, :, tap]
            for head in range(tensor.shape[0] // size)
            for tap in range(tensor.shape[2])
        ]
    if "gate_up_proj" in name and split_gate_up:
        half = tensor.shape[1] // 2
        return [part for expert in tensor for part in (expert[:half], expert[half:])]
    return list(tensor)


def random_gradients(named: dict[str, nn.Parameter], seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for parameter in named.values():
        parameter.grad = torch.randn(parameter.shape, generator=generator)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"split_gate_up": False},
        {"nesterov": False},
        {"momentum": 0.0},
        {"weight_decay": 0.3},
        {"weight_decay": 0.0, "nesterov": False, "momentum": 0.5},
    ],
    ids=str,
)
def test_batched_muon_is_plain_muon_on_every_matrix(settings: dict) -> None:
    config = OptimizerConfig(muon_learning_rate=0.02, **settings)
    named, _ = parameter_groups(Zaya(miniature.config(cca_time1=3, num_hidden_layers=2)))
    twins = {
        name: [PlainMuon(matrix, config) for matrix in matrices_of(name, parameter.data, config.split_gate_up)]
        for name, parameter in named.items()
    }
    optimizer = Muon(named, config)
    for step in range(3):
        random_gradients(named, step)
        for name, parameter in named.items():
            for twin, gradient in zip(
                twins[name], matrices_of(name, parameter.grad, config.split_gate_up), strict=True
            ):
                twin.step(gradient)
        optimizer.step()
    for name, parameter in named.items():
        for twin, matrix in zip(twins[name], matrices_of(name, parameter.data, config.split_gate_up), strict=True):
            # The twin works in fp64; the steps are of size 0.02.
            torch.testing.assert_close(matrix.double(), twin.weight, atol=1e-6, rtol=0, msg=name)


def test_split_and_fused_gate_up_differ() -> None:
    """Otherwise the setting would show nothing."""
    results = []
    for split in (True, False):
        named, _ = parameter_groups(Zaya(miniature.config()))
        random_gradients(named, 0)
        Muon(named, OptimizerConfig(split_gate_up=split)).step()
        results.append({name: parameter.detach().clone() for name, parameter in named.items()})
    differing = {name.split(".", 3)[-1] for name in results[0] if not torch.equal(results[0][name], results[1][name])}
    assert differing == {"mlp.experts.gate_up_proj"}


def test_it_follows_torch_muon_as_far_as_its_bfloat16_allows() -> None:
    """torch.optim.Muon orthogonalises in bf16, 8 bits: five steps of it leave a few per cent of a step's size.

    Both are deterministic functions of the same momentum, so the difference stays at that size.
    """
    config = OptimizerConfig(muon_learning_rate=0.02, weight_decay=0.1)
    generator = torch.Generator().manual_seed(0)
    start = [torch.randn(24, 40, generator=generator) for _ in range(3)]
    stack = nn.Parameter(torch.stack(start))
    ours = Muon({"experts.down_proj": stack}, config)
    theirs = [nn.Parameter(matrix.clone()) for matrix in start]
    reference = torch.optim.Muon(
        theirs, lr=0.02, weight_decay=0.1, momentum=0.95, nesterov=True, adjust_lr_fn="match_rms_adamw"
    )
    for _ in range(4):
        stack.grad = torch.randn(stack.shape, generator=generator)
        for index, parameter in enumerate(theirs):
            parameter.grad = stack.grad[index].clone()
        ours.step()
        reference.step()
    for index, parameter in enumerate(theirs):
        moved = (parameter - start[index]).norm()
        assert float((stack[index] - parameter).detach().norm() / moved.detach()) < 0.05


def test_rates_are_scaled_by_name_weight_decay_included() -> None:
    """Factors multiply where several keys are in the name, and touch no other parameter."""
    config = OptimizerConfig(weight_decay=0.4, muon_scales={".experts.": 0.5, "down": 0.25, "absent": 9.0})
    gradient = torch.randn(3, 6, 6, generator=torch.Generator().manual_seed(0))
    moved = {}
    for name in ("x.experts.up", "x.experts.down", "other"):
        parameter = nn.Parameter(torch.ones(3, 6, 6))
        parameter.grad = gradient.clone()
        Muon({name: parameter}, config).step()
        moved[name] = 1 - parameter.detach()
    torch.testing.assert_close(moved["x.experts.up"], 0.5 * moved["other"])
    torch.testing.assert_close(moved["x.experts.down"], 0.125 * moved["other"])


def test_parameters_of_one_shape_keep_their_own_rates() -> None:
    """They are orthogonalised as one batch."""
    named = {name: nn.Parameter(torch.zeros(2, 4, 4)) for name in ("experts", "other")}
    for parameter in named.values():
        parameter.grad = torch.ones(2, 4, 4)
    Muon(named, OptimizerConfig(muon_scales={"experts": 0.1})).step()
    torch.testing.assert_close(named["experts"].detach(), 0.1 * named["other"].detach())


def test_bfloat16_newton_schulz_stays_near_float32() -> None:
    config = OptimizerConfig(newton_schulz_dtype="bfloat16")
    assert newton_schulz_dtype(config, torch.device("cpu")) == torch.bfloat16
    assert newton_schulz_dtype(OptimizerConfig(), torch.device("cpu")) == torch.float32
    auto = newton_schulz_dtype(OptimizerConfig(newton_schulz_dtype="auto"), torch.device("cpu"))
    assert auto in (torch.bfloat16, torch.float32)
    matrices = torch.randn(4, 24, 40, generator=torch.Generator().manual_seed(0))
    exact, rounded = orthogonalize(matrices), orthogonalize(matrices, dtype=torch.bfloat16)
    assert rounded.dtype == torch.float32
    # Five steps in 8 bits; the same few per cent as between torch.optim.Muon and us.
    assert 0 < float((exact - rounded).norm() / exact.norm()) < 0.05


def test_one_step_of_a_square_matrix_has_the_size_of_adamw() -> None:
    """Root mean square of the change: learning rate times about 0.2, whatever the gradient's scale."""
    for scale in (1e-4, 1.0, 1e4):
        parameter = nn.Parameter(torch.zeros(64, 64))
        optimizer = Muon({"w": parameter}, OptimizerConfig(muon_learning_rate=0.01, weight_decay=0))
        parameter.grad = scale * torch.randn(64, 64, generator=torch.Generator().manual_seed(0))
        optimizer.step()
        assert float(parameter.detach().square().mean().sqrt()) == pytest.approx(0.01 * 0.2, rel=0.2)


def test_weights_decay_towards_zero_independently_of_the_gradient() -> None:
    parameter = nn.Parameter(torch.ones(8, 8))
    optimizer = Muon({"w": parameter}, OptimizerConfig(muon_learning_rate=0.1, weight_decay=0.5))
    parameter.grad = torch.zeros(8, 8)
    optimizer.step()
    torch.testing.assert_close(parameter.detach(), torch.full((8, 8), 0.95))


def test_momentum_zero_keeps_no_buffer_and_other_momentum_one_a_parameter() -> None:
    for momentum, num_buffers in ((0.0, 0), (0.9, 1)):
        parameter = nn.Parameter(torch.ones(4, 6))
        optimizer = Muon({"w": parameter}, OptimizerConfig(momentum=momentum))
        parameter.grad = torch.ones(4, 6)
        optimizer.step()
        tensors = [value for state in optimizer.state.values() for value in state.values()]
        assert len(tensors) == num_buffers
        assert torch.equal(parameter.grad, torch.ones(4, 6)), "the gradient itself must stay"


def test_a_parameter_without_gradient_is_left_alone() -> None:
    first, second = nn.Parameter(torch.ones(4, 6)), nn.Parameter(torch.ones(4, 6))
    first.grad = torch.ones(4, 6)
    Muon({"a": first, "b": second}, OptimizerConfig(weight_decay=0.5)).step()
    assert torch.equal(second.detach(), torch.ones(4, 6)) and not torch.equal(first.detach(), torch.ones(4, 6))


@pytest.mark.parametrize("shape", [(1, 1, 1), (3, 16, 16), (2, 5, 40), (2, 40, 5), (4, 1, 7), (4, 7, 1)])
def test_orthogonalised_singular_values_lie_in_the_known_band(shape: tuple[int, int, int]) -> None:
    """The quintic does not converge to 1 but holds values that started above about 0.01 within 0.65 to 1.25."""
    matrices = torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))
    before = torch.linalg.svdvals(matrices / torch.linalg.matrix_norm(matrices, keepdim=True))
    directions = orthogonalize(matrices)
    after = torch.linalg.svdvals(directions)
    assert directions.shape == matrices.shape
    assert bool((after[before > 0.01] > 0.65).all()) and bool((after < 1.25).all())
    left, _, right = torch.linalg.svd(matrices, full_matrices=False)
    cosine = (directions * (left @ right)).sum((1, 2)) / (directions.norm(dim=(1, 2)) * (left @ right).norm(dim=(1, 2)))
    assert bool((cosine > 0.97).all()), "not the direction of U V^T"


def test_orthogonalize_zero_is_zero_and_dtype_stays() -> None:
    assert not orthogonalize(torch.zeros(2, 3, 4)).any()
    assert orthogonalize(torch.ones(2, 3, 4, dtype=torch.bfloat16)).dtype == torch.bfloat16


def test_state_survives_saving() -> None:
    model = Zaya(miniature.config())
    optimizer = MuonAdamW(model, OptimizerConfig(), total_steps=10)
    for step in (1, 2):
        random_gradients(dict(model.named_parameters()), step)
        optimizer.step(step)
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    other = Zaya(miniature.config(), seed=5)
    resumed = MuonAdamW(other, OptimizerConfig(), total_steps=10)
    other.load_state_dict(weights)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for net, opt in ((model, optimizer), (other, resumed)):
        random_gradients(dict(net.named_parameters()), 3)
        opt.step(3)
    assert miniature.differences(dict(model.state_dict()), dict(other.state_dict())) == []
