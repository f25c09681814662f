"""What a model costs, from its configuration alone: parameters, FLOPs, bytes of decoding state.

Everything follows from one table, :func:`layer_parts`: the multiply-add weights and the other parameters of
each part of a layer (arXiv 2605.05365, model section; arXiv 2510.04476 for the attention). A weight of a matrix
product costs two FLOPs a token, so the same table gives parameters and FLOPs. The tests build every preset and
every ablation variant on the meta device and compare.

Symbols: D hidden, d head size, h_q and h_k query and key heads, C = (h_q + h_k) * d, E experts, F expert width,
R router width, k0 and k1 convolution kernels, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from openzaya.model.config import ZayaConfig

CCA_STATE_BYTES_PER_NUMBER = 4
"""The CCA part of the decoding state is kept in fp32 at any model dtype."""


@dataclass(frozen=True)
class Part:
    """Parameters of one part of a layer: those of matrix products and convolutions, and all others."""

    num_matrix: int
    num_other: int = 0

    @property
    def num_parameters(self) -> int:
        return self.num_matrix + self.num_other


def layer_parts(config: ZayaConfig, layer_index: int) -> dict[str, Part]:
    """The parts of one layer: ``attention``, ``router``, ``expert`` (one of them), ``norms_and_residuals``."""
    num_residual_vectors = 8 if config.residual == "learned" else 0
    return {
        "attention": _attention(config),
        "router": _router(config, layer_index),
        "expert": Part(3 * config.hidden_size * config.moe_intermediate_size),
        "norms_and_residuals": Part(0, (2 + num_residual_vectors) * config.hidden_size),
    }


def _attention(config: ZayaConfig) -> Part:
    hidden, head_dim = config.hidden_size, config.head_dim
    query_size, key_size = config.num_attention_heads * head_dim, config.num_cache_heads * head_dim
    queries_and_output = 2 * hidden * query_size
    temperatures = config.num_cache_heads
    if config.attention == "cca":
        channels = config.conv_channels
        # Half the value channels come from this token, half from the one before: one key-sized matrix in all.
        projections = queries_and_output + 2 * hidden * key_size
        convolutions = channels * (config.cca_time0 + head_dim * config.cca_time1)
        return Part(projections + convolutions, 2 * channels + temperatures)
    if config.attention == "mla":
        latent, rotary = config.mla_latent_size, config.rotary_dim
        from_latent = latent * config.num_attention_heads * ((head_dim - rotary) + head_dim)
        return Part(queries_and_output + hidden * (latent + rotary) + from_latent, temperatures)
    return Part(queries_and_output + 2 * hidden * key_size, temperatures)


def _router(config: ZayaConfig, layer_index: int) -> Part:
    hidden, width, num_classes = config.hidden_size, config.router_hidden_size, config.num_router_classes
    if config.router == "linear":
        return Part(hidden * num_classes)
    matrices = hidden * width + 2 * width * width + width * num_classes
    # Biases of the down-projection and of two MLP layers, and the norm's weight.
    vectors = 4 * width
    if config.router == "mlp+eda" and layer_index > 0:
        vectors += width
    return Part(matrices, vectors)


def num_parameters(config: ZayaConfig, embeddings: bool = True) -> int:
    """Trainable parameters of the model; the tied embedding counts once, or not at all without ``embeddings``."""
    return _num_parameters(config, config.num_experts, embeddings)


def num_active_parameters(config: ZayaConfig, embeddings: bool = False) -> int:
    """Parameters that one token at an expert uses: all but the other ``num_experts - 1`` experts of each layer."""
    return _num_parameters(config, 1, embeddings)


def _num_parameters(config: ZayaConfig, num_experts: int, embeddings: bool) -> int:
    # Scale and bias of the embedding, and the last norm.
    total = 3 * config.hidden_size
    if embeddings:
        total += config.vocab_size * config.hidden_size
    for layer_index in range(config.num_hidden_layers):
        for name, part in layer_parts(config, layer_index).items():
            total += part.num_parameters * (num_experts if name == "expert" else 1)
    return total


def forward_flops_per_token(config: ZayaConfig, mean_keys: float) -> float:
    """FLOPs of one token's forward pass, head included, as 2 per multiply-add; training costs about three times that.

    Args:
        config: the shape.
        mean_keys: keys that a query sees on average; half the context for causal attention over a whole context.
            Sliding-window layers see at most their window.

    Norms, activations, softmax and biases are left out; a token of the skip class costs one expert less.
    """
    flops = 2.0 * config.vocab_size * config.hidden_size
    for layer_index, layer_type in enumerate(config.layer_types):
        flops += 2.0 * sum(part.num_matrix for part in layer_parts(config, layer_index).values())
        keys = mean_keys
        if layer_type == "hybrid_sliding" and config.sliding_window is not None:
            keys = min(mean_keys, config.sliding_window)
        # Scores and weighted sum: two products of a head's size per key.
        flops += 4.0 * config.num_attention_heads * config.head_dim * keys
    return flops


def cache_bytes_per_token(config: ZayaConfig, dtype: torch.dtype = torch.bfloat16) -> int:
    """Bytes of keys and values that one more token adds to the decoding state, over all layers."""
    return config.num_hidden_layers * 2 * config.num_cache_heads * config.head_dim * dtype.itemsize


def cca_state_bytes(config: ZayaConfig) -> int:
    """Bytes of one sequence's convolution history and delayed values, over all layers; 0 without CCA."""
    if config.attention != "cca":
        return 0
    history = (config.cca_time0 + config.cca_time1 - 2) * config.conv_channels
    delayed = config.num_key_value_heads * config.head_dim // 2
    return config.num_hidden_layers * (history + delayed) * CCA_STATE_BYTES_PER_NUMBER
