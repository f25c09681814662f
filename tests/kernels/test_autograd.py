"""Kernels among PyTorch's modes: inference mode, decoding, no graph, second derivatives, odd layouts in memory."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from openzaya.kernels import attention, build, calls, experts, functions
from openzaya.model.transformer import Zaya
from tests.model.reference import TINY, perturb, random_tokens

pytestmark = pytest.mark.skipif(not build.available(), reason="no C++ compiler on this machine")

N = 40
OFFSETS = torch.arange(N) % 10
ANGLES = torch.linspace(0, 1, N)[:, None].expand(N, 2)


def cca(
    projected: Tensor, weight0: Tensor, bias0: Tensor, weight1: Tensor, bias1: Tensor, temperature: Tensor
) -> Tensor:
    rotary = (ANGLES.cos(), ANGLES.sin())
    arguments = (projected, (weight0, bias0), (weight1, bias1), temperature, rotary, OFFSETS, 2)
    return torch.cat([part.flatten() for part in functions.cca_mix(*arguments)])


KERNELS: dict[str, tuple[Callable[..., Tensor], tuple[tuple[int, ...], ...]]] = {
    "embedding": (lambda weight: functions.embedding(torch.arange(N) % 7, weight), ((7, 5),)),
    "linear": (functions.linear, ((N, 6), (5, 6), (5,))),
    "rms_norm": (lambda x, weight: functions.rms_norm(x, weight, 1e-5), ((N, 6), (6,))),
    "merge": (functions.merge, ((N, 6), (N, 6), (6,), (6,), (6,), (6,))),
    "cca_mix": (cca, ((N, 16), (12, 1, 2), (12,), (12, 4, 2), (12,), (1,))),
    "attend": (lambda q, v: functions.attend(q, v, [10, 30], None), ((N, 3, 4), (N, 1, 4))),
    "experts": (
        lambda x, gate, w1, w2: functions.experts(x, torch.arange(N) % 3, gate, w1, w2),
        ((N, 6), (N,), (2, 8, 6), (2, 6, 4)),
    ),
}
by_kernel = pytest.mark.parametrize("name", KERNELS)


def leaves_of(name: str) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(shape, generator=generator).requires_grad_() for shape in KERNELS[name][1]]


def model_and_tokens(rows: int = 2, length: int = 40) -> tuple[Zaya, Tensor]:
    generator = torch.Generator().manual_seed(2)
    model = Zaya(TINY)
    perturb(model, generator)
    return model, random_tokens(TINY, rows, length, generator)


@by_kernel
@pytest.mark.parametrize("large", [False, True])
def test_differentiating_twice_is_refused(name: str, large: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where the incoming gradient is a constant, as that of a sum: the answer would be a silent zero."""
    if large:
        monkeypatch.setattr(experts, "LARGE_EXPERT", 0)
    leaves = leaves_of(name)
    output = KERNELS[name][0](*leaves)
    for loss in (output.sum(), output.square().sum()):
        with pytest.raises(RuntimeError, match=r"second derivatives.*disabled\(\)"):
            torch.autograd.grad(loss + leaves[0].square().sum(), leaves, create_graph=True)


@by_kernel
def test_gradients_do_not_depend_on_how_they_are_asked_for(name: str) -> None:
    """Twice from one graph, and for one input at a time."""
    leaves = leaves_of(name)
    loss = KERNELS[name][0](*leaves).square().sum()
    first, second = (torch.autograd.grad(loss, leaves, retain_graph=True) for _ in range(2))
    assert all(one.equal(other) for one, other in zip(first, second, strict=True))
    for index, leaf in enumerate(leaves):
        frozen = [other.detach().requires_grad_(other is leaf) for other in leaves]
        (alone,) = torch.autograd.grad(KERNELS[name][0](*frozen).square().sum(), frozen[index])
        assert alone.equal(first[index])


@by_kernel
@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad])
def test_without_a_graph_the_same_bits(name: str, mode: Callable[[], torch.inference_mode]) -> None:
    leaves = leaves_of(name)
    expected = KERNELS[name][0](*leaves)
    with mode():
        output = KERNELS[name][0](*leaves)
        again = KERNELS[name][0](*[leaf.clone() for leaf in leaves])
    assert not output.requires_grad and output.grad_fn is None
    assert output.equal(expected) and again.equal(expected)


