"""Budgets against a model's context."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from openzaya.errors import RSAError
from openzaya.ttc.config import PRESETS, make_config
from openzaya.ttc.fitting import fit_context, needed_context


def test_what_fits_or_is_not_known_stays() -> None:
    for context in (None, 131_072):
        assert fit_context(PRESETS["default"], context, 500) == (PRESETS["default"], None)
    small = make_config("default", {"beta": 100, "tau": 10, "final_budget": 200})
    assert fit_context(small, needed_context(small, 50), 50) == (small, None)
    assert fit_context(small, needed_context(small, 50) - 1, 50)[1] is not None


@settings(derandomize=True, max_examples=300, deadline=None)
@given(st.sampled_from(sorted(PRESETS)), st.integers(3000, 120_000), st.integers(0, 1000))
def test_what_is_scaled_fits_and_wastes_little(name: str, context: int, num_prompt: int) -> None:
    fitted, note = fit_context(PRESETS[name], context, num_prompt)
    needed = needed_context(fitted, num_prompt)
    assert needed <= context
    if note is None:
        assert fitted == PRESETS[name]
    else:
        assert needed > context - 200 - fitted.c * 2
        assert f"{context:,}" in note and f"final_budget {PRESETS[name].final_budget:,} ->" in note


def test_the_proportions_stay() -> None:
    fitted, _ = fit_context(PRESETS["default"], 8192, 100)
    assert fitted.beta / fitted.tau == pytest.approx(4, rel=0.02)
    assert fitted.final_budget / fitted.beta == pytest.approx(2.5, rel=0.02)


def test_what_was_chosen_is_never_changed() -> None:
    config = make_config("default", {"beta": 300, "tau": 64})
    fitted, note = fit_context(config, 4096, 100, {"beta", "tau"})
    assert (
        (fitted.beta, fitted.tau) == (300, 64) and note is not None and "beta" not in note.replace("final_budget", "")
    )
    with pytest.raises(RSAError, match=r"cannot hold .* tau=64, and beta=300 or final_budget=40960"):
        fit_context(config, 4096, 100, {"beta", "tau", "final_budget"})


def test_a_question_that_leaves_no_room() -> None:
    with pytest.raises(RSAError, match="a question of 5,000"):
        fit_context(PRESETS["default"], 4096, 5000)
