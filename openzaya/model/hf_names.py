"""Which tensors a ZAYA checkpoint holds, and what each is called in the two released layouts.

One declarative table serves loading, saving, converting (both ways) and inspecting. A row names a
tensor in the native layout (one entry a layer: attention and experts together; arXiv 2605.05365,
names as in ``transformers``), its name in the legacy layout (attention and experts as separate
sub-layers: native layer i is sub-layers 2i and 2i+1) and its shape in symbols.

Two things are more than a rename. Experts: native stacks them, legacy keeps one matrix an expert,
``linear_fc1`` with the gate rows first, so a stacked tensor is the concatenation of its experts'
bytes. Residual scales: legacy stores them with the sub-layer that CONSUMES the stream, native with
the one that PRODUCES it; the scale behind the last layer is ``model.res_scale`` there.

Symbols of shapes: V vocabulary, D hidden, Q all query heads, K all key heads, U half of the value
channels, C convolution channels, d head size, S and T convolution kernels, G key/value heads,
R router width, X router classes (experts and skip), E experts, F expert width, 2F gate and up.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from openzaya.errors import CheckpointError
from openzaya.model.config import ZayaConfig

DtypePolicy = Literal["weight", "float32", "stored"]
"""``weight``: any supported float type, cast on request; ``float32``: always float32 in memory; ``stored``: parts of
quantised matrices, whose types belong to their format."""


@dataclass(frozen=True)
class TensorSpec:
    """One tensor of the native layout and where its bytes are in the legacy layout."""

    native: str
    legacy: tuple[str, ...]
    """One name, or one an expert: the native tensor is their concatenation in this order."""
    shape: tuple[int, ...]
    dtype_policy: DtypePolicy = "weight"
    is_stacked: bool = False
    """True for experts: the first dimension counts the legacy tensors."""

    @property
    def legacy_shape(self) -> tuple[int, ...]:
        """Shape of each legacy tensor."""
        return self.shape[1:] if self.is_stacked else self.shape


# (native name, legacy name, shape) of tensors that exist once.
_GLOBAL_ROWS = (
    ("model.embed_tokens.weight", "model.embed_tokens.weight", "V D"),
    ("model.input_hidden_states_scale", "model.layers.0.res_scale.hidden_states_scale", "D"),
    ("model.input_hidden_states_bias", "model.layers.0.res_scale.hidden_states_bias", "D"),
    ("model.norm.weight", "model.final_norm.weight", "D"),
)

# The same for every layer; native names are under "model.layers.i.". In legacy names <attention> is
# "model.layers.2i", <experts> "model.layers.(2i+1)" and <next> "model.layers.(2i+2)", or "model"
# behind the last layer.
_LAYER_ROWS = (
    ("input_layernorm.weight", "<attention>.input_norm.weight", "D"),
    ("self_attn.qkv_proj.q_proj.weight", "<attention>.self_attn.qkv.linear_q.weight", "Q D"),
    ("self_attn.qkv_proj.k_proj.weight", "<attention>.self_attn.qkv.linear_k.weight", "K D"),
    ("self_attn.qkv_proj.v_proj_current.weight", "<attention>.self_attn.qkv.val_proj1.weight", "U D"),
    ("self_attn.qkv_proj.v_proj_delayed.weight", "<attention>.self_attn.qkv.val_proj2.weight", "U D"),
    ("self_attn.qkv_proj.conv_qk_depthwise.weight", "<attention>.self_attn.qkv.conv_qk.0.weight", "C 1 S"),
    ("self_attn.qkv_proj.conv_qk_depthwise.bias", "<attention>.self_attn.qkv.conv_qk.0.bias", "C"),
    ("self_attn.qkv_proj.conv_qk_grouped.weight", "<attention>.self_attn.qkv.conv_qk.1.weight", "C d T"),
    ("self_attn.qkv_proj.conv_qk_grouped.bias", "<attention>.self_attn.qkv.conv_qk.1.bias", "C"),
    ("self_attn.qk_norm.temp", "<attention>.self_attn.qkv.temp", "G"),
    ("self_attn.o_proj.weight", "<attention>.self_attn.o_proj.weight", "D Q"),
    ("post_attention_residual_scale.hidden_states_scale", "<experts>.res_scale.hidden_states_scale", "D"),
    ("post_attention_residual_scale.hidden_states_bias", "<experts>.res_scale.hidden_states_bias", "D"),
    ("post_attention_residual_scale.residual_scale", "<experts>.res_scale.residual_scale", "D"),
    ("post_attention_residual_scale.residual_bias", "<experts>.res_scale.residual_bias", "D"),
    ("post_attention_layernorm.weight", "<experts>.input_norm.weight", "D"),
    ("mlp.gate.down_proj.weight", "<experts>.zaya_block.router.down_proj.weight", "R D"),
    ("mlp.gate.down_proj.bias", "<experts>.zaya_block.router.down_proj.bias", "R"),
    ("mlp.gate.router_states_scale", "<experts>.zaya_block.router.router_states_scale", "R"),
    ("mlp.gate.router_mlp.norm.weight", "<experts>.zaya_block.router.rmsnorm_eda.weight", "R"),
    ("mlp.gate.router_mlp.fc1.weight", "<experts>.zaya_block.router.router_mlp.0.weight", "R R"),
    ("mlp.gate.router_mlp.fc1.bias", "<experts>.zaya_block.router.router_mlp.0.bias", "R"),
    ("mlp.gate.router_mlp.fc2.weight", "<experts>.zaya_block.router.router_mlp.2.weight", "R R"),
    ("mlp.gate.router_mlp.fc2.bias", "<experts>.zaya_block.router.router_mlp.2.bias", "R"),
    ("mlp.gate.router_mlp.out_proj.weight", "<experts>.zaya_block.router.router_mlp.4.weight", "X R"),
    ("mlp.gate.balancing_biases", "<experts>.zaya_block.router.balancing_biases", "X"),
    ("mlp.experts.gate_up_proj", "<experts>.zaya_block.experts.local_experts.<e>.linear_fc1.weight", "E 2F D"),
    ("mlp.experts.down_proj", "<experts>.zaya_block.experts.local_experts.<e>.linear_fc2.weight", "E D F"),
    ("post_mlp_residual_scale.hidden_states_scale", "<next>.res_scale.hidden_states_scale", "D"),
    ("post_mlp_residual_scale.hidden_states_bias", "<next>.res_scale.hidden_states_bias", "D"),
    ("post_mlp_residual_scale.residual_scale", "<next>.res_scale.residual_scale", "D"),
    ("post_mlp_residual_scale.residual_bias", "<next>.res_scale.residual_bias", "D"),
)

_ABSENT_IN_FIRST_LAYER = "mlp.gate.router_states_scale"  # the first router has no state to average with
_ALWAYS_FLOAT32 = "balancing_biases"  # steps of the balancer are far below bfloat16's resolution
_QUANTISED = (".packed", ".scales")

_LEGACY_NAME = re.compile(r"\.zaya_block\.|\.self_attn\.qkv\.|\.input_norm\.|\.?res_scale\.|^model\.final_norm\.")
_NATIVE_NAME = re.compile(
    r"\.self_attn\.qkv_proj\.|\.mlp\.gate\.|\.mlp\.experts\.|_residual_scale\.|\.input_layernorm\.|"
    r"^model\.input_hidden_states_|^model\.norm\."
)
_IGNORED_NAME = re.compile(r"rotary_emb\.(\w+_)?inv_freq$")


def tensor_table(config: ZayaConfig) -> list[TensorSpec]:
    """Every tensor of a released-architecture model, in file order.

    Raises:
        CheckpointError: ``config`` is an ablation variant, which the released layouts cannot hold.
    """
    refuse_variant(config, "the released layouts")
    dims = {
        "1": 1,
        "V": config.vocab_size,
        "D": config.hidden_size,
        "Q": config.num_attention_heads * config.head_dim,
        "K": config.num_key_value_heads * config.head_dim,
        "U": config.num_key_value_heads * config.head_dim // 2,
        "C": config.conv_channels,
        "d": config.head_dim,
        "S": config.cca_time0,
        "T": config.cca_time1,
        "G": config.num_key_value_heads,
        "R": config.router_hidden_size,
        "X": config.num_router_classes,
        "E": config.num_experts,
        "F": config.moe_intermediate_size,
        "2F": 2 * config.moe_intermediate_size,
    }

    def shape(symbols: str) -> tuple[int, ...]:
        return tuple(dims[symbol] for symbol in symbols.split())

    def layer_rows() -> Iterator[TensorSpec]:
        for i in range(config.num_hidden_layers):
            last = i == config.num_hidden_layers - 1
            for native, legacy, symbols in _LAYER_ROWS:
                if native == _ABSENT_IN_FIRST_LAYER and i == 0:
                    continue
                legacy = legacy.replace("<attention>", f"model.layers.{2 * i}")
                legacy = legacy.replace("<experts>", f"model.layers.{2 * i + 1}")
                legacy = legacy.replace("<next>", "model" if last else f"model.layers.{2 * i + 2}")
                names: tuple[str, ...] = (legacy,)
                stacked = "<e>" in legacy
                if stacked:
                    names = tuple(legacy.replace("<e>", str(e)) for e in range(config.num_experts))
                policy: DtypePolicy = "float32" if native.endswith(_ALWAYS_FLOAT32) else "weight"
                yield TensorSpec(f"model.layers.{i}.{native}", names, shape(symbols), policy, stacked)

    first = [TensorSpec(native, (legacy,), shape(symbols)) for native, legacy, symbols in _GLOBAL_ROWS]
    return [*first[:-1], *layer_rows(), first[-1]]


def expected_tensors(config: ZayaConfig) -> dict[str, tuple[tuple[int, ...], DtypePolicy]]:
    """Native name -> (shape, dtype policy) of every tensor that a checkpoint of ``config`` must hold."""
    return {spec.native: (spec.shape, spec.dtype_policy) for spec in tensor_table(config)}


def dtype_policy(native_name: str) -> DtypePolicy:
    """How the tensor of this native name is cast when a model is loaded in another dtype."""
    if native_name.endswith(_QUANTISED):
        return "stored"
    return "float32" if native_name.endswith(_ALWAYS_FLOAT32) else "weight"


def is_ignorable(name: str) -> bool:
    """True for tensors of older files that the model recomputes (rotary frequencies)."""
    return _IGNORED_NAME.search(name) is not None


def layout_of_names(names: list[str]) -> Literal["native", "legacy", "mixed", "unknown"]:
    """The released layout that tensor names speak of."""
    native = any(_NATIVE_NAME.search(name) for name in names)
    legacy = any(_LEGACY_NAME.search(name) for name in names)
    if native and legacy:
        return "mixed"
    return "native" if native else "legacy" if legacy else "unknown"


def refuse_variant(config: ZayaConfig, where: str) -> None:
    """Raise :class:`CheckpointError` naming the fields that keep ``config`` out of ``where``."""
    released = {"attention": "cca", "router": "mlp+eda", "residual": "learned"}
    wrong = [f"{key}={getattr(config, key)!r} (only {value!r})" for key, value in released.items()]
    wrong = [text for text, (key, value) in zip(wrong, released.items(), strict=True) if getattr(config, key) != value]
    if wrong:
        raise CheckpointError(f"{where} cannot hold {', '.join(wrong)}; use layout 'openzaya'")