def test_inference_mode_leaves_training_alone() -> None:
    """A sample in the middle of training: gradients afterwards are those without it."""
    model, tokens = model_and_tokens()

    def gradients() -> list[Tensor]:
        model.zero_grad()
        model(tokens).square().mean().backward()
        return [parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None]

    expected = gradients()
    with torch.inference_mode():
        logits = model(tokens)
    assert logits.equal(model(tokens))
    assert all(one.equal(other) for one, other in zip(gradients(), expected, strict=True))


def test_decoding_a_large_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Enough rows for the kernels at every step, with and without padding; the cache they meet is not trained on."""
    model, tokens = model_and_tokens(rows=calls.MIN_TOKENS + 3, length=9)
    mask = torch.ones_like(tokens)
    mask[1, :2] = mask[5, :4] = 0
    called: list[str] = []
    call = calls.call
    for module in ("dense", "attention", "experts"):
        monkeypatch.setattr(
            f"openzaya.kernels.{module}.call", lambda name, *rest: (called.append(name), call(name, *rest))
        )

    @torch.inference_mode()
    def decode() -> Tensor:
        cache = model.make_cache(tokens.shape[0], tokens.shape[1])
        logits = [model(tokens[:, :5], attention_mask=mask[:, :5], cache=cache)]
        called.clear()
        logits += [model(tokens[:, index : index + 1], cache=cache) for index in range(5, 9)]
        return torch.cat(logits, dim=1)[mask.bool()]

    ours, steps = decode(), set(called)
    assert steps == {"linear_forward", "norm_forward", "merge_forward", "experts_forward"}
    with functions.disabled():
        twin = decode()
    assert not called
    assert float((ours - twin).abs().max() / twin.abs().max()) < 1e-5


@by_kernel
def test_odd_layouts_in_memory(name: str) -> None:
    """Transposed, strided and expanded tensors and gradients give the bits of dense ones."""

    def strided(tensor: Tensor) -> Tensor:
        wide = torch.full((*tensor.shape, 2), torch.nan)
        wide[..., 0] = tensor.detach()
        return wide[..., 0].requires_grad_()

    results = []
    for leaves in (leaves_of(name), [strided(leaf) for leaf in leaves_of(name)]):
        output = KERNELS[name][0](*leaves)
        weights = torch.linspace(-1, 1, 2 * output.numel()).view(*output.shape, 2)[..., 0]
        if leaves[0].is_contiguous():
            weights = weights.contiguous()
        results.append([output, *torch.autograd.grad(output, leaves, weights)])
    assert all(one.equal(other) for one, other in zip(*results, strict=True))


def test_wrong_sizes_and_ids_are_refused_before_memory_is_read() -> None:
    hidden, head = torch.randn(N, 8), torch.randn(50, 8)
    for targets in (torch.full((N,), 50), torch.full((N,), -100), torch.zeros(N, dtype=torch.int32)):
        with pytest.raises(IndexError, match=r"\[0, 50\)"):
            functions.cross_entropy(hidden, head, targets, 1.0, None, None, add=False)
    for token in (-1, 50):
        with pytest.raises(IndexError):
            functions.embedding(torch.tensor([token]), head)
    with pytest.raises(ValueError, match="39 tokens"):
        functions.attend(torch.randn(N, 3, 4), torch.randn(N, 1, 4), [10, 29], None)
    with pytest.raises(ValueError, match="not contiguous"):
        calls.call("linear_forward", hidden.T)


def test_an_empty_batch_of_targets() -> None:
    losses = functions.cross_entropy(
        torch.zeros(0, 8), torch.zeros(50, 8), torch.zeros(0, dtype=torch.int64), 1.0, None, None, add=False
    )
    assert losses.shape == (0,)


def test_attention_suits_only_enough_short_documents(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    assert functions.suits_attention([5], 2) and functions.suits_attention([5, 5], 1)
    assert not functions.suits_attention([5], 1)
    assert not functions.suits_attention([attention.MAX_DOCUMENT_LENGTH + 1], 2)
