"""What runs next: continuous batching over a fixed number of blocks and slots.

Each step holds one token of every candidate that is decoding, and up to ``chunk_tokens`` of prompts, first come first
served. So a long prompt is run in chunks beside the decoding of others and stalls nobody. Only who begins like a prompt
that is being run waits for it, and lets others pass (sharing.py).

A candidate is admitted when the blocks of all its tokens are there, and a spare block for each that runs already.
Decoding takes blocks as it goes; when none is left, the youngest candidate is *preempted*: it gives up its blocks and
waits at the head of the queue. Later its tokens are run again, through the prefix cache, and it goes on where it was.
The oldest always proceeds, so everything ends.
"""

from __future__ import annotations

import itertools
from array import array
from collections import deque
from typing import NamedTuple

import numpy as np

from openzaya.infer import sharing
from openzaya.infer.blocks import BlockPool, num_blocks_for
from openzaya.infer.requests import Candidate, Request
from openzaya.infer.runner import BLOCK_TOKENS, Runner, StepSequence

SPARE_BLOCKS = 1
"""Free blocks to be left for each running candidate when another one is admitted: fewer preemptions."""


class Share(NamedTuple):
    """How many of a candidate's tokens the next step runs."""

    candidate: Candidate
    num_tokens: int
    is_split: bool = False
    """Others go on from its end."""

    @property
    def is_last(self) -> bool:
        """After it a token can be chosen."""
        return self.num_tokens == self.candidate.num_left

    def sequence(self) -> StepSequence:
        """What the runner is told."""
        candidate, begin = self.candidate, self.candidate.num_run
        end = begin + self.num_tokens
        experts = candidate.request.prompt_experts
        assert candidate.slot is not None
        return StepSequence(
            candidate.tokens[begin:end],
            begin,
            candidate.slot,
            candidate.blocks,
            "last" if end == len(candidate.tokens) else "none",
            None if experts is None or begin >= len(experts) else experts[begin:end],
        )


def chunk(candidate: Candidate, budget: int) -> Share:
    """As many of a candidate's tokens as the budget allows; replayed choices and free ones do not mix in a share."""
    num_tokens, experts = min(candidate.num_left, budget), candidate.request.prompt_experts
    if experts is not None and candidate.num_run < len(experts):
        num_tokens = min(num_tokens, len(experts) - candidate.num_run)
    return Share(candidate, num_tokens)


