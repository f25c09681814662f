"""Packed documents equal the same documents run alone: logits and the gradients of every parameter.

In fp64 the two agree to 1e-12, so nothing leaks at all; in fp32, with the
C++ kernels and without, to rounding.
``transformers`` with position ids is run on the same window to show what a leak looks like.
"""

from __future__ import annotations

import random

import pytest
import torch
from torch import Tensor

from openzaya.errors import DataError
from openzaya.model.config import ZayaConfig
from openzaya.model.transformer import Zaya
from tests.model.reference import (
    TINY,
    gradients,
    logits_error,
    perturb,
    random_config,
    random_tokens,
    transformers_twin,
    worst_gradient_error,
)


def perturbed(config: ZayaConfig, seed: int, dtype: torch.dtype = torch.float32) -> Zaya:
    model = Zaya(config, seed=seed)
    perturb(model, torch.Generator().manual_seed(seed))
    if dtype == torch.float64:
        model.set_experts_implementation("loop")  # the grouped product of PyTorch has no fp64
    return model.to(dtype)


def document_ids(rows: list[list[int]]) -> Tensor:
    """int64 (rows, T) from the lengths of each row's documents; ids restart in each row."""
    return torch.stack([torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths)) for lengths in rows])


def alone(model: Zaya, tokens: Tensor, rows: list[list[int]]) -> Tensor:
    """The logits of every document run by itself, put together as in the packed windows."""
    return torch.stack(
        [
            torch.cat([model(document[None])[0] for document in row.split(lengths)])
            for row, lengths in zip(tokens, rows, strict=True)
        ]
    )


