"""Which prompts begin alike: what one of them ran, the others take over, to the token.

The prefix cache (blocks.py) holds full blocks. Prompts seldom part at the end of one, so where prompts in flight part
inside a block, the block's beginning is kept as well: the *part*, a copy of the block as it is there, with the CCA
state behind its last token as snapshot. For this the prompts are compared:

    leader     a candidate whose prompt is being run
    split      a number of tokens after which the leader's prompt and one that waits part; the leader's chunk ends
               there, and the part is kept
    waiting    a candidate is not admitted while a leader is on the way to a split from which it could go on

So prompts that are queued together run as the tree of their beginnings, each common token once. Whoever waits does so
for a leader that runs, and a leader waits for nobody: nothing can lock.

What is known too late, of a prompt that comes when the leader is past the split, is found in full blocks only.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from openzaya.infer.blocks import BlockPool, root_key
from openzaya.infer.requests import Candidate
from openzaya.infer.runner import BLOCK_TOKENS, Runner

MIN_SHARED_TOKENS = 8
"""Fewer are run again: a split costs the leader a step, and its part a copy."""
LOOKAHEAD = 64
"""So many from the head of the queue are compared with what runs, and may be admitted past those that wait."""


@dataclass(frozen=True)
class Hit:
    """What the cache holds of a candidate's tokens, the last one excepted: it must be run to give logits."""

    blocks: list[int]
    """Full ones, from the first on."""
    part: int | None = None
    """A block that holds ``num_part`` tokens behind these."""
    num_part: int = 0

    @property
    def num_tokens(self) -> int:
        return len(self.blocks) * BLOCK_TOKENS + self.num_part


def find(pool: BlockPool, candidate: Candidate) -> Hit:
    """What the candidate can take over now."""
    usable = len(candidate.tokens) - 1
    blocks: list[int] = []
    while (len(blocks) + 1) * BLOCK_TOKENS <= usable:
        block = pool.find(candidate.key(len(blocks)))
        if block is None:
            break
        blocks.append(block)
    begin = len(blocks) * BLOCK_TOKENS
    rest = candidate.tokens[begin : min(usable, begin + BLOCK_TOKENS)]
    part = pool.find_part(key_before(candidate, len(blocks)), rest)
    return Hit(blocks) if part is None else Hit(blocks, *part)


def key_before(candidate: Candidate, block: int) -> bytes:
    """The key of the block before the one with this index."""
    return candidate.key(block - 1) if block else root_key(candidate.version)


def num_common(leader: Candidate, other: Candidate) -> int:
    """Prompt tokens of the leader from which the other could go on: not its own last one."""
    known = leader.num_common.get(other)
    if known is None:
        mine, others = leader.request.prompt_array, other.request.prompt_array
        length = min(len(mine), len(others))
        differ = mine[:length] != others[:length]
        first = int(differ.argmax())
        known = min(first if differ[first] else length, len(other.tokens) - 1)
        leader.num_common[other] = known
    return known


def is_alike(leader: Candidate, other: Candidate) -> bool:
    """Whether it is worth comparing them: a quick look, as most prompts are not alike."""
    mine, others, last = leader.request.prompt, other.request.prompt, MIN_SHARED_TOKENS - 1
    return len(mine) > last and len(others) > last and mine[last] == others[last] and mine[0] == others[0]


def next_split(pool: BlockPool, leader: Candidate, waiting: Iterable[Candidate]) -> int | None:
    """The first split that the leader has not reached; None where all begin otherwise, or nearly so."""
    for split in sorted({num_common(leader, other) for other in waiting if is_alike(leader, other)}):
        if split > leader.num_run and split - num_kept(pool, leader, split) >= MIN_SHARED_TOKENS:
            return split
    return None


def num_kept(pool: BlockPool, leader: Candidate, split: int) -> int:
    """How many of the leader's first ``split`` tokens others find in the cache when it has come so far."""
    num_full = split // BLOCK_TOKENS
    part = pool.find_part(key_before(leader, num_full), leader.tokens[num_full * BLOCK_TOKENS : split])
    return num_full * BLOCK_TOKENS + (0 if part is None else part[1])


def leader_for(pool: BlockPool, candidate: Candidate, leaders: Iterable[Candidate]) -> tuple[Candidate, int] | None:
    """The leader that is about to run most of what the candidate lacks, and the split; None where none is worth it."""
    split, best = 0, None
    for leader in leaders:
        common = num_common(leader, candidate) if is_alike(leader, candidate) else 0
        if common > max(split, leader.num_run):
            split, best = common, leader
    if best is None or split - find(pool, candidate).num_tokens < MIN_SHARED_TOKENS:
        return None
    return best, split


def keep_part(pool: BlockPool, runner: Runner, candidate: Candidate) -> None:
    """Keep the beginning of the block in which the candidate stands, for others; nothing where no block is free."""
    assert candidate.slot is not None
    num_full = candidate.num_run // BLOCK_TOKENS
    begin = num_full * BLOCK_TOKENS
    copy = pool.allocate() if candidate.num_run > begin else None
    if copy is None:
        return
    try:
        runner.copy_block(candidate.blocks[num_full], copy)
        runner.save_slot(candidate.slot, copy)
        experts = candidate.experts(begin, candidate.num_run)
        pool.publish_part(copy, key_before(candidate, num_full), candidate.tokens[begin : candidate.num_run], experts)
    finally:
        pool.release(copy)
