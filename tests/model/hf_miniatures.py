"""Small checkpoints with the released files' exact key names, for the tests of hf.py."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from openzaya.model.config import ZayaConfig
from openzaya.model.hf_names import tensor_table

MINI = ZayaConfig(
    vocab_size=48,
    hidden_size=32,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    num_experts=3,
    moe_intermediate_size=12,
    router_hidden_size=10,
    max_position_embeddings=64,
    eos_token_id=6,
)
SLIDING = MINI.with_changes(
    num_hidden_layers=4, layer_types=("hybrid_sliding", "hybrid") * 2, sliding_window=5, rope_theta_sliding=500.0
)

# The field sets of the released 8B files (native and legacy), at miniature sizes.
NATIVE_CONFIG: dict[str, Any] = {
    "architectures": ["ZayaForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 2,
    "cca_time0": 2,
    "cca_time1": 2,
    "dtype": "bfloat16",
    "eos_token_id": 6,
    "head_dim": 8,
    "hidden_act": "silu",
    "hidden_size": 32,
    "initializer_range": 0.02,
    "layer_types": ["hybrid"] * 3,
    "lm_head_bias": False,
    "max_position_embeddings": 64,
    "model_type": "zaya",
    "moe_intermediate_size": 12,
    "num_attention_heads": 4,
    "num_experts": 3,
    "num_experts_per_tok": 1,
    "num_hidden_layers": 3,
    "num_key_value_heads": 2,
    "output_router_logits": False,
    "pad_token_id": 0,
    "partial_rotary_factor": 0.5,
    "rms_norm_eps": 1e-05,
    "rope_parameters": {
        "hybrid": {"partial_rotary_factor": 0.5, "rope_theta": 5000000, "rope_type": "default"},
        "hybrid_sliding": {"partial_rotary_factor": 0.5, "rope_theta": 10000.0, "rope_type": "default"},
        "rope_type": "default",
    },
    "router_hidden_size": 10,
    "sliding_window": None,
    "tie_word_embeddings": True,
    "use_cache": True,
    "vocab_size": 48,
}
LEGACY_CONFIG: dict[str, Any] = {
    "activation_func": "swiglu",
    "activation_func_fp8_input_store": False,
    "add_bias_linear": False,
    "architectures": ["ZayaForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bias_activation_fusion": True,
    "bos_token_id": 2,
    "cca": True,
    "dtype": "bfloat16",
    "eos_token_id": 6,
    "ffn_hidden_size": 24,
    "gated_linear_unit": True,
    "head_dim": 8,
    "hidden_size": 32,
    "kv_channels": 8,
    "lm_head_bias": False,
    "mamba_cache_dtype": "float32",
    "max_position_embeddings": 64,
    "model_type": "zaya",
    "moe_router_topk": 1,
    "norm_epsilon": 1e-05,
    "normalization": "RMSNorm",
    "num_attention_heads": 4,
    "num_experts": 3,
    "num_hidden_layers": 6,
    "num_key_value_heads": 2,
    "num_query_groups": 2,
    "pad_token_id": 0,
    "partial_rotary_factor": 0.5,
    "residual_in_fp32": True,
    "rope_scaling": False,
    "rope_theta": 5000000,
    "scale_residual_merge": True,
    "sliding_window": None,
    "use_cache": True,
    "vocab_size": 48,
    "zaya_mlp_expansion": 10,
    "zaya_use_eda": True,
    "zaya_use_mod": True,
}


def native_state(config: ZayaConfig, *, seed: int = 0, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    """Random tensors under native names; balancing biases in float32, the skip bias -1."""
    generator = torch.Generator().manual_seed(seed)
    state = {}
    for spec in tensor_table(config):
        tensor = 0.3 * torch.randn(spec.shape, generator=generator)
        if spec.dtype_policy == "float32":
            tensor = 0.01 * tensor.abs()
            tensor[-1] = -1
            state[spec.native] = tensor
        else:
            state[spec.native] = tensor.to(dtype)
    return state


def legacy_state(config: ZayaConfig, native: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The same tensors under legacy names, written out by hand (no table of the package)."""
    last = config.num_hidden_layers - 1
    state = {
        "model.embed_tokens.weight": native["model.embed_tokens.weight"],
        "model.final_norm.weight": native["model.norm.weight"],
        "model.layers.0.res_scale.hidden_states_scale": native["model.input_hidden_states_scale"],
        "model.layers.0.res_scale.hidden_states_bias": native["model.input_hidden_states_bias"],
    }
    for i in range(last + 1):
        attention, experts, here = f"model.layers.{2 * i}.", f"model.layers.{2 * i + 1}.", f"model.layers.{i}."
        qkv, router = attention + "self_attn.qkv.", experts + "zaya_block.router."
        proj, gate = here + "self_attn.qkv_proj.", here + "mlp.gate."
        following = "model.res_scale." if i == last else f"model.layers.{2 * i + 2}.res_scale."
        for field in ("hidden_states_scale", "hidden_states_bias", "residual_scale", "residual_bias"):
            state[f"{experts}res_scale.{field}"] = native[f"{here}post_attention_residual_scale.{field}"]
            state[following + field] = native[f"{here}post_mlp_residual_scale.{field}"]
        state[attention + "input_norm.weight"] = native[here + "input_layernorm.weight"]
        state[experts + "input_norm.weight"] = native[here + "post_attention_layernorm.weight"]
        state[attention + "self_attn.o_proj.weight"] = native[here + "self_attn.o_proj.weight"]
        state[qkv + "temp"] = native[here + "self_attn.qk_norm.temp"]
        state[qkv + "linear_q.weight"] = native[proj + "q_proj.weight"]
        state[qkv + "linear_k.weight"] = native[proj + "k_proj.weight"]
        state[qkv + "val_proj1.weight"] = native[proj + "v_proj_current.weight"]
        state[qkv + "val_proj2.weight"] = native[proj + "v_proj_delayed.weight"]
        for number, name in enumerate(("depthwise", "grouped")):
            for kind in ("weight", "bias"):
                state[f"{qkv}conv_qk.{number}.{kind}"] = native[f"{proj}conv_qk_{name}.{kind}"]
        state[router + "down_proj.weight"] = native[gate + "down_proj.weight"]
        state[router + "down_proj.bias"] = native[gate + "down_proj.bias"]
        state[router + "balancing_biases"] = native[gate + "balancing_biases"]
        if i:
            state[router + "router_states_scale"] = native[gate + "router_states_scale"]
        state[router + "rmsnorm_eda.weight"] = native[gate + "router_mlp.norm.weight"]
        state[router + "router_mlp.0.weight"] = native[gate + "router_mlp.fc1.weight"]
        state[router + "router_mlp.0.bias"] = native[gate + "router_mlp.fc1.bias"]
        state[router + "router_mlp.2.weight"] = native[gate + "router_mlp.fc2.weight"]
        state[router + "router_mlp.2.bias"] = native[gate + "router_mlp.fc2.bias"]
        state[router + "router_mlp.4.weight"] = native[gate + "router_mlp.out_proj.weight"]
        for e in range(config.num_experts):
            expert = f"{experts}zaya_block.experts.local_experts.{e}."
            state[expert + "linear_fc1.weight"] = native[here + "mlp.experts.gate_up_proj"][e].clone()
            state[expert + "linear_fc2.weight"] = native[here + "mlp.experts.down_proj"][e].clone()
    return state


def write(
    directory: Path, config: dict[str, Any], state: dict[str, torch.Tensor], *, shards: int = 1, tokenizer: bool = False
) -> Path:
    """A checkpoint directory written with the safetensors library."""
    from safetensors.torch import save_file

    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(config))
    names = list(state)
    if shards == 1:
        save_file(state, directory / "model.safetensors", metadata={"format": "pt"})
    else:
        weight_map = {}
        for i in range(shards):
            file = f"model-{i + 1:05d}-of-{shards:05d}.safetensors"
            part = {name: state[name] for name in names[i::shards]}
            save_file(part, directory / file, metadata={"format": "pt"})
            weight_map |= dict.fromkeys(part, file)
        (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    if tokenizer:
        (directory / "tokenizer.json").write_text("{}")
    return directory


def read(directory: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a checkpoint directory, read with the safetensors library."""
    from safetensors.torch import load_file

    state: dict[str, torch.Tensor] = {}
    for file in sorted(directory.glob("*.safetensors")):
        state |= load_file(file)
    return state


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    """Equal names, types and values, bit for bit."""
    return one.keys() == other.keys() and all(
        one[name].dtype == other[name].dtype and torch.equal(one[name], other[name]) for name in one
    )
