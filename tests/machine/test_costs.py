"""The formulas against numbers worked out by hand, and against the tensors of real small models."""

from __future__ import annotations

import pytest
import torch

from openzaya.infer.runner import block_bytes, slot_bytes
from openzaya.machine.costs import PROGRAM_BYTES, Costs, costs_of, distinct_experts, weight_costs
from openzaya.model.config import ZayaConfig, preset
from openzaya.model.counts import num_active_parameters
from openzaya.model.quantised import QuantScheme, quantise_model
from openzaya.model.transformer import Zaya

SMALL = ZayaConfig(
    vocab_size=300,
    hidden_size=72,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    num_experts=5,
    moe_intermediate_size=100,
    router_hidden_size=24,
    max_position_embeddings=2048,
    eos_token_id=4,
)


def by_kind(costs: Costs) -> dict[str, int]:
    return {weight.kind: weight.num_bytes for weight in costs.weights}


def test_expert_bytes_by_hand() -> None:
    """Rows are padded to 16, columns to 64: (200, 72) -> (208, 128) and (72, 100) -> (80, 128)."""
    weights = 208 * 128 + 80 * 128
    rows = 208 + 80
    for text, expert in (
        ("int8", weights + 4 * rows),
        ("int4", weights // 2 + 2 * rows * 2),
        ("int8,gate_up=int4", 208 * 128 // 2 + 2 * 208 * 2 + 80 * 128 + 4 * 80),
    ):
        costs = costs_of(SMALL, QuantScheme.parse(text), torch.bfloat16)
        assert by_kind(costs)["experts"] == 3 * 5 * expert
    assert by_kind(costs_of(SMALL, None, torch.bfloat16))["experts"] == 3 * 5 * (200 * 72 + 72 * 100) * 2


def test_zaya1_8b_by_hand() -> None:
    """Every matrix of this shape fills its blocks: nothing is padded."""
    layers, experts, size = 40, 16, 2048 * 2048
    projections = 2 * 2048 * 1024 + 2 * 2048 * 256
    int4 = by_kind(costs_of(preset("zaya1-8b"), QuantScheme.parse("int4"), torch.bfloat16))
    assert int4["experts"] == layers * experts * 3 * size * (64 // 2 + 2) // 64
    plain = by_kind(costs_of(preset("zaya1-8b"), QuantScheme.parse("int4,head=int4"), torch.bfloat16))
    assert plain["head"] == 262_272 * 2048 * (64 // 2 + 2) // 64
    int8 = by_kind(costs_of(preset("zaya1-8b"), QuantScheme.parse("int8"), torch.bfloat16))
    assert int8["experts"] == layers * experts * (3 * size + 4 * (4096 + 2048))
    assert int8["head"] == int4["head"] == 262_272 * (2048 + 4)
    assert int8["embedding"] == int4["embedding"] == 262_272 * 2048 * 2
    convolutions = 1280 * (2 + 2 * 128) + 2 * 1280 + 2
    rows = 1024 + 256 + 128 + 128 + 2048
    assert int8["attention"] == int4["attention"] == layers * (projections + 4 * rows + 2 * convolutions)


@pytest.mark.parametrize("scheme", [None, "int8", "int4", "int8,gate_up=int4,head=float", "float,attention=int4"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("changes", [{}, {"attention": "mla", "router": "linear", "residual": "plain"}])
def test_weights_are_those_of_the_model(scheme: str | None, dtype: torch.dtype, changes: dict[str, str]) -> None:
    config = SMALL.with_changes(**changes)
    parsed = None if scheme is None else QuantScheme.parse(scheme)
    model = Zaya(config, seed=0)
    model.to(dtype)
    biases = [buffer for name, buffer in model.named_buffers() if name.endswith("balancing_biases")]
    if parsed is not None:
        quantise_model(model, parsed)
    costs = costs_of(config, parsed, dtype)
    # A loaded model keeps its balancing biases in fp32.
    widened = sum(bias.numel() * 4 - bias.nbytes for bias in biases)
    assert costs.file_bytes == sum(tensor.nbytes for tensor in model.state_dict().values()) + widened
    head = config.vocab_size * config.hidden_size if "head" in by_kind(costs) else 0
    num_biases = sum(bias.numel() for bias in biases)
    assert sum(weight.num_weights for weight in costs.weights) == config.num_parameters() + num_biases + head


def test_a_token_of_a_float_model_reads_its_active_weights() -> None:
    config = preset("zaya1-8b")
    costs = costs_of(config, None, torch.bfloat16)
    biases = config.num_hidden_layers * config.num_router_classes
    assert costs.step_bytes(0, 1) == 2 * num_active_parameters(config, embeddings=True) + 4 * biases
    head = costs_of(config, QuantScheme.parse("int8"), torch.bfloat16)
    table = config.vocab_size * config.hidden_size * 2
    assert head.file_bytes - head.weight_bytes == table, "the table lies in its file"
    assert all(weight.read_bytes(16) == 0 for weight in head.weights if weight.kind == "embedding")


def test_distinct_experts() -> None:
    assert distinct_experts(16, 1) == pytest.approx(1)
    assert distinct_experts(16, 2) == pytest.approx(1 + 15 / 16)
    assert distinct_experts(16, 16) == pytest.approx(10.3, abs=0.05)
    assert distinct_experts(16, 10_000) == pytest.approx(16)
    assert distinct_experts(1, 5) == 1


def test_keys_values_and_state() -> None:
    costs = costs_of(SMALL, None, torch.float32, torch.int8)
    block = 3 * 64 * 2 * 2 * (16 + 4) + slot_bytes(SMALL)
    assert block_bytes(SMALL, torch.int8) == block
    assert [costs.cache_bytes(context, 5) for context in (1, 64, 65)] == [5 * block, 5 * block, 10 * block]
    assert costs.state_bytes(5) == 5 * 4 * 3 * (2 * 96 + 16)
    parts = costs.weight_bytes + costs.cache_bytes(65, 5) + costs.state_bytes(5) + costs.activation_bytes(5)
    assert costs.peak_bytes(65, 5) == PROGRAM_BYTES + parts


def test_reading_keys_and_values() -> None:
    config = SMALL.with_changes(layer_types=("hybrid", "hybrid_sliding", "hybrid"), sliding_window=10)
    costs = costs_of(config, None, torch.float32, torch.bfloat16)
    weights = costs.step_bytes(0, 7)
    a_key = 2 * 2 * 16 * 2
    assert costs.step_bytes(8, 7) - weights == pytest.approx(7 * 3 * 8 * a_key)
    assert costs.step_bytes(100, 7) - weights == pytest.approx(7 * (2 * 100 + 10) * a_key)
    assert costs.tokens_per_second(100, 7, 1e9) == pytest.approx(7e9 / costs.step_bytes(100, 7))


def test_what_fits() -> None:
    costs = costs_of(SMALL, QuantScheme.parse("int8"), torch.float32)
    memory = costs.peak_bytes(640, 7)
    assert costs.largest_batch(640, memory) == 7
    assert costs.largest_batch(640, memory - 1) == 6
    assert costs.largest_context(7, memory) == 640
    assert costs.largest_context(7, memory - 1) == 576
    assert costs.largest_context(1, 1 << 50) == SMALL.max_position_embeddings
    assert costs.largest_batch(1, 1000) == costs.largest_context(1, 1000) == 0


def test_every_kind_is_known() -> None:
    kinds = {weight.kind: weight for weight in weight_costs(SMALL, QuantScheme.parse("int4"))}
    assert kinds.keys() == {"experts", "attention", "router", "head", "embedding", "other"}
    assert kinds["experts"].num_copies == 5 and kinds["attention"].num_copies == 1
    norms_and_scales = 3 * (2 + 8) * 72 + 3 * 72
    assert kinds["other"].num_weights == norms_and_scales
