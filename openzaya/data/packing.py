"""Best-fit-decreasing packing of whole examples into windows, and batches of windows.

Examples are placed longest first, each into the window with the least free space that still holds it
(a search by bisection over the free spaces in use: O(n log n)). No example is cut at a window border;
one longer than a window is an error, or skipped and counted where the caller says so (arXiv 2605.05365
packs the same way after AP trimming).

``PackedBatches`` takes a shard of examples from the mixture, packs it, shuffles its windows and emits
them in batches. Windows left over at the end of a shard open the next batch together with the next
shard's first ones, so none is lost and each batch is full. The state is the mixture's state at the
start of the shard in hand and the number of its windows emitted: resuming packs that shard again, the
batches that follow are identical bit for bit.

Shapes: T window length in tokens, B windows a batch.
"""

from __future__ import annotations

import random
from bisect import bisect_left, insort
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch

from openzaya.data.mixture import Example, Mixture
from openzaya.errors import DataError

OverlongPolicy = Literal["error", "skip"]


@dataclass(frozen=True)
class Window:
    """One packed window of T tokens.

    ``document_ids`` count the documents of the window from 0; -1 is padding. ``positions`` count from
    0 in each document (0 on padding). ``loss_mask`` is that of the examples, false on padding.
    """

    tokens: np.ndarray
    """int64 [T]"""
    loss_mask: np.ndarray
    """bool [T]"""
    document_ids: np.ndarray
    """int64 [T]"""
    positions: np.ndarray
    """int64 [T]"""

    @property
    def num_tokens(self) -> int:
        """Tokens that are not padding."""
        return int((self.document_ids >= 0).sum())


@dataclass(frozen=True)
class Batch:
    """Stacked windows; see ``Window`` for the meaning. All [B, T]: int64, bool, int64, int64."""

    tokens: torch.Tensor
    loss_mask: torch.Tensor
    document_ids: torch.Tensor
    positions: torch.Tensor


def assign(lengths: Sequence[int], window_length: int) -> list[list[int]]:
    """Best-fit decreasing: for each window the indices of its examples, in the order placed.

    Every length must be in 1 .. ``window_length``. Equal lengths keep their order; of equally full
    windows the last opened is taken.
    """
    windows: list[list[int]] = []
    free_sizes: list[int] = []  # ascending, each size once
    windows_by_free_size: dict[int, list[int]] = {}

    def put_back(window: int, free: int) -> None:
        if free == 0:
            return
        if free in windows_by_free_size:
            windows_by_free_size[free].append(window)
        else:
            windows_by_free_size[free] = [window]
            insort(free_sizes, free)

    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        length = lengths[index]
        place = bisect_left(free_sizes, length)
        if place == len(free_sizes):
            windows.append([index])
            put_back(len(windows) - 1, window_length - length)
            continue
        free = free_sizes[place]
        candidates = windows_by_free_size[free]
        window = candidates.pop()
        if not candidates:
            del windows_by_free_size[free], free_sizes[place]
        windows[window].append(index)
        put_back(window, free - length)
    return windows


def pack(
    examples: Sequence[Example], window_length: int, *, pad_token_id: int = 0, overlong: OverlongPolicy = "error"
) -> list[Window]:
    """Pack whole examples into windows of ``window_length`` tokens.

    An example longer than a window raises ``DataError``, or is left out with ``overlong="skip"``
    (``PackedBatches`` counts those).
    """
    if window_length < 1:
        raise DataError(f"window_length={window_length}; give at least 1 token")
    if overlong not in ("error", "skip"):
        raise DataError(f"unknown overlong policy '{overlong}'; use error or skip")
    fitting = [example for example in examples if len(example.tokens) <= window_length]
    if len(fitting) < len(examples) and overlong == "error":
        longest = max(len(example.tokens) for example in examples)
        raise DataError(
            f"{len(examples) - len(fitting)} of {len(examples)} examples exceed the window of {window_length} tokens "
            f"(the longest has {longest}); trim them to the context length first, or raise it"
        )
    lengths = [len(example.tokens) for example in fitting]
    return [
        fill_window([fitting[i] for i in group], window_length, pad_token_id)
        for group in assign(lengths, window_length)
    ]


def fill_window(examples: Sequence[Example], window_length: int, pad_token_id: int = 0) -> Window:
    """A window with ``examples``, which must fit, one after the other."""
    tokens = np.full(window_length, pad_token_id, dtype=np.int64)
    loss_mask = np.zeros(window_length, dtype=np.bool_)
    document_ids = np.full(window_length, -1, dtype=np.int64)
    positions = np.zeros(window_length, dtype=np.int64)
    start = 0
    for document, example in enumerate(examples):
        end = start + len(example.tokens)
        tokens[start:end] = example.tokens
        loss_mask[start:end] = example.loss_mask
        document_ids[start:end] = document
        positions[start:end] = np.arange(end - start)
        start = end
    return Window(tokens, loss_mask, document_ids, positions)


