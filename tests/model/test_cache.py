"""Decoding state: token by token, in chunks or in one pass, the logits are the same, and so are ``transformers``'.

Snapshots, rollback and forks are compared with runs that never took the other path.
"""

from __future__ import annotations

import random

import pytest
import torch
from torch import Tensor

from openzaya.errors import DataError
from openzaya.model.cache import DecodeCache
from openzaya.model.config import ZayaConfig, preset
from openzaya.model.transformer import Zaya
from tests.model.reference import (
    TINY,
    left_padding,
    logits_error,
    perturb,
    random_config,
    random_tokens,
    transformers_twin,
)

TOLERANCE = 1e-5
pytestmark = pytest.mark.usefixtures("no_gradients")


@pytest.fixture
def no_gradients():  # type: ignore[no-untyped-def]
    with torch.no_grad():
        yield


def perturbed(config: ZayaConfig, seed: int) -> Zaya:
    model = Zaya(config, seed=seed)
    perturb(model, torch.Generator().manual_seed(seed))
    return model


def feed(model: Zaya, cache: DecodeCache, tokens: Tensor, chunks: list[int], mask: Tensor | None = None) -> Tensor:
    """Logits of ``tokens``, appended to ``cache`` in chunks of the given sizes."""
    masks = [None] * len(chunks) if mask is None else mask.split(chunks, dim=1)
    pieces = zip(tokens.split(chunks, dim=1), masks, strict=True)
    return torch.cat([model(piece, attention_mask=part, cache=cache) for piece, part in pieces], dim=1)


def random_chunks(total: int, draw: random.Random) -> list[int]:
    chunks: list[int] = []
    while sum(chunks) < total:
        chunks.append(min(draw.choice((1, 1, 2, 3, 5, 9)), total - sum(chunks)))
    return chunks


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("seed", range(16))
def test_token_by_token_and_chunks_equal_the_full_pass(seed: int, padded: bool, arithmetic: str) -> None:
    draw = random.Random(seed)
    config = random_config(draw)
    model, rows, length = perturbed(config, seed), draw.randint(2, 3), draw.randint(2, 26)
    tokens = random_tokens(config, rows, length, torch.Generator().manual_seed(seed))
    mask = left_padding(rows, length, draw) if padded else None
    real = torch.ones_like(tokens, dtype=torch.bool) if mask is None else mask.bool()
    full = model(tokens, attention_mask=mask)
    for chunks in ([length], [1] * length, random_chunks(length, draw), [length - 1, 1]):
        cache = model.make_cache(rows, length + draw.randint(0, 3))
        cached = feed(model, cache, tokens, chunks, mask)
        assert cache.length == length
        assert logits_error(cached[real], full[real]) < TOLERANCE, chunks


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("seed", range(16))
def test_cached_decoding_equals_that_of_transformers(seed: int, padded: bool) -> None:
    """A prompt, then token by token; padding is masked in the prompt and seen in the cache from then on.

    A window of 1 is left out: there ``transformers``' cache keeps every key instead of none, and its cached logits
    are off by more than half of its own uncached ones.
    """
    from transformers import DynamicCache

    draw = random.Random(100 + seed)
    config = random_config(draw)
    config = config.with_changes(sliding_window=max(config.sliding_window or 0, 2))
    model, rows, length = perturbed(config, seed), 2, draw.randint(4, 20)
    tokens = random_tokens(config, rows, length, torch.Generator().manual_seed(seed))
    prompt = draw.randint(2, length - 1)
    mask = torch.ones_like(tokens)
    if padded:
        mask[1, : draw.randint(1, prompt - 1)] = 0
    twin = transformers_twin(model)
    theirs, their_cache = [], DynamicCache(config=twin.config)
    for start, end in [(0, prompt), *((i, i + 1) for i in range(prompt, length))]:
        output = twin(tokens[:, start:end], attention_mask=mask[:, :end], past_key_values=their_cache, use_cache=True)
        theirs.append(output.logits)
    cache = model.make_cache(rows, length)
    ours = [model(tokens[:, :prompt], attention_mask=mask[:, :prompt], cache=cache)]
    ours += [model(tokens[:, i : i + 1], cache=cache) for i in range(prompt, length)]
    real = mask.bool()
    assert logits_error(torch.cat(ours, 1)[real], torch.cat(theirs, 1)[real]) < TOLERANCE


