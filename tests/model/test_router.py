"""The router: its formula written out, balancing biases, the skip class, forced choices (replay)."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from openzaya.errors import DataError
from openzaya.model.router import ROUTERS, EDARouter, Router
from openzaya.model.transformer import ForwardRecord, Zaya
from tests.model.reference import TINY, gradients, logits_error, perturb, random_tokens
from tests.model.test_layers import normal, randomised

NUM_EXPERTS = TINY.num_experts


def router_in_fp64(kind: str = "mlp+eda", layer_index: int = 1) -> Router:
    config = TINY.with_changes(router=kind)
    return randomised(ROUTERS[kind](config, layer_index))  # type: ignore[return-value]


def test_the_router_is_its_formula() -> None:
    router = router_in_fp64()
    hidden, previous = normal(9, TINY.hidden_size), normal(9, TINY.router_hidden_size, seed=1)
    route, state = router(hidden, previous)
    weights = dict(router.named_parameters())
    mlp = {name.removeprefix("router_mlp."): weight for name, weight in weights.items() if "router_mlp" in name}
    expected_state = hidden @ weights["down_proj.weight"].T + weights["down_proj.bias"]
    expected_state = expected_state + weights["router_states_scale"] * previous
    # The state handed on is the one before the norm.
    torch.testing.assert_close(state, expected_state)
    r = expected_state / (expected_state.square().mean(-1, keepdim=True) + TINY.rms_norm_eps).sqrt()
    r = r * mlp["norm.weight"]
    r = F.gelu(r @ mlp["fc1.weight"].T + mlp["fc1.bias"])
    r = F.gelu(r @ mlp["fc2.weight"].T + mlp["fc2.bias"])
    shares = torch.softmax(r @ mlp["out_proj.weight"].T, dim=-1)
    torch.testing.assert_close(route.shares_NX, shares)
    choice = (shares + router.balancing_biases).argmax(-1)
    assert torch.equal(route.choice_N, choice)
    gate = torch.where(choice == NUM_EXPERTS, 0.0, shares[torch.arange(9), choice])
    torch.testing.assert_close(route.gate_N, gate)


def test_layer_0_has_no_depth_average() -> None:
    router = router_in_fp64(layer_index=0)
    assert isinstance(router, EDARouter)
    assert "router_states_scale" not in dict(router.named_parameters())
    hidden = normal(3, TINY.hidden_size)
    _, state = router(hidden, None)
    torch.testing.assert_close(state, router.down_proj(hidden))


def test_biases_choose_but_do_not_enter_the_gate() -> None:
    router = router_in_fp64()
    hidden, previous = normal(20, TINY.hidden_size), normal(20, TINY.router_hidden_size, seed=1)
    before, _ = router(hidden, previous)
    router.balancing_biases.copy_(torch.tensor([0.0, 0, 5, 0, -1]))
    after, _ = router(hidden, previous)
    assert bool((after.choice_N == 2).all()) and not bool((before.choice_N == 2).all())
    torch.testing.assert_close(after.shares_NX, before.shares_NX)
    torch.testing.assert_close(after.gate_N, before.shares_NX[:, 2])
    assert not router.balancing_biases.requires_grad


def test_a_skip_bias_of_minus_one_cannot_win_once_an_expert_has_a_positive_one() -> None:
    router = router_in_fp64()
    hidden, previous = normal(50, TINY.hidden_size), normal(50, TINY.router_hidden_size, seed=1)
    with torch.no_grad():
        router.router_mlp.out_proj.weight[-1] = 100 * router.router_mlp.out_proj.weight[-1].abs()
    router.balancing_biases.copy_(torch.tensor([1e-3, 0, 0, 0, -1]))
    assert NUM_EXPERTS not in router(hidden, previous)[0].choice_N
    router.balancing_biases[-1] = 0
    skipped = router(hidden, previous)[0]
    assert NUM_EXPERTS in skipped.choice_N
    assert bool((skipped.gate_N[skipped.choice_N == NUM_EXPERTS] == 0).all())


@pytest.mark.parametrize("kind", list(ROUTERS))
def test_gradcheck_of_gates_and_depth_average(kind: str) -> None:
    """Gates and the state handed on, of every choice but skip, against hidden states, state and all parameters."""
    router = router_in_fp64(kind)
    names = [name for name, _ in router.named_parameters()]
    forced = torch.tensor([0, 1, 2, 3, 0])

    def call(hidden: Tensor, previous: Tensor, *weights: Tensor) -> tuple[Tensor, ...]:
        route, state = torch.func.functional_call(
            router, dict(zip(names, weights, strict=True)), (hidden, previous, forced)
        )
        return route.gate_N, route.shares_NX, *(() if state is None else (state,))

    inputs = (normal(5, TINY.hidden_size), normal(5, TINY.router_hidden_size, seed=1))
    values = (*inputs, *(parameter.detach().clone() for parameter in router.parameters()))
    assert torch.autograd.gradcheck(call, tuple(value.requires_grad_() for value in values))


# --- forced choices -----------------------------------------------------------------------------------


def recorded_run(seed: int) -> tuple[Zaya, Tensor, Tensor, Tensor]:
    """A perturbed model, tokens (3, 8), its logits and its choices (3, 8, L)."""
    model = Zaya(TINY, seed=seed)
    perturb(model, torch.Generator().manual_seed(seed))
    tokens, record = random_tokens(TINY, 3, 8, torch.Generator().manual_seed(seed)), ForwardRecord()
    logits = model(tokens, record=record)
    return model, tokens, logits, record.experts_NL().view(3, 8, -1)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int32, torch.int64])
def test_replayed_choices_give_identical_logits(dtype: torch.dtype) -> None:
    model, tokens, logits, experts = recorded_run(1)
    record = ForwardRecord()
    replayed = model(tokens, forced_experts=experts.to(dtype), record=record)
    assert torch.equal(replayed, logits)
    assert torch.equal(record.experts_NL(), experts.view(24, -1))


def test_replay_overrules_the_router() -> None:
    """With other balancing biases the free choices change, the replayed ones do not, and neither do the gates."""
    model, tokens, logits, experts = recorded_run(2)
    for block in model.model.layers:
        block.mlp.gate.balancing_biases.copy_(torch.tensor([3.0, 0, 0, 0, -1]))
    assert logits_error(model(tokens), logits) > 1e-2
    assert torch.equal(model(tokens, forced_experts=experts), logits)


def test_other_choices_give_other_logits() -> None:
    model, tokens, logits, experts = recorded_run(3)
    changed = experts.clone()
    # Layer 1, a token of row 1 that is not skipped: another expert with a gate of its own.
    at = 1 + int((experts[1, 1:, 1] != NUM_EXPERTS).nonzero()[0, 0])
    changed[1, at, 1] = (int(changed[1, at, 1]) + 1) % NUM_EXPERTS
    found = model(tokens, forced_experts=changed)
    # Only this token and those behind it in its row can notice.
    assert logits_error(found[[0, 2]], logits[[0, 2]]) < 1e-6
    assert logits_error(found[1, :at], logits[1, :at]) < 1e-6
    assert logits_error(found[1, at], logits[1, at]) > 1e-4


def test_forced_gates_are_the_routers_own_and_train_it() -> None:
    model, tokens, _, experts = recorded_run(4)
    forced = (experts.long() + 1) % NUM_EXPERTS
    record = ForwardRecord()
    model(tokens, forced_experts=forced, record=record).square().sum().backward()
    for layer, route in enumerate(record.routes):
        assert torch.equal(route.choice_N, forced[:, :, layer].reshape(-1))
        torch.testing.assert_close(route.gate_N, route.shares_NX.gather(1, route.choice_N[:, None])[:, 0])
    for name, gradient in gradients(model).items():
        if ".gate." in name:
            assert bool(gradient.any()), name


def test_replay_gives_the_gradients_of_the_free_run() -> None:
    model, tokens, logits, experts = recorded_run(5)
    logits.square().mean().backward()
    free = gradients(model)
    model(tokens, forced_experts=experts).square().mean().backward()
    for name, gradient in gradients(model).items():
        torch.testing.assert_close(gradient, free[name], msg=name)


def test_forced_skip_gives_no_expert_output_and_no_expert_gradient() -> None:
    model, tokens, _, experts = recorded_run(6)
    skip = torch.full_like(experts, NUM_EXPERTS)
    skipped = model(tokens, forced_experts=skip)
    with torch.no_grad():
        for block in model.model.layers:
            block.mlp.experts.down_proj.mul_(1000)
    again = model(tokens, forced_experts=skip)
    assert torch.equal(again, skipped)
    again.sum().backward()
    for name, gradient in gradients(model).items():
        if ".experts." in name:
            assert not gradient.any(), name


def test_forced_choices_go_with_documents_padding_and_cache() -> None:
    model, tokens, logits, experts = recorded_run(7)
    ids = torch.tensor([[0] * 3 + [1] * 5] * 3)
    record = ForwardRecord()
    packed = model(tokens, document_ids=ids, record=record)
    forced = record.experts_NL().view(3, 8, -1)
    assert torch.equal(model(tokens, document_ids=ids, forced_experts=forced), packed)
    cache = model.make_cache(3, 8)
    pieces = [model(tokens[:, i : i + 2], forced_experts=experts[:, i : i + 2], cache=cache) for i in range(0, 8, 2)]
    assert logits_error(torch.cat(pieces, 1), logits) < 1e-5


@pytest.mark.parametrize(
    ("forced", "message"),
    [
        (torch.zeros(3, 8, 2, dtype=torch.int64), r"shape \(3, 8, 2\).*\(3, 8, 3\)"),
        (torch.zeros(24, 3, dtype=torch.int64), r"shape \(24, 3\).*\(3, 8, 3\)"),
        (torch.full((3, 8, 3), 5), r"class.* 5.* 4"),
        (torch.full((3, 8, 3), -1), r"class.* -1.* 4"),
    ],
)
def test_choices_that_do_not_exist_are_refused(forced: Tensor, message: str) -> None:
    model, tokens, *_ = recorded_run(8)
    with pytest.raises(DataError, match=message):
        model(tokens, forced_experts=forced)


def test_biases_stay_fp32_alone_too() -> None:
    router = ROUTERS["linear"](TINY, 0).to(torch.bfloat16)
    assert router.balancing_biases.dtype == torch.float32
    assert router.out_proj.weight.dtype == torch.bfloat16
