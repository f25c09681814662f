"""Greedy decoding through the engine equals ``transformers`` token for token, however the engine cuts the work.

Chunks of a few tokens, a prefix cache that hits, and pools so small that candidates are preempted: none may show.
"""

from __future__ import annotations

import functools

import pytest
import torch
from torch import Tensor

from openzaya.infer import blocks, scheduler
from openzaya.infer.engine import Engine
from openzaya.infer.runner import block_bytes
from openzaya.infer.sampling import SamplingParams
from openzaya.model.transformer import Zaya
from tests.infer.miniature import make_model, make_prompts
from tests.model.reference import transformers_twin


@pytest.fixture(autouse=True)
def the_cache_keeps_all(monkeypatch) -> None:
    """Else texts of 512 tokens evict each other while others' blocks are untouched."""
    monkeypatch.setattr(blocks, "KEPT_SHARE", 1)


def seven_prompts(seed: int) -> list[list[int]]:
    """Ragged ones; some begin like others, up to the middle of a block or to the end of one."""
    prompts = make_prompts(7, (1, 150), make_model(seed).config.vocab_size, seed)
    prompts[3] = prompts[0][: len(prompts[0]) // 2] + prompts[3]
    prompts[5] = (prompts[4] * 128)[:128] + prompts[5][:9]
    prompts[6] = prompts[5][:128] + prompts[6][:30]
    return prompts


@functools.cache
def by_transformers(seed: int, num_tokens: int) -> list[list[int]]:
    """All seven as one batch, padded on the left."""
    prompts = seven_prompts(seed)
    longest = max(map(len, prompts))
    padded = torch.tensor([[0] * (longest - len(prompt)) + prompt for prompt in prompts])
    is_token = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    return twin_generates(seed, padded, is_token, num_tokens)


def twin_generates(seed: int, tokens: Tensor, is_token: Tensor, num_tokens: int) -> list[list[int]]:
    twin = transformers_twin(make_model(seed))
    settings = {"max_new_tokens": num_tokens, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    return twin.generate(tokens, attention_mask=is_token, **settings)[:, tokens.shape[1] :].tolist()


def engine_with(model: Zaya, num_blocks: int, **settings) -> Engine:
    return Engine(model, cache_bytes=num_blocks * block_bytes(model.config, torch.float32), max_running=7, **settings)


def run(engine: Engine, prompts: list[list[int]], num_tokens: int) -> list[list[int]]:
    params = SamplingParams(temperature=0, max_new_tokens=num_tokens, ignore_eos=True)
    return [output.completions[0].tokens for output in engine.generate(prompts, params)]


def check_alone_then_cached(seed: int, num_tokens: int, backend: str) -> None:
    """One after the other, then all at once, with blocks that those before them left."""
    prompts, expected = seven_prompts(seed), by_transformers(seed, num_tokens)
    assert len({tuple(tokens) for tokens in expected}) > 4, "the model says the same to all prompts"
    assert len({token for tokens in expected for token in tokens}) > 8, "the model repeats itself"
    with engine_with(make_model(seed), 200, backend=backend) as engine:
        assert [run(engine, [prompt], num_tokens)[0] for prompt in prompts] == expected
        assert run(engine, prompts, num_tokens) == expected
        stats = engine.stats()
        assert stats.preemptions == 0
        assert stats.cached_tokens >= sum((len(prompt) - 1) // 64 * 64 for prompt in prompts)


def check_preempted(seed: int, num_tokens: int, backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """All at once, chunk by chunk, in pools that do not hold them."""
    # Admitted without a spare block, candidates soon take each other's.
    monkeypatch.setattr(scheduler, "SPARE_BLOCKS", 0)
    prompts, expected = seven_prompts(seed), by_transformers(seed, num_tokens)
    longest = -(-max(len(prompt) + num_tokens for prompt in prompts) // 64)
    num_preemptions = 0
    for more in (0, 1):
        with engine_with(make_model(seed), longest + more, chunk_tokens=17, backend=backend) as engine:
            assert run(engine, prompts, num_tokens) == expected
            stats = engine.stats()
            assert stats.blocks_free == stats.blocks_total
            num_preemptions += stats.preemptions
    assert num_preemptions > 0


@pytest.mark.parametrize("backend", ["torch", "auto"])
def test_greedy_tokens_equal_transformers(backend: str, monkeypatch) -> None:
    check_alone_then_cached(4, 48, backend)
    check_preempted(4, 48, backend, monkeypatch)


def test_a_prompt_alone_gives_transformers_the_same() -> None:
    """Padding on the left is fair: it does not show in what ``transformers`` generates."""
    prompt = torch.tensor([seven_prompts(4)[2]])
    assert twin_generates(4, prompt, torch.ones_like(prompt), 48) == [by_transformers(4, 48)[2]]


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(10))
def test_512_tokens_of_ten_models(seed: int, monkeypatch) -> None:
    check_alone_then_cached(seed, 512, "auto")
    check_preempted(seed, 512, "auto", monkeypatch)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
def test_512_tokens_on_the_plain_runner(seed: int, monkeypatch) -> None:
    check_alone_then_cached(seed, 512, "torch")
    check_preempted(seed, 512, "torch", monkeypatch)
