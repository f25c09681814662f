"""An engine that recites: texts from a script, token by token through a real tokenizer, at any pace.

It keeps the interface of ``openzaya.Engine`` that the server uses, and records what it was asked.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from types import SimpleNamespace

import numpy as np

from openzaya.data.tokenizer import encode_batch
from openzaya.errors import EngineError, QueueFull
from openzaya.infer.outputs import Completion, Delta, RequestOutput, TokenLogprob

Script = Callable[[list[int], object, int], str]


class FakeEngine:
    """``script(prompt, params, candidate)`` gives each answer; ``pause_s`` passes before each token."""

    def __init__(self, tokenizer, script: Script | str = "<think>so so</think>Fine.", *, pause_s: float = 0.0):
        self.tokenizer = tokenizer
        self.script = script if callable(script) else lambda *_: script
        self.pause_s = pause_s
        self.config = SimpleNamespace(
            max_position_embeddings=2048, vocab_size=len(tokenizer) + 8, eos_token_id=tokenizer.eos_token_id
        )
        self.max_sequence_tokens = 2048
        self.max_waiting = 10**6
        self.version = 0
        self.calls: list[SimpleNamespace] = []
        self.cancelled: set[str] = set()
        self.breaks_after: int | None = None
        self._lock = threading.Lock()
        self._running: set[str] = set()

    @property
    def num_running(self) -> int:
        return len(self._running)

    def stats(self):
        names = "num_waiting blocks_total blocks_free blocks_cached steps tokens_generated prompt_tokens cached_tokens"
        zeros = dict.fromkeys([*names.split(), "preemptions"], 0)
        return SimpleNamespace(**zeros, num_running=self.num_running)

    def submit(self, prompt, params, n=1, *, on_delta=None, on_end=None, request_id=None) -> str:
        if len(self._running) >= self.max_waiting:
            raise QueueFull("1 requests are waiting, max_waiting is 1; try again later")
        if params.grammar is not None and "refuse" in params.grammar:
            raise EngineError("this grammar is refused; write another")
        with self._lock:
            name = request_id or f"request-{len(self.calls)}"
            self.calls.append(SimpleNamespace(id=name, prompt=list(prompt), params=params, n=n))
            self._running.add(name)
        arguments = (name, list(prompt), params, n, on_delta, on_end)
        threading.Thread(target=self._recite, args=arguments, daemon=True).start()
        return name

    def cancel(self, request_id: str) -> None:
        self.cancelled.add(request_id)

    def _recite(self, name, prompt, params, n, on_delta, on_end) -> None:
        tokens = [encode_batch(self.tokenizer, [self.script(prompt, params, index)])[0] for index in range(n)]
        completions = [Completion(index) for index in range(n)]
        shown = [""] * n
        position = 0
        try:
            while any(completion.finish_reason is None for completion in completions):
                if self.breaks_after is not None and position >= self.breaks_after:
                    raise EngineError("the step failed")
                if self.pause_s:
                    time.sleep(self.pause_s)
                for index, completion in enumerate(completions):
                    if completion.finish_reason is None:
                        delta = self._next(name, tokens[index], position, completion, params, shown, len(prompt))
                        on_delta(delta)
                position += 1
        except EngineError as error:
            on_end(error)
        except RuntimeError:
            pass  # the event loop has gone
        else:
            on_end(RequestOutput(prompt, completions, 0))
        finally:
            self._running.discard(name)

    def _next(self, name, tokens, position, completion, params, shown, num_prompt) -> Delta:
        index = completion.index
        kept = []
        if name in self.cancelled:
            completion.finish_reason = "cancelled"
        elif position >= len(tokens):
            completion.finish_reason = "stop"
        else:
            kept = [tokens[position]]
            completion.tokens += kept
            if len(completion.tokens) >= params.max_new_tokens:
                completion.finish_reason = "length"
        text = str(self.tokenizer.decode(completion.tokens, skip_special_tokens=False))
        piece = ""
        if not text.endswith("�") or completion.finish_reason:
            piece, shown[index] = text[len(shown[index]) :], text
        logprobs = None
        if params.logprobs is not None:
            top = tuple((kept[0] + k, -0.5 - k) for k in range(params.logprobs)) if kept else ()
            logprobs = [TokenLogprob(token, -0.5, top) for token in kept]
        if completion.finish_reason and params.return_experts:
            completion.experts = np.zeros((num_prompt + len(completion.tokens) - 1, 2), dtype=np.uint8)
        done = completion.finish_reason is not None
        completion.text = text
        return Delta(
            index,
            kept,
            piece,
            logprobs,
            completion.finish_reason,
            num_cached_tokens=3,
            completion=completion if done else None,
        )
