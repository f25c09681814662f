"""A runner without a model, for the engine's tests: it remembers what it is told and checks that it fits together.

Pages hold token ids, slots and snapshots hold whole texts. Each step checks that the pages of a sequence hold exactly
the tokens before it, so a block that was shared, freed or overwritten wrongly is seen at once. The next token is a
fixed function of the text, the classes of a token are functions of its id: all results can be foretold.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence

import torch

from openzaya.infer.runner import BLOCK_TOKENS, StepResult, StepSequence
from openzaya.model.config import ZayaConfig

CONFIG = ZayaConfig(
    vocab_size=64,
    hidden_size=8,
    num_hidden_layers=2,
    num_attention_heads=1,
    num_key_value_heads=1,
    head_dim=4,
    num_experts=2,
    moe_intermediate_size=4,
    router_hidden_size=4,
    max_position_embeddings=1024,
    eos_token_id=4,
)


def next_token(text: Sequence[int], salt: int = 0) -> int:
    """What follows a text; the end of turn now and then."""
    return zlib.crc32(bytes(text) + bytes([salt])) % CONFIG.vocab_size


def completion_of(prompt: Sequence[int], max_new_tokens: int) -> tuple[list[int], str]:
    """The greedy completion and why it ends."""
    text = list(prompt)
    while len(text) < len(prompt) + max_new_tokens:
        token = next_token(text)
        if token == CONFIG.eos_token_id:
            return text[len(prompt) :], "stop"
        text.append(token)
    return text[len(prompt) :], "length"


class MemoryRunner:
    """See the file."""

    def __init__(self, num_blocks: int, num_slots: int):
        self.config, self.num_blocks, self.num_slots = CONFIG, num_blocks, num_slots
        self.pages: list[list[int | None]] = [[None] * BLOCK_TOKENS for _ in range(num_blocks)]
        self.slots: list[tuple[int, ...] | None] = [None] * num_slots
        self.snapshots: list[tuple[int, ...] | None] = [None] * num_blocks
        self.steps: list[list[StepSequence]] = []
        self.salt = 0
        self.fault: Exception | None = None
        """Raised by the next step."""
        self.num_refreshes = 0

    def step(self, sequences: Sequence[StepSequence]) -> StepResult:
        if self.fault is not None:
            fault, self.fault = self.fault, None
            raise fault
        self.steps.append(list(sequences))
        assert sequences, "a step without work"
        slots = [given.slot for given in sequences]
        assert len(set(slots)) == len(slots) and all(0 <= slot < self.num_slots for slot in slots)
        logits, experts = [], []
        for given in sequences:
            text = self._extended(given)
            experts += [[token % 3, (token + 1) % 3] for token in given.tokens]
            if given.logits == "last":
                row = torch.zeros(CONFIG.vocab_size)
                row[next_token(text, self.salt)] = 9
                logits.append(row)
        stacked = torch.stack(logits) if logits else torch.empty(0, CONFIG.vocab_size)
        return StepResult(stacked, torch.tensor(experts, dtype=torch.uint8))

    def _extended(self, given: StepSequence) -> tuple[int, ...]:
        before = self.slots[given.slot] if given.start else ()
        assert before is not None and len(before) == given.start, "the slot is another sequence's"
        assert given.tokens
        text = (*before, *given.tokens)
        assert len(given.blocks) * BLOCK_TOKENS >= len(text)
        held = [self.pages[given.blocks[i // BLOCK_TOKENS]][i % BLOCK_TOKENS] for i in range(len(before))]
        assert tuple(held) == before, "the pages hold something else"
        for i in range(len(before), len(text)):
            block = given.blocks[i // BLOCK_TOKENS]
            self.pages[block][i % BLOCK_TOKENS] = text[i]
            self.snapshots[block] = text[: i + 1] if (i + 1) % BLOCK_TOKENS == 0 else None
        self.slots[given.slot] = text
        return text

    def copy_block(self, source: int, target: int) -> None:
        self.pages[target] = list(self.pages[source])
        self.snapshots[target] = self.snapshots[source]

    def copy_slot(self, source: int, target: int) -> None:
        self.slots[target] = self.slots[source]

    def save_slot(self, slot: int, block: int) -> None:
        self.snapshots[block] = self.slots[slot]

    def restore_slot(self, block: int, slot: int) -> None:
        assert self.snapshots[block] is not None, "the block has no snapshot"
        self.slots[slot] = self.snapshots[block]

    def refresh(self) -> None:
        self.num_refreshes += 1
