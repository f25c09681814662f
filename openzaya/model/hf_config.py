"""config.json of the three checkpoint layouts, read into and written from :class:`ZayaConfig`.

Every key is accounted for: it is read, or must have the one value that the architecture implements,
or is on the short list of keys that say nothing about the model; anything else is refused by name.
``transformers`` fills what is missing with defaults; so does the native reader, with the same ones. The legacy reader
asks for every value on which published readers of that layout disagree.
"""

from __future__ import annotations

from typing import Any, Literal

from openzaya.errors import CheckpointError, ConfigError
from openzaya.model.config import ZayaConfig, parse_config
from openzaya.model.hf_config_keys import FIXED, SHARED_FIELDS, Refuse, check_keys, short, single_token_id
from openzaya.model.hf_config_legacy import LEGACY_MARKERS, legacy_values, read_legacy
from openzaya.model.hf_names import refuse_variant

Layout = Literal["native", "legacy", "openzaya"]
LAYOUTS: tuple[Layout, ...] = ("native", "legacy", "openzaya")

OPENZAYA_FORMAT = 1
"""Version of the "openzaya" layout that this code writes, and the newest that it reads."""

_NATIVE_MARKERS = frozenset({"moe_intermediate_size", "rope_parameters"})


def layout_of_config(raw: dict[str, Any]) -> Layout:
    """The layout that a parsed config.json is written in.

    Raises:
        CheckpointError: another kind of model, or keys of both released layouts at once.
    """
    if "openzaya_format" in raw or raw.get("model_type") == "openzaya":
        return "openzaya"
    if raw.get("model_type") != "zaya":
        raise CheckpointError(
            f"model_type={raw.get('model_type')!r}, expected 'zaya' or 'openzaya'; pass a ZAYA checkpoint"
        )
    legacy, native = sorted(LEGACY_MARKERS & raw.keys()), sorted(_NATIVE_MARKERS & raw.keys())
    if legacy and native:
        raise CheckpointError(
            f"config.json holds keys of the legacy layout ({', '.join(legacy)}) and of the native one "
            f"({', '.join(native)}); remove the keys of the layout that the tensors are not in"
        )
    return "legacy" if legacy else "native"


def read_config(raw: dict[str, Any], layout: Layout) -> ZayaConfig:
    """The model's shape from a parsed config.json of a known layout.

    Raises:
        CheckpointError: one message naming every key that is unknown, missing or unsupported.
    """
    problems: list[str] = []
    if "quantization_config" in raw:
        problems.append("quantization_config: quantised checkpoints are not supported; use the bfloat16 weights")
    if "vision_config" in raw:
        problems.append("vision_config: models with a vision tower are not supported; use a text-only checkpoint")
    known = {key: value for key, value in raw.items() if key not in ("quantization_config", "vision_config")}
    readers = {"native": _read_native, "legacy": read_legacy, "openzaya": _read_openzaya}
    values = readers[layout](known, problems.append)
    if not problems:
        try:
            return parse_config(values)
        except ConfigError as error:
            problems.append(str(error))
    raise CheckpointError("config.json: " + "\n  ".join(problems))


def write_config(config: ZayaConfig, layout: Layout, dtype: str) -> dict[str, Any]:
    """config.json of ``config`` in a layout; ``dtype`` is the torch name of the weights' type.

    Raises:
        CheckpointError: an ablation variant in a released layout.
    """
    if layout == "openzaya":
        return {
            "model_type": "openzaya",
            "openzaya_format": OPENZAYA_FORMAT,
            "dtype": dtype,
            "config": config.model_dump(mode="json"),
        }
    refuse_variant(config, f"the {layout} layout")
    common = {key: getattr(config, key) for key in SHARED_FIELDS}
    common |= {key: values[0] for key, values in FIXED.items() if key not in ("hidden_act", "num_experts_per_tok")}
    common |= {
        "architectures": ["ZayaForCausalLM"],
        "model_type": "zaya",
        "dtype": dtype,
        "eos_token_id": config.eos_token_id,
        "num_attention_heads": config.num_attention_heads,
        "num_key_value_heads": config.num_key_value_heads,
        "use_cache": True,
        "transformers_version": _transformers_version(),
        "attention_dropout": 0.0,
    }
    return common | (_native_values(config) if layout == "native" else legacy_values(config))


def _transformers_version() -> str:
    from importlib.metadata import version

    return version("transformers")


# --- native -------------------------------------------------------------------------------------

