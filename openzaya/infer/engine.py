"""The inference engine: many requests at once on one model, from any thread or from asyncio.

    with openzaya.Engine("path/or/hub-id") as engine:
        outputs = engine.generate(["1 + 1 =", "2 + 2 ="], SamplingParams(temperature=0))
        async for delta in engine.stream("Once"): ...

Continuous batching, chunked prefill, paged keys and values with an exact prefix cache, prompts that begin alike run as
the tree of their beginnings, forks (n candidates of one prompt cost one prefill), weights that change between two
steps. Parts: scheduler.py decides what runs next (sharing.py: who begins alike), a runner (runner.py) runs it,
choosing.py picks tokens, loop.py is the thread that does these in turn.
"""

from __future__ import annotations

import asyncio
import functools
import itertools
import operator
import os
import queue
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

import torch
from torch import Tensor

from openzaya.data.tokenizer import encode_plain
from openzaya.errors import EngineError, QueueFull
from openzaya.infer.choosing import SequenceState
from openzaya.infer.loop import StepLoop
from openzaya.infer.outputs import Delta, RequestOutput
from openzaya.infer.requests import OnDelta, OnEnd, Request
from openzaya.infer.runner import BLOCK_TOKENS, CacheDtype, Runner
from openzaya.infer.sampling import SamplingParams
from openzaya.infer.scheduler import Scheduler
from openzaya.infer.setup import Backend, load_model, make_runner
from openzaya.model.config import ZayaConfig
from openzaya.model.transformer import Zaya

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

Prompt = str | Sequence[int]
MAX_CANDIDATES = 4096
"""Of one request: each costs memory from the start, waiting or not."""


@dataclass(frozen=True)
class EngineStats:
    """What the engine holds now, and what it has done since it was made."""

    num_running: int
    """Candidates whose state is in memory."""
    num_waiting: int
    """Candidates in the queue, preempted ones among them."""
    blocks_total: int
    blocks_free: int
    """Blocks that nobody holds; cached ones count, they are given away when needed."""
    blocks_cached: int
    """Blocks in the prefix cache, held or not."""
    steps: int
    tokens_generated: int
    prompt_tokens: int
    """Prompt tokens that were run; those of a preempted request count again."""
    cached_tokens: int
    """Prompt tokens that others had run instead."""
    preemptions: int


