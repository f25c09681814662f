"""config.json of the legacy layout, read into and written from the fields of ``ZayaConfig``.

Values that change on the way (facts of the released files; the model is that of arXiv 2605.05365):
``num_hidden_layers`` counts attention and experts separately, so it halves; ``ffn_hidden_size``
counts gate and up rows, so the expert width is half of it (an explicit ``intermediate_size`` wins);
``swa_layers`` holds the number of PREVIOUS tokens a sliding layer sees, one entry a sub-layer, so
``sliding_window`` is that plus one (an explicit ``layer_types`` or ``sliding_window`` wins).
Values may be lists with one entry a sub-layer, 0 where they do not apply (ZAYA1-base). A value on whose
default published readers of this layout disagree must be there.
"""

from __future__ import annotations

from typing import Any

from openzaya.errors import CheckpointError
from openzaya.model.config import ZayaConfig
from openzaya.model.hf_config_keys import FIXED, Refuse, check_keys, short, single_token_id

_LEGACY_IGNORED_KEYS = frozenset(
    {
        "fused_add_norm",
        "apply_rope_fusion",
        "bias_activation_fusion",
        "activation_func_fp8_input_store",
        "mamba_cache_dtype",
        "zaya_high_prec",
        "use_grouped_mm",
    }
)  # how the training framework computed, not what

_LEGACY_FIXED: dict[str, tuple[Any, ...]] = {
    **FIXED,
    "cca": (True,),
    "zaya_use_eda": (True,),
    "zaya_use_mod": (True,),
    "scale_residual_merge": (True,),
    "residual_in_fp32": (True,),
    "gated_linear_unit": (True,),
    "add_bias_linear": (False,),
    "clamp_temp": (False,),
    "activation_func": ("swiglu",),
    "normalization": ("RMSNorm",),
    "moe_router_topk": (1,),
    "rope_scaling": (False, None),
}
LEGACY_MARKERS = frozenset(_LEGACY_FIXED) - frozenset(FIXED) - {"rope_scaling"} | {
    "ffn_hidden_size",
    "norm_epsilon",
    "swa_layers",
    "swa_rotary_base",
    "zaya_mlp_expansion",
    "zaya_layers",
    "num_query_groups",
    "kv_channels",
}
_LEGACY_UNUSED_WINDOW = "openzaya_sliding_window"
"""Our key for a window that no layer uses, which the legacy keys cannot say."""


_LAYER_TYPE_NAMES = {
    "full_attention": "hybrid",
    "sliding_attention": "hybrid_sliding",
    "hybrid": "hybrid",
    "hybrid_sliding": "hybrid_sliding",
}
# ZayaConfig field <- the legacy keys that may hold it, the first that is present wins; None: refuse when absent.
_LEGACY_FIELDS: dict[str, tuple[tuple[str, ...], Any]] = {
    "num_attention_heads": (("cca_num_q_heads", "num_attention_heads"), None),
    "num_key_value_heads": (("num_query_groups_list", "num_query_groups", "num_key_value_heads"), None),
    "router_hidden_size": (("router_hidden_size", "zaya_mlp_expansion"), None),
    "moe_intermediate_size": (("intermediate_size", "ffn_hidden_size_list", "ffn_hidden_size"), None),
    "head_dim": (("head_dim", "kv_channels"), None),
    "rms_norm_eps": (("rms_norm_eps", "norm_epsilon"), 1e-5),
    "rope_theta": (("rope_theta", "rotary_base"), None),
    "rope_theta_sliding": (("swa_rotary_base",), 10_000.0),
    "partial_rotary_factor": (("partial_rotary_factor", "rope_pct"), 0.5),
    "vocab_size": (("vocab_size",), None),
    "hidden_size": (("hidden_size",), None),
    "max_position_embeddings": (("max_position_embeddings",), None),
    "cca_time0": (("cca_time0",), 2),
    "cca_time1": (("cca_time1",), 2),
    "initializer_range": (("initializer_range",), 0.02),
    "pad_token_id": (("pad_token_id",), 0),
    "bos_token_id": (("bos_token_id",), 2),
}
_LEGACY_OTHER_KEYS = {"num_hidden_layers", "zaya_layers", "num_experts", "eos_token_id"}
_LEGACY_OTHER_KEYS |= {"swa_layers", "sliding_window", "layer_types", _LEGACY_UNUSED_WINDOW}


