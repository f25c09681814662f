"""Shared by the engine's tests: small models with varied text, prompts, and the plain loop that all must equal."""

from __future__ import annotations

import functools
import random
from collections.abc import Sequence

import torch

from openzaya.infer.choosing import SequenceState, choose
from openzaya.infer.sampling import SamplingParams
from openzaya.model.config import ZayaConfig
from openzaya.model.transformer import Zaya
from tests.model.reference import TINY, perturb, random_config

GREEDY = SamplingParams(temperature=0, max_new_tokens=24, ignore_eos=True)


@functools.cache
def make_model(seed: int = 0, config: ZayaConfig | None = None) -> Zaya:
    """Random weights that give varied text; seeds other than 0 vary the shape as well."""
    if config is None:
        shape = random_config(random.Random(seed)) if seed else TINY
        # With a window of one token, transformers' generation with a cache differs from its own without.
        window = max(2, shape.sliding_window or 2)
        config = shape.with_changes(max_position_embeddings=1024, vocab_size=200, sliding_window=window)
    model = Zaya(config, seed=seed)
    perturb(model, torch.Generator().manual_seed(seed))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            # Else the tied embedding decides, and greedy text repeats its last token.
            if name.endswith(("o_proj.weight", "experts.down_proj")):
                parameter *= 6
    return model.eval()


def make_prompts(num: int, lengths: tuple[int, int], vocab_size: int, seed: int = 0) -> list[list[int]]:
    draw = random.Random(seed)
    return [[draw.randrange(5, vocab_size) for _ in range(draw.randint(*lengths))] for _ in range(num)]


@torch.inference_mode()
def naive(model: Zaya, prompt: Sequence[int], params: SamplingParams, seed: int | None = None) -> list[int]:
    """The tokens of one completion without cache, blocks or batch: the whole sequence again for every token."""
    state = SequenceState(
        params,
        prompt,
        eos_token_id=model.config.eos_token_id,
        vocab_size=model.config.vocab_size,
        seed=params.seed if seed is None else seed,
    )
    while True:
        logits_BV = model(torch.tensor([[*prompt, *state.tokens]]), last_only=True)[:, 0]
        if state.accept(choose(logits_BV, [state])[0]).finish_reason is not None:
            return state.tokens