def test_a_row_decodes_alike_alone_and_in_a_padded_batch() -> None:
    model = perturbed(TINY, 1)
    tokens = random_tokens(TINY, 3, 14, torch.Generator().manual_seed(1))
    mask = torch.ones_like(tokens)
    mask[1, :5], mask[2, :9] = 0, 0
    together = feed(model, model.make_cache(3, 14), tokens, [10, *[1] * 4], mask)
    for row, padding in enumerate((0, 5, 9)):
        own = tokens[row : row + 1, padding:]
        alone = feed(model, model.make_cache(1, 14), own, [10 - padding, *[1] * 4])
        assert logits_error(together[row : row + 1, padding:], alone) < TOLERANCE


def test_padding_ids_mean_nothing() -> None:
    model = perturbed(TINY, 2)
    tokens = random_tokens(TINY, 2, 10, torch.Generator().manual_seed(2))
    mask = torch.ones_like(tokens)
    mask[1, :6] = 0
    other = tokens.clone()
    other[1, :6] = 7
    real = mask.bool()
    first, second = (feed(model, model.make_cache(2, 10), ids, [3, 5, 2], mask)[real] for ids in (tokens, other))
    assert logits_error(first, second) < 1e-6
    assert bool(feed(model, model.make_cache(2, 10), tokens, [3, 5, 2], mask).isfinite().all())


@pytest.mark.parametrize("seed", range(8))
def test_rollback_then_other_tokens_equals_a_cold_run(seed: int) -> None:
    draw = random.Random(200 + seed)
    config = random_config(draw)
    model, generator = perturbed(config, seed), torch.Generator().manual_seed(seed)
    prompt, wrong, right = (random_tokens(config, 2, length, generator) for length in (9, 6, 5))
    mask = torch.ones_like(prompt)
    if seed % 2:
        mask[1, :4] = 0
    cache = model.make_cache(2, 15)
    start = cache.snapshot()
    feed(model, cache, prompt, random_chunks(9, draw), mask)
    snapshot = cache.snapshot()
    expected = feed(model, model.make_cache(2, 15), torch.cat((prompt, right), 1), [9, 5], _extended(mask, 5))[:, 9:]
    # The same snapshot serves more than once.
    for _ in range(2):
        cache.restore(snapshot)
        feed(model, cache, wrong, random_chunks(6, draw))
        cache.restore(snapshot)
        assert cache.length == 9
        assert logits_error(feed(model, cache, right, random_chunks(5, draw)), expected) < TOLERANCE
    cache.restore(start)
    again = feed(model, cache, prompt, [9])
    assert logits_error(again, model(prompt)) < TOLERANCE


def test_padding_fed_after_a_rollback_is_forgotten_with_it() -> None:
    model = perturbed(TINY, 3)
    tokens = random_tokens(TINY, 2, 8, torch.Generator().manual_seed(3))
    cache = model.make_cache(2, 8)
    empty = cache.snapshot()
    mask = torch.ones_like(tokens)
    mask[1, :5] = 0
    feed(model, cache, tokens, [8], mask)
    cache.restore(empty)
    assert logits_error(feed(model, cache, tokens, [3, 5]), model(tokens)) < TOLERANCE


@pytest.mark.parametrize("seed", range(8))
def test_forked_dropped_and_reordered_rows_go_on_as_their_own(seed: int) -> None:
    draw = random.Random(300 + seed)
    config = random_config(draw)
    model, generator = perturbed(config, seed), torch.Generator().manual_seed(seed)
    prompt = random_tokens(config, 3, 8, generator)
    mask = torch.ones_like(prompt)
    mask[1, :3] = 0
    cache = model.make_cache(3, 14)
    feed(model, cache, prompt, random_chunks(8, draw), mask)
    rows = torch.tensor([2, 1, 1, 2])
    cache.select(rows)
    continuations = random_tokens(config, 4, 6, generator)
    found = feed(model, cache, continuations, random_chunks(6, draw))
    whole = torch.cat((prompt[rows], continuations), dim=1)
    expected = model(whole, attention_mask=_extended(mask[rows], 6))[:, 8:]
    assert logits_error(found, expected) < TOLERANCE


def test_a_fork_does_not_write_into_its_sibling() -> None:
    model = perturbed(TINY, 4)
    generator = torch.Generator().manual_seed(4)
    prompt, end = random_tokens(TINY, 1, 6, generator), random_tokens(TINY, 2, 4, generator)
    cache = model.make_cache(1, 10)
    model(prompt, cache=cache)
    cache.select(torch.tensor([0, 0]))
    found = feed(model, cache, end, [1] * 4)
    for row in range(2):
        alone = model(torch.cat((prompt, end[row : row + 1]), 1))[:, 6:]
        assert logits_error(found[row : row + 1], alone) < TOLERANCE