@dataclass
class PackingCounts:
    """What was packed over a run; shards count when their last window is emitted."""

    shards: int = 0
    windows: int = 0
    examples: int = 0
    tokens: int = 0
    supervised_tokens: int = 0
    overlong_skipped: int = 0

    def add(self, other: PackingCounts) -> None:
        for key, value in vars(other).items():
            setattr(self, key, getattr(self, key) + value)


@dataclass
class _Shard:
    start_state: dict[str, Any]
    windows: list[Window]
    counts: PackingCounts
    emitted: int = field(default=0)


class PackedBatches:
    """An endless iterator of ``Batch`` over a mixture, resumable bit for bit.

    ``overlong`` is the policy of ``pack``; skipped examples are counted in ``report``. A shard in which
    nothing fits raises ``DataError``.
    """

    def __init__(
        self,
        mixture: Mixture,
        window_length: int,
        windows_per_batch: int,
        shard_examples: int = 1024,
        *,
        pad_token_id: int = 0,
        overlong: OverlongPolicy = "error",
    ) -> None:
        if windows_per_batch < 1 or shard_examples < 1:
            raise DataError(
                f"windows_per_batch={windows_per_batch} and shard_examples={shard_examples} must both be at least 1"
            )
        self.mixture = mixture
        self.window_length = window_length
        self.windows_per_batch = windows_per_batch
        self.shard_examples = shard_examples
        self.pad_token_id = pad_token_id
        self.overlong: OverlongPolicy = overlong
        self._finished = PackingCounts()
        self._shard: _Shard | None = None

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        windows = [self._next_window() for _ in range(self.windows_per_batch)]
        return Batch(
            *(
                torch.from_numpy(np.stack([getattr(window, name) for window in windows]))
                for name in ("tokens", "loss_mask", "document_ids", "positions")
            )
        )

    def _next_window(self) -> Window:
        if self._shard is None:
            self._shard = self._read_shard()
        shard = self._shard
        window = shard.windows[shard.emitted]
        shard.emitted += 1
        if shard.emitted == len(shard.windows):
            self._finished.add(shard.counts)
            self._shard = None
        return window

    def _read_shard(self) -> _Shard:
        start_state = self.mixture.state_dict()
        examples = [self.mixture.next_example() for _ in range(self.shard_examples)]
        windows = pack(examples, self.window_length, pad_token_id=self.pad_token_id, overlong=self.overlong)
        fitting = [example for example in examples if len(example.tokens) <= self.window_length]
        if not windows:
            raise DataError(
                f"none of {len(examples)} examples fits the window of {self.window_length} tokens (the shortest has "
                f"{min(len(example.tokens) for example in examples)}); trim them first, or raise the context length"
            )
        # Packing sorts by length; training must not see the long ones first.
        random.Random(f"{self.mixture.seed}/windows/{self._finished.shards}").shuffle(windows)
        counts = PackingCounts(
            shards=1,
            windows=len(windows),
            examples=len(fitting),
            tokens=sum(len(example.tokens) for example in fitting),
            supervised_tokens=sum(sum(example.loss_mask) for example in fitting),
            overlong_skipped=len(examples) - len(fitting),
        )
        return _Shard(start_state, windows, counts)

    def state_dict(self) -> dict[str, Any]:
        """Small and JSON-able: mixture state at the shard's start, windows of it emitted, counts before it."""
        shard = self._shard
        return {
            "mixture": shard.start_state if shard is not None else self.mixture.state_dict(),
            "windows_emitted": shard.emitted if shard is not None else 0,
            "counts": dict(vars(self._finished)),
            "settings": self._settings(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue after the last batch before ``state`` was taken; ``DataError`` for other settings."""
        if state["settings"] != self._settings():
            raise DataError(
                f"the saved batches were packed with {dict(state['settings'])}, these with {self._settings()}; resume "
                "with the same recipe, or start the phase anew"
            )
        self.mixture.load_state_dict(state["mixture"])
        self._finished = PackingCounts(**state["counts"])
        self._shard = None
        emitted = state["windows_emitted"]
        if emitted:
            self._shard = self._read_shard()
            if emitted >= len(self._shard.windows):
                raise DataError(
                    f"the saved position is window {emitted}, but the shard now packs into {len(self._shard.windows)}: "
                    "the data changed since; restore it, or start the phase anew"
                )
            self._shard.emitted = emitted

    def _settings(self) -> dict[str, Any]:
        # The number of windows a batch is left out: it may change on resume, the stream of windows does not.
        return {
            "window_length": self.window_length,
            "shard_examples": self.shard_examples,
            "pad_token_id": self.pad_token_id,
            "overlong": self.overlong,
        }

    def report(self) -> dict[str, Any]:
        """Counts over the finished shards and the one in hand, and the fill rate (tokens per window place)."""
        counts = PackingCounts(**vars(self._finished))
        if self._shard is not None:
            counts.add(self._shard.counts)
        places = counts.windows * self.window_length
        return {**vars(counts), "fill_rate": counts.tokens / places if places else 0.0}
