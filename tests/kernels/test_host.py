"""Memory that is used again: the same pages come back, and never while a tensor lies on them."""

from __future__ import annotations

import pytest
import torch

from openzaya.kernels import host


@pytest.fixture(autouse=True)
def _small_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host, "RECYCLE_FROM_BYTES", 1024)
    monkeypatch.setattr(host, "_free", {})


def test_memory_comes_back_when_the_last_tensor_is_gone() -> None:
    first = host.recycled_empty(20, 30)
    view, address = first[3:], first.data_ptr()
    del first
    other = host.recycled_empty(20, 30)
    assert other.data_ptr() != address
    del view
    assert host.recycled_empty(30, 20).data_ptr() == address


def test_a_gradient_keeps_its_memory() -> None:
    parameter = torch.nn.Parameter(torch.zeros(20, 30))
    gradient = host.recycled_empty(20, 30).fill_(2)
    parameter.grad = gradient
    del gradient
    host.recycled_empty(20, 30).zero_()
    assert parameter.grad is not None and bool((parameter.grad == 2).all())


def test_small_tensors_are_left_to_torch() -> None:
    assert host.recycled_empty(4, 4).shape == (4, 4)
    assert not host._free
    host.release_recycled()