def test_a_snapshot_survives_what_comes_after_it() -> None:
    """Its tensors are copies: more tokens, other rollbacks and another restore leave them as they were."""
    model = perturbed(TINY, 5)
    tokens = random_tokens(TINY, 1, 9, torch.Generator().manual_seed(5))
    cache = model.make_cache(1, 9)
    feed(model, cache, tokens[:, :5], [5])
    snapshot = cache.snapshot()
    before = [(history.clone(), delayed.clone()) for history, delayed in snapshot.layers]
    feed(model, cache, tokens[:, 5:], [1] * 4)
    cache.restore(snapshot)
    feed(model, cache, tokens[:, 5:], [4])
    for (history, delayed), kept in zip(snapshot.layers, before, strict=True):
        assert torch.equal(history, kept[0]) and torch.equal(delayed, kept[1])


def test_bfloat16_decoding_keeps_the_cca_state_in_fp32_and_agrees_with_the_full_pass() -> None:
    model = perturbed(TINY.with_changes(num_experts=1), 6)
    for block in model.model.layers:
        block.mlp.gate.balancing_biases.copy_(torch.tensor([0.0, -2.0]))
    model.to(torch.bfloat16)
    tokens = random_tokens(TINY, 2, 12, torch.Generator().manual_seed(6))
    cache = model.make_cache(2, 12)
    cached = feed(model, cache, tokens, [1] * 12)
    layer = cache.layers[0]
    assert layer.keys_BKSd.dtype == layer.values_BKSd.dtype == torch.bfloat16
    assert layer.z_history_BLC.dtype == layer.last_delayed_B1V.dtype == torch.float32
    assert logits_error(cached, model(tokens)) < 0.02


def test_last_only_gives_the_last_logits() -> None:
    model = perturbed(TINY, 7)
    tokens = random_tokens(TINY, 2, 7, torch.Generator().manual_seed(7))
    assert logits_error(model(tokens, last_only=True), model(tokens)[:, -1:]) < 1e-6


def test_overflow_wrong_rows_and_impossible_rollbacks_are_refused() -> None:
    model = perturbed(TINY, 8)
    tokens = random_tokens(TINY, 2, 6, torch.Generator().manual_seed(8))
    cache = model.make_cache(2, 8)
    model(tokens, cache=cache)
    late = cache.snapshot()
    with pytest.raises(DataError, match=r"6 tokens are cached and 3 more .*capacity of 8; create"):
        model(tokens[:, :3], cache=cache)
    with pytest.raises(DataError, match=r"holds 2 rows, the batch 1; make them equal"):
        model(tokens[:1, :1], cache=cache)
    # A refused call leaves the cache as it was.
    assert cache.length == 6
    assert logits_error(model(tokens[:, :2], cache=cache), model(torch.cat((tokens, tokens[:, :2]), 1))[:, 6:]) < 1e-5
    other = model.make_cache(2, 8)
    with pytest.raises(DataError, match=r"snapshot at 6 tokens is no point on the way to this cache.s 0 tokens"):
        other.restore(late)


def test_padding_behind_cached_tokens_is_refused() -> None:
    model = perturbed(TINY, 9)
    tokens = random_tokens(TINY, 2, 4, torch.Generator().manual_seed(9))
    cache = model.make_cache(2, 8)
    model(tokens, cache=cache)
    mask = torch.ones_like(tokens)
    mask[1, :2] = 0
    with pytest.raises(DataError, match=r"padding"):
        model(tokens, attention_mask=mask, cache=cache)


def _extended(mask: Tensor, length: int) -> Tensor:
    """``mask`` with ``length`` real tokens behind it."""
    return torch.cat((mask, mask.new_ones(mask.shape[0], length)), dim=1)


def test_a_stale_snapshot_is_refused() -> None:
    """Keys behind a rollback point are overwritten: a snapshot taken behind it must not come back."""
    model = Zaya(preset("smoke")).eval()
    tokens = torch.arange(12)[None]
    cache = model.make_cache(1, 32)
    model(tokens[:, :5], cache=cache)
    early = cache.snapshot()
    model(tokens[:, 5:9], cache=cache)
    late = cache.snapshot()
    cache.restore(early)
    cache.restore(early)
    model(tokens[:, :6], cache=cache)
    with pytest.raises(DataError, match="no point on the way"):
        cache.restore(late)
    cache.restore(early)
    cache.select(torch.tensor([0, 0]))
    with pytest.raises(DataError, match="no point on the way"):
        cache.restore(early)
