"""What runs next: continuous batching over a fixed number of blocks and slots.

Each step holds one token of every candidate that is decoding, and up to ``chunk_tokens`` of prompts, first come first
served. So a long prompt is run in chunks beside the decoding of others and stalls nobody.

A candidate is admitted when the blocks of all its tokens are there, and a spare block for each that runs already.
Decoding takes blocks as it goes; when none is left, the youngest candidate is *preempted*: it gives up its blocks and
waits at the head of the queue. Later its tokens are run again, through the prefix cache, and it goes on where it was.
The oldest always proceeds, so everything ends.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from openzaya.infer.blocks import BlockPool, num_blocks_for
from openzaya.infer.requests import Candidate, Request
from openzaya.infer.runner import BLOCK_TOKENS, Runner, StepSequence

SPARE_BLOCKS = 1
"""Free blocks to be left for each running candidate when another one is admitted: fewer preemptions."""


@dataclass(frozen=True)
class Share:
    """How many of a candidate's tokens the next step runs."""

    candidate: Candidate
    num_tokens: int

    @property
    def is_last(self) -> bool:
        """After it a token can be chosen."""
        return self.num_tokens == self.candidate.num_left

    def sequence(self) -> StepSequence:
        """What the runner is told."""
        candidate = self.candidate
        assert candidate.slot is not None
        return StepSequence(
            candidate.tokens[candidate.num_run : candidate.num_run + self.num_tokens],
            candidate.num_run,
            candidate.slot,
            candidate.blocks,
            "last" if self.is_last else "none",
            self._forced_experts(),
        )

    def _forced_experts(self) -> Tensor | None:
        experts, begin = self.candidate.request.prompt_experts, self.candidate.num_run
        if experts is None or begin >= len(experts):
            return None
        return experts[begin : begin + self.num_tokens]


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
        prefix_cache: whether full blocks are kept for later prompts that begin alike.
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

    def plan(self) -> list[Share]:
        """The next step; takes the blocks that it needs."""
        shares: list[Share] = []
        preempted = self.num_preemptions
        for candidate in list(self.running):
            if candidate.slot is not None and candidate.num_left == 1 and self._make_room(candidate):
                shares.append(Share(candidate, 1))
        budget = self.chunk_tokens
        for candidate in self.running:
            if budget and candidate.num_left > 1:
                shares.append(chunk(candidate, budget))
                budget -= shares[-1].num_tokens
        # Whoever was just preempted must not take back the blocks that it gave up.
        while budget and self.waiting and self.num_preemptions == preempted and self._admit(self.waiting[0]):
            shares.append(chunk(self.running[-1], budget))
            budget -= shares[-1].num_tokens
        return shares

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
        candidate.blocks = []
        if candidate.slot is not None:
            self._slots.append(candidate.slot)
            candidate.slot = None

    def _admit(self, candidate: Candidate) -> bool:
        """Move the head of the queue to the running ones, if slot and blocks are there."""
        if not self._slots:
            return False
        candidate.begin(self.version)
        num_full = (len(candidate.tokens) - 1) // BLOCK_TOKENS if self._is_cached(candidate) else 0
        for index in range(num_full):
            block = self.pool.find(candidate.key(index))
            if block is None:
                break
            self.pool.share(block)
            candidate.blocks.append(block)
        num_hits = len(candidate.blocks)
        num_needed = num_blocks_for(len(candidate.tokens)) - num_hits
        if self.pool.num_free < num_needed + SPARE_BLOCKS * len(self.running):
            self._give_up(candidate)
            return False
        self.waiting.popleft()
        self.running.append(candidate)
        candidate.slot = self._slots.pop()
        for _ in range(num_needed):
            block = self.pool.allocate()
            assert block is not None
            candidate.blocks.append(block)
        if num_hits:
            candidate.num_run = num_hits * BLOCK_TOKENS
            for index, block in enumerate(candidate.blocks[:num_hits]):
                candidate.record_experts(index * BLOCK_TOKENS, self.pool.experts(block))
            self.runner.restore_slot(candidate.blocks[num_hits - 1], candidate.slot)
        if candidate.request.num_cached_tokens is None:
            candidate.request.num_cached_tokens = candidate.num_run
            self.num_cached_tokens += candidate.num_run
        return True

    def _is_cached(self, candidate: Candidate) -> bool:
        """Whether its blocks may come from the prefix cache and enter it."""
        return self.prefix_cache and candidate.request.prompt_experts is None

    def advance(self, share: Share, experts_NL: np.ndarray) -> None:
        """The share has been run."""
        candidate = share.candidate
        before = candidate.num_run // BLOCK_TOKENS
        candidate.record_experts(candidate.num_run, experts_NL)
        candidate.num_run += share.num_tokens
        if self._is_cached(candidate) and candidate.version == self.version:
            for index in range(before, candidate.num_run // BLOCK_TOKENS):
                experts = candidate.experts(index * BLOCK_TOKENS, (index + 1) * BLOCK_TOKENS)
                self.pool.publish(candidate.blocks[index], candidate.key(index), experts)

    def fork(self, leader: Candidate) -> list[Candidate]:
        """The followers that begin now, as forks of the leader, whose prompt has just been run.

        The others wait behind one of them, at the head of the queue.
        """
        followers, leader.followers = leader.followers, []
        begun = 0
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
