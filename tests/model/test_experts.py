"""Experts: the formula token by token, and the grouped product against its plain twin, forward and backward."""

from __future__ import annotations

import random

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from openzaya.model.experts import Experts
from openzaya.model.router import Route
from openzaya.model.transformer import Zaya
from tests.model.reference import TINY, gradients, logits_error, perturb, random_tokens, worst_gradient_error

E = TINY.num_experts


def route_to(choices: list[int], seed: int) -> Route:
    """A route with random gates (0 for skip), as the router makes it."""
    generator = torch.Generator().manual_seed(seed)
    choice_N = torch.tensor(choices)
    shares = torch.rand(len(choices), E + 1, generator=generator).softmax(-1)
    gate = shares.gather(1, choice_N[:, None])[:, 0].masked_fill(choice_N == E, 0)
    return Route(choice_N, gate, shares)


def experts_with_weights(seed: int) -> Experts:
    experts = Experts(TINY)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in experts.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) / parameter.shape[-1] ** 0.5)
    return experts


def run(experts: Experts, implementation: str, hidden: Tensor, route: Route) -> tuple[Tensor, dict[str, Tensor]]:
    """Output and the gradients of hidden states, gates and weights under an arbitrary output gradient."""
    experts.implementation = implementation
    hidden, gate = hidden.clone().requires_grad_(), route.gate_N.clone().requires_grad_()
    output = experts(hidden, Route(route.choice_N, gate, route.shares_NX))
    weights = torch.randn(output.shape, generator=torch.Generator().manual_seed(9))
    (output * weights).sum().backward()
    found = gradients(experts)
    for name, leaf in (("hidden", hidden), ("gate", gate)):
        found[name] = torch.zeros_like(leaf) if leaf.grad is None else leaf.grad
    return output.detach(), found


def test_an_expert_is_its_formula() -> None:
    experts, route = experts_with_weights(0), route_to([2, 0, E, 3, 0, 1], 0)
    hidden = torch.randn(6, TINY.hidden_size, generator=torch.Generator().manual_seed(0))
    for implementation in ("grouped", "loop"):
        output, _ = run(experts, implementation, hidden, route)
        for token, choice in enumerate(route.choice_N.tolist()):
            expected = torch.zeros(TINY.hidden_size)
            if choice < E:
                # Gate rows come first.
                gate, up = (experts.gate_up_proj[choice] @ hidden[token]).split(TINY.moe_intermediate_size)
                expected = route.gate_N[token] * (experts.down_proj[choice] @ (F.silu(gate) * up))
            torch.testing.assert_close(output[token], expected.detach(), atol=1e-6, rtol=1e-5)


ASSIGNMENTS = {
    "all experts": [*range(E + 1)] * 5,
    "one expert": [2] * 9,
    "empty first and last": [1, 2, 2, 1, E],
    "all skip": [E] * 6,
    "one token": [3],
    "one skipped token": [E],
    "random": [random.Random(1).randint(0, E) for _ in range(70)],
    "mostly skip": [E] * 30 + [0],
}


@pytest.mark.parametrize("choices", ASSIGNMENTS.values(), ids=ASSIGNMENTS.keys())
def test_grouped_equals_loop(choices: list[int]) -> None:
    experts, route = experts_with_weights(1), route_to(choices, 1)
    hidden = torch.randn(len(choices), TINY.hidden_size, generator=torch.Generator().manual_seed(2))
    grouped, grouped_gradients = run(experts, "grouped", hidden, route)
    loop, loop_gradients = run(experts, "loop", hidden, route)
    torch.testing.assert_close(grouped, loop, atol=1e-5, rtol=1e-5)
    assert not grouped[route.choice_N == E].any()
    assert worst_gradient_error(grouped_gradients, loop_gradients)[0] < 1e-5
    # No token, no gradient: not even from what a grouped product leaves in unused memory.
    for expert in set(range(E)) - set(choices):
        assert not grouped_gradients["gate_up_proj"][expert].any()
        assert not grouped_gradients["down_proj"][expert].any()


@pytest.mark.parametrize("seed", range(4))
def test_grouped_equals_loop_in_the_whole_model(seed: int) -> None:
    model = Zaya(TINY, seed=seed)
    perturb(model, torch.Generator().manual_seed(seed))
    tokens = random_tokens(TINY, 3, 13, torch.Generator().manual_seed(seed))
    results = {}
    for implementation in ("grouped", "loop"):
        model.set_experts_implementation(implementation)
        logits = model(tokens)
        logits.square().mean().backward()
        results[implementation] = logits.detach(), gradients(model)
    assert logits_error(results["grouped"][0], results["loop"][0]) < 1e-5
    assert worst_gradient_error(results["grouped"][1], results["loop"][1])[0] < 1e-4


def test_grouped_equals_loop_in_bfloat16() -> None:
    experts, route = experts_with_weights(3).to(torch.bfloat16), route_to(ASSIGNMENTS["random"], 3)
    hidden = torch.randn(70, TINY.hidden_size, generator=torch.Generator().manual_seed(3)).to(torch.bfloat16)
    outputs = []
    for implementation in ("grouped", "loop"):
        experts.implementation = implementation
        outputs.append(experts(hidden, route))
    assert outputs[0].dtype == outputs[1].dtype == torch.bfloat16
    assert logits_error(outputs[0].float(), outputs[1].float()) < 0.02
