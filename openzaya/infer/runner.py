"""What the engine asks of the code that runs the model, whichever that is.

A *runner* owns the weights' fast form and the memory of all sequences: pages ("blocks") of keys and values, and the
CCA state, which is what the convolutions and the value shift need of the last tokens. The engine decides which
tokens run next and in which pages they live, and never looks inside. Two runners exist: ``TorchRunner``
(torch_runner.py, any device, the plain twin) and ``CpuRunner`` (cpu_runner.py, kernels in C++).

    sequence      tokens 0 .. n of one text
    block         BLOCK_TOKENS consecutive tokens' keys and values, all layers; shared between sequences that begin
                  alike, and never written again once full
    slot          the CCA state of one running sequence behind its last token
    snapshot      the same state kept with a block, as it was behind the block's last token: from there any sequence can
                  go on
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, Protocol

import torch
from torch import Tensor

from openzaya.model.config import ZayaConfig

BLOCK_TOKENS = 64

CacheDtype = Literal["auto", "float32", "bfloat16", "int8"]
"""How keys and values are stored; ``auto`` is the model's own type, ``int8`` has one scale a token and head."""


class StepSequence(NamedTuple):
    """One sequence's share of a step: ``tokens`` at positions ``start``, ``start + 1``, ..."""

    tokens: Sequence[int]
    start: int
    """How many tokens of the sequence the runner has seen. 0: the slot's content is ignored, a document begins."""
    slot: int
    blocks: Sequence[int]
    """Page table: block i holds tokens i*BLOCK_TOKENS and following; covers ``start + len(tokens)``."""
    logits: Literal["none", "last", "all"] = "last"
    forced_experts: Tensor | None = None
    """uint8 (tokens, L): take these classes instead of the router's (its gates stay); E is the skip class."""


@dataclass(frozen=True)
class StepResult:
    """``logits`` fp32 (rows, V): for each sequence in order its last token's, all tokens' or none, as it asked.

    ``experts`` uint8 (N, L): the class of every token of the step, sequences in order.
    """

    logits: Tensor
    experts: Tensor


class Runner(Protocol):
    """Runs steps. Not thread-safe: one caller at a time."""

    config: ZayaConfig
    num_blocks: int
    num_slots: int

    def step(self, sequences: Sequence[StepSequence]) -> StepResult:
        """Run all new tokens, append to blocks and slots, and snapshot the state of each block that becomes full."""
        ...

    def copy_block(self, source: int, target: int) -> None:
        """Copy a block's keys, values and snapshot: a fork writes into its own copy of a block that is not full."""
        ...

    def copy_slot(self, source: int, target: int) -> None:
        """Copy a sequence's CCA state: a fork."""
        ...

    def save_slot(self, slot: int, block: int) -> None:
        """Make a slot's state the snapshot of a block that is not full and will not be written to."""
        ...

    def restore_slot(self, block: int, slot: int) -> None:
        """Set a slot to a block's snapshot."""
        ...

    def refresh(self) -> None:
        """The model's weights were changed in place: renew everything that was derived from them."""
        ...


def block_bytes(config: ZayaConfig, dtype: torch.dtype) -> int:
    """Memory of one block: keys and values (int8: with their fp32 scales), and its snapshot."""
    heads, layers = config.num_cache_heads, config.num_hidden_layers
    per_token = 2 * heads * (config.head_dim * dtype.itemsize + (4 if dtype == torch.int8 else 0))
    return layers * BLOCK_TOKENS * per_token + slot_bytes(config)


def slot_bytes(config: ZayaConfig) -> int:
    """Memory of one CCA state, fp32: the last k0 + k1 - 2 vectors z and the last delayed value."""
    if config.attention != "cca":
        return 0
    history = config.cca_time0 + config.cca_time1 - 2
    delayed = config.num_cache_heads * config.head_dim // 2
    return 4 * config.num_hidden_layers * (history * config.conv_channels + delayed)
