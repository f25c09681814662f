"""A request and its candidates while the engine works on them.

A *candidate* is one answer in the making: its text so far, what of it has been run, and where its state lies. All
candidates of a request begin with the same prompt; those that have not begun yet follow a leader, which is prefilled
for all of them.
"""

from __future__ import annotations

import functools
from array import array
from collections.abc import Callable, Sequence

import numpy as np
from torch import Tensor

from openzaya.errors import EngineError
from openzaya.infer.blocks import next_key, root_key
from openzaya.infer.choosing import Progress, SequenceState
from openzaya.infer.outputs import Completion, Delta, FinishReason, RequestOutput, TokenLogprob
from openzaya.infer.runner import BLOCK_TOKENS
from openzaya.infer.sampling import SamplingParams

OnDelta = Callable[[Delta], None]
OnEnd = Callable[[RequestOutput | EngineError], None]


class Request:
    """One prompt with ``len(states)`` candidates; ``on_end`` is called once, after the last delta."""

    def __init__(
        self,
        request_id: str,
        prompt: Sequence[int],
        params: SamplingParams,
        states: Sequence[SequenceState],
        on_delta: OnDelta | None,
        on_end: OnEnd | None,
        prompt_experts: Tensor | None = None,
    ):
        self.id, self.prompt, self.params = request_id, list(prompt), params
        self.on_delta, self.on_end = on_delta, on_end
        self.prompt_experts = prompt_experts
        """uint8 (P, L) to be taken instead of the router's choices; such blocks must not be shared."""
        self.candidates = [Candidate(self, index, state) for index, state in enumerate(states)]
        self.num_cached_tokens: int | None = None
        """Prompt tokens that others had run when the first candidate began; None before."""
        self.is_ended = False

    @functools.cached_property
    def prompt_array(self) -> np.ndarray:
        """The prompt as int64 (P,)."""
        return np.asarray(self.prompt, dtype=np.int64)

    def output(self) -> RequestOutput:
        """All candidates as they are."""
        completions = [candidate.completion for candidate in self.candidates]
        return RequestOutput(self.prompt, completions, self.num_cached_tokens or 0)


class Candidate:
    """One candidate; ``tokens`` are prompt and completion, of which the first ``num_run`` have been run."""

    def __init__(self, request: Request, index: int, state: SequenceState):
        self.request, self.state = request, state
        self.tokens = list(request.prompt)
        self.completion = Completion(index, logprobs=None if request.params.logprobs is None else [])
        self.followers: list[Candidate] = []
        """Candidates that begin when this one's prompt has been run."""
        self.num_run = 0
        self.slot: int | None = None
        self.blocks = array("i")
        self.version = -1
        """The weights' version that all of its blocks were run with since it was admitted."""
        self.num_common: dict[Candidate, int] = {}
        """While its prompt is run: how many of its tokens others can take over (sharing.py)."""
        self.waits_for: tuple[Candidate, int] | None = None
        """While it waits: the candidate that will have run so many of its tokens soon."""
        self._keys: list[bytes] = []
        self._pieces: list[str] = []
        self._experts = bytearray()
        """The classes of the tokens that have been run, L bytes a token: appending to bytes costs least."""
        self._num_layers = 0

    @property
    def num_left(self) -> int:
        """Tokens that have to be run before the next one can be chosen; 1 while decoding."""
        return len(self.tokens) - self.num_run

    @property
    def is_done(self) -> bool:
        return self.completion.finish_reason is not None

    def begin(self, version: int) -> None:
        """Start over with weights of this version; keys of full blocks are kept where they still hold."""
        if version != self.version:
            self.version, self._keys = version, []
        self.num_run, self.blocks, self.waits_for = 0, array("i"), None

    def key(self, block: int) -> bytes:
        """The prefix cache's key of the full block with this index."""
        while len(self._keys) <= block:
            start = len(self._keys) * BLOCK_TOKENS
            before = self._keys[-1] if self._keys else root_key(self.version)
            self._keys.append(next_key(before, self.tokens[start : start + BLOCK_TOKENS]))
        return self._keys[block]

    def record_experts(self, start: int, experts_NL: np.ndarray) -> None:
        """Remember the classes of tokens ``start``, ``start + 1``, ..."""
        self._num_layers = experts_NL.shape[1]
        self._experts[start * self._num_layers :] = experts_NL.tobytes()

    def experts(self, start: int, end: int) -> np.ndarray:
        """A copy of the recorded classes, uint8 (end - start, L)."""
        width = self._num_layers
        return np.frombuffer(self._experts[start * width : end * width], np.uint8).reshape(end - start, width)

    def become_fork_of(self, leader: Candidate) -> None:
        """Everything but blocks and slot as in the leader, whose prompt has just been run."""
        self.num_run, self.version, self._keys = leader.num_run, leader.version, list(leader._keys)
        if leader.num_run:
            self.record_experts(0, leader.experts(0, leader.num_run))

    def accept(self, chosen: TokenLogprob, version: int) -> Progress:
        """Take a sampled token."""
        progress, completion = self.state.accept(chosen), self.completion
        if progress.kept:
            self.tokens.append(chosen.token)
            completion.tokens.append(chosen.token)
            completion.versions.append(version)
            if completion.logprobs is not None:
                completion.logprobs.append(chosen)
        else:
            completion.end_token, completion.end_version = chosen, version
        self._record(progress)
        return progress

    def end(self, reason: FinishReason) -> Delta:
        """End it from outside."""
        progress = Progress(self.state.flush(), reason, None, False)
        self._record(progress)
        return self.delta(progress)

    def _record(self, progress: Progress) -> None:
        completion = self.completion
        if progress.text:
            self._pieces.append(progress.text)
        if progress.finish_reason is not None:
            completion.finish_reason, completion.stop = progress.finish_reason, progress.stop
            completion.text = "".join(self._pieces)
            if self.request.params.return_experts:
                completion.experts = self.experts(0, self.num_run)

    def delta(self, progress: Progress) -> Delta:
        """What a listener is told of the last token."""
        completion = self.completion
        last = slice(-1, None) if progress.kept else slice(0)
        return Delta(
            completion.index,
            completion.tokens[last],
            progress.text,
            logprobs=None if completion.logprobs is None else completion.logprobs[last],
            finish_reason=progress.finish_reason,
            num_cached_tokens=self.request.num_cached_tokens or 0,
            versions=completion.versions[last],
            completion=completion if progress.finish_reason is not None else None,
        )
