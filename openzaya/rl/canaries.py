"""Canaries: signs in a rollout's tokens that a policy is going astray.

**Repetition** (arXiv 2605.05365). The ids, as little-endian int32, go through one raw deflate stream of level 1 with a
window of 1,024 bytes (256 tokens), flushed after each chunk of a fixed number of tokens. A chunk's ratio is its
compressed size less the flush's own bytes, by its raw size. A ratio below 0.05 means a short verbatim loop, and the
rollout's task reward becomes 0 before advantages are computed. The report leaves id width, chunk size and overhead
open; with those here, loops of up to 12 tokens fall below the limit, 16 tokens give 0.06, and from about 200 tokens on
the window sees nothing.

**Longer loops** (ours, not the report's). The share of a chunk's n-grams that have stood in the rollout before: near 1
in a verbatim loop of any period, small in prose, code and counting.

**Rare tokens** (logged only). The share of tokens in the top parts of the id range, where byte-pair encodings keep what
is seldom seen: it rises when a policy begins to write noise.
"""

from __future__ import annotations

import itertools
import zlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from openzaya.errors import DataError

CHUNK_TOKENS = 512
LIMIT = 0.05
FLUSH_BYTES = 5
"""What Z_SYNC_FLUSH adds: an empty stored block, on a byte's border."""
NGRAM_TOKENS = 24
REPEATED_LIMIT = 0.9
RARE_PARTS = (0.10, 0.05, 0.02, 0.01)


def compression_ratios(token_ids: Sequence[int] | NDArray[np.integer], chunk_tokens: int = CHUNK_TOKENS) -> list[float]:
    """The ratio of each chunk; a shorter last one is part of the one before. Empty for no tokens."""
    ids = _ids(token_ids)
    compressor = zlib.compressobj(1, zlib.DEFLATED, -10)
    ratios = []
    for begin, end in _chunks(len(ids), chunk_tokens):
        raw = ids[begin:end].astype("<i4").tobytes()
        packed = len(compressor.compress(raw)) + len(compressor.flush(zlib.Z_SYNC_FLUSH))
        ratios.append((packed - FLUSH_BYTES) / len(raw))
    return ratios


def repeated_shares(
    token_ids: Sequence[int] | NDArray[np.integer],
    chunk_tokens: int = CHUNK_TOKENS,
    ngram_tokens: int = NGRAM_TOKENS,
) -> list[float]:
    """For each chunk the share of the n-grams ending in it that also end earlier in the rollout. Ours."""
    ids = _ids(token_ids)
    seen: set[bytes] = set()
    repeated = np.zeros(len(ids), dtype=bool)
    for end in range(ngram_tokens, len(ids) + 1):
        ngram = ids[end - ngram_tokens : end].tobytes()
        repeated[end - 1] = ngram in seen
        seen.add(ngram)
    return [float(repeated[begin:end].mean()) for begin, end in _chunks(len(ids), chunk_tokens)]


@dataclass(frozen=True)
class Repetition:
    """What the two signals say of a rollout."""

    lowest_ratio: float
    """1 for no tokens."""
    highest_repeated: float
    is_short_loop: bool
    """The report's canary: the task reward becomes 0."""
    is_long_loop: bool
    """Ours."""

    @property
    def fires(self) -> bool:
        return self.is_short_loop or self.is_long_loop


def repetition(token_ids: Sequence[int] | NDArray[np.integer], chunk_tokens: int = CHUNK_TOKENS) -> Repetition:
    """Both repetition canaries of one rollout."""
    lowest = min(compression_ratios(token_ids, chunk_tokens), default=1.0)
    highest = max(repeated_shares(token_ids, chunk_tokens), default=0.0)
    return Repetition(lowest, highest, lowest < LIMIT, highest > REPEATED_LIMIT)


def rare_token_shares(
    token_ids: Sequence[int] | NDArray[np.integer], vocab_size: int, parts: Sequence[float] = RARE_PARTS
) -> dict[float, float]:
    """For each part of the id range, counted from its top, the share of the tokens in it."""
    ids = _ids(token_ids)
    if not len(ids):
        return dict.fromkeys(parts, 0.0)
    return {part: float((ids >= vocab_size * (1 - part)).mean()) for part in parts}


def _ids(token_ids: Sequence[int] | NDArray[np.integer]) -> NDArray[np.int64]:
    ids = np.asarray(token_ids, dtype=np.int64)
    if ids.ndim != 1:
        raise DataError(f"token_ids have shape {ids.shape}; give the ids of one rollout")
    return ids


def _chunks(num_tokens: int, chunk_tokens: int) -> list[tuple[int, int]]:
    if chunk_tokens < 1:
        raise DataError(f"chunk_tokens={chunk_tokens}, expected at least 1")
    num_whole = max(1, num_tokens // chunk_tokens) if num_tokens else 0
    borders = [chunk * chunk_tokens for chunk in range(num_whole)] + [num_tokens]
    return list(itertools.pairwise(borders))
