"""Presets, validation, and counts: what the configuration says equals the model as built on the meta device."""

from __future__ import annotations

import itertools

import pytest
import torch

from openzaya.errors import ConfigError
from openzaya.model.cache import DecodeCache
from openzaya.model.config import PRESETS, ZayaConfig, parse_config, preset
from openzaya.model.counts import (
    cache_bytes_per_token,
    cca_state_bytes,
    forward_flops_per_token,
    num_active_parameters,
    num_parameters,
)
from openzaya.model.transformer import Zaya
from tests.model.reference import TINY

VARIANTS = [
    TINY.with_changes(attention=attention, router=router, residual=residual, num_hidden_layers=layers)
    for attention, router, residual, layers in itertools.product(
        ("cca", "gqa", "mha", "mla"), ("mlp+eda", "mlp", "linear"), ("learned", "plain"), (1, 3)
    )
]
SHAPES = [
    *PRESETS.values(),
    *VARIANTS,
    TINY.with_changes(cca_time0=1, cca_time1=4, num_key_value_heads=4, num_experts=1),
    TINY.with_changes(num_key_value_heads=1, partial_rotary_factor=1.0, attention="mla", mla_latent_size=20),
]


def on_meta(config: ZayaConfig) -> Zaya:
    with torch.device("meta"):
        return Zaya(config)


def test_counts_of_zaya1_8b_are_the_published_ones() -> None:
    config = preset("zaya1-8b")
    assert num_parameters(config) == config.num_parameters() == 8_840_488_784
    assert num_parameters(config, embeddings=False) == config.num_parameters(embeddings=False) == 8_303_355_728
    assert num_active_parameters(config) == 753_608_528
    assert cache_bytes_per_token(config, torch.bfloat16) == 40_960
    # Two vectors z of 1,280 and half a value of 256, in fp32, in each of 40 layers.
    assert cca_state_bytes(config) == 40 * (2 * 1280 + 128) * 4
    # Half the context is what a query sees on average.
    assert round(forward_flops_per_token(config, 4096 / 2) / 1e9, 1) == 2.9
    assert round(forward_flops_per_token(config, 131_072 / 2) / 1e9, 1) == 13.3


@pytest.mark.parametrize("config", SHAPES, ids=range(len(SHAPES)))
def test_counts_equal_the_built_model(config: ZayaConfig) -> None:
    model = on_meta(config)
    sizes = {name: parameter.numel() for name, parameter in model.named_parameters()}
    embedding = sizes["model.embed_tokens.weight"]
    assert num_parameters(config) == sum(sizes.values())
    assert num_parameters(config, embeddings=False) == sum(sizes.values()) - embedding
    experts = sum(size for name, size in sizes.items() if ".experts." in name)
    active = sum(sizes.values()) - embedding - experts + experts // config.num_experts
    assert num_active_parameters(config) == active
    assert num_active_parameters(config, embeddings=True) == active + embedding


@pytest.mark.parametrize("config", SHAPES, ids=range(len(SHAPES)))
def test_flops_are_two_per_weight_of_every_product(config: ZayaConfig) -> None:
    """A matrix has two dimensions or more; a stack of experts counts once."""
    flops = 0
    for name, parameter in on_meta(config).named_parameters():
        if parameter.dim() >= 2:
            flops += 2 * parameter.numel() // (config.num_experts if ".experts." in name else 1)
    assert forward_flops_per_token(config, 0) == flops
    num_sliding = config.layer_types.count("hybrid_sliding")
    per_key = 4 * config.num_attention_heads * config.head_dim
    long = 10**6
    keys = (config.num_hidden_layers - num_sliding) * long + num_sliding * (config.sliding_window or 0)
    assert forward_flops_per_token(config, long) == flops + per_key * keys


@pytest.mark.parametrize("config", SHAPES, ids=range(len(SHAPES)))
def test_cache_bytes_equal_the_built_cache(config: ZayaConfig) -> None:
    capacity = 7
    for dtype in (torch.bfloat16, torch.float32):
        cache = DecodeCache(config, 1, capacity, device="meta", dtype=dtype)
        keys_values = [tensor for layer in cache.layers for tensor in (layer.keys_BKSd, layer.values_BKSd)]
        states = [tensor for layer in cache.layers for tensor in (layer.z_history_BLC, layer.last_delayed_B1V)]
        assert cache_bytes_per_token(config, dtype) * capacity == sum(tensor.nbytes for tensor in keys_values)
        assert cca_state_bytes(config) == sum(tensor.nbytes for tensor in states)


def test_presets_are_valid_and_known_by_name() -> None:
    assert set(PRESETS) >= {"zaya1-8b", "zaya1-74b-preview", "nano", "smoke"}
    large = preset("zaya1-74b-preview")
    assert (large.num_hidden_layers, large.hidden_size, large.num_experts, large.sliding_window) == (60, 4096, 24, 4097)
    assert large.layer_types.count("hybrid_sliding") == 30
    assert 2_000_000 <= num_parameters(preset("nano")) <= 8_000_000
    with pytest.raises(ConfigError, match=r"zaya1-9b.*zaya1-8b"):
        preset("zaya1-9b")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_attention_heads": 3}, r"num_attention_heads=3.*num_key_value_heads=2"),
        ({"num_hidden_layers": 2, "layer_types": ("hybrid",)}, r"1 layers.*num_hidden_layers=2"),
        ({"sliding_window": None}, r"sliding_window is not set"),
        ({"partial_rotary_factor": 0.1}, r"partial_rotary_factor.*even number"),
        ({"eos_token_id": 48}, r"eos_token_id=48.*48"),
        ({"num_key_value_heads": 1, "head_dim": 5, "partial_rotary_factor": 0.4}, r"=5 is odd"),
        ({"cca_time0": 0}, r"cca_time0"),
        ({"num_expert": 3}, r"num_expert\b"),
        ({"attention": "cca2"}, r"attention"),
    ],
)
def test_a_shape_that_cannot_be_is_refused(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        TINY.with_changes(**changes)


def test_depth_changes_keep_the_pattern_of_layers() -> None:
    pattern = preset("zaya1-74b-preview").with_changes(num_hidden_layers=3).layer_types
    assert pattern == ("hybrid_sliding", "hybrid", "hybrid_sliding")
    assert parse_config({"num_hidden_layers": 2}).layer_types == ("hybrid", "hybrid")