class Scheduler:
    """Owns queue, blocks and slots. One caller at a time.

    Args:
        max_running: candidates that run at once, at most the runner's slots.
        chunk_tokens: prompt tokens in one step.
        prefix_cache: whether prompts that begin alike share what was run, at once and later.
    """

    def __init__(self, runner: Runner, *, max_running: int, chunk_tokens: int, prefix_cache: bool):
        self.runner, self.chunk_tokens, self.prefix_cache = runner, chunk_tokens, prefix_cache
        self.pool = BlockPool(runner.num_blocks)
        self.version = 0
        self.waiting: deque[Candidate] = deque()
        self.running: list[Candidate] = []
        """In the order of admission."""
        self.num_preemptions = self.num_cached_tokens = 0
        self._slots = list(range(max_running - 1, -1, -1))

    @property
    def has_work(self) -> bool:
        return bool(self.running or self.waiting)

    @property
    def num_waiting(self) -> int:
        """Candidates in the queue; may be asked from any thread."""
        return sum(1 + len(candidate.followers) for candidate in tuple(self.waiting))

    def add(self, request: Request) -> None:
        """Queue a request."""
        leader, *followers = request.candidates
        leader.followers = followers
        self.waiting.append(leader)

    def plan(self, *, admit: bool = True) -> list[Share]:
        """The next step; takes the blocks that it needs. Without ``admit`` nothing begins that waits."""
        shares: list[Share] = []
        preempted = self.num_preemptions
        for candidate in list(self.running):
            if candidate.slot is not None and candidate.num_left == 1 and self._make_room(candidate):
                is_prompt = candidate.num_run < len(candidate.request.prompt)
                shares.append(self._prompt_share(candidate, 1) if is_prompt else Share(candidate, 1))
        budget = self.chunk_tokens
        for candidate in self.running:
            if budget and candidate.num_left > 1:
                shares.append(self._prompt_share(candidate, budget))
                budget -= shares[-1].num_tokens
        # Whoever was just preempted must not take back the blocks that it gave up.
        if admit and self.num_preemptions == preempted:
            for candidate in list(itertools.islice(self.waiting, sharing.LOOKAHEAD)):
                if not budget:
                    break
                if self._waits(candidate):
                    continue
                if not self._admit(candidate):
                    break
                shares.append(self._prompt_share(candidate, budget))
                budget -= shares[-1].num_tokens
        return shares

    def _prompt_share(self, candidate: Candidate, budget: int) -> Share:
        """A chunk of a prompt, which ends where those who wait want to go on."""
        share = chunk(candidate, budget)
        if self.waiting and self._is_leader(candidate):
            others = filter(self._is_cached, itertools.islice(self.waiting, sharing.LOOKAHEAD))
            split = sharing.next_split(self.pool, candidate, others)
            if split is not None and split <= candidate.num_run + share.num_tokens:
                return Share(candidate, split - candidate.num_run, is_split=True)
        return share

    def _waits(self, candidate: Candidate) -> bool:
        """Whether a prompt that is being run will soon hold more of the candidate's tokens than the cache does."""
        if not self._is_cached(candidate) or not self._slots:
            return False
        if candidate.waits_for is not None:
            leader, split = candidate.waits_for
            if self._is_leader(leader) and leader.num_run < split:
                return True
        if candidate.version != self.version:
            candidate.begin(self.version)
        candidate.waits_for = sharing.leader_for(self.pool, candidate, filter(self._is_leader, self.running))
        return candidate.waits_for is not None

    def _is_leader(self, candidate: Candidate) -> bool:
        """Whether it runs its prompt, and others may take that over."""
        return (
            candidate.slot is not None
            and candidate.num_run < len(candidate.request.prompt)
            and candidate.version == self.version
            and self._is_cached(candidate)
        )

    def _make_room(self, candidate: Candidate) -> bool:
        """Blocks for one token more, by preemption if need be; False when the candidate itself had to go."""
        while len(candidate.blocks) * BLOCK_TOKENS <= candidate.num_run:
            block = self.pool.allocate()
            if block is not None:
                candidate.blocks.append(block)
            else:
                youngest = self.running[-1]
                self._preempt(youngest)
                if youngest is candidate:
                    return False
        return True

    def _preempt(self, candidate: Candidate) -> None:
        self.running.remove(candidate)
        self._give_up(candidate)
        self.waiting.appendleft(candidate)
        self.num_preemptions += 1

    def _give_up(self, candidate: Candidate) -> None:
        # The end of a text goes first when the cache makes room: its beginning is worth more.
        for block in reversed(candidate.blocks):
            self.pool.release(block)
        candidate.blocks = array("i")
        if candidate.slot is not None:
            self._slots.append(candidate.slot)
            candidate.slot = None
        candidate.num_common.clear()

    def _admit(self, candidate: Candidate) -> bool:
        """Move the head of the queue to the running ones, if slot and blocks are there."""
        if not self._slots:
            return False
        candidate.begin(self.version)
        hit = sharing.find(self.pool, candidate) if self._is_cached(candidate) else sharing.Hit([])
        for block in hit.blocks:
            self.pool.share(block)
            candidate.blocks.append(block)
        num_needed = num_blocks_for(len(candidate.tokens)) - len(hit.blocks)
        num_wanted = num_needed + SPARE_BLOCKS * len(self.running)
        if hit.part is not None:
            self.pool.share(hit.part)
            if self.pool.num_free < num_wanted:
                # Its block may be the very one that is missing.
                self.pool.release(hit.part)
                hit = sharing.Hit(hit.blocks)
        if self.pool.num_free < num_wanted:
            self._give_up(candidate)
            return False
        self.waiting.remove(candidate)
        self.running.append(candidate)
        candidate.slot = self._slots.pop()
        for _ in range(num_needed):
            fresh = self.pool.allocate()
            assert fresh is not None
            candidate.blocks.append(fresh)
        if hit.part is not None:
            # Nothing is allocated before it is copied, so nobody takes it.
            self.pool.release(hit.part)
        self._take_over(candidate, hit)
        if candidate.request.num_cached_tokens is None:
            candidate.request.num_cached_tokens = candidate.num_run
            self.num_cached_tokens += candidate.num_run
        return True

    def _take_over(self, candidate: Candidate, hit: sharing.Hit) -> None:
        """Let an admitted candidate go on from what the cache holds of its tokens."""
        assert candidate.slot is not None
        candidate.num_run = hit.num_tokens
        held = [*hit.blocks, *([] if hit.part is None else [hit.part])]
        for index, block in enumerate(held):
            candidate.record_experts(index * BLOCK_TOKENS, self.pool.experts(block))
        if hit.part is not None:
            self.runner.copy_block(hit.part, candidate.blocks[len(hit.blocks)])
        if held:
            self.runner.restore_slot(held[-1], candidate.slot)

    def _is_cached(self, candidate: Candidate) -> bool:
        """Whether its blocks may come from the prefix cache and enter it."""
        return self.prefix_cache and candidate.request.prompt_experts is None

    def advance(self, share: Share, experts_NL: np.ndarray) -> None:
        """The share has been run."""
        candidate = share.candidate
        before, candidate.num_run = candidate.num_run, candidate.num_run + share.num_tokens
        candidate.record_experts(before, experts_NL)
        first_full, end_full = before // BLOCK_TOKENS, candidate.num_run // BLOCK_TOKENS
        may_keep = first_full < end_full or share.is_split
        if may_keep and self._is_cached(candidate) and candidate.version == self.version:
            for index in range(first_full, end_full):
                experts = candidate.experts(index * BLOCK_TOKENS, (index + 1) * BLOCK_TOKENS)
                self.pool.publish(candidate.blocks[index], candidate.key(index), experts)
            if share.is_split:
                sharing.keep_part(self.pool, self.runner, candidate)
        if candidate.num_common and candidate.num_run >= len(candidate.request.prompt):
            candidate.num_common.clear()

    def fork(self, leader: Candidate) -> list[Candidate]:
        """The followers that begin now, as forks of the leader, whose prompt has just been run.

        The others wait behind one of them, at the head of the queue.
        """
        followers, begun = leader.followers, 0
        if not followers:
            return []
        leader.followers = []
        for follower in followers:
            if not self._slots or self.pool.num_free < 1 + SPARE_BLOCKS * len(self.running):
                break
            self._fork(leader, follower)
            begun += 1
        if begun < len(followers):
            head, *rest = followers[begun:]
            head.followers = rest
            self.waiting.appendleft(head)
        return followers[:begun]

    def _fork(self, leader: Candidate, follower: Candidate) -> None:
        follower.become_fork_of(leader)
        follower.slot = self._slots.pop()
        self.running.append(follower)
        assert leader.slot is not None
        self.runner.copy_slot(leader.slot, follower.slot)
        num_full = leader.num_run // BLOCK_TOKENS
        for block in leader.blocks[:num_full]:
            self.pool.share(block)
            follower.blocks.append(block)
        if num_full * BLOCK_TOKENS < leader.num_run:
            copy = self.pool.allocate()
            assert copy is not None
            follower.blocks.append(copy)
            self.runner.copy_block(leader.blocks[num_full], copy)

    def finish(self, candidate: Candidate) -> None:
        """Free what a candidate holds, wherever it is."""
        if candidate in self.running:
            self.running.remove(candidate)
        elif candidate in self.waiting:
            self.waiting.remove(candidate)
        self._give_up(candidate)

    def remove(self, request: Request) -> None:
        """Free what all candidates of a request hold and take them out of the queue."""
        for candidate in request.candidates:
            self.finish(candidate)
            candidate.followers = []

    def new_version(self) -> int:
        """The weights were changed: blocks in the cache no longer hold what a new run would give."""
        self.version += 1
        self.pool.clear_cache()
        return self.version
