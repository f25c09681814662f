"""The runner for CPUs: a whole step of the model is one call of C++ (openzaya/kernels/cpp/cpu.cpp).

It computes what ``TorchRunner`` computes, several times faster: matrices are read where the model keeps them, quantised
ones as integers, and what a decoding step does besides matrix products is fused. Every sum has one order, so a
sequence's numbers do not depend on the batch, on how its prompt was cut into chunks, or on the number of threads.
"""

from __future__ import annotations

import ctypes
from array import array
from collections.abc import Sequence

import torch
from torch import Tensor

from openzaya.errors import EngineError
from openzaya.infer import cpu_records as records
from openzaya.infer.runner import BLOCK_TOKENS, CacheDtype, StepResult, StepSequence, slot_bytes
from openzaya.kernels import build
from openzaya.kernels.host import zeros_in_large_pages
from openzaya.model.config import ZayaConfig
from openzaya.model.counts import num_active_parameters
from openzaya.model.transformer import Zaya

LANES = 16
NOT_FORCED = 255
ALONE_BELOW = 1 << 20
"""Products of so few multiplications take one thread no longer than several, which wait for each other."""


class CpuRunner:
    """Runs steps of a model on the CPU; see :class:`openzaya.infer.runner.Runner`.

    Args:
        model: on the CPU, of the released architecture; its matrices are used in place.
        num_blocks, num_slots: memory for sequences.
        cache_dtype: of keys and values.
        num_threads: by default PyTorch's.

    Raises:
        EngineError: the kernels cannot run this model here; :meth:`supports` says why.
    """

    def __init__(
        self,
        model: Zaya,
        num_blocks: int,
        num_slots: int,
        *,
        cache_dtype: CacheDtype = "auto",
        num_threads: int | None = None,
    ):
        reason = self.supports(model)
        if reason is not None:
            raise EngineError(f"the CPU kernels cannot run this model: {reason}; use backend='torch'")
        library = build.inference().library
        assert library is not None
        self._step = library.cpu_step
        self._step.restype = ctypes.c_int64
        self.config: ZayaConfig = model.config
        self.num_blocks, self.num_slots = num_blocks, num_slots
        self.num_threads = num_threads or torch.get_num_threads()
        dtype = model.dtype if cache_dtype == "auto" else getattr(torch, cache_dtype)
        self._tokens_alone = ALONE_BELOW // num_active_parameters(model.config)
        self._model = records.ModelRecord(model)
        self._make_memory(dtype)
        self._room = torch.empty(1 << 20, dtype=torch.uint8)

    @staticmethod
    def supports(model: Zaya) -> str | None:
        """None if the kernels can run this model on this machine, else the reason why not."""
        config = model.config
        if not config.is_released_architecture:
            return (
                f"attention={config.attention}, router={config.router}, residual={config.residual} is an ablation "
                "variant, and the kernels know the released architecture only"
            )
        if model.device.type != "cpu":
            return f"it is on {model.device}"
        if config.head_dim > 1024:
            return f"head_dim={config.head_dim} is above 1024"

        for name, parameter in model.named_parameters():
            if parameter.dim() < 2:
                continue  # vectors are copied
            if parameter.dtype not in records.FORMATS:
                return f"{name} is {parameter.dtype}, and the kernels read float32 and bfloat16"
            if not parameter.is_contiguous():
                return f"{name} is not contiguous"
        kernels = build.inference()
        return None if kernels.library is not None else f"there are no kernels ({kernels.problem})"

    def _make_memory(self, dtype: torch.dtype) -> None:
        config = self.config
        heads = (config.num_hidden_layers, self.num_blocks, config.num_key_value_heads)
        width = -(-config.head_dim // LANES) * LANES
        state = slot_bytes(config) // (4 * config.num_hidden_layers)
        self.keys = zeros_in_large_pages(*heads, BLOCK_TOKENS * width, dtype=dtype)
        self.values = zeros_in_large_pages(*heads, BLOCK_TOKENS * width, dtype=dtype)
        scales = heads if dtype == torch.int8 else (0, 0, 0)
        floats = torch.float32
        self.key_scales = zeros_in_large_pages(*scales, BLOCK_TOKENS, dtype=floats)
        self.value_scales = zeros_in_large_pages(*scales, BLOCK_TOKENS, dtype=floats)
        self.slots = zeros_in_large_pages(self.num_slots, config.num_hidden_layers, state, dtype=floats)
        self.snapshots = zeros_in_large_pages(self.num_blocks, config.num_hidden_layers, state, dtype=floats)
        self._memory = records.Memory(
            self.keys.data_ptr(),
            self.values.data_ptr(),
            self.key_scales.data_ptr() if dtype == torch.int8 else None,
            self.value_scales.data_ptr() if dtype == torch.int8 else None,
            self.slots.data_ptr(),
            self.snapshots.data_ptr(),
            self.num_blocks,
            self.num_slots,
            records.CACHE_FORMATS[dtype],
        )

    def step(self, sequences: Sequence[StepSequence]) -> StepResult:
        """See :meth:`openzaya.infer.runner.Runner.step`; raises :class:`EngineError` for blocks that do not suffice."""
        config = self.config
        # `listed` are the sequences' records (Sequence in model.hpp), one behind the other.
        tokens, tables, listed = array("i"), array("i"), array("q")
        for sequence in sequences:
            tables.extend(sequence.blocks)
        table, rows = tables.buffer_info()[0], 0
        for brought, start, slot, blocks, wanted, _ in sequences:
            count = len(brought)
            if count == 0 or len(blocks) * BLOCK_TOKENS < start + count:
                raise EngineError(
                    f"a sequence brings {count} tokens behind {start} and has {len(blocks)} blocks of "
                    f"{BLOCK_TOKENS}; give at least one token, and blocks for all"
                )
            num_rows = 1 if wanted == "last" else count if wanted == "all" else 0
            listed.extend((len(tokens), count, start, slot, table, rows, num_rows))
            tokens.extend(brought)
            table += tables.itemsize * len(blocks)
            rows += num_rows
        forced = self._forced(sequences, len(tokens))
        experts = torch.empty(len(tokens), config.num_hidden_layers, dtype=torch.uint8)
        logits = torch.empty(rows, config.vocab_size)
        work = records.Work(
            len(tokens),
            len(sequences),
            rows,
            tokens.buffer_info()[0],
            listed.buffer_info()[0],
            None if forced is None else forced.data_ptr(),
            experts.data_ptr(),
            logits.data_ptr(),
            self._room.data_ptr(),
            self._room.nbytes,
        )
        needed = self._call(work)
        if needed:
            self._room = torch.empty(needed, dtype=torch.uint8)
            work.room, work.room_bytes = self._room.data_ptr(), needed
            self._call(work)
        return StepResult(logits, experts)

    def _call(self, work: records.Work) -> int:
        model, memory = self._model.record, self._memory
        num_threads = 1 if work.tokens <= self._tokens_alone else self.num_threads
        return int(self._step(num_threads, ctypes.byref(model), ctypes.byref(memory), ctypes.byref(work)))

    def _forced(self, sequences: Sequence[StepSequence], num_tokens: int) -> Tensor | None:
        if all(sequence.forced_experts is None for sequence in sequences):
            return None
        forced = torch.full((num_tokens, self.config.num_hidden_layers), NOT_FORCED, dtype=torch.uint8)
        first = 0
        for sequence in sequences:
            if sequence.forced_experts is not None:
                forced[first : first + len(sequence.tokens)] = sequence.forced_experts
            first += len(sequence.tokens)
        return forced

    def copy_block(self, source: int, target: int) -> None:
        """Copy a block's keys, values and snapshot."""
        for store in (self.keys, self.values, self.key_scales, self.value_scales):
            if store.numel():
                store[:, target] = store[:, source]
        self.snapshots[target] = self.snapshots[source]

    def copy_slot(self, source: int, target: int) -> None:
        """Copy a sequence's CCA state."""
        self.slots[target] = self.slots[source]

    def save_slot(self, slot: int, block: int) -> None:
        """Make a slot's state a block's snapshot."""
        self.snapshots[block] = self.slots[slot]

    def restore_slot(self, block: int, slot: int) -> None:
        """Set a slot to a block's snapshot."""
        self.slots[slot] = self.snapshots[block]

    def refresh(self) -> None:
        """Renew the copies of vectors, and the addresses, after a change of the weights."""
        self._model.refresh()
