"""config.json: every key read, fixed, or named when refused; the legacy rules one by one."""

from __future__ import annotations

from typing import Any

import pytest

from openzaya.errors import CheckpointError
from openzaya.model.hf_config import layout_of_config, read_config
from tests.model.hf_miniatures import LEGACY_CONFIG, MINI, NATIVE_CONFIG


def without(raw: dict[str, Any], *keys: str) -> dict[str, Any]:
    return {key: value for key, value in raw.items() if key not in keys}


def rope(**changes: Any) -> dict[str, Any]:
    return {**NATIVE_CONFIG["rope_parameters"], **changes}


DEFAULT_ROPE = {"rope_type": "default", "rope_theta": 5e6, "partial_rotary_factor": 0.5}


def test_released_field_sets():
    assert layout_of_config(NATIVE_CONFIG) == "native"
    assert layout_of_config(LEGACY_CONFIG) == "legacy"
    assert read_config(NATIVE_CONFIG, "native") == MINI
    assert read_config(LEGACY_CONFIG, "legacy") == MINI


def test_per_layer_lists_of_the_base_model():
    """ZAYA1-base writes lists with an entry a sub-layer; its scalars may say something else, lists may be longer."""
    raw = {
        **without(LEGACY_CONFIG, "ffn_hidden_size", "num_query_groups", "head_dim", "num_experts"),
        "zaya_layers": ["a", 3] * 3,
        "num_hidden_layers": 12,
        "num_attention_heads": 8,
        "cca_num_q_heads": [4, 0] * 3,
        "num_query_groups_list": [2, 0] * 3,
        "ffn_hidden_size_list": [0, 24] * 5,
        "zaya_mlp_expansion": [0, 10] * 3,
    }
    assert read_config(raw, layout_of_config(raw)) == MINI
    for key, value in (
        ("zaya_layers", ["a", 3, "a", 4, "a", 3]),
        ("cca_num_q_heads", [4, 0, 8, 0, 4, 0]),
        ("ffn_hidden_size_list", [0, 24]),
    ):
        with pytest.raises(CheckpointError, match=key):
            read_config({**raw, key: value}, "legacy")


def test_legacy_windows():
    windows = {"swa_layers": [16, 0, 0, 0, 16, 0], "swa_rotary_base": 700}
    config = read_config({**LEGACY_CONFIG, **windows}, "legacy")
    assert config.layer_types == ("hybrid_sliding", "hybrid", "hybrid_sliding")
    assert (config.sliding_window, config.rope_theta_sliding) == (17, 700)
    assert read_config({**LEGACY_CONFIG, "swa_layers": [16, 0, 16]}, "legacy").layer_types == config.layer_types
    assert read_config({**LEGACY_CONFIG, **windows, "sliding_window": 9}, "legacy").sliding_window == 9
    explicit = ["full_attention"] * 4 + ["sliding_attention"] * 2
    config = read_config({**LEGACY_CONFIG, **windows, "layer_types": explicit}, "legacy")
    assert config.layer_types == ("hybrid", "hybrid", "hybrid_sliding") and config.sliding_window == 17
    for raw in ({"swa_layers": [16, 0]}, {"swa_layers": [16, 0, 8, 0, 0, 0]}, {"layer_types": ["odd"] * 3}):
        with pytest.raises(CheckpointError, match=next(iter(raw))):
            read_config({**LEGACY_CONFIG, **raw}, "legacy")


def test_explicit_intermediate_size_wins():
    assert read_config({**LEGACY_CONFIG, "intermediate_size": 40}, "legacy").moe_intermediate_size == 20
    with pytest.raises(CheckpointError, match="odd"):
        read_config({**LEGACY_CONFIG, "intermediate_size": 41}, "legacy")


