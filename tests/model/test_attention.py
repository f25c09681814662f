"""Attention: CCA written out token by token in fp64, gradcheck, the window, and the ablation kinds.

The written-out form shares no code with the model and none with ``transformers``: it is the formulas of
arXiv 2510.04476 and arXiv 2605.05365, with explicit sums over lags, heads and keys.
"""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from openzaya.model.attention import Attention
from openzaya.model.config import ZayaConfig
from openzaya.model.layers import rotary_tables
from openzaya.model.layout import TokenLayout, make_layout
from openzaya.model.transformer import ForwardRecord, Zaya
from tests.model.reference import (
    TINY,
    gradients,
    logits_error,
    perturb,
    random_tokens,
    worst_gradient_error,
)
from tests.model.test_layers import normal, randomised

SLIDING = TINY.with_changes(num_hidden_layers=1, layer_types=("hybrid_sliding",), sliding_window=3)


def written_out(attention: Attention, config: ZayaConfig, h: Tensor, window: int | None, base: float) -> Tensor:
    """Attention over one document h (T, D) in fp64, one number at a time where it can be."""
    w = dict(attention.named_parameters())
    h_q, h_k, d = config.num_attention_heads, config.num_key_value_heads, config.head_dim
    group, num_tokens = h_q // h_k, h.shape[0]
    depthwise, grouped = w["qkv_proj.conv_qk_depthwise.weight"], w["qkv_proj.conv_qk_grouped.weight"]
    b0, b1 = w["qkv_proj.conv_qk_depthwise.bias"], w["qkv_proj.conv_qk_grouped.bias"]
    k0, k1 = depthwise.shape[-1], grouped.shape[-1]
    q, k = h @ w["qkv_proj.q_proj.weight"].T, h @ w["qkv_proj.k_proj.weight"].T
    z = torch.cat((q, k), dim=1)

    def z_at(t: int) -> Tensor:
        return z[t] if t >= 0 else torch.zeros_like(z[0])

    def y_at(t: int) -> Tensor:
        return b0 + sum(depthwise[:, 0, k0 - 1 - lag] * z_at(t - lag) for lag in range(k0))

    queries, keys, values = [], [], []
    for t in range(num_tokens):
        c = []
        for head in range(h_q + h_k):
            rows = slice(head * d, (head + 1) * d)
            c.append(b1[rows] + sum(grouped[rows, :, k1 - 1 - lag] @ y_at(t - lag)[rows] for lag in range(k1)))
        q_t, k_t = q[t].view(h_q, d), k[t].view(h_k, d)
        Q = [c[j] + (q_t[j] + k_t[j // group]) / 2 for j in range(h_q)]
        K = [c[h_q + g] + (k_t[g] + q_t[g * group : (g + 1) * group].mean(0)) / 2 for g in range(h_k)]
        Q = [math.sqrt(d) * x / x.norm() for x in Q]
        K = [w["qk_norm.temp"][g] * math.sqrt(d) * x / x.norm() for g, x in enumerate(K)]
        half = config.rotary_dim // 2
        for heads in (Q, K):
            for index, x in enumerate(heads):
                turned = x.clone()
                for i in range(half):
                    angle = t * base ** (-2 * i / config.rotary_dim)
                    cos, sin = math.cos(angle), math.sin(angle)
                    turned[i] = x[i] * cos - x[i + half] * sin
                    turned[i + half] = x[i + half] * cos + x[i] * sin
                heads[index] = turned
        before = h[t - 1] if t else torch.zeros_like(h[0])
        value = torch.cat((w["qkv_proj.v_proj_current.weight"] @ h[t], w["qkv_proj.v_proj_delayed.weight"] @ before))
        queries.append(Q)
        keys.append(K)
        values.append(value.view(h_k, d))
    rows = []
    for t in range(num_tokens):
        first = 0 if window is None else max(0, t - window + 1)
        heads = []
        for j in range(h_q):
            scores = torch.stack([queries[t][j] @ keys[s][j // group] for s in range(first, t + 1)]) / math.sqrt(d)
            shares = scores.softmax(0)
            heads.append(sum(share * values[first + i][j // group] for i, share in enumerate(shares)))
        rows.append(w["o_proj.weight"] @ torch.cat(heads))
    return torch.stack(rows)


def run(attention: Attention, config: ZayaConfig, hidden: Tensor, layout: TokenLayout, base: float) -> Tensor:
    return attention(hidden, layout, rotary_tables(layout.positions_N, config.rotary_dim, base), None)


@pytest.mark.parametrize("kernels", [(1, 1), (2, 2), (3, 1), (1, 3), (4, 4)])
@pytest.mark.parametrize("layer", [0, 1])
def test_cca_is_its_formula(kernels: tuple[int, int], layer: int) -> None:
    """Packed documents of 7, 1 and 5 tokens, full attention (layer 0) and a window of 4 (layer 1)."""
    config = TINY.with_changes(cca_time0=kernels[0], cca_time1=kernels[1])
    attention: Attention = randomised(Attention(config, layer))  # type: ignore[assignment]
    lengths, base = [7, 1, 5], 20.0
    ids = torch.arange(3).repeat_interleave(torch.tensor(lengths))[None]
    hidden = normal(13, config.hidden_size)
    window = config.sliding_window if layer == 1 else None
    with torch.no_grad():
        found = run(attention, config, hidden, make_layout(ids, document_ids=ids), base)
        expected = torch.cat([written_out(attention, config, h, window, base) for h in hidden.split(lengths)])
    # RoPE tables are fp32.
    torch.testing.assert_close(found, expected, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", ["cca", "gqa", "mha", "mla"])
@pytest.mark.parametrize("documents", [None, [4, 1, 2]])
def test_gradcheck(kind: str, documents: list[int] | None) -> None:
    """Numerical gradients of hidden states and every attention parameter, in rows and in documents."""
    config = TINY.with_changes(
        hidden_size=3, num_attention_heads=2, num_key_value_heads=1, head_dim=4, cca_time0=2, cca_time1=3,
        num_hidden_layers=1, layer_types=("hybrid_sliding",), sliding_window=3, attention=kind, mla_latent_size=2,
    )  # fmt: skip
    attention = randomised(Attention(config, 0))
    tokens = torch.zeros(1, 7, dtype=torch.int64)
    ids = None if documents is None else torch.arange(3).repeat_interleave(torch.tensor(documents))[None]
    layout = make_layout(tokens, document_ids=ids)
    rotary = rotary_tables(layout.positions_N, config.rotary_dim, 10.0)
    names = [name for name, _ in attention.named_parameters()]

    def call(hidden: Tensor, *weights: Tensor) -> Tensor:
        parameters = dict(zip(names, weights, strict=True))
        return torch.func.functional_call(attention, parameters, (hidden, layout, rotary, None))

    values = (normal(7, 3), *(parameter.detach().clone() for parameter in attention.parameters()))
    assert torch.autograd.gradcheck(call, tuple(value.requires_grad_() for value in values))


def test_the_window_counts_the_token_itself() -> None:
    """A window of 3 and kernels of 1: a token hears itself and two before; one more through the delayed value."""
    config = SLIDING.with_changes(cca_time0=1, cca_time1=1)
    attention: Attention = randomised(Attention(config, 0))  # type: ignore[assignment]
    layout = make_layout(torch.zeros(1, 9, dtype=torch.int64))
    hidden = normal(9, config.hidden_size).requires_grad_()
    run(attention, config, hidden, layout, 10.0)[8].sum().backward()
    heard = hidden.grad.abs().sum(1).nonzero()[:, 0].tolist()
    assert heard == [5, 6, 7, 8]


def test_temperature_scales_the_scores_linearly_and_acts_on_keys_alone() -> None:
    """Doubling a key head's temperature sharpens exactly its query heads; a negative one turns the order round."""
    config = SLIDING.with_changes(layer_types=("hybrid",))
    attention: Attention = randomised(Attention(config, 0))  # type: ignore[assignment]
    layout = make_layout(torch.zeros(1, 6, dtype=torch.int64))
    queries_keys = normal(6, 6, config.head_dim)
    with torch.no_grad():
        attention.qk_norm.temp.copy_(torch.tensor([2.0, -3.0]))
        normed = attention.qk_norm(queries_keys)
    lengths = normed.norm(dim=-1) / math.sqrt(config.head_dim)
    torch.testing.assert_close(lengths, torch.tensor([1.0] * 4 + [2.0, 3.0]).double().expand(6, 6))
    directions = torch.nn.functional.cosine_similarity(normed, queries_keys, dim=-1)
    torch.testing.assert_close(directions, torch.tensor([1.0] * 5 + [-1.0]).double().expand(6, 6))
    zero = torch.zeros_like(queries_keys)
    assert bool(attention.qk_norm(zero).eq(0).all()), "a padding row must not become 0/0"
    assert layout.row_length == 6


# --- ablation kinds -----------------------------------------------------------------------------------

VARIANTS = {
    **{kind: {"attention": kind} for kind in ("gqa", "mha", "mla")},
    "mlp": {"router": "mlp"},
    "linear": {"router": "linear"},
    "plain": {"residual": "plain"},
    "mla+linear+plain": {"attention": "mla", "router": "linear", "residual": "plain"},
    "mha+mlp+plain": {"attention": "mha", "router": "mlp", "residual": "plain"},
}


def variant(name: str, *, perturbed: bool = True) -> Zaya:
    model = Zaya(TINY.with_changes(mla_latent_size=10, **VARIANTS[name]), seed=1)
    if perturbed:
        perturb(model, torch.Generator().manual_seed(1))
    return model


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("perturbed", [False, True])
def test_every_parameter_of_a_variant_gets_a_finite_gradient(name: str, perturbed: bool) -> None:
    model = variant(name, perturbed=perturbed)
    tokens = random_tokens(TINY, 4, 24, torch.Generator().manual_seed(1))
    record = ForwardRecord()
    model(tokens, record=record).square().mean().backward()
    assert all(int(route.choice_N.max()) <= TINY.num_experts for route in record.routes)
    for key, parameter in model.named_parameters():
        assert parameter.grad is not None and bool(parameter.grad.isfinite().all()), key
        assert bool(parameter.grad.any()), key


@pytest.mark.parametrize("name", VARIANTS)
def test_a_variant_decodes_as_it_reads(name: str) -> None:
    model = variant(name)
    tokens = random_tokens(TINY, 3, 12, torch.Generator().manual_seed(2))
    mask = torch.ones_like(tokens)
    mask[1, :3] = 0
    with torch.no_grad():
        full = model(tokens, attention_mask=mask)
        for chunks in ([12], [1] * 12, [5, 1, 4, 2]):
            cache = model.make_cache(3, 12)
            pieces = zip(tokens.split(chunks, 1), mask.split(chunks, 1), strict=True)
            cached = torch.cat([model(part, attention_mask=m, cache=cache) for part, m in pieces], dim=1)
            assert logits_error(cached[mask.bool()], full[mask.bool()]) < 1e-5


@pytest.mark.parametrize("name", VARIANTS)
def test_packed_equals_alone_for_a_variant(name: str) -> None:
    model = variant(name)
    lengths = [3, 1, 9, 2, 1, 6]
    tokens = random_tokens(TINY, 1, sum(lengths), torch.Generator().manual_seed(3))
    ids = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths))[None]
    packed = model(tokens, document_ids=ids)
    alone = torch.cat([model(document) for document in tokens.split(lengths, 1)], dim=1)
    assert logits_error(packed, alone) < 1e-5
    weights = torch.randn(packed.shape, generator=torch.Generator().manual_seed(4))
    (packed * weights).sum().backward()
    found = gradients(model)
    (alone * weights).sum().backward()
    error, key = worst_gradient_error(found, gradients(model))
    assert error < 1e-4, key


def test_gqa_and_mha_differ_in_key_heads_only() -> None:
    gqa, mha, mla = (variant(name).model.layers[0].self_attn for name in ("gqa", "mha", "mla"))
    assert gqa.qkv_proj.k_proj.weight.shape[0] == 2 * TINY.head_dim
    assert mha.qkv_proj.k_proj.weight.shape[0] == 4 * TINY.head_dim
    assert mla.qkv_proj.latent_proj.weight.shape[0] == 10
    assert (gqa.qk_norm.temp.numel(), mha.qk_norm.temp.numel(), mla.qk_norm.temp.numel()) == (2, 4, 4)
