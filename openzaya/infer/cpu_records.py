"""The records that ``cpu_runner`` hands to C++ (openzaya/kernels/cpp/cpu/model.hpp declares the same).

A record holds addresses. Whatever they point at must stay alive and in place while the record is in use, so
:class:`ModelRecord` keeps the tensors too. Matrices are the model's own, without a copy; vectors are small and are
copied to fp32 (``refresh`` copies them again when the weights have changed).
"""

from __future__ import annotations

import ctypes
from typing import Any

import torch
from torch import Tensor

from openzaya.model.layers import Linear
from openzaya.model.quantised import QuantisedMatrix
from openzaya.model.transformer import Zaya

FORMATS = {torch.float32: 0, torch.bfloat16: 1}
PACKED_FORMATS = {"int8": 2, "int4": 3}
CACHE_FORMATS = {torch.float32: 0, torch.bfloat16: 1, torch.int8: 2}


def _fields(*groups: tuple[str, type]) -> list[tuple[str, type]]:
    return [(name, kind) for names, kind in groups for name in names.split()]


class Matrix(ctypes.Structure):
    _fields_ = _fields(("data scales", ctypes.c_void_p), ("rows columns format stride scale_stride", ctypes.c_int64))


VECTORS = (
    "input_norm attention_scale attention_bias attention_residual_scale attention_residual_bias "
    "mlp_norm mlp_scale mlp_bias mlp_residual_scale mlp_residual_bias "
    "depthwise convolution_constant temperature router_scale router_bias router_norm fc1_bias fc2_bias balancing"
)
MATRICES = "query key value_now value_late output grouped router_down fc1 fc2 router_out gate_up down"


class Layer(ctypes.Structure):
    _fields_ = _fields((VECTORS, ctypes.c_void_p), (MATRICES, Matrix), ("window rotary", ctypes.c_int64))


class Model(ctypes.Structure):
    _fields_ = _fields(
        ("hidden layers query_heads key_heads head_dim experts width router_width kernel0 kernel1", ctypes.c_int64),
        ("vocabulary rotary_half", ctypes.c_int64),
        ("epsilon", ctypes.c_double),
        ("input_scale input_bias final_norm frequencies frequencies_sliding", ctypes.c_void_p),
        ("embedding head", Matrix),
        ("layer", ctypes.c_void_p),
    )


class Memory(ctypes.Structure):
    _fields_ = _fields(
        ("keys values key_scales value_scales slots snapshots", ctypes.c_void_p),
        ("blocks num_slots format", ctypes.c_int64),
    )


class Work(ctypes.Structure):
    _fields_ = _fields(
        ("tokens sequences logits_rows", ctypes.c_int64),
        ("token sequence forced experts logits room", ctypes.c_void_p),
        ("room_bytes", ctypes.c_int64),
    )


def matrix_record(matrix: Tensor | QuantisedMatrix) -> Matrix:
    """The record of a float matrix (.., N, K), row-major, or of a packed one."""
    if isinstance(matrix, QuantisedMatrix):
        packed, scales = matrix.packed, matrix.scales
        stacked = bool(matrix.leading)
        return Matrix(
            packed.data_ptr(),
            scales.data_ptr(),
            matrix.rows,
            matrix.columns,
            PACKED_FORMATS[matrix.format],
            packed[0].nbytes if stacked else 0,
            scales[0].nbytes if stacked else 0,
        )
    rows, columns = matrix.shape[-2:]
    stride = rows * columns * matrix.element_size()
    return Matrix(matrix.data_ptr(), None, rows, columns, FORMATS[matrix.dtype], stride, 0)


def weight_of(module: Linear | QuantisedMatrix) -> Tensor | QuantisedMatrix:
    return module if isinstance(module, QuantisedMatrix) else module.weight


