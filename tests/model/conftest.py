"""Fixtures of the model's tests: the arithmetic to run a test with."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from openzaya.kernels import build, calls


@pytest.fixture(params=["kernels", "plain"])
def arithmetic(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Runs a test twice: with the C++ kernels wherever there is one, few tokens or not, and in plain PyTorch."""
    if request.param == "plain":
        with calls.disabled():
            yield request.param
        return
    if not build.available():
        pytest.skip("no C++ compiler on this machine")
    monkeypatch.setattr(calls, "MIN_TOKENS", 1)
    yield request.param
