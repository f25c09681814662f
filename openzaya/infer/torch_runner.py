"""The plain runner: the model's own modules on a ragged batch, with keys and values in pages (model/paged.py).

Works on any device and with every variant of the model. With ``batch_invariant`` each token runs by itself: then a
sequence's numbers cannot depend on what else is in the step, on how its prompt was cut into chunks, or on whether
its blocks came from the cache, bit for bit. It costs the speed of a batch.

Shape suffixes: N tokens, L layers, D hidden, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from openzaya.infer.runner import BLOCK_TOKENS, CacheDtype, StepResult, StepSequence
from openzaya.model.paged import PagedCache, Piece
from openzaya.model.transformer import ForwardRecord, Zaya

CACHE_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "int8": torch.int8}


def resolve_cache_dtype(cache_dtype: CacheDtype, model: Zaya) -> torch.dtype:
    """The type of keys and values; ``auto`` is that of the model's activations."""
    return model.dtype if cache_dtype == "auto" else CACHE_DTYPES[cache_dtype]


class TorchRunner:
    """Runs steps through ``model``; see :class:`openzaya.infer.runner.Runner`."""

    def __init__(
        self,
        model: Zaya,
        num_blocks: int,
        num_slots: int,
        cache_dtype: CacheDtype = "auto",
        *,
        batch_invariant: bool = False,
    ):
        self.model, self.config = model, model.config
        self.num_blocks, self.num_slots = num_blocks, num_slots
        self.batch_invariant = batch_invariant
        self.cache = PagedCache(
            model.config,
            num_blocks,
            num_slots,
            block_tokens=BLOCK_TOKENS,
            device=model.device,
            dtype=resolve_cache_dtype(cache_dtype, model),
        )

    @torch.inference_mode()
    def step(self, sequences: Sequence[StepSequence]) -> StepResult:
        """Run all new tokens; see :meth:`openzaya.infer.runner.Runner.step`."""
        logits: list[Tensor] = [torch.empty(0)] * len(sequences)
        experts: list[Tensor] = [torch.empty(0)] * len(sequences)
        for numbers in self._runs(sequences):
            parts = [sequences[number] for number in numbers]
            logits_parts, experts_parts = self._run(parts)
            for number, logits_part, experts_part in zip(numbers, logits_parts, experts_parts, strict=True):
                logits[number], experts[number] = logits_part, experts_part
        if not sequences:
            logits = [torch.empty(0, self.config.vocab_size)]
            experts = [torch.empty(0, self.config.num_hidden_layers, dtype=torch.uint8)]
        return StepResult(torch.cat(logits), torch.cat(experts).cpu())

    def _runs(self, sequences: Sequence[StepSequence]) -> list[list[int]]:
        """Which sequences go through the model together."""
        if self.batch_invariant:
            return [[number] for number in range(len(sequences))]
        # Replayed and free choices do not mix in one pass: the router takes all of them or none.
        free = [number for number, given in enumerate(sequences) if given.forced_experts is None]
        forced = [number for number, given in enumerate(sequences) if given.forced_experts is not None]
        return [numbers for numbers in (free, forced) if numbers]

    def _run(self, sequences: list[StepSequence]) -> tuple[list[Tensor], list[Tensor]]:
        """Logits and experts of each sequence."""
        if self.batch_invariant:
            steps = [self._forward([single]) for single in single_tokens(sequences[0])]
            logits_parts, experts_parts = (torch.cat(parts) for parts in zip(*steps, strict=True))
            return [logits_parts], [experts_parts]
        logits, experts = self._forward(sequences)
        rows = {"none": lambda length: 0, "last": lambda length: 1, "all": lambda length: length}
        return (
            list(logits.split([rows[given.logits](len(given.tokens)) for given in sequences])),
            list(experts.split([len(given.tokens) for given in sequences])),
        )

    def _forward(self, sequences: list[StepSequence]) -> tuple[Tensor, Tensor]:
        device, record = self.model.device, ForwardRecord()
        layout = self.cache.begin(
            [Piece(len(given.tokens), given.start, given.slot, given.blocks) for given in sequences]
        )
        tokens_N = torch.tensor([token for given in sequences for token in given.tokens], device=device)
        forced_NL = None
        if sequences[0].forced_experts is not None:
            forced = [given.forced_experts for given in sequences if given.forced_experts is not None]
            forced_NL = torch.cat(forced).to(device)
        hidden_ND = self.model.run(tokens_N, layout, forced_NL=forced_NL, record=record)
        rows: list[int] = []
        end = 0
        for given in sequences:
            begin, end = end, end + len(given.tokens)
            rows += [] if given.logits == "none" else range(end - 1 if given.logits == "last" else begin, end)
        return self.model.logits(hidden_ND[torch.tensor(rows, dtype=torch.int64, device=device)]), record.experts_NL()

    def copy_block(self, source: int, target: int) -> None:
        self.cache.copy_block(source, target)

    def copy_slot(self, source: int, target: int) -> None:
        self.cache.copy_slot(source, target)

    def save_slot(self, slot: int, block: int) -> None:
        self.cache.save_slot(slot, block)

    def restore_slot(self, block: int, slot: int) -> None:
        self.cache.restore_slot(block, slot)

    def refresh(self) -> None:
        """Nothing is derived from the weights here."""


def single_tokens(sequence: StepSequence) -> list[StepSequence]:
    """The same work in steps of one token."""
    last = len(sequence.tokens) - 1
    return [
        StepSequence(
            [token],
            sequence.start + place,
            sequence.slot,
            sequence.blocks,
            "none" if sequence.logits == "last" and place < last else sequence.logits,
            None if sequence.forced_experts is None else sequence.forced_experts[place : place + 1],
        )
        for place, token in enumerate(sequence.tokens)
    ]
