"""Generation for scripts that hold a model: an engine for the length of one call, or of several.

    openzaya.generate(model, [[2, 17, 5]], SamplingParams(temperature=0))

    with engine_for(model, prompts, params, max_rows=64) as engine:
        greedy = complete(engine, prompts, greedy_params)
        sampled = complete(engine, prompts, params, num_samples=4)

Prompts and completions are token ids. Each row has its own seed and its own room below the model's positions, so
its tokens do not depend on the other rows (on the CPU's kernels exactly, elsewhere up to rounding of matrix products).
"""

from __future__ import annotations

import queue
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from openzaya.errors import DataError, EngineError
from openzaya.infer.engine import Engine, prompt_problem
from openzaya.infer.outputs import Delta, RequestOutput
from openzaya.infer.sampling import SamplingParams
from openzaya.infer.setup import cache_bytes_for
from openzaya.model.transformer import Zaya


@dataclass(frozen=True)
class Completion:
    """What was generated for one prompt, stop token excluded, and why it ended."""

    tokens: list[int]
    finish_reason: Literal["stop", "length"]


def generate(
    model: Zaya,
    prompts: Sequence[Sequence[int]],
    params: SamplingParams,
    *,
    num_samples: int = 1,
    max_rows: int = 256,
    progress: Callable[[int, int], None] | None = None,
) -> list[list[Completion]]:
    """``num_samples`` completions of each prompt of token ids.

    Args:
        max_rows: rows decoded together; bounds memory.
        progress: called with (prompts done, generated tokens) after each prompt.

    Sample j of prompt i draws from the seed ``params.seed + i * num_samples + j``. A completion ends with the
    model's EOS token (``stop``) or after ``max_new_tokens`` (``length``).

    Raises:
        DataError: an empty prompt, or one that leaves no room below ``max_position_embeddings``.
        EngineError: not enough memory for the longest row.
    """
    if not prompts:
        return []
    with engine_for(model, prompts, params, min(max_rows, len(prompts) * num_samples)) as engine:
        return complete(engine, prompts, params, num_samples, progress)


def complete(
    engine: Engine,
    prompts: Sequence[Sequence[int]],
    params: SamplingParams,
    num_samples: int = 1,
    progress: Callable[[int, int], None] | None = None,
) -> list[list[Completion]]:
    """What :func:`generate` gives, on an engine that others may use before, after and meanwhile.

    Raises:
        EngineError: a prompt that the engine cannot serve.
    """
    each = [params.model_copy(update={"seed": params.seed + index * num_samples}) for index in range(len(prompts))]
    outputs = engine.generate(prompts, each, num_samples, progress)
    return [
        [
            Completion(completion.tokens, "stop" if completion.finish_reason == "stop" else "length")
            for completion in output.completions
        ]
        for output in outputs
    ]


def stream(model: Zaya, prompt: Sequence[int], params: SamplingParams) -> Iterator[int]:
    """The tokens of one completion as they are made, stop token excluded; same tokens as :func:`generate`."""
    pieces: queue.SimpleQueue[Delta | RequestOutput | EngineError] = queue.SimpleQueue()
    with engine_for(model, [prompt], params, 1) as engine:
        engine.submit(prompt, params, on_delta=pieces.put, on_end=pieces.put)
        while not isinstance(piece := pieces.get(), RequestOutput):
            if isinstance(piece, EngineError):
                raise piece
            yield from piece.tokens


def engine_for(model: Zaya, prompts: Sequence[Sequence[int]], params: SamplingParams, max_rows: int) -> Engine:
    """An engine with room for ``max_rows`` of the longest prompt's completions at once, as far as memory allows.

    Raises:
        DataError: an empty prompt, or one that leaves no room below ``max_position_embeddings``.
        EngineError: not enough memory for the longest row.
    """
    for index, prompt in enumerate(prompts):
        problem = prompt_problem(prompt, model.config, "the prompt" if len(prompts) == 1 else f"prompt {index}")
        if problem is not None:
            raise DataError(problem)
    longest = max(len(prompt) for prompt in prompts) + params.max_new_tokens
    return Engine(
        model,
        device=str(model.device),
        max_running=max_rows,
        cache_bytes=cache_bytes_for(model, max_rows, min(longest, model.config.max_position_embeddings)),
        chunk_tokens=2048,
    )