def read_legacy(raw: dict[str, Any], refuse: Refuse) -> dict[str, Any]:
    used = set(_LEGACY_OTHER_KEYS) | {key for keys, _ in _LEGACY_FIELDS.values() for key in keys}
    check_keys(raw, used | _LEGACY_IGNORED_KEYS, _LEGACY_FIXED, refuse)
    values: dict[str, Any] = {}

    pattern = raw.get("zaya_layers")
    num_sublayers = len(pattern) if isinstance(pattern, list) and pattern else raw.get("num_hidden_layers")
    if not isinstance(num_sublayers, int) or num_sublayers < 2 or num_sublayers % 2:
        refuse(f"num_hidden_layers={num_sublayers!r}, expected an even number (attention and experts count separately)")
        return values
    values["num_hidden_layers"] = num_layers = num_sublayers // 2
    values["num_experts"] = raw.get("num_experts")
    if pattern:
        experts = set(map(str, pattern[1::2]))
        if set(map(str, pattern[::2])) != {"a"} or len(experts) != 1 or not isinstance(pattern[1], int):
            refuse(f"zaya_layers={short(pattern)}, expected 'a' and one number of experts in turn")
        elif raw.get("num_experts") not in (None, pattern[1]):
            refuse(f"num_experts={raw['num_experts']} but zaya_layers says {pattern[1]}; correct config.json")
        else:
            values["num_experts"] = pattern[1]
    if values["num_experts"] is None:
        refuse("num_experts is missing; add it to config.json")

    for field, (keys, default) in _LEGACY_FIELDS.items():
        present = [key for key in keys if raw.get(key) is not None]
        values[field] = _uniform(raw[present[0]], present[0], num_sublayers, refuse) if present else default
        if values[field] is None:
            refuse(f"{' or '.join(keys)} is missing; add it to config.json")
    if raw.get("kv_channels") not in (None, values["head_dim"]):
        refuse(f"kv_channels={raw['kv_channels']} but head_dim={values['head_dim']}; correct config.json")
    if raw.get("num_key_value_heads") not in (None, values["num_key_value_heads"]):
        refuse(
            f"num_key_value_heads={raw['num_key_value_heads']} but the query groups are "
            f"{values['num_key_value_heads']}; correct config.json"
        )
    width = values["moe_intermediate_size"]
    if isinstance(width, int):
        if width % 2:
            refuse(f"expert width {width} (gate and up rows) is odd; it must be twice the width after the gate")
        values["moe_intermediate_size"] = width // 2
    if "eos_token_id" in raw:
        values["eos_token_id"] = single_token_id(raw, refuse)
    else:
        refuse("eos_token_id is missing, and published readers disagree on its default; add it to config.json")
    values |= _legacy_windows(raw, num_layers, refuse)
    return values


def _uniform(value: Any, key: str, num_sublayers: int, refuse: Refuse) -> Any:
    """A scalar, or the one non-zero entry of a list with an entry a sub-layer (released lists may be longer)."""
    if not isinstance(value, list):
        return value
    found = {entry for entry in value if isinstance(entry, int) and entry}
    if len(value) < num_sublayers or len(found) != 1:
        refuse(f"{key}={short(value)}, expected {num_sublayers} entries with one value besides 0")
        return None
    return found.pop()


def _legacy_windows(raw: dict[str, Any], num_layers: int, refuse: Refuse) -> dict[str, Any]:
    def one_a_layer(key: str, entries: Any) -> list[Any]:
        if isinstance(entries, list) and len(entries) in (num_layers, 2 * num_layers):
            return entries[::2] if len(entries) == 2 * num_layers else entries
        refuse(f"{key}={short(entries)}, expected {num_layers} or {2 * num_layers} entries; correct config.json")
        return []

    values: dict[str, Any] = {}
    windows = []
    if raw.get("swa_layers") is not None:
        windows = [window or 0 for window in one_a_layer("swa_layers", raw["swa_layers"])]
        if len(set(windows) - {0}) > 1:
            refuse(f"swa_layers holds the windows {sorted(set(windows) - {0})}; one window for all layers is supported")
        values["layer_types"] = ["hybrid_sliding" if window else "hybrid" for window in windows]
    if raw.get("layer_types") is not None:
        types = one_a_layer("layer_types", raw["layer_types"])
        for unknown in sorted(set(map(str, types)) - _LAYER_TYPE_NAMES.keys()):
            refuse(f"layer_types holds '{unknown}', expected one of {', '.join(_LAYER_TYPE_NAMES)}")
        values["layer_types"] = [_LAYER_TYPE_NAMES.get(str(name), "hybrid") for name in types]
    if raw.get("sliding_window"):
        values["sliding_window"] = raw["sliding_window"]
    elif any(windows):
        values["sliding_window"] = max(windows) + 1
    elif raw.get(_LEGACY_UNUSED_WINDOW):
        values["sliding_window"] = raw[_LEGACY_UNUSED_WINDOW]
    return values


def legacy_values(config: ZayaConfig) -> dict[str, Any]:
    values: dict[str, Any] = {key: allowed[0] for key, allowed in _LEGACY_FIXED.items() if key not in FIXED}
    values |= {
        "num_hidden_layers": 2 * config.num_hidden_layers,
        "ffn_hidden_size": 2 * config.moe_intermediate_size,
        "zaya_mlp_expansion": config.router_hidden_size,
        "norm_epsilon": config.rms_norm_eps,
        "num_query_groups": config.num_key_value_heads,
        "kv_channels": config.head_dim,
        "rope_theta": config.rope_theta,
        "swa_rotary_base": config.rope_theta_sliding,
        "partial_rotary_factor": config.partial_rotary_factor,
        "sliding_window": None,
        "bias_activation_fusion": True,
        "activation_func_fp8_input_store": False,
        "mamba_cache_dtype": "float32",
    }
    if "hybrid_sliding" in config.layer_types and config.sliding_window is not None:
        sliding = config.sliding_window
        if sliding < 2:
            raise CheckpointError(
                f"sliding_window={sliding}: the legacy layout says the number of previous tokens, and 0 means no "
                "window; use the native layout"
            )
        windows = [sliding - 1 if kind == "hybrid_sliding" else 0 for kind in config.layer_types]
        values["swa_layers"] = [entry for window in windows for entry in (window, 0)]
    elif config.sliding_window is not None:
        values[_LEGACY_UNUSED_WINDOW] = config.sliding_window
    return values
