"""Figures over problems, against sums by hand."""

from __future__ import annotations

from typing import Any

import pytest

from openzaya.ttc.summary import majority_reward, problem_figures, summarise, summary_text


def round_of(*candidates: tuple[str | None, float | None], truncated: int = 0, failed: int = 0) -> dict[str, Any]:
    """A round of (answer, reward) by slot."""
    return {
        "candidates": [
            {"slot": slot, "status": "done", "answer": answer, "correct": reward}
            for slot, (answer, reward) in enumerate(candidates)
        ],
        "truncated": truncated,
        "failed": failed,
    }


def run_of(*rounds: dict[str, Any], selected: tuple[int, ...] = (0,)) -> dict[str, Any]:
    return {"rounds": list(rounds), "selected": list(selected), "tokens": {"prompt": 10, "completion": 5}}


RIGHT, WRONG = ("42", 1.0), ("17", 0.0)


def test_one_problem() -> None:
    run = run_of(round_of(WRONG, WRONG, RIGHT, (None, 0.0)), round_of(RIGHT, WRONG, RIGHT, RIGHT), selected=(1,))
    assert problem_figures(run) == {
        "single": 0.25,
        "majority_0": 0.0,
        "score": 0.75,
        "majority": 1.0,
        "selected": 0.0,
        "gain": 0.5,
    }


def test_majority_of_special_rounds() -> None:
    assert majority_reward(round_of(WRONG, RIGHT)) == 0.0, "ties go to the earliest"
    assert majority_reward(round_of(("b", None), ("b", None), ("a", 1.0))) is None, "no verdict on the majority"
    assert majority_reward(round_of((None, 0.0), (None, 0.0))) == 0.0, "nobody answered"
    assert majority_reward(round_of((None, None))) is None
    assert majority_reward(round_of((None, 0.0), (None, 0.0), (None, 0.0), RIGHT)) == 1.0


def test_many_problems() -> None:
    good = run_of(round_of(RIGHT, WRONG, truncated=1), round_of(RIGHT, RIGHT))
    bad = run_of(round_of(WRONG, WRONG), round_of(WRONG, WRONG, failed=3))
    unjudged = run_of(round_of(("x", None)), round_of(("x", None)))
    errors = {"late": "no answer\nafter all retries"}
    summary = summarise([good, bad, unjudged], errors, 12.5)
    assert summary["num_problems"] == 4 and summary["num_failed"] == 1 and summary["num_scored"] == 2
    assert summary["figures"]["single"][0] == 0.25 and summary["figures"]["score"][0] == 0.5
    assert summary["figures"]["gain"][0] == 0.25
    low, high = summary["figures"]["score"][1:]
    assert low == 0.0 and high == 1.0, "two problems leave everything open"
    assert summary["truncation_rate"] == {"round_0": pytest.approx(1 / 5), "final_round": 0.0}
    assert summary["tokens"] == {"prompt": 30, "completion": 15} and summary["failed_rollouts"] == 3
    text = summary_text(summary, errors)
    assert "over 2 problems with a verdict" in text and "failed: late: no answer after all retries" in text
    assert "50.0%  [0.0%, 100.0%]" in text


def test_nothing_at_all() -> None:
    summary = summarise([], {"a": "x"}, 0.0)
    assert set(summary["figures"].values()) == {None} and summary["truncation_rate"]["round_0"] is None
    assert "1 problems, 1 failed" in summary_text(summary, {"a": "x"})
