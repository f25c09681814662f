"""From groups with advantages to packed windows that the trainer runs.

A sequence is a prompt with one rollout. Sequences are packed by the packer of all stages (openzaya/data/packing.py);
what RL knows of each token goes into arrays of the same windows. At position t stands what belongs to the token AT t:
its log probability when it was sampled, its advantage. The trainer predicts token t from the hidden state at t - 1.

Shape suffixes: B windows, T tokens a window, L layers, N = B*T.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from openzaya.data.mixture import Example
from openzaya.data.packing import assign, fill_window
from openzaya.errors import DataError
from openzaya.rl.rollout import Rollout


@dataclass(frozen=True)
class PolicySequence:
    """A prompt with a rollout and the advantage of its tokens."""

    prompt_tokens: np.ndarray
    rollout: Rollout
    advantage: float

    @property
    def num_tokens(self) -> int:
        return len(self.prompt_tokens) + len(self.rollout.tokens)


@dataclass(frozen=True)
class PolicyBatch:
    """Stacked windows, all (B, T)."""

    tokens: Tensor
    """int64"""
    document_ids: Tensor
    """int64, -1 at padding"""
    positions: Tensor
    """int64"""
    is_sampled: Tensor
    """bool: the policy wrote this token."""
    sampler_logprobs: Tensor
    """float32"""
    advantages: Tensor
    """float32"""
    versions: Tensor
    """int64 learner steps"""
    experts: Tensor | None
    """uint8 (B, T, L) to replay; None: the router chooses."""

    def to(self, device: str | torch.device) -> PolicyBatch:
        moved = {name: None if value is None else value.to(device) for name, value in vars(self).items()}
        return PolicyBatch(**moved)  # type: ignore[arg-type]

    @property
    def predicts_N(self) -> Tensor:
        """bool (N): positions whose next token the policy wrote."""
        mask_BT = torch.zeros_like(self.is_sampled)
        mask_BT[:, :-1] = self.is_sampled[:, 1:] & (self.document_ids[:, 1:] == self.document_ids[:, :-1])
        return mask_BT.reshape(-1)

    @property
    def was_run_N(self) -> Tensor:
        """bool (N): positions whose token the sampler ran, so that it chose an expert: not a sequence's last one."""
        mask_BT = self.document_ids >= 0
        mask_BT[:, :-1] &= self.document_ids[:, 1:] == self.document_ids[:, :-1]
        mask_BT[:, -1] = False
        return mask_BT.reshape(-1)

    def of_next(self, values_BT: Tensor) -> Tensor:
        """``values_BT`` of the tokens that :attr:`predicts_N` predict, in the same order."""
        return values_BT.reshape(-1)[self.predicts_N.nonzero()[:, 0] + 1]


def make_batches(
    sequences: Sequence[PolicySequence], *, window_tokens: int, windows_per_batch: int, replay_experts: bool
) -> Iterator[PolicyBatch]:
    """Pack ``sequences`` into micro-batches.

    Raises:
        DataError: a sequence longer than a window; recorded experts that do not belong to its tokens.
    """
    longest = max((sequence.num_tokens for sequence in sequences), default=0)
    if longest > window_tokens:
        raise DataError(
            f"a prompt with its rollout has {longest} tokens, a window {window_tokens}; raise window_tokens or lower "
            "rollout.max_new_tokens"
        )
    groups = assign([sequence.num_tokens for sequence in sequences], window_tokens)
    for start in range(0, len(groups), windows_per_batch):
        chosen = groups[start : start + windows_per_batch]
        windows = [_window([sequences[i] for i in group], window_tokens, replay_experts) for group in chosen]
        stacked = [None if part[0] is None else torch.from_numpy(np.stack(part)) for part in zip(*windows, strict=True)]
        yield PolicyBatch(*stacked)  # type: ignore[arg-type]


def _window(sequences: list[PolicySequence], window_tokens: int, replay_experts: bool) -> tuple[np.ndarray | None, ...]:
    """The fields of :class:`PolicyBatch` for one window, in their order."""
    examples = [
        Example(
            np.concatenate([sequence.prompt_tokens, sequence.rollout.tokens]).tolist(),
            [False] * len(sequence.prompt_tokens) + [True] * len(sequence.rollout.tokens),
        )
        for sequence in sequences
    ]
    window = fill_window(examples, window_tokens)
    logprobs, advantages = np.zeros(window_tokens, dtype=np.float32), np.zeros(window_tokens, dtype=np.float32)
    versions = np.zeros(window_tokens, dtype=np.int64)
    num_layers = _num_layers(sequences) if replay_experts else 0
    experts = np.zeros((window_tokens, num_layers), dtype=np.uint8) if replay_experts else None
    start = 0
    for sequence in sequences:
        begin, end = start + len(sequence.prompt_tokens), start + sequence.num_tokens
        logprobs[begin:end] = sequence.rollout.logprobs
        advantages[begin:end] = sequence.advantage
        versions[begin:end] = sequence.rollout.versions
        if experts is not None:
            # The last token was never run: nothing was predicted from it, and nothing is now.
            experts[start : end - 1] = _recorded(sequence, num_layers)
        start = end
    return (
        window.tokens,
        window.document_ids,
        window.positions,
        window.loss_mask,
        logprobs,
        advantages,
        versions,
        experts,
    )


def _num_layers(sequences: Sequence[PolicySequence]) -> int:
    for sequence in sequences:
        if sequence.rollout.experts is not None:
            return int(sequence.rollout.experts.shape[1])
    raise DataError(
        "replay_experts is set, and no rollout has recorded experts; use an engine that returns them, or set "
        "rollout.replay_experts=false"
    )


def _recorded(sequence: PolicySequence, num_layers: int) -> np.ndarray:
    experts, expected = sequence.rollout.experts, (sequence.num_tokens - 1, num_layers)
    if experts is None or experts.shape != expected:
        found = None if experts is None else experts.shape
        raise DataError(f"a rollout has recorded experts {found}, expected {expected}: one class a token and layer")
    return experts
