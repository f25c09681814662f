"""Quantised numbers and matrices: the stored order, the rounding, and a model made of them."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from openzaya.errors import CheckpointError, ConfigError, TrainingError
from openzaya.model.config import preset
from openzaya.model.quantised import QuantisedMatrix, QuantScheme, copy_weights_, quantise_model
from openzaya.model.quantised_formats import (
    FORMATS,
    GROUP,
    pack,
    packed_shape,
    padded_size,
    quantise_activations,
    quantise_int4,
    scales_dtype,
    scales_shape,
    unpack,
)
from openzaya.model.transformer import ForwardRecord, Zaya

SMALL = preset("smoke").with_changes(vocab_size=100, moe_intermediate_size=72)


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def small_model(**changes) -> Zaya:
    model = Zaya(SMALL.with_changes(**changes), seed=1).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(4)  # layers that matter
    return model


def tokens(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, SMALL.vocab_size, shape, generator=torch.Generator().manual_seed(seed))


def nmse(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).square().sum() / expected.square().sum())


# --- formats ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("format", FORMATS)
@settings(derandomize=True, max_examples=25, deadline=None)
@given(rows=st.integers(1, 3), columns=st.integers(1, 3), seed=st.integers(0, 1000))
def test_packing_loses_nothing(format, rows, columns, seed):
    low = -127 if format == "int8" else -8
    shape = (2, 16 * rows, GROUP * columns)
    codes = torch.randint(low, -low, shape, generator=torch.Generator().manual_seed(seed)).to(torch.int8)
    packed = pack(codes, format)
    assert packed.shape == packed_shape(format, *shape[1:], (2,))
    assert torch.equal(unpack(packed, format), codes)
    assert torch.equal(pack(unpack(packed, format), format), packed)


@pytest.mark.parametrize("format", FORMATS)
def test_the_stored_order_is_the_one_written_down(format):
    """Every element found by hand, as a kernel would."""
    matrix = QuantisedMatrix.from_matrix(normal(2, 21, 75), format)
    weights = matrix.dequantised()
    for expert, n, k in [(0, 0, 0), (0, 16, 3), (0, 5, 4), (1, 20, 74), (1, 17, 64), (0, 15, 63), (1, 3, 9)]:
        if format == "int8":
            code = int(matrix.packed[expert, n // 16, k // 4, n % 16, k % 4]) - 128
            scale = matrix.scales[expert, n // 16, n % 16]
        else:
            byte = int(matrix.packed[expert, n // 16, k // 8, n % 16, k % 4])
            code = (byte >> 4 if k % 8 >= 4 else byte & 15) - 8
            scale = matrix.scales[expert, n // 16, k // GROUP, n % 16]
        assert weights[expert, n, k] == code * scale.float()


@pytest.mark.parametrize("format", FORMATS)
def test_padding_holds_zeros(format):
    matrix = QuantisedMatrix.from_matrix(normal(3, 17, 65), format)
    assert padded_size(17, 65) == (32, 128)
    codes = unpack(matrix.packed, format)
    assert not codes[:, 17:].any() and not codes[:, :, 65:].any()
    assert matrix.scales.isfinite().all()
    assert matrix.dequantised().shape == (3, 17, 65)


@pytest.mark.parametrize(("format", "limit"), [("int8", 6e-5), ("int4", 0.0086)])
def test_rounding_error_of_normal_weights(format, limit):
    """The int4 limit is out of reach for scales taken from the largest value alone (0.0116, signed 0.0090)."""
    weights = normal(256, 512)
    assert nmse(QuantisedMatrix.from_matrix(weights, format).dequantised(), weights) < limit


def test_int8_is_within_half_a_step():
    weights = normal(33, 100)
    matrix = QuantisedMatrix.from_matrix(weights, "int8")
    step = weights.abs().amax(1, keepdim=True) / 127
    assert ((matrix.dequantised() - weights).abs() <= 0.5001 * step).all()
    assert torch.allclose(matrix.dequantised().abs().amax(1), weights.abs().amax(1))


def test_int4_scales_are_chosen_well():
    """Within 3 % of the squared error of a search through 120 scales, on normal and on heavy-tailed weights."""
    for groups in (normal(500, GROUP), normal(500, GROUP) / normal(500, 1, seed=1).abs().clamp_min(0.2)):
        codes, scales = quantise_int4(groups)
        error = (codes * scales.float() - groups).square().sum()
        extreme = groups.gather(1, groups.abs().argmax(1, keepdim=True))
        best = torch.full((500, 1), torch.inf)
        for share in torch.linspace(0.4, 1.15, 60).tolist():
            for scale in (extreme * share / -8, extreme * share / 7):
                scale = scale.bfloat16().float()
                rounded = (groups / scale).round().clamp(-8, 7) * scale
                best = torch.minimum(best, (rounded - groups).square().sum(1, keepdim=True))
        assert error < 1.03 * best.sum()


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("weights", [torch.zeros(20, 70), torch.full((20, 70), 1e-40), torch.full((20, 70), 3e30)])
def test_extreme_weights_stay_finite(format, weights):
    found = QuantisedMatrix.from_matrix(weights, format).dequantised()
    assert torch.allclose(found, weights, rtol=0.01, atol=1e-35)


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_weights_that_are_not_finite_are_refused(format, value):
    weights = normal(40, 64)
    weights[33, 7] = value
    with pytest.raises(CheckpointError, match="rows 0 to 47 are not finite"):
        QuantisedMatrix.from_matrix(weights, format)


@settings(derandomize=True, max_examples=50, deadline=None)
@given(size=st.integers(1, 150), exponent=st.integers(-44, 30), seed=st.integers(0, 1000))
def test_activations_are_rounded_to_half_a_step(size, exponent, seed):
    x = normal(3, size, seed=seed) * 10.0**exponent
    codes, scales = quantise_activations(x)
    assert codes.dtype == torch.int8 and codes.shape == (3, -(-size // GROUP), GROUP)
    found = (codes.float() * scales[..., None]).flatten(1)[:, :size]
    assert ((found - x).abs() <= 0.501 * scales.repeat_interleave(GROUP, 1)[:, :size] + 1e-29).all()


def test_activations_round_half_to_even_and_zeros_stay_zeros():
    x = torch.zeros(2, GROUP)
    x[1, 3] = 1e-40  # the inverse of its scale would be infinite
    x[0, :5] = torch.tensor([127.0, 0.5, 1.5, 2.5, -0.5])
    codes, scales = quantise_activations(x)
    assert codes[0, 0, :5].tolist() == [127, 0, 2, 2, 0]
    assert scales.tolist() == [[1.0], [0.0]] and not codes[1].any()


# --- matrices ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("format", FORMATS)
def test_forward_is_the_sum_of_the_kernels(format):
    """Integer dot products of groups of 64, scaled and added: what a kernel computes."""
    matrix = QuantisedMatrix.from_matrix(normal(2, 21, 150), format)
    x = normal(5, 150, seed=1)
    codes, scales = quantise_activations(x)
    weights = unpack(matrix.packed[1], format).unflatten(-1, (-1, GROUP))
    dots = torch.einsum("ngk,tgk->tng", weights.long(), codes.long()).double()
    if format == "int8":
        weight_scales = matrix.scales[1].flatten()[:, None].double()
    else:
        weight_scales = matrix.scales[1].transpose(1, 2).flatten(0, 1).double()
    expected = (dots * weight_scales * scales[:, None].double()).sum(-1)[:, :21]
    assert torch.allclose(matrix(x, 1).double(), expected, rtol=1e-5, atol=1e-5)
    assert nmse(matrix(x, 1), x @ matrix.dequantised(1).T) < 1e-4
    matrix.quantises_activations = False
    assert torch.allclose(matrix(x, 1), x @ matrix.dequantised(1).T, atol=1e-5)


def test_other_types_of_input():
    matrix = QuantisedMatrix.from_matrix(normal(20, 64).bfloat16(), "int4")
    assert matrix(normal(3, 64).bfloat16()).dtype == torch.bfloat16
    assert matrix(normal(0, 64)).shape == (0, 20)
    assert matrix(normal(2, 3, 64)).shape == (2, 3, 20)


def test_casting_a_model_leaves_codes_and_scales_alone():
    matrix = QuantisedMatrix.from_matrix(normal(20, 64), "int8")
    before = matrix.dequantised()
    assert torch.equal(matrix.bfloat16().dequantised(), before)
    assert matrix.scales.dtype == torch.float32


def test_sizes_are_those_of_the_format():
    for format, bits in (("int8", 8 + 32 / 2048), ("int4", 4.25)):
        matrix = QuantisedMatrix(format, 64, 2048, (3,), device="meta")
        assert matrix.nbytes * 8 == bits * matrix.num_weights
        assert matrix.scales.dtype == scales_dtype(format)
        assert matrix.scales.shape == scales_shape(format, 64, 2048, (3,))


def test_new_weights_in_place():
    matrix = QuantisedMatrix.from_matrix(normal(2, 20, 64), "int4")
    addresses = matrix.packed.data_ptr(), matrix.scales.data_ptr()
    new = normal(2, 20, 64, seed=5)
    matrix.copy_from_(new)
    assert (matrix.packed.data_ptr(), matrix.scales.data_ptr()) == addresses
    assert torch.equal(matrix.dequantised(), QuantisedMatrix.from_matrix(new, "int4").dequantised())
    with pytest.raises(CheckpointError, match=r"\(2, 20, 65\)"):
        matrix.copy_from_(normal(2, 20, 65))


def test_a_gradient_is_refused():
    matrix = QuantisedMatrix.from_matrix(normal(20, 64), "int8")
    x = normal(3, 64).requires_grad_()
    with pytest.raises(TrainingError, match="train the original"):
        matrix(x)
    with torch.no_grad():
        assert matrix(x).shape == (3, 20)


# --- schemes and models -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "formats"),
    [
        ("int8", ("int8", "int8", "int8", "int8")),
        ("int4", ("int4", "int4", "int8", "int8")),
        ("int4,attention=int4,head=int4", ("int4", "int4", "int4", "int4")),
        ("int4, down=int8,head = float", ("int4", "int8", "int8", "float")),
        ("float,gate_up=int4", ("int4", "float", "float", "float")),
    ],
)
def test_schemes_are_read_and_written(text, formats):
    scheme = QuantScheme.parse(text)
    assert tuple(scheme.model_dump().values()) == formats
    assert QuantScheme.parse(str(scheme)) == scheme


def test_every_scheme_is_written_so_that_it_is_read_back_and_says_what_it_holds():
    for formats in itertools.product(("int8", "int4", "float"), repeat=4):
        if set(formats) != {"float"}:
            scheme = QuantScheme(**dict(zip(QuantScheme.model_fields, formats, strict=True)))
            assert QuantScheme.parse(str(scheme)) == scheme
            assert ("int4" in str(scheme)) == ("int4" in formats)
    named = [str(QuantScheme.parse(text)) for text in ("int8", "int4", "int4,head=int8", "float,down=int4")]
    assert named == ["int8", "int4", "int4", "float,down=int4"]


@pytest.mark.parametrize(
    "text",
    ["", "int3", "int4=int4", "int4,head=", "int4,router=int8", "int4,down", "int4,down=int8,down=int4", "float"],
)
def test_other_schemes_are_refused(text):
    with pytest.raises(ConfigError, match="quantisation"):
        QuantScheme.parse(text)


@pytest.mark.parametrize("attention", ["cca", "gqa", "mha", "mla"])
@pytest.mark.parametrize("scheme", ["int8", "int4,down=int8,head=float", "float,gate_up=int4"])
def test_a_quantised_model_stays_close(attention, scheme):
    model = small_model(attention=attention)
    inputs, record = tokens(2, 20), ForwardRecord()
    with torch.no_grad():
        expected = model(inputs, record=record)
    forced = record.experts_NL().view(2, 20, -1)
    quantise_model(model, scheme)
    assert nmse(model(inputs, forced_experts=forced), expected) < (0.001 if scheme == "int8" else 0.08)


def test_the_skip_class_gives_nothing():
    model = quantise_model(small_model(), "int4")
    forced = torch.full((1, 6, SMALL.num_hidden_layers), SMALL.num_experts)
    block = model.model.layers[0]
    hidden, route = normal(6, SMALL.hidden_size), ForwardRecord()
    model(tokens(1, 6), forced_experts=forced, record=route)
    assert not block.mlp.experts(hidden, route.routes[0]).any()


def test_cached_decoding_agrees():
    model = quantise_model(small_model(), "int4")
    for module in model.modules():
        if isinstance(module, QuantisedMatrix):
            # Rounding activations turns last-bit differences of sums into steps; without it the rest is exact.
            module.quantises_activations = False
    inputs = tokens(3, 24)
    cache = model.make_cache(3, 24)
    pieces = [model(inputs[:, :10], cache=cache), *(model(inputs[:, i : i + 1], cache=cache) for i in range(10, 24))]
    assert torch.allclose(torch.cat(pieces, 1), model(inputs), atol=1e-5)


def test_quantising_frees_the_float_matrices():
    model = quantise_model(small_model(), "int4")
    names = [name for name, parameter in model.named_parameters() if parameter.numel() >= 64 * 64]
    assert names == ["model.embed_tokens.weight"]
    assert model.lm_head is not None and model.lm_head.rows == SMALL.vocab_size
    assert not any(parameter.requires_grad for parameter in model.parameters())
    with pytest.raises(CheckpointError, match="already"):
        quantise_model(model, "int8")


def test_progress_counts_every_weight():
    seen: list[tuple[int, int]] = []
    model = quantise_model(small_model(), "int8", progress=lambda done, total: seen.append((done, total)))
    matrices = [module for module in model.modules() if isinstance(module, QuantisedMatrix)]
    assert len(seen) == len(matrices) and seen[-1][0] == seen[-1][1] == sum(m.num_weights for m in matrices)


def test_another_configuration_shares_the_matrices():
    model = quantise_model(small_model(), "int4")
    other = model.with_config(SMALL.with_changes(max_position_embeddings=64))
    assert other.lm_head.packed.data_ptr() == model.lm_head.packed.data_ptr()
    assert torch.equal(other(tokens(1, 9)), model(tokens(1, 9)))


@pytest.mark.parametrize("scheme", ["int8", "int4,gate_up=float"])
def test_new_weights_for_a_whole_model(scheme):
    source = small_model()
    model = quantise_model(small_model(), scheme)
    with torch.no_grad():
        for parameter in source.parameters():
            parameter.add_(0.01)
    copy_weights_(model, source.state_dict())
    expected = quantise_model(copy.deepcopy(source), scheme)
    for name, tensor in expected.state_dict().items():
        assert torch.equal(model.state_dict()[name], tensor), name


@pytest.mark.parametrize(
    ("name", "tensor", "match"),
    [
        ("model.layers.0.mlp.experts.gate_up_proj", torch.zeros(3), "expected float"),
        ("model.layers.0.mlp.experts.gate_up_proj.packed", torch.zeros(3), "no such weight"),
        ("lm_head", torch.zeros(100, 64), "no such weight"),
        ("model.norm.weight", torch.full((64,), float("nan")), "not finite"),
        ("model.norm.weight", torch.zeros(64, dtype=torch.int64), "expected float"),
    ],
)
def test_weights_that_do_not_fit_change_nothing(name, tensor, match):
    model = quantise_model(small_model(), "int4")
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(CheckpointError, match=match):
        copy_weights_(model, {"model.input_hidden_states_bias": torch.ones(64), name: tensor})
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