_NATIVE_FIELDS = (
    *SHARED_FIELDS,
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "moe_intermediate_size",
    "router_hidden_size",
    "rms_norm_eps",
    "sliding_window",
    "layer_types",
)


def _read_native(raw: dict[str, Any], refuse: Refuse) -> dict[str, Any]:
    values = {key: raw[key] for key in _NATIVE_FIELDS if key in raw}
    if values.get("layer_types") is None:
        values.pop("layer_types", None)
    if "eos_token_id" in raw:
        values["eos_token_id"] = single_token_id(raw, refuse)
    used = {*_NATIVE_FIELDS, "eos_token_id", "rope_parameters", "partial_rotary_factor", "rope_theta"}
    check_keys(raw, used, FIXED, refuse)

    rope = raw.get("rope_parameters")
    layer_types = values.get("layer_types", ["hybrid"])
    if rope is not None:
        if not isinstance(rope, dict) or not isinstance(rope.get("hybrid", rope.get("hybrid_sliding")), dict):
            refuse(f"rope_parameters={short(rope)}, expected one entry a layer type ('hybrid', 'hybrid_sliding')")
            return values
        factors = set()
        # Released files carry a stray "rope_type" beside the layer types.
        for key in rope.keys() - {"hybrid", "hybrid_sliding"}:
            if not (key == "rope_type" and rope[key] == "default"):
                refuse(f"rope_parameters.{key}={short(rope[key])} is not supported (only 'default' RoPE); remove it")
        for kind, field in (("hybrid", "rope_theta"), ("hybrid_sliding", "rope_theta_sliding")):
            entry = rope.get(kind)
            if entry is None and kind not in layer_types:
                continue
            if not isinstance(entry, dict) or not {"rope_theta", "partial_rotary_factor"} <= entry.keys():
                refuse(f"rope_parameters.{kind}={short(entry)} needs rope_theta and partial_rotary_factor; add them")
                continue
            for key in entry.keys() - {"rope_theta", "partial_rotary_factor"}:
                if not (key == "rope_type" and entry[key] == "default"):
                    refuse(f"rope_parameters.{kind}.{key}={short(entry[key])} is not supported (only 'default' RoPE)")
            values[field] = entry["rope_theta"]
            if kind in layer_types:
                factors.add(entry["partial_rotary_factor"])
        if len(factors) > 1:
            refuse(f"partial_rotary_factor differs between layer types {sorted(factors)}; one value is supported")
        elif factors:
            values["partial_rotary_factor"] = factors.pop()
    for key, default in (("partial_rotary_factor", 0.5), ("rope_theta", 5_000_000.0)):
        if key in raw and raw[key] != values.get(key, default):
            refuse(f"{key}={raw[key]} beside rope_parameters with {values.get(key, default)}; make them agree")
    return values


def _native_values(config: ZayaConfig) -> dict[str, Any]:
    def rope(theta: float) -> dict[str, Any]:
        return {"rope_type": "default", "rope_theta": theta, "partial_rotary_factor": config.partial_rotary_factor}

    return {
        "num_hidden_layers": config.num_hidden_layers,
        "moe_intermediate_size": config.moe_intermediate_size,
        "router_hidden_size": config.router_hidden_size,
        "rms_norm_eps": config.rms_norm_eps,
        "sliding_window": config.sliding_window,
        "layer_types": list(config.layer_types),
        "rope_parameters": {"hybrid": rope(config.rope_theta), "hybrid_sliding": rope(config.rope_theta_sliding)},
        "hidden_act": "silu",
        "num_experts_per_tok": 1,
        "output_router_logits": False,
    }


# --- openzaya -----------------------------------------------------------------------------------


def _read_openzaya(raw: dict[str, Any], refuse: Refuse) -> dict[str, Any]:
    version = raw.get("openzaya_format")
    if not isinstance(version, int) or isinstance(version, bool) or version < 1:
        refuse(f"openzaya_format={version!r}, expected a version number; write the checkpoint again")
    elif version > OPENZAYA_FORMAT:
        refuse(f"openzaya_format={version}, this version reads up to {OPENZAYA_FORMAT}; upgrade openzaya")
    else:
        for key in sorted(raw.keys() - {"model_type", "openzaya_format", "dtype", "config", "groups", "quantisation"}):
            refuse(f"unknown key '{key}'={short(raw[key])}; write the checkpoint again")
        if isinstance(raw.get("config"), dict):
            return dict(raw["config"])
        refuse(f"config={short(raw.get('config'))}, expected the model's configuration; write the checkpoint again")
    return {}
