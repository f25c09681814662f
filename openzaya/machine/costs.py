"""What a model costs to run, from its shape alone: bytes in memory, bytes read for a token, and what speed that allows.

Decoding is bound by memory: a step reads every weight that it uses once, whatever the batch, and each sequence's own
keys and values. With B sequences and E experts chosen alike often, a layer reads

    E * (1 - (1 - 1/E)^B)

different experts. Bytes are those of the tensors that the model holds (built on the meta device), so formats, padding
and scales are in them. A plain head is the embedding table and is read whole; beside a quantised head the table lies
mapped in its file, and a token touches one row of it.

Activations and the program itself are estimates, the rest is exact.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch

from openzaya.infer.runner import BLOCK_TOKENS, block_bytes, slot_bytes
from openzaya.model.config import ZayaConfig
from openzaya.model.hf_names import dtype_policy
from openzaya.model.hf_survey import empty_model
from openzaya.model.quantised import QuantisedMatrix, QuantScheme

CHUNK_TOKENS = 512
"""Prompt tokens that a step takes at most, unless the engine is told otherwise."""
PROGRAM_BYTES = 450 * 2**20
"""The program without a model: 285 MB resident were measured on Linux, the rest is for a large tokenizer."""

_KINDS = {
    ".mlp.experts.": "experts",
    ".self_attn.": "attention",
    ".mlp.gate.": "router",
    "lm_head.": "head",
    "model.embed_tokens.": "embedding",
}


@dataclass(frozen=True)
class WeightCost:
    """The weights of one kind, over all layers."""

    kind: str
    """``experts``, ``attention`` (its convolutions too), ``router``, ``head``, ``embedding``, or ``other``."""
    num_weights: int
    num_bytes: int
    num_copies: int = 1
    """E for experts, of which a token uses one a layer; 1 for all else."""
    is_table: bool = False
    """Lies in a mapped file, and a token reads one row of it."""

    def read_bytes(self, batch: int) -> float:
        """Bytes that a step of ``batch`` tokens reads, on average."""
        if self.is_table:
            return 0.0
        return self.num_bytes / self.num_copies * distinct_experts(self.num_copies, batch)


def distinct_experts(num_experts: int, batch: int) -> float:
    """How many of ``num_experts`` are chosen at least once by ``batch`` tokens that choose independently and alike."""
    return num_experts * (1 - (1 - 1 / num_experts) ** batch)


@functools.lru_cache(maxsize=64)
def weight_costs(
    config: ZayaConfig, scheme: QuantScheme | None = None, dtype: torch.dtype = torch.bfloat16
) -> tuple[WeightCost, ...]:
    """The model's weights by kind, the largest first; ``dtype`` is that of all that ``scheme`` leaves in float."""
    model = empty_model(config, scheme)
    weights: dict[str, int] = {}
    num_bytes: dict[str, int] = {}
    for name, tensor in model.state_dict().items():
        kind = next((kind for part, kind in _KINDS.items() if part in name), "other")
        policy = dtype_policy(name)
        size = tensor.nbytes if policy == "stored" else tensor.numel() * (4 if policy == "float32" else dtype.itemsize)
        matrix = model.get_submodule(name.rpartition(".")[0])
        count = tensor.numel()
        if isinstance(matrix, QuantisedMatrix):
            count = matrix.num_weights if name.endswith(".packed") else 0
        weights[kind] = weights.get(kind, 0) + count
        num_bytes[kind] = num_bytes.get(kind, 0) + size
    return tuple(
        WeightCost(
            kind,
            weights[kind],
            size,
            num_copies=config.num_experts if kind == "experts" else 1,
            is_table=kind == "embedding" and "head" in num_bytes,
        )
        for kind, size in sorted(num_bytes.items(), key=lambda item: -item[1])
    )


@dataclass(frozen=True)
class Costs:
    """What ``batch`` sequences of ``context`` tokens each take, beside the weights."""

    config: ZayaConfig
    weights: tuple[WeightCost, ...]
    dtype: torch.dtype
    """Of the weights in float."""
    cache_dtype: torch.dtype

    @property
    def file_bytes(self) -> int:
        """All weights, as a checkpoint holds them."""
        return sum(weight.num_bytes for weight in self.weights)

    @property
    def weight_bytes(self) -> int:
        """Weights that a running model needs in memory."""
        return sum(weight.num_bytes for weight in self.weights if not weight.is_table)

    def cache_bytes(self, context: int, batch: int) -> int:
        """Keys and values of all sequences in whole blocks, with a snapshot of the CCA state a block."""
        return batch * -(-context // BLOCK_TOKENS) * block_bytes(self.config, self.cache_dtype)

    def state_bytes(self, batch: int) -> int:
        """The running sequences' CCA states."""
        return batch * slot_bytes(self.config)

    def activation_bytes(self, batch: int, chunk_tokens: int = CHUNK_TOKENS) -> int:
        """An estimate: fp32 rows of one layer for a chunk of a prompt, and logits twice for a token a sequence."""
        config = self.config
        heads = 3 * config.conv_channels + 2 * config.num_attention_heads * config.head_dim
        row = 6 * config.hidden_size + 3 * config.moe_intermediate_size + heads + 4 * config.router_hidden_size
        return 4 * ((chunk_tokens + batch) * row + 2 * batch * config.vocab_size)

    def peak_bytes(self, context: int, batch: int) -> int:
        """Memory of the whole program."""
        in_use = self.cache_bytes(context, batch) + self.state_bytes(batch) + self.activation_bytes(batch)
        return PROGRAM_BYTES + self.weight_bytes + in_use

    def step_bytes(self, context: int, batch: int) -> float:
        """Bytes read to make one token for each of ``batch`` sequences of ``context`` tokens."""
        config = self.config
        a_token = 2 * config.num_cache_heads * key_or_value_bytes(config, self.cache_dtype)
        window = config.sliding_window or context
        keys = sum(min(context, window) if kind == "hybrid_sliding" else context for kind in config.layer_types)
        return sum(weight.read_bytes(batch) for weight in self.weights) + batch * keys * a_token

    def tokens_per_second(self, context: int, batch: int, bandwidth: float) -> float:
        """All sequences together, if memory of ``bandwidth`` bytes a second is all that takes time."""
        return batch * bandwidth / self.step_bytes(context, batch)

    def largest_batch(self, context: int, memory_bytes: int) -> int:
        """How many sequences of ``context`` tokens fit; 0 where not even one does."""
        return _largest(lambda batch: self.peak_bytes(context, batch) <= memory_bytes, 1 << 20)

    def largest_context(self, batch: int, memory_bytes: int) -> int:
        """How long ``batch`` sequences may be, up to the model's limit; 0 where not even one token fits."""
        limit = self.config.max_position_embeddings
        return _largest(lambda context: self.peak_bytes(context, batch) <= memory_bytes, limit)


def costs_of(
    config: ZayaConfig, scheme: QuantScheme | None, dtype: torch.dtype, cache_dtype: torch.dtype | None = None
) -> Costs:
    """The costs of a model; ``cache_dtype`` None stores keys and values as the weights in float."""
    return Costs(config, weight_costs(config, scheme, dtype), dtype, cache_dtype or dtype)


def key_or_value_bytes(config: ZayaConfig, dtype: torch.dtype) -> int:
    """Bytes of one token's key or value of one head; int8 ones have an fp32 scale."""
    return config.head_dim * dtype.itemsize + (4 if dtype == torch.int8 else 0)


def _largest(fits: Callable[[int], bool], limit: int) -> int:
    """The largest number up to ``limit`` that fits, where all smaller ones do."""
    low, high = 0, limit
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    return low