def check_packed_equals_alone(model: Zaya, rows: list[list[int]], seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    tokens = random_tokens(model.config, len(rows), sum(rows[0]), generator)
    logits_packed, logits_alone = model(tokens, document_ids=document_ids(rows)), alone(model, tokens, rows)
    exact = model.dtype == torch.float64
    assert logits_error(logits_packed, logits_alone) < (1e-12 if exact else 1e-5)
    # Any leak, forward or backward, meets these arbitrary output gradients.
    weights = torch.randn(logits_packed.shape, generator=generator).to(logits_packed.dtype)
    (logits_packed * weights).sum().backward()
    found = gradients(model)
    (logits_alone * weights).sum().backward()
    error, name = worst_gradient_error(found, gradients(model))
    assert error < (1e-10 if exact else 1e-4), name


BOTH_PRECISIONS = pytest.mark.parametrize("dtype", [torch.float64, torch.float32])


@BOTH_PRECISIONS
@pytest.mark.parametrize("kernels", [(1, 1), (2, 2), (1, 4), (4, 1), (4, 4), (3, 2)])
def test_every_length_from_1_to_12_in_one_window(kernels: tuple[int, int], dtype: torch.dtype, arithmetic: str) -> None:
    """Shorter and longer than kernels (up to 4 + 4) and sliding window (4), short ones side by side."""
    config = TINY.with_changes(cca_time0=kernels[0], cca_time1=kernels[1])
    lengths = [1, 1, *range(1, 13)]
    random.Random(kernels[0] * 10 + kernels[1]).shuffle(lengths)
    check_packed_equals_alone(perturbed(config, 1, dtype), [lengths], seed=1)


@BOTH_PRECISIONS
@pytest.mark.parametrize("seed", range(12))
def test_random_shapes_and_lengths_in_several_rows(seed: int, dtype: torch.dtype, arithmetic: str) -> None:
    draw = random.Random(seed)
    model = perturbed(random_config(draw), seed, dtype)
    length = draw.randint(1, 30)
    rows = []
    for _ in range(draw.randint(1, 4)):
        lengths: list[int] = []
        while sum(lengths) < length:
            lengths.append(min(draw.choice((1, 1, 2, 3, draw.randint(1, 20))), length - sum(lengths)))
        rows.append(lengths)
    check_packed_equals_alone(model, rows, seed)


def test_a_window_of_one_document_is_a_plain_row() -> None:
    model = perturbed(TINY, 2)
    tokens = random_tokens(TINY, 3, 10, torch.Generator().manual_seed(2))
    ids = torch.tensor([[5] * 10, [0] * 10, [7] * 10])
    assert logits_error(model(tokens, document_ids=ids), model(tokens)) < 1e-5


def test_equal_ids_at_a_row_border_are_two_documents() -> None:
    """The last document of a row and the first of the next have the same id, yet nothing passes between rows."""
    model = perturbed(TINY, 3, torch.float64)
    tokens = random_tokens(TINY, 2, 8, torch.Generator().manual_seed(3))
    ids = torch.tensor([[0, 0, 0, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 2, 2, 2]])
    both = model(tokens, document_ids=ids)
    for row in range(2):
        assert logits_error(both[row], model(tokens[row : row + 1], document_ids=ids[row : row + 1])[0]) < 1e-12


def test_the_future_and_other_documents_do_not_reach_a_token() -> None:
    """Changing the tokens of one document changes no bit of another's logits, before or behind it."""
    model = perturbed(TINY, 4)
    tokens = random_tokens(TINY, 1, 15, torch.Generator().manual_seed(4))
    ids = document_ids([[5, 1, 9]])
    before = model(tokens, document_ids=ids)
    changed = tokens.clone()
    changed[0, 5] = tokens[0, 5] % (TINY.vocab_size - 1) + 1
    after = model(changed, document_ids=ids)
    assert logits_error(after[:, :5], before[:, :5]) < 1e-6
    assert logits_error(after[:, 6:], before[:, 6:]) < 1e-6
    assert logits_error(after[:, 5], before[:, 5]) > 0.1


def test_positions_can_be_given_and_only_their_differences_count() -> None:
    model = perturbed(TINY, 5)
    tokens = random_tokens(TINY, 1, 12, torch.Generator().manual_seed(5))
    ids = document_ids([[5, 7]])
    restarting = torch.tensor([[*range(5), *range(7)]])
    packed = model(tokens, document_ids=ids)
    assert torch.equal(model(tokens, document_ids=ids, positions=restarting), packed)
    assert logits_error(model(tokens, document_ids=ids, positions=restarting + 3), packed) < 1e-5
    assert logits_error(model(tokens, document_ids=ids, positions=restarting * 2), packed) > 1e-2


def test_transformers_leaks_between_packed_documents_and_we_do_not() -> None:
    """The same window of six documents through both, against the documents alone.

    ``transformers`` keeps documents apart in attention (it finds them in restarting position ids), but its
    convolutions and delayed value run across: at these weights the
    first tokens' logits are off by 1.29 times the largest logit. Ours: 1e-6.
    """
    config = TINY.with_changes(layer_types=("hybrid",) * 3)
    model = perturbed(config, 6)
    twin = transformers_twin(model)
    lengths = [6, 1, 5, 3, 7, 2]
    tokens = random_tokens(config, 1, sum(lengths), torch.Generator().manual_seed(6))
    expected = alone(model, tokens, [lengths])
    ours = model(tokens, document_ids=document_ids([lengths]))
    positions = torch.cat([torch.arange(length) for length in lengths])[None]
    with torch.no_grad():
        theirs = twin(tokens, position_ids=positions, use_cache=False).logits
    first_tokens = (positions[0] == 0).nonzero()[1:, 0]

    def at(logits: Tensor, where: Tensor) -> float:
        return logits_error(logits[:, where], expected[:, where])

    assert logits_error(ours, expected) < 1e-5
    # The first document has nothing before it: there the two models agree, so the rest is the leak.
    assert at(theirs, torch.arange(lengths[0])) < 1e-5
    assert at(theirs, first_tokens) > 0.4


@pytest.mark.parametrize("attention_mask", [None, torch.ones(1, 6, dtype=torch.int64)])
def test_documents_go_with_neither_cache_nor_padding(attention_mask: Tensor | None) -> None:
    model = perturbed(TINY, 7)
    tokens = random_tokens(TINY, 1, 6, torch.Generator().manual_seed(7))
    cache = None if attention_mask is not None else model.make_cache(1, 8)
    with pytest.raises(DataError, match=r"document_ids.*pass one"):
        model(tokens, document_ids=document_ids([[2, 4]]), attention_mask=attention_mask, cache=cache)
