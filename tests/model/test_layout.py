"""Layouts: where documents begin, and arguments that contradict each other."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from openzaya.errors import DataError
from openzaya.model.layout import make_layout
from openzaya.model.transformer import Zaya
from tests.model.reference import TINY, logits_error, perturb, random_tokens


@settings(max_examples=50, derandomize=True, deadline=None)
@given(st.lists(st.lists(st.integers(0, 2), min_size=7, max_size=7), min_size=1, max_size=3))
def test_documents_are_the_runs_of_equal_ids_in_each_row(rows: list[list[int]]) -> None:
    lengths, offsets = [], []
    for row in rows:
        previous = None
        for document in row:
            if document != previous:
                lengths.append(0)
            offsets.append(lengths[-1])
            lengths[-1] += 1
            previous = document
    layout = make_layout(torch.zeros(len(rows), 7, dtype=torch.int64), document_ids=torch.tensor(rows))
    assert layout.document_lengths == lengths
    assert layout.offset_N.tolist() == layout.positions_N.tolist() == offsets


def test_rows_without_documents_are_documents() -> None:
    layout = make_layout(torch.zeros(2, 3, dtype=torch.int64))
    assert layout.offset_N.tolist() == layout.positions_N.tolist() == [0, 1, 2, 0, 1, 2]
    assert layout.is_token_N is None


def test_a_mask_of_ones_is_no_mask() -> None:
    tokens = torch.zeros(2, 3, dtype=torch.int64)
    assert make_layout(tokens, attention_mask=torch.ones_like(tokens)).is_token_BT is None
    assert make_layout(tokens, attention_mask=torch.tensor([[1, 1, 1], [0, 1, 1]])).is_token_N is not None


@pytest.mark.parametrize("name", ["document_ids", "positions", "attention_mask"])
@pytest.mark.parametrize("shape", [(2, 4), (1, 5), (5,), (2, 5, 1)])
def test_wrong_shapes_are_named(name: str, shape: tuple[int, ...]) -> None:
    arguments = {name: torch.ones(shape, dtype=torch.int64)}
    with pytest.raises(DataError, match=rf"{name} has shape .*tokens \(2, 5\); make them equal"):
        Zaya(TINY)(torch.ones(2, 5, dtype=torch.int64), **arguments)


@pytest.mark.parametrize("row", [[1, 1, 1, 1, 0], [0, 1, 0, 1, 1], [1, 0, 1, 1, 1]])
def test_padding_on_the_right_or_inside_is_refused(row: list[int]) -> None:
    tokens = torch.ones(2, 5, dtype=torch.int64)
    with pytest.raises(DataError, match=r"padding to the right.*pad rows on the left"):
        Zaya(TINY)(tokens, attention_mask=torch.tensor([[1] * 5, row]))


def test_padded_rows_equal_unpadded_ones() -> None:
    """A batch of four different paddings; a boolean mask and 0/1 integers mean the same."""
    model = Zaya(TINY, seed=1)
    perturb(model, torch.Generator().manual_seed(1))
    tokens = random_tokens(TINY, 4, 11, torch.Generator().manual_seed(1))
    mask = torch.ones_like(tokens)
    paddings = (0, 1, 6, 10)
    for row, padding in enumerate(paddings):
        mask[row, :padding] = 0
    logits = model(tokens, attention_mask=mask)
    assert torch.equal(logits, model(tokens, attention_mask=mask.bool()))
    for row, padding in enumerate(paddings):
        assert logits_error(logits[row, padding:], model(tokens[row : row + 1, padding:])[0]) < 1e-5


def test_a_row_of_nothing_but_padding_stays_finite_and_harms_no_other() -> None:
    model = Zaya(TINY, seed=2)
    perturb(model, torch.Generator().manual_seed(2))
    tokens = random_tokens(TINY, 2, 7, torch.Generator().manual_seed(2))
    mask = torch.ones_like(tokens)
    mask[1] = 0
    logits = model(tokens, attention_mask=mask)
    assert bool(logits.isfinite().all())
    assert logits_error(logits[0], model(tokens[:1])[0]) < 1e-5
    logits[0].sum().backward()
    assert all(bool(parameter.grad.isfinite().all()) for parameter in model.parameters())
