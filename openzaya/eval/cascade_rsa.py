"""Markovian RSA and single rollouts of the same model on the same problems, in numbers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from openzaya.eval.benchmarks import Score, summarise_scores
from openzaya.eval.cascade_jobs import RSAScore
from openzaya.intervals import mean_with_interval, paired_difference

RSA_BANDS = {"below 30 %": (0.0, 0.3), "30 to 70 %": (0.3, 0.7), "above 70 %": (0.7, 1.0), "all": (1.0, 1.1)}
"""Name -> lowest share of right single rollouts of a problem, and the one that belongs to the next band."""


def summarise_rsa(single: Sequence[Score], found: Sequence[RSAScore]) -> dict[str, Any]:
    """The table's numbers; ``single`` and ``found`` are aligned: entry i of each is problem i."""
    final, majority = [one.rounds[-1] for one in found], [one.majority for one in found]
    return {
        "n": len(found),
        "avg": interval(final),
        "rounds": [interval([one.rounds[index] for one in found]) for index in range(len(found[0].rounds))],
        "majority": interval(majority),
        "pass": interval([one.passed for one in found]),
        "truncation_rate": sum(one.truncated for one in found) / len(found),
        "tokens_per_problem": sum(one.num_tokens for one in found) / len(found),
        "single": summarise_scores(single),
        "gain": paired_difference([one.average for one in single], final),
        "gain_over_majority": paired_difference([one.majority for one in single], final),
        "majority_gain": paired_difference([one.majority for one in single], majority),
        "bands": _bands(single, found),
    }


def _bands(single: Sequence[Score], found: Sequence[RSAScore]) -> list[dict[str, Any]]:
    """RSA by how often single rollouts solve a problem.

    The last round is compared with RSA's own first one, which are single rollouts too, but not those that the bands
    are made by: what is chosen for its luck comes down to its mean again.
    """
    bands = []
    for name, (low, high) in RSA_BANDS.items():
        chosen = [
            rsa for one, rsa in zip(single, found, strict=True) if one.average is not None and low <= one.average < high
        ]
        band: dict[str, Any] = {"single_right": name, "n": len(chosen), "first": None, "final": None, "gain": None}
        if chosen:
            first, final = ([rsa.rounds[index] for rsa in chosen] for index in (0, -1))
            band |= {"first": interval(first), "final": interval(final), "gain": paired_difference(first, final)}
        bands.append(band)
    return bands


def interval(values: Sequence[float | None]) -> list[float] | None:
    """[mean, low, high] of those that are known."""
    known = [value for value in values if value is not None]
    return mean_with_interval(known) if known else None
