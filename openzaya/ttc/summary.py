"""Figures of runs over many problems, from the runs as JSON.

    single      mean reward of round 0: what one rollout is worth
    majority_0  reward of round 0's most frequent answer: what voting makes of the same rollouts
    score       mean reward of the final round, the report's measure
    majority    reward of the final round's most frequent answer
    gain        score - single, problem by problem

Each with its 95 % bootstrap interval over problems (openzaya/intervals.py), over the problems that have a verdict.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from openzaya.intervals import mean_with_interval
from openzaya.runlog import format_duration
from openzaya.ttc.display import one_line

Run = Mapping[str, Any]
TITLES = {
    "single": "single rollout (round 0)",
    "majority_0": "majority of round 0",
    "score": "mean of the final round",
    "majority": "majority of the final round",
    "selected": "answer returned",
    "gain": "gain over a single rollout",
}


def rewards(round_: Run) -> list[float]:
    """Rewards of a round's candidates that have a verdict."""
    found = (candidate.get("correct") for candidate in round_["candidates"])
    return [reward for reward in found if reward is not None and math.isfinite(reward)]


def majority_reward(round_: Run) -> float | None:
    """Mean reward of the candidates that gave the most frequent answer, ties to the earliest; None without verdict."""
    votes: dict[str, list[float]] = {}
    counts: dict[str, int] = {}
    for candidate in round_["candidates"]:
        answer = candidate.get("answer")
        if answer is None:
            continue
        counts[answer] = counts.get(answer, 0) + 1
        if candidate.get("correct") is not None:
            votes.setdefault(answer, []).append(candidate["correct"])
    if not counts:
        # Nobody answered: that is wrong wherever right and wrong are told apart.
        return 0.0 if rewards(round_) else None
    return _mean(votes.get(max(counts, key=lambda answer: counts[answer]), []))


def problem_figures(run: Run) -> dict[str, float | None]:
    """One problem's figures, by the names above."""
    rounds = run.get("rounds") or []
    if not rounds or run.get("state") == "unfinished":
        return dict.fromkeys(TITLES)
    first, last = rounds[0], rounds[-1]
    single, score = _mean(rewards(first)), _mean(rewards(last))
    chosen = set(run.get("selected") or [])
    return {
        "single": single,
        "majority_0": majority_reward(first),
        "score": score,
        "majority": majority_reward(last),
        "selected": _mean(rewards({"candidates": [one for one in last["candidates"] if one["slot"] in chosen]})),
        "gain": None if single is None or score is None else score - single,
    }


def summarise(runs: Sequence[Run], errors: Mapping[str, str], seconds: float) -> dict[str, Any]:
    """All problems together, as JSON.

    Args:
        runs: those that came to their end.
        errors: of the problems that did not, what happened.
        seconds: wall-clock time of the whole.
    """
    figures = [problem_figures(run) for run in runs]
    measured = {}
    for name in TITLES:
        values = [value for one in figures if (value := one[name]) is not None]
        measured[name] = mean_with_interval(values) if values else None
    tokens: dict[str, int] = {}
    for run in runs:
        for name, value in run["tokens"].items():
            tokens[name] = tokens.get(name, 0) + value
    return {
        "num_problems": len(runs) + len(errors),
        "num_failed": len(errors),
        "num_scored": sum(one["score"] is not None for one in figures),
        "figures": measured,
        "truncation_rate": {"round_0": _cut_off(runs, 0), "final_round": _cut_off(runs, -1)},
        "failed_rollouts": sum(round_["failed"] for run in runs for round_ in run["rounds"]),
        "tokens": tokens,
        "seconds": round(seconds, 3),
    }


def summary_text(summary: Mapping[str, Any], errors: Mapping[str, str]) -> str:
    """The summary as a table for a person."""
    lines = []
    if summary["num_scored"]:
        lines.append(f"{'':<28} {'mean':>7}  95 % interval   over {summary['num_scored']} problems with a verdict")
    for name, title in TITLES.items():
        if (figure := summary["figures"][name]) is not None:
            mean, low, high = figure
            lines.append(f"{title:<28} {mean:>7.1%}  [{low:.1%}, {high:.1%}]")
    cut = summary["truncation_rate"]
    tokens = summary["tokens"]
    lines += [
        f"{summary['num_problems']} problems, {summary['num_failed']} failed, "
        f"{summary['failed_rollouts']} failed rollouts in the others",
        f"cut off at the budget: {_share(cut['round_0'])} of round 0, {_share(cut['final_round'])} of the final round",
        f"{tokens.get('completion', 0):,} new tokens, {tokens.get('prompt', 0):,} of prompts "
        f"({tokens.get('cached', 0):,} from a cache), {format_duration(summary['seconds'])}",
    ]
    lines += [f"failed: {one_line(name, 40)}: {one_line(error, 300)}" for name, error in errors.items()]
    return "\n".join(lines)


def _cut_off(runs: Sequence[Run], index: int) -> float | None:
    chosen = [run["rounds"][index] for run in runs if run["rounds"]]
    done = sum(candidate["status"] == "done" for round_ in chosen for candidate in round_["candidates"])
    return sum(round_["truncated"] for round_ in chosen) / done if done else None


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None


def _share(value: float | None) -> str:
    return "–" if value is None else f"{value:.1%}"