class ModelRecord:
    """A model as C++ sees it. Make a new one, or :meth:`refresh` it, after the weights have changed."""

    def __init__(self, model: Zaya):
        self.model = model
        self.layers = (Layer * model.config.num_hidden_layers)()
        self.record = Model()
        self._vectors: list[Tensor] = []
        self.refresh()

    def refresh(self) -> None:
        """Copy all vectors and look up all matrices again."""
        config, backbone = self.model.config, self.model.model
        self._vectors = []
        for layer, block in zip(self.layers, backbone.layers, strict=True):
            self._fill_layer(layer, block)
        record = self.record
        record.hidden, record.layers = config.hidden_size, config.num_hidden_layers
        record.query_heads, record.key_heads = config.num_attention_heads, config.num_key_value_heads
        record.head_dim, record.experts, record.width = (
            config.head_dim,
            config.num_experts,
            config.moe_intermediate_size,
        )
        record.router_width, record.kernel0, record.kernel1 = (
            config.router_hidden_size,
            config.cca_time0,
            config.cca_time1,
        )
        record.vocabulary, record.rotary_half = config.vocab_size, config.rotary_dim // 2
        record.epsilon = config.rms_norm_eps
        record.input_scale = self._vector(backbone.input_hidden_states_scale)
        record.input_bias = self._vector(backbone.input_hidden_states_bias)
        record.final_norm = self._vector(backbone.norm.weight)
        record.frequencies = self._vector(_frequencies(config.rotary_dim, config.rope_theta))
        record.frequencies_sliding = self._vector(_frequencies(config.rotary_dim, config.rope_theta_sliding))
        record.embedding = matrix_record(backbone.embed_tokens.weight)
        head = self.model.lm_head
        record.head = matrix_record(backbone.embed_tokens.weight if head is None else head)
        record.layer = ctypes.addressof(self.layers)

    def _fill_layer(self, layer: Layer, block: Any) -> None:
        attention, gate, experts = block.self_attn, block.mlp.gate, block.mlp.experts
        projection, mlp = attention.qkv_proj, gate.router_mlp
        depthwise, grouped = projection.conv_qk_depthwise, projection.conv_qk_grouped
        after_attention, after_mlp = block.post_attention_residual_scale, block.post_mlp_residual_scale
        heads = grouped.bias.numel() // projection.head_dim
        # What the depthwise bias contributes to every token, through all taps of the grouped convolution.
        constant = grouped.bias.float() + torch.einsum(
            "hoik,hi->ho",
            grouped.weight.float().unflatten(0, (heads, -1)),
            depthwise.bias.float().view(heads, -1),
        ).reshape(-1)
        vectors: dict[str, Tensor | None] = {
            "input_norm": block.input_layernorm.weight,
            "attention_scale": after_attention.hidden_states_scale,
            "attention_bias": after_attention.hidden_states_bias,
            "attention_residual_scale": after_attention.residual_scale,
            "attention_residual_bias": after_attention.residual_bias,
            "mlp_norm": block.post_attention_layernorm.weight,
            "mlp_scale": after_mlp.hidden_states_scale,
            "mlp_bias": after_mlp.hidden_states_bias,
            "mlp_residual_scale": after_mlp.residual_scale,
            "mlp_residual_bias": after_mlp.residual_bias,
            "depthwise": depthwise.weight[:, 0].T,
            "convolution_constant": constant,
            "temperature": attention.qk_norm.temp,
            "router_scale": getattr(gate, "router_states_scale", None),
            "router_bias": gate.down_proj.bias,
            "router_norm": mlp.norm.weight,
            "fc1_bias": mlp.fc1.bias,
            "fc2_bias": mlp.fc2.bias,
            "balancing": gate.balancing_biases,
        }
        for name, vector in vectors.items():
            setattr(layer, name, None if vector is None else self._vector(vector))
        matrices: dict[str, Tensor | QuantisedMatrix] = {
            "query": weight_of(projection.q_proj),
            "key": weight_of(projection.k_proj),
            "value_now": weight_of(projection.v_proj_current),
            "value_late": weight_of(projection.v_proj_delayed),
            "output": weight_of(attention.o_proj),
            "grouped": grouped.weight.flatten(1),
            "router_down": gate.down_proj.weight,
            "fc1": mlp.fc1.weight,
            "fc2": mlp.fc2.weight,
            "router_out": mlp.out_proj.weight,
            "gate_up": experts.gate_up_proj,
            "down": experts.down_proj,
        }
        for name, matrix in matrices.items():
            setattr(layer, name, matrix_record(matrix))
        layer.window = attention.sliding_window or 0
        layer.rotary = int(attention.sliding_window is not None)

    def _vector(self, vector: Tensor) -> int:
        copy = vector.detach().to(torch.float32, copy=True).contiguous()
        self._vectors.append(copy)
        return copy.data_ptr()


def _frequencies(rotary_dim: int, base: float) -> Tensor:
    """Angle of each rotary pair a position, as in ``rotary_tables``."""
    exponents = torch.arange(0, rotary_dim, 2, dtype=torch.float32) / rotary_dim
    return 1.0 / base**exponents
