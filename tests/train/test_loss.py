"""The loss in blocks equals the textbook's, forward and backward; targets never cross a document's end."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from openzaya.data.packing import Batch
from openzaya.train import loss as loss_module
from openzaya.train.loop import targets_of
from openzaya.train.loss import linear_cross_entropy, plain_cross_entropy


def inputs(num_tokens: int, width: int, vocab: int, dtype: torch.dtype = torch.float32, seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    hidden = (2 * torch.randn(num_tokens, width, generator=generator)).to(dtype).requires_grad_()
    head = torch.randn(vocab, width, generator=generator).to(dtype).requires_grad_()
    return hidden, head, torch.randint(0, vocab, (num_tokens,), generator=generator)


def assert_twins_agree(hidden, head, targets, mask, tolerance: float = 1e-5) -> None:
    results = []
    for function in (linear_cross_entropy, plain_cross_entropy):
        leaves = [x.detach().clone().requires_grad_() for x in (hidden, head)]
        loss = function(*leaves, targets, mask)
        assert loss.dtype == torch.float32 and loss.shape == ()
        (loss * 0.37).backward()
        results.append((loss.detach(), *(leaf.grad for leaf in leaves)))
    for ours, twin in zip(*results, strict=True):
        assert ours.dtype == twin.dtype and ours.shape == twin.shape
        scale = max(1e-6, float(twin.abs().max()))
        assert float((ours.float() - twin.float()).abs().max()) <= tolerance * scale


@pytest.mark.parametrize("share", [0.0, 0.05, 0.5, 1.0])
def test_it_equals_its_twin(share: float) -> None:
    hidden, head, targets = inputs(133, 24, 71)
    mask = torch.rand(133, generator=torch.Generator().manual_seed(1)) < share
    assert_twins_agree(hidden, head, targets, mask)


@pytest.mark.parametrize("block_bytes", [4, 4 * 71 * 3, 4 * 71 * 50])
def test_blocks_do_not_show(block_bytes: int, monkeypatch) -> None:
    monkeypatch.setattr(loss_module, "BLOCK_BYTES", block_bytes)
    hidden, head, targets = inputs(101, 24, 71)
    assert_twins_agree(hidden, head, targets, torch.ones(101, dtype=torch.bool))


@settings(max_examples=25, derandomize=True, deadline=None)
@given(st.integers(1, 70), st.integers(1, 40), st.integers(2, 90), st.integers(0, 2**16))
def test_any_size(num_tokens: int, width: int, vocab: int, seed: int) -> None:
    hidden, head, targets = inputs(num_tokens, width, vocab, seed=seed)
    mask = torch.rand(num_tokens, generator=torch.Generator().manual_seed(seed)) < 0.6
    assert_twins_agree(hidden, head, targets, mask, 2e-5)


def test_bfloat16_weights_give_fp32_sums_and_gradients_in_their_own_dtype() -> None:
    hidden, head, targets = inputs(200, 32, 128, torch.bfloat16)
    mask = torch.rand(200, generator=torch.Generator().manual_seed(1)) < 0.8
    # The gradients are rounded to bfloat16 (8 bits) once; the loss itself is not rounded.
    assert_twins_agree(hidden, head, targets, mask, 2**-7)
    exact = plain_cross_entropy(hidden.double(), head.double(), targets, mask)
    assert float(linear_cross_entropy(hidden, head, targets, mask).detach()) == pytest.approx(
        float(exact.detach()), rel=1e-5
    )


def test_large_logits_stay_finite() -> None:
    hidden, head, targets = inputs(20, 16, 30)
    large = (hidden.detach() * 1000).requires_grad_()
    loss = linear_cross_entropy(large, head, targets, torch.ones(20, dtype=torch.bool))
    loss.backward()
    assert bool(torch.isfinite(loss)) and bool(torch.isfinite(large.grad).all())


def test_without_supervised_tokens_loss_and_gradients_are_zero() -> None:
    hidden, head, targets = inputs(9, 8, 20)
    loss = linear_cross_entropy(hidden, head, targets, torch.zeros(9, dtype=torch.bool))
    loss.backward()
    assert float(loss.detach()) == 0.0
    assert not hidden.grad.any() and not head.grad.any()


@pytest.mark.parametrize("frozen", [0, 1])
def test_a_frozen_input_gets_no_gradient_and_the_other_its_own(frozen: int) -> None:
    hidden, head, targets = inputs(30, 8, 20)
    leaves = [x.detach().clone().requires_grad_(index != frozen) for index, x in enumerate((hidden, head))]
    mask = torch.ones(30, dtype=torch.bool)
    linear_cross_entropy(*leaves, targets, mask).backward()
    plain_cross_entropy(hidden, head, targets, mask).backward()
    assert leaves[frozen].grad is None
    torch.testing.assert_close(leaves[1 - frozen].grad, (hidden, head)[1 - frozen].grad, atol=1e-5, rtol=1e-5)


# --- targets --------------------------------------------------------------------------------------


def batch_of(documents: list[list[list[int]]], length: int, masks: list[list[list[bool]]] | None = None) -> Batch:
    """Windows of documents of tokens; everything but a document's first token supervised by default."""
    shape = (len(documents), length)
    tokens, ids = torch.zeros(shape, dtype=torch.int64), torch.full(shape, -1)
    mask, positions = torch.zeros(shape, dtype=torch.bool), torch.zeros(shape, dtype=torch.int64)
    for row, window in enumerate(documents):
        start = 0
        for index, document in enumerate(window):
            end = start + len(document)
            tokens[row, start:end] = torch.tensor(document)
            given_mask = None if masks is None else masks[row][index]
            mask[row, start:end] = torch.tensor(given_mask or [False] + [True] * (len(document) - 1))
            ids[row, start:end] = index
            positions[row, start:end] = torch.arange(len(document))
            start = end
    return Batch(tokens, mask, ids, positions)


def test_targets_are_the_next_tokens_of_the_same_document() -> None:
    batch = batch_of([[[5, 6, 7], [8, 9]], [[1], [2, 3]]], 6)
    targets, mask = (x.view(2, 6) for x in targets_of(batch))
    assert mask.tolist() == [[True, True, False, True, False, False], [False, True, False, False, False, False]]
    assert targets[mask].tolist() == [6, 7, 9, 3]


def test_even_a_mask_that_asks_for_it_never_makes_a_document_predict_the_next() -> None:
    everything = [[[True, True, True], [True, True]]]
    _, mask = targets_of(batch_of([[[5, 6, 7], [8, 9]]], 5, everything))
    assert mask.tolist() == [True, True, False, True, False]


def test_the_last_token_of_a_row_does_not_predict_the_next_row() -> None:
    targets, mask = targets_of(batch_of([[[5, 6]], [[7, 8]]], 2, [[[True, True]], [[True, True]]]))
    assert mask.tolist() == [True, False, True, False]
    assert targets[mask].tolist() == [6, 8]


@settings(max_examples=40, derandomize=True, deadline=None)
@given(st.lists(st.lists(st.integers(1, 6), min_size=1, max_size=4), min_size=1, max_size=4), st.integers(0, 9))
def test_each_supervised_token_is_a_target_once(lengths: list[list[int]], seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    documents = [[torch.randint(1, 99, (n,), generator=generator).tolist() for n in window] for window in lengths]
    batch = batch_of(documents, 24)
    targets, mask = targets_of(batch)
    assert int(mask.sum()) == int(batch.loss_mask.sum())
    wanted = [token for window in documents for document in window for token in document[1:]]
    assert targets[mask].tolist() == wanted