@pytest.mark.parametrize(
    "key",
    [
        "hidden_size",
        "vocab_size",
        "ffn_hidden_size",
        "num_experts",
        "rope_theta",
        "eos_token_id",
        "zaya_mlp_expansion",
        "max_position_embeddings",
        "num_hidden_layers",
    ],
)
def test_legacy_values_that_may_not_be_guessed(key):
    with pytest.raises(CheckpointError, match=f"{key}.*(missing|expected)"):
        read_config(without(LEGACY_CONFIG, key), "legacy")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("tie_word_embeddings", False),
        ("attention_bias", True),
        ("lm_head_bias", True),
        ("num_experts_per_tok", 2),
        ("hidden_act", "gelu"),
        ("attention_dropout", 0.1),
        ("zaya_use_eda", False),
        ("zaya_use_mod", False),
        ("scale_residual_merge", False),
        ("clamp_temp", True),
        ("add_bias_linear", True),
        ("moe_router_topk", 2),
        ("activation_func", "gelu"),
        ("normalization", "LayerNorm"),
        ("rope_scaling", {"type": "yarn", "factor": 4.0}),
        ("quantization_config", {"bits": 4}),
        ("vision_config", {}),
        ("kv_channels", 16),
        ("num_key_value_heads", 4),
        ("num_attention_heads", 3),
        ("brand_new_key", 1),
    ],
)
def test_unsupported_legacy_values_are_named(key, value):
    with pytest.raises(CheckpointError, match=key):
        read_config({**LEGACY_CONFIG, key: value}, "legacy")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("tie_word_embeddings", False),
        ("attention_bias", True),
        ("lm_head_bias", True),
        ("num_experts_per_tok", 2),
        ("hidden_act", "gelu"),
        ("brand_new_key", 1),
        ("layer_types", ["hybrid"] * 2),
        ("layer_types", ["hybrid", "hybrid", "linear"]),
        ("eos_token_id", [1, 6]),
        ("partial_rotary_factor", 0.25),
        ("vocab_size", "many"),
        ("rope_parameters", {"rope_type": "default", "rope_theta": 5e6}),
        ("rope_parameters", rope(rope_type="yarn")),
        ("rope_parameters", rope(hybrid={**DEFAULT_ROPE, "rope_type": "linear", "factor": 2})),
        ("rope_parameters", rope(hybrid={"rope_type": "default", "rope_theta": 5e6})),
        ("rope_parameters", rope(hybrid={**DEFAULT_ROPE, "factor": 2})),
    ],
)
def test_unsupported_native_values_are_named(key, value):
    with pytest.raises(CheckpointError, match=key):
        read_config({**NATIVE_CONFIG, key: value}, "native")


def test_native_defaults_are_those_of_transformers():
    from transformers import ZayaConfig as ReferenceConfig

    reference = ReferenceConfig()
    config = read_config({"model_type": "zaya"}, "native")
    for field in ("vocab_size", "hidden_size", "num_hidden_layers", "head_dim", "rms_norm_eps", "eos_token_id"):
        assert getattr(config, field) == getattr(reference, field)
    assert config.rope_theta == reference.rope_parameters["hybrid"]["rope_theta"]
    assert config.rope_theta_sliding == reference.rope_parameters["hybrid_sliding"]["rope_theta"]


def test_all_problems_come_in_one_message():
    raw = {**NATIVE_CONFIG, "attention_bias": True, "one_key": 1, "other_key": 2}
    with pytest.raises(CheckpointError) as error:
        read_config(raw, "native")
    assert all(key in str(error.value) for key in ("attention_bias", "one_key", "other_key"))


def test_other_models_and_mixtures_are_refused():
    with pytest.raises(CheckpointError, match="llama"):
        layout_of_config({"model_type": "llama"})
    with pytest.raises(CheckpointError, match=r"ffn_hidden_size.*moe_intermediate_size"):
        layout_of_config({**NATIVE_CONFIG, "ffn_hidden_size": 24})


def test_newer_format_of_ours_is_refused():
    raw = {"model_type": "openzaya", "openzaya_format": 2, "config": {}}
    with pytest.raises(CheckpointError, match="upgrade"):
        read_config(raw, layout_of_config(raw))
    with pytest.raises(CheckpointError, match=r"hiden_size.*hidden_size"):
        read_config({"openzaya_format": 1, "config": {"hiden_size": 3}}, "openzaya")
