"""Balancing: what is counted, the step each kind takes, and that the loop closes: skewed routers become even."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from openzaya.model.balancing import Balancer, BalancingConfig, count_load, load_entropy, load_shares
from openzaya.model.router import Route
from openzaya.model.transformer import ForwardRecord, Zaya
from tests.model.reference import TINY, perturb, random_tokens

E, L = TINY.num_experts, TINY.num_hidden_layers


def biases(model: Zaya) -> Tensor:
    return torch.stack([block.mlp.gate.balancing_biases for block in model.model.layers])


def balancer(kind: str, **settings: float) -> tuple[Zaya, Balancer]:
    model = Zaya(TINY, seed=0)
    return model, Balancer(model, BalancingConfig(kind=kind, **settings))  # type: ignore[arg-type]


def test_load_is_counted_per_layer_and_class_over_real_tokens_only() -> None:
    model = Zaya(TINY, seed=1)
    perturb(model, torch.Generator().manual_seed(1))
    tokens, record = random_tokens(TINY, 3, 9, torch.Generator().manual_seed(1)), ForwardRecord()
    mask = torch.ones_like(tokens, dtype=torch.bool)
    mask[1, :4] = False
    model(tokens, attention_mask=mask, record=record)
    load = count_load(record.routes, mask.reshape(-1))
    choices = record.experts_NL()[mask.reshape(-1)]
    assert load.shape == (L, E + 1)
    for layer in range(L):
        for expert in range(E + 1):
            assert int(load[layer, expert]) == int((choices[:, layer] == expert).sum())
    assert bool((load.sum(1) == 23).all())


def test_shares_count_skipped_tokens_in_the_total_and_entropy_does_not() -> None:
    load = torch.tensor([[2, 2, 2, 2, 8], [16, 0, 0, 0, 0], [4, 4, 4, 4, 0], [0, 0, 0, 0, 5]])
    torch.testing.assert_close(load_shares(load)[0], torch.full((4,), 1 / 8))
    torch.testing.assert_close(load_entropy(load), torch.tensor([1.0, 0.0, 1.0, 0.0]))
    assert bool(load_shares(torch.zeros(1, 5)).eq(0).all())
    assert float(load_entropy(torch.tensor([[7, 3]]))) == 1.0
    shares = torch.tensor([0.5, 0.25, 0.25, 0.0])
    entropy = -sum(float(share) * math.log(float(share)) for share in shares if share > 0) / math.log(4)
    torch.testing.assert_close(load_entropy(torch.tensor([[4, 2, 2, 0, 9]])), torch.tensor([entropy]))


LOAD = torch.tensor([[6, 2, 2, 2, 0], [3, 3, 3, 3, 0], [0, 0, 0, 12, 0]])


def test_the_first_adamw_step_is_the_learning_rate_against_the_error() -> None:
    model, balance = balancer("adamw_pid", learning_rate=0.01)
    balance.step(LOAD)
    signs = torch.tensor([[1.0, -1, -1, -1], [0, 0, 0, 0], [-1, -1, -1, 1]])
    torch.testing.assert_close(biases(model)[:, :E], -0.01 * signs, atol=1e-6, rtol=0)


def test_adamw_steps_are_those_of_torch_on_the_share_error() -> None:
    model, balance = balancer("adamw_pid", learning_rate=0.01, beta1=0.8, beta2=0.9)
    expected = torch.nn.Parameter(torch.zeros(L, E))
    optimizer = torch.optim.AdamW([expected], lr=0.01, betas=(0.8, 0.9), weight_decay=0.0)
    generator = torch.Generator().manual_seed(0)
    for _ in range(5):
        load = torch.randint(0, 9, (L, E + 1), generator=generator)
        balance.step(load)
        expected.grad = load[:, :E] / load.sum(1, keepdim=True) - 1 / E
        optimizer.step()
    torch.testing.assert_close(biases(model)[:, :E], expected.detach())


def test_sign_steps_have_one_size() -> None:
    model, balance = balancer("sign", learning_rate=0.01)
    balance.step(LOAD, scale=0.5)
    signs = torch.tensor([[1.0, -1, -1, -1], [0, 0, 0, 0], [-1, -1, -1, 1]])
    torch.testing.assert_close(biases(model)[:, :E], -0.005 * signs)


@pytest.mark.parametrize("kind", ["adamw_pid", "sign", "aux_loss", "none"])
def test_the_skip_bias_never_moves(kind: str) -> None:
    model, balance = balancer(kind)
    for _ in range(5):
        balance.step(torch.tensor([[1, 2, 3, 4, 50]] * L))
    assert bool((biases(model)[:, -1] == -1).all())
    moved = bool(biases(model)[:, :E].any())
    assert moved == (kind in ("adamw_pid", "sign"))


@pytest.mark.parametrize("kind", ["adamw_pid", "sign"])
def test_skewed_routers_become_even(kind: str) -> None:
    """Shares that favour one expert; biases alone bring every expert its part."""
    model, balance = balancer(kind, learning_rate=0.01)
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(L, 600, E + 1, generator=generator) + torch.tensor([2.0, 0.5, 0, -1, 0])
    shares = logits.softmax(-1)
    entropies = []
    for _ in range(300):
        choices = (shares + biases(model)[:, None]).argmax(-1)
        load = torch.stack([torch.bincount(row, minlength=E + 1) for row in choices])
        entropies.append(float(load_entropy(load).min()))
        balance.step(load)
    assert entropies[0] < 0.6
    assert min(entropies[-20:]) > 0.97


def test_auxiliary_loss_is_its_formula_and_trains_towards_the_idle_experts() -> None:
    _, balance = balancer("aux_loss", aux_loss_coefficient=0.5)
    logits = torch.zeros(6, E + 1, requires_grad=True)
    choice = torch.tensor([0, 0, 0, 1, E, 2])
    is_token = torch.tensor([True, True, True, True, True, False])
    shares = logits.softmax(-1)
    route = Route(choice, shares.gather(1, choice[:, None])[:, 0], shares)
    loss = balance.auxiliary_loss([route, route], is_token)
    assert loss is not None
    # Two layers, five tokens: E * sum of count * mean share, at equal shares of 1 / (E + 1).
    assert float(loss.detach()) == pytest.approx(0.5 * 2 * E * (3 + 1) / (E + 1))
    loss.backward()
    assert logits.grad is not None
    gradient = logits.grad[0]
    assert float(gradient[0]) > float(gradient[1]) > float(gradient[2]) == float(gradient[3])
    assert not logits.grad[5].any()
    for kind in ("adamw_pid", "sign", "none"):
        assert balancer(kind)[1].auxiliary_loss([route], is_token) is None


def test_saved_and_restored_it_goes_on_bit_for_bit() -> None:
    model, balance = balancer("adamw_pid")
    generator = torch.Generator().manual_seed(0)
    loads = torch.randint(0, 9, (8, L, E + 1), generator=generator)
    for load in loads[:4]:
        balance.step(load)
    weights, state = {name: t.clone() for name, t in model.state_dict().items()}, balance.state_dict()
    state = {"state": {k: {n: v.clone() for n, v in s.items()} for k, s in state["state"].items()},
             "param_groups": state["param_groups"]}  # fmt: skip
    for load in loads[4:]:
        balance.step(load)
    other, resumed = balancer("adamw_pid")
    other.load_state_dict(weights)
    resumed.load_state_dict(state)
    for load in loads[4:]:
        resumed.step(load)
    assert torch.equal(biases(other), biases(model))


def test_it_starts_from_the_biases_of_the_model() -> None:
    model = Zaya(TINY, seed=0)
    model.model.layers[1].mlp.gate.balancing_biases[2] = 0.25
    balance = Balancer(model, BalancingConfig(kind="sign", learning_rate=0.01))
    balance.step(torch.tensor([[1, 1, 1, 1, 0]] * L))
    assert float(biases(model)[1, 2]) == 0.25
