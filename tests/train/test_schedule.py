"""The learning rate's schedule, and the clipping of gradients."""

from __future__ import annotations

import math

import pytest
import torch

from openzaya.errors import ConfigError
from openzaya.model.transformer import Zaya
from openzaya.train.optim import MuonAdamW, OptimizerConfig, schedule_scale
from tests.train import miniature
from tests.train.test_optim import random_gradients


def scales(total: int, **settings) -> list[float]:
    config = OptimizerConfig(**settings)
    return [schedule_scale(config, step, total) for step in range(1, total + 1)]


def test_warm_up_then_stable_then_linear_decay_to_the_end() -> None:
    found = scales(12, warmup_steps=4, decay_steps=4)
    assert found == pytest.approx([0.25, 0.5, 0.75, 1, 1, 1, 1, 1, 0.75, 0.5, 0.25, 0.0])


def test_decay_ends_at_the_final_scale() -> None:
    found = scales(8, warmup_steps=0, decay_steps=4, final_scale=0.2)
    assert found == pytest.approx([1, 1, 1, 1, 0.8, 0.6, 0.4, 0.2])


def test_square_root_decay_falls_first() -> None:
    linear = scales(100, warmup_steps=0, decay_steps=100)
    root = scales(100, warmup_steps=0, decay_steps=100, decay_shape="sqrt")
    assert root[24] == pytest.approx(0.5) and root[-1] == pytest.approx(0.0)
    assert all(low < high for low, high in zip(root[:-1], linear[:-1], strict=True))


def test_without_decay_it_stays_and_a_long_warm_up_only_rises() -> None:
    assert scales(5, warmup_steps=0, decay_steps=0) == [1.0] * 5
    assert scales(4, warmup_steps=8, decay_steps=0) == pytest.approx([1 / 8, 2 / 8, 3 / 8, 4 / 8])


def test_both_halves_follow_the_schedule() -> None:
    model = Zaya(miniature.config())
    config = OptimizerConfig(muon_learning_rate=0.1, adamw_learning_rate=0.2, warmup_steps=2, decay_steps=2)
    optimizer = MuonAdamW(model, config, total_steps=5)
    rates = []
    for step in range(1, 6):
        random_gradients(dict(model.named_parameters()), step)
        numbers = optimizer.step(step)
        rates.append((numbers["optim/lr_muon"], numbers["optim/lr_adamw"]))
        assert optimizer.muon.param_groups[0]["lr"] == numbers["optim/lr_muon"]
        assert optimizer.adamw.param_groups[0]["lr"] == numbers["optim/lr_adamw"]
        assert all(parameter.grad is None for parameter in model.parameters())
    assert rates == [pytest.approx(pair) for pair in [(0.05, 0.1), (0.1, 0.2), (0.1, 0.2), (0.05, 0.1), (0, 0)]]


def test_the_gradient_is_clipped_over_all_parameters_together() -> None:
    model = Zaya(miniature.config())
    optimizer = MuonAdamW(model, OptimizerConfig(gradient_clip=0.5), total_steps=5)
    random_gradients(dict(model.named_parameters()), 0)
    norm = math.sqrt(sum(float(p.grad.double().square().sum()) for p in model.parameters()))
    seen: list[float] = []
    plain_step = optimizer.adamw.step

    def recording_step() -> None:
        seen.append(math.sqrt(sum(float(p.grad.double().square().sum()) for p in model.parameters())))
        plain_step()

    optimizer.adamw.step = recording_step
    assert optimizer.step(1)["optim/gradient_norm"] == pytest.approx(norm, rel=1e-5)
    assert seen == [pytest.approx(0.5, rel=1e-4)]


def test_a_small_gradient_is_not_scaled_up() -> None:
    model = Zaya(miniature.config())
    optimizer = MuonAdamW(model, OptimizerConfig(gradient_clip=1e6), total_steps=5)
    random_gradients(dict(model.named_parameters()), 0)
    kept = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    optimizer.muon.step = lambda: None
    optimizer.adamw.step = lambda: None
    optimizer.zero_grad = lambda: None
    optimizer.step(1)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter.grad, kept[name])


@pytest.mark.parametrize("bad", ["momentum=1.0", "gradient_clip=0", "final_scale=2", "decay_shape='cosine'"])
def test_settings_out_of_range_are_refused(tmp_path, bad: str) -> None:
    recipe = miniature.write_phase(tmp_path)
    with pytest.raises(ConfigError, match=f"optimizer.{bad.partition('=')[0]}"):
        miniature.resolve(recipe, f"optimizer.{bad}")
