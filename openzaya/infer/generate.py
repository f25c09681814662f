"""Cached generation for a list of prompts: plain batches, rows that are done leave the batch.

Prompts of similar length share a batch, are padded on the left and prefilled once; ``num_samples`` continuations
of a prompt are forks of the same prefill. Each row has its own seed and its own room below the model's positions,
so the tokens of a row do not depend on the batch it was in (up to rounding of matrix products).

Shape suffixes: B rows, T tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from openzaya.errors import DataError
from openzaya.infer.sampling import SamplingParams, draw, uniforms
from openzaya.model.transformer import Zaya

FinishReason = Literal["stop", "length"]
COMPACT_BELOW = 0.75
"""Rows that are done are dropped from the batch when less than this share is still running."""


@dataclass(frozen=True)
class Completion:
    """What was generated for one prompt, stop token excluded, and why it ended."""

    tokens: list[int]
    finish_reason: FinishReason


@torch.inference_mode()
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
        progress: called with (prompts done, generated tokens) after each batch.

    Sample j of prompt i draws from the seed ``params.seed + i * num_samples + j``. A completion ends with the
    model's EOS token (``stop``) or after ``max_new_tokens`` (``length``).

    Raises:
        DataError: an empty prompt, or one that leaves no room below ``max_position_embeddings``.
    """
    limit = model.config.max_position_embeddings
    for index, prompt in enumerate(prompts):
        if not 0 < len(prompt) < limit:
            raise DataError(
                f"prompt {index} has {len(prompt)} tokens; it needs at least 1 and fewer than "
                f"the model's {limit} positions"
            )
    order = sorted(range(len(prompts)), key=lambda index: len(prompts[index]))
    prompts_per_batch = max(1, max_rows // num_samples)
    results: list[list[Completion]] = [[] for _ in prompts]
    done, generated = 0, 0
    for start in range(0, len(order), prompts_per_batch):
        chosen = order[start : start + prompts_per_batch]
        # A prompt with more samples than rows is prefilled again for each part of them.
        for first in range(0, num_samples, max_rows):
            samples = range(first, min(first + max_rows, num_samples))
            seeds = [params.seed + index * num_samples + sample for index in chosen for sample in samples]
            completions = _generate_batch(model, [prompts[index] for index in chosen], params, len(samples), seeds)
            for place, index in enumerate(chosen):
                results[index] += completions[place * len(samples) : (place + 1) * len(samples)]
            generated += sum(len(completion.tokens) for completion in completions)
        done += len(chosen)
        if progress is not None:
            progress(done, generated)
    return results


def _generate_batch(
    model: Zaya, prompts: list[Sequence[int]], params: SamplingParams, num_samples: int, seeds: list[int]
) -> list[Completion]:
    tokens_BT, mask_BT = pad_left(prompts, model.config.pad_token_id, model.device)
    # Padding takes none of a short prompt's room: positions are relative, so a row may run past the limit by it.
    room = [
        min(params.max_new_tokens, model.config.max_position_embeddings - len(prompt))
        for prompt in prompts
        for _ in range(num_samples)
    ]
    num_steps = max(room)
    cache = model.make_cache(len(prompts), tokens_BT.shape[1] + num_steps)
    logits_BV = model(tokens_BT, attention_mask=mask_BT, cache=cache, last_only=True)[:, 0]
    if num_samples > 1:
        forks = torch.arange(len(prompts), device=model.device).repeat_interleave(num_samples)
        cache.select(forks)
        logits_BV = logits_BV[forks]

    uniforms_BS = uniforms(seeds, num_steps).to(model.device)
    generated: list[list[int]] = [[] for _ in seeds]
    stopped = [False] * len(seeds)

    def is_running(row: int) -> bool:
        return not stopped[row] and len(generated[row]) < room[row]

    rows = list(range(len(seeds)))
    for step in range(num_steps):
        next_B = draw(logits_BV, params, uniforms_BS[:, step])
        for place, token in enumerate(next_B.tolist()):
            row = rows[place]
            if not is_running(row):
                continue
            if token == model.config.eos_token_id:
                stopped[row] = True
            else:
                generated[row].append(token)
        running = [place for place, row in enumerate(rows) if is_running(row)]
        if not running:
            break
        if len(running) < COMPACT_BELOW * len(rows):
            kept = torch.tensor(running, device=model.device)
            cache.select(kept)
            next_B, uniforms_BS = next_B[kept], uniforms_BS[kept]
            rows = [rows[place] for place in running]
        logits_BV = model(next_B[:, None], cache=cache, last_only=True)[:, 0]
    return [
        Completion(tokens, "stop" if was_stopped else "length")
        for tokens, was_stopped in zip(generated, stopped, strict=True)
    ]


def stream(model: Zaya, prompt: Sequence[int], params: SamplingParams) -> Iterator[int]:
    """The tokens of one completion as they are made, stop token excluded; same tokens as :func:`generate`."""
    if not 0 < len(prompt) < model.config.max_position_embeddings:
        raise DataError(
            f"the prompt has {len(prompt)} tokens; it needs at least 1 and fewer than the model's "
            f"{model.config.max_position_embeddings} positions"
        )
    with torch.inference_mode():
        num_steps = min(params.max_new_tokens, model.config.max_position_embeddings - len(prompt))
        cache = model.make_cache(1, len(prompt) + num_steps)
        tokens_BT = torch.tensor([list(prompt)], device=model.device)
        uniforms_BS = uniforms([params.seed], num_steps).to(model.device)
        for step in range(num_steps):
            logits_BV = model(tokens_BT, cache=cache, last_only=True)[:, 0]
            next_B = draw(logits_BV, params, uniforms_BS[:, step])
            if int(next_B) == model.config.eos_token_id:
                return
            yield int(next_B)
            tokens_BT = next_B[:, None]


def pad_left(
    prompts: Sequence[Sequence[int]], pad_token_id: int, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """Prompts as int64 (B, T) with padding on the left, and the mask of real tokens, bool (B, T)."""
    longest = max(len(prompt) for prompt in prompts)
    tokens_BT = torch.full((len(prompts), longest), pad_token_id, dtype=torch.int64)
    mask_BT = torch.zeros(len(prompts), longest, dtype=torch.bool)
    for row, prompt in enumerate(prompts):
        tokens_BT[row, longest - len(prompt) :] = torch.tensor(list(prompt), dtype=torch.int64)
        mask_BT[row, longest - len(prompt) :] = True
    return tokens_BT.to(device), mask_BT.to(device)
