"""Who holds which block: reference counts, and the prefix cache.

A full block never changes again, so sequences that begin with the same tokens may share it. Each full block has a
key, a hash of all tokens up to its end and of the weights' version; the cache maps keys to blocks. A block's beginning
can be cached too, as a *part*, under the key that its tokens give; whoever goes on from it needs a copy. A block is

    free       nobody's
    held       by one or more sequences (its reference count)
    cached     under its key, held or not; cached blocks that nobody holds are given away least recently used first

The system backs a block with memory when it is first written, so a new block is taken where memory is backed already:
the free block that was held last; else, once the cache has its share of the pool, a cached block; else a block that
was never held; and a cached one again when there is none. So what is backed follows the load, not the pool's size.

Pure bookkeeping: the memory itself is the runner's.
"""

from __future__ import annotations

import hashlib
from collections import Counter, OrderedDict
from collections.abc import Sequence

import numpy as np

from openzaya.infer.runner import BLOCK_TOKENS

KEPT_SHARE = 4
"""Cached blocks that nobody holds do not take more than one part in so many of the pool while others are untouched."""
MIN_KEPT = 64
"""But so many in any case."""


def root_key(version: int) -> bytes:
    """The key before the first block of any sequence run with these weights."""
    return hashlib.sha256(b"openzaya prefix %d" % version).digest()


def next_key(key: bytes, tokens: Sequence[int]) -> bytes:
    """The key of the block of ``tokens`` that follows the block of ``key``."""
    return hashlib.sha256(key + np.asarray(tokens, dtype=np.int64).tobytes()).digest()


def num_blocks_for(num_tokens: int) -> int:
    """Blocks that hold so many tokens."""
    return -(-num_tokens // BLOCK_TOKENS)


class BlockPool:
    """``num_blocks`` blocks; every method leaves ``free + cached and unheld + untouched + held = num_blocks``."""

    def __init__(self, num_blocks: int):
        self.num_blocks = num_blocks
        self._free: list[int] = []
        """Held before; the last one is taken first."""
        self.num_touched = 0
        """Blocks that were ever held: those below this number."""
        self._num_kept = max(MIN_KEPT, num_blocks // KEPT_SHARE)
        self._holders = [0] * num_blocks
        self._key_of: dict[int, bytes] = {}
        self._cached: dict[bytes, int] = {}
        self._experts: dict[int, np.ndarray] = {}
        self._part_of: dict[int, bytes] = {}
        """Of each block that holds a part: the key of the block before it."""
        self._part_lengths: dict[bytes, Counter[int]] = {}
        """Of each key: how many parts of which number of tokens follow."""
        self._unheld: OrderedDict[int, None] = OrderedDict()
        """Cached blocks without holder, least recently used first."""

    @property
    def num_free(self) -> int:
        """Blocks that can be allocated now, cached ones that nobody holds among them."""
        return len(self._free) + len(self._unheld) + self.num_blocks - self.num_touched

    @property
    def num_cached(self) -> int:
        """Blocks in the prefix cache, held or not."""
        return len(self._cached)

    def allocate(self) -> int | None:
        """A block with one holder, whatever its content; None where all are held."""
        is_untouched_left = self.num_touched < self.num_blocks
        if self._free:
            block = self._free.pop()
        elif is_untouched_left and len(self._unheld) < self._num_kept:
            block = self.num_touched
            self.num_touched += 1
        elif self._unheld:
            block, _ = self._unheld.popitem(last=False)
            self._forget(block)
        else:
            return None
        self._holders[block] = 1
        return block

    def share(self, block: int) -> None:
        """One holder more, of a held or cached block."""
        if self._holders[block] == 0:
            if block not in self._unheld:
                raise ValueError(f"block {block} is free and cannot be shared")
            del self._unheld[block]
        self._holders[block] += 1

    def release(self, block: int) -> None:
        """One holder less; the last one leaves a cached block to the cache."""
        if self._holders[block] == 0:
            raise ValueError(f"block {block} is held by nobody and cannot be released")
        self._holders[block] -= 1
        if self._holders[block] == 0:
            if block in self._key_of:
                self._unheld[block] = None
            else:
                self._free.append(block)

    def holders(self, block: int) -> int:
        return self._holders[block]

    def publish(self, block: int, key: bytes, experts: np.ndarray) -> None:
        """Enter a held block that is written no more into the cache with its tokens' classes, uint8 (tokens, L).

        Where the key is known already, the other block stays and this one remains its holders' own.
        """
        if key in self._cached or block in self._key_of:
            return
        self._cached[key], self._key_of[block], self._experts[block] = block, key, experts

    def publish_part(self, block: int, before: bytes, tokens: Sequence[int], experts: np.ndarray) -> None:
        """Enter a held block that holds ``tokens`` only, which follow the block of key ``before``."""
        key = next_key(before, tokens)
        if key in self._cached or block in self._key_of:
            return
        self.publish(block, key, experts)
        self._part_of[block] = before
        self._part_lengths.setdefault(before, Counter())[len(tokens)] += 1

    def find_part(self, before: bytes, tokens: Sequence[int]) -> tuple[int, int] | None:
        """The cached part with most of ``tokens``, which follow the block of key ``before``, and how many it holds."""
        for length in sorted(self._part_lengths.get(before, ()), reverse=True):
            if length <= len(tokens):
                block = self._cached.get(next_key(before, tokens[:length]))
                if block is not None:
                    return block, length
        return None

    def find(self, key: bytes) -> int | None:
        """The cached block of a key; not yet held for the caller: see :meth:`share`."""
        return self._cached.get(key)

    def experts(self, block: int) -> np.ndarray:
        """What :meth:`publish` was told."""
        return self._experts[block]

    def clear_cache(self) -> None:
        """Forget all keys: held blocks stay with their holders, the others become free."""
        for block in list(self._key_of):
            self._forget(block)
        self._free += self._unheld
        self._unheld.clear()

    def _forget(self, block: int) -> None:
        del self._cached[self._key_of.pop(block)]
        length = len(self._experts.pop(block))
        before = self._part_of.pop(block, None)
        if before is not None:
            lengths = self._part_lengths[before]
            lengths[length] -= 1
            if not lengths[length]:
                del lengths[length]
            if not lengths:
                del self._part_lengths[before]