class Engine:
    """Generates with one model.

    Args:
        path_or_model: a directory or hub id of a checkpoint, or a model.
        tokenizer: for text in and out; by default the checkpoint's own, where it has one.
        quantize: ``int8`` or ``int4`` weights; a model that is passed in is copied for it.
        dtype: of the weights that are loaded; ``auto`` is the checkpoint's.
        device: ``cpu`` or any device of PyTorch.
        backend: ``cpu`` (kernels), ``torch``, or ``auto``: the kernels where they can run this model.
        cache_dtype: of keys and values.
        cache_bytes: memory for keys, values and snapshots. Default: what ``max_running`` sequences of full length
            need, at most half of the memory that is available.
        max_running: candidates that are run together.
        max_waiting: requests that may wait; one more raises :class:`QueueFull`.
        chunk_tokens: prompt tokens in a step.
        prefix_cache: prompts that begin alike share what was run: at once to the token, later in blocks of 64.
        batch_invariant: the numbers of a sequence do not depend, in a single bit, on what else runs. The kernels'
            always have this property; ``torch`` runs token by token for it, slowly.
        runner: one of your own instead, for this model and at least ``max_running`` slots; ``quantize``, ``backend``,
            the cache's settings and ``batch_invariant`` then say nothing.

    Raises:
        EngineError: settings that cannot be used together, or memory that holds no sequence.
        CheckpointError, ConfigError: see :func:`openzaya.load`.
    """

    def __init__(
        self,
        path_or_model: str | os.PathLike[str] | Zaya,
        tokenizer: PreTrainedTokenizerFast | None = None,
        *,
        quantize: str | None = None,
        dtype: Any = "auto",
        device: str = "cpu",
        backend: Backend = "auto",
        cache_dtype: CacheDtype = "auto",
        cache_bytes: int | None = None,
        max_running: int = 64,
        max_waiting: int = 1024,
        chunk_tokens: int = 512,
        prefix_cache: bool = True,
        batch_invariant: bool = False,
        runner: Runner | None = None,
    ):
        for name, value in (("max_running", max_running), ("max_waiting", max_waiting), ("chunk_tokens", chunk_tokens)):
            if value < 1:
                raise EngineError(f"{name}={value}, expected at least 1")
        self._model, self.tokenizer = load_model(path_or_model, tokenizer, quantize, dtype, device)
        self.config: ZayaConfig = self._model.config
        self._runner = runner or make_runner(
            self._model,
            backend=backend,
            cache_dtype=cache_dtype,
            cache_bytes=cache_bytes,
            max_running=max_running,
            batch_invariant=batch_invariant,
        )
        self.max_waiting = max_waiting
        self.max_sequence_tokens = min(self.config.max_position_embeddings, self._runner.num_blocks * BLOCK_TOKENS)
        """Prompt and completion together: the model's positions, or what the cache can hold."""
        self._scheduler = Scheduler(
            self._runner, max_running=max_running, chunk_tokens=chunk_tokens, prefix_cache=prefix_cache
        )
        self._loop = StepLoop(self._runner, self._scheduler)
        self._numbers = itertools.count()

    # --- requests ---------------------------------------------------------------------------------

    def generate(
        self,
        prompts: Sequence[Prompt],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        n: int = 1,
        progress: Callable[[int, int], None] | None = None,
    ) -> list[RequestOutput]:
        """``n`` candidates of each prompt (text or token ids), in the order of the prompts.

        Args:
            params: for all prompts, or one for each. Candidate i draws from the seed ``params.seed + i``.
            progress: called with (prompts done, tokens generated) after each prompt.

        However many prompts there are, only as many are queued as the engine may hold.

        Raises:
            EngineError: a prompt that cannot be served, or a step that failed; all other prompts are then cancelled.
        """
        if params is None or isinstance(params, SamplingParams):
            params = [params or SamplingParams()] * len(prompts)
        if len(params) != len(prompts):
            raise EngineError(f"{len(prompts)} prompts but {len(params)} params; pass one for each, or one for all")
        requests = [(self._tokens(prompt), settings) for prompt, settings in zip(prompts, params, strict=True)]
        for tokens, _ in requests:
            self.check(tokens, n)
        ended: queue.SimpleQueue[tuple[int, RequestOutput | EngineError]] = queue.SimpleQueue()
        outputs: list[RequestOutput | None] = [None] * len(prompts)
        ids: list[str] = []
        done = num_generated = 0

        def put(index: int, outcome: RequestOutput | EngineError) -> None:
            ended.put((index, outcome))

        try:
            while done < len(prompts):
                room = self.max_waiting - self._loop.num_unstarted
                together = [
                    self._prepare(*requests[index], n, None, functools.partial(put, index))
                    for index in range(len(ids), min(len(ids) + room, len(prompts)))
                ]
                # All at once: the same prompts then always share the same steps.
                self._loop.submit(together)
                ids += [request.id for request in together]
                if len(ids) == done:
                    # Others have filled the queue.
                    time.sleep(0.05)
                    continue
                index, outcome = ended.get()
                if isinstance(outcome, EngineError):
                    raise outcome
                outputs[index] = outcome
                done += 1
                num_generated += sum(len(completion.tokens) for completion in outcome.completions)
                if progress is not None:
                    progress(done, num_generated)
        finally:
            if done < len(prompts):
                for request_id in ids:
                    self.cancel(request_id)
        return [output for output in outputs if output is not None]

    async def stream(
        self, prompt: Prompt, params: SamplingParams | None = None, n: int = 1, *, request_id: str | None = None
    ) -> AsyncIterator[Delta]:
        """The pieces of ``n`` candidates as they are made, those of different candidates interleaved.

        Leaving the loop, closing the generator or cancelling the task ends the request and frees its memory.

        Raises:
            EngineError: as :meth:`submit`, or a step that failed.
        """
        loop = asyncio.get_running_loop()
        pieces: asyncio.Queue[Delta | RequestOutput | EngineError] = asyncio.Queue()

        def put(piece: Delta | RequestOutput | EngineError) -> None:
            loop.call_soon_threadsafe(pieces.put_nowait, piece)

        name = request_id or self._new_id()
        # A long prompt or a grammar takes time to prepare: not on the event loop.
        submitted = asyncio.ensure_future(
            asyncio.to_thread(self.submit, prompt, params, n, on_delta=put, on_end=put, request_id=name)
        )
        try:
            await asyncio.shield(submitted)
            while not isinstance(piece := await pieces.get(), RequestOutput):
                if isinstance(piece, EngineError):
                    raise piece
                yield piece
        finally:
            if submitted.done():
                self.cancel(name)
            else:
                submitted.add_done_callback(lambda task: None if task.exception() else self.cancel(name))

    def submit(
        self,
        prompt: Prompt,
        params: SamplingParams | None = None,
        n: int = 1,
        *,
        on_delta: OnDelta | None = None,
        on_end: OnEnd | None = None,
        request_id: str | None = None,
        prompt_experts: Tensor | None = None,
    ) -> str:
        """Queue a request and return its id, at once.

        Args:
            on_delta: called with each piece, in the engine's thread: keep it short. If it raises, the request ends.
            on_end: called once, last, with all candidates, or with the error that ended the request.
            request_id: of your choice, for :meth:`cancel`; must not be that of a request that is still running.
            prompt_experts: uint8 (P, L), classes that the prompt's tokens take instead of the router's choice (E is
                the skip class). Such a prompt neither uses nor fills the prefix cache.

        Raises:
            EngineError: the prompt is empty, too long, or holds ids that the model does not have; classes that do not
                fit; the engine is closed.
            QueueFull: ``max_waiting`` requests wait already.
        """
        tokens = self._tokens(prompt)
        self.check(tokens, n)
        self._check_experts(prompt_experts, len(tokens))
        if self._loop.num_unstarted >= self.max_waiting:
            raise QueueFull(
                f"{self._loop.num_unstarted} requests are waiting, max_waiting is {self.max_waiting}; try again later"
            )
        request = self._prepare(tokens, params or SamplingParams(), n, on_delta, on_end, request_id, prompt_experts)
        self._loop.submit([request])
        return request.id

    def _prepare(
        self,
        tokens: list[int],
        params: SamplingParams,
        n: int,
        on_delta: OnDelta | None,
        on_end: OnEnd | None,
        request_id: str | None = None,
        prompt_experts: Tensor | None = None,
    ) -> Request:
        room = self.max_sequence_tokens - len(tokens)
        limited = params.model_copy(update={"max_new_tokens": min(params.max_new_tokens, room)})
        states = [
            SequenceState(
                limited,
                tokens,
                tokenizer=self.tokenizer,
                eos_token_id=self.config.eos_token_id,
                vocab_size=self.config.vocab_size,
                seed=params.seed + index,
            )
            for index in range(n)
        ]
        return Request(request_id or self._new_id(), tokens, params, states, on_delta, on_end, prompt_experts)

    def together(self) -> AbstractContextManager[None]:
        """While any such context is open, requests wait with their beginning, half a second at most.

        For requests that are prepared one by one in several threads or tasks, and whose prompts begin alike: those
        that begin together share their common tokens to the last one, those that come later only full blocks of them.
        :meth:`generate` does this by itself.
        """
        return self._loop.together()

    def cancel(self, request_id: str) -> None:
        """End a request soon: its unfinished candidates end with ``cancelled``. One that has ended is left alone."""
        self._loop.cancel(request_id)

    def check(self, tokens: Sequence[int], n: int = 1) -> None:
        """Raise the :class:`EngineError` with which :meth:`submit` would refuse this prompt."""
        problem = prompt_problem(tokens, self.config)
        if problem is None and len(tokens) >= self.max_sequence_tokens:
            problem = (
                f"the prompt has {len(tokens)} tokens and the cache holds sequences of fewer than "
                f"{self.max_sequence_tokens}; shorten it, or give the engine a larger cache_bytes"
            )
        if problem is None and not 1 <= n <= MAX_CANDIDATES:
            problem = f"n={n}, expected 1 to {MAX_CANDIDATES}; split it into several requests"
        if problem is not None:
            raise EngineError(problem)

    def _check_experts(self, prompt_experts: Tensor | None, num_tokens: int) -> None:
        if prompt_experts is None:
            return
        shape, num_experts = (num_tokens, self.config.num_hidden_layers), self.config.num_experts
        if prompt_experts.shape != shape or prompt_experts.dtype != torch.uint8:
            raise EngineError(
                f"prompt_experts are {tuple(prompt_experts.shape)} {prompt_experts.dtype}, expected {shape} "
                "torch.uint8; pass one class a token and layer"
            )
        if (highest := int(prompt_experts.max())) > num_experts:
            raise EngineError(
                f"prompt_experts name class {highest}, the classes are 0 to {num_experts} (skip); replay choices "
                "recorded with this model"
            )

    def encode(self, text: str) -> list[int]:
        """Token ids of plain text, behind the tokenizer's BOS; control strings in it stay text."""
        if self.tokenizer is None:
            raise EngineError("the engine has no tokenizer, but the prompt is text; pass one, or pass token ids")
        bos = self.tokenizer.bos_token_id
        return ([] if bos is None else [bos]) + encode_plain(self.tokenizer, [text])[0]

    def _tokens(self, prompt: Prompt) -> list[int]:
        if isinstance(prompt, str):
            return self.encode(prompt)
        try:
            return [operator.index(token) for token in prompt]
        except TypeError as error:
            raise EngineError(f"the prompt is neither text nor a list of token ids: {error}") from None

    def _new_id(self) -> str:
        return f"request-{next(self._numbers)}"

    # --- the engine itself ------------------------------------------------------------------------

    @property
    def version(self) -> int:
        """How often the weights were changed."""
        return self._scheduler.version

    def stats(self) -> EngineStats:
        """Counts of this moment; taken while a step may run, so they may be a step apart."""
        scheduler, loop = self._scheduler, self._loop
        return EngineStats(
            num_running=len(scheduler.running),
            num_waiting=scheduler.num_waiting,
            blocks_total=scheduler.pool.num_blocks,
            blocks_free=scheduler.pool.num_free,
            blocks_cached=scheduler.pool.num_cached,
            steps=loop.num_steps,
            tokens_generated=loop.num_tokens_generated,
            prompt_tokens=loop.num_prompt_tokens,
            cached_tokens=scheduler.num_cached_tokens,
            preemptions=scheduler.num_preemptions,
        )

    def update_weights(self, weights: Mapping[str, Tensor]) -> int:
        """Copy tensors into the model between two steps; waits for it and returns the new version.

        Requests that are running go on with the new weights and what the old ones left in their cache; each token
        says with which version it was sampled. The prefix cache starts anew.

        Raises:
            CheckpointError: unknown names, other shapes or types, values that are not finite; nothing is changed then.
        """
        from openzaya.model.quantised import copy_weights_

        def change() -> int:
            copy_weights_(self._model, weights)
            self._runner.refresh()
            return self._scheduler.new_version()

        return self._loop.call(change)

    def close(self) -> None:
        """End all requests with an error and the engine with them."""
        self._loop.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def prompt_problem(tokens: Sequence[int], config: ZayaConfig, name: str = "the prompt") -> str | None:
    """Why the model cannot go on from a prompt; None if it can."""
    limit = config.max_position_embeddings
    if not 0 < len(tokens) < limit:
        return f"{name} has {len(tokens)} tokens; it needs at least 1 and fewer than the model's {limit} positions"
    low, high = min(tokens), max(tokens)
    if low < 0 or high >= config.vocab_size:
        return (
            f"{name} holds token id {low if low < 0 else high}, the vocabulary holds {config.vocab_size}; use the "
            "tokenizer that belongs to this checkpoint"
        )
    return None
