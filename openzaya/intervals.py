"""Means with intervals that respect how the numbers were sampled.

k samples of one problem are not k independent observations: intervals of avg@k, pass@k and majority@k resample
problems, not samples (percentile bootstrap over problems, 95 %). Two models that were asked the same problems are
compared problem by problem: what makes a problem hard for both is then no part of the difference.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

RESAMPLES = 2000


def mean_with_interval(per_problem: NDArray[np.float64] | list[float], *, seed: int = 0) -> list[float]:
    """[mean, low, high]: the mean over problems and its 95 % bootstrap interval; NaN for no problems."""
    values = np.asarray(per_problem, dtype=np.float64)
    if values.size == 0:
        return [float("nan")] * 3
    draws = np.random.default_rng(seed).integers(0, values.size, (RESAMPLES, values.size))
    low, high = np.quantile(values[draws].mean(axis=1), (0.025, 0.975))
    return [float(values.mean()), float(low), float(high)]


def paired_difference(
    before: Sequence[float | None], after: Sequence[float | None], *, seed: int = 0
) -> list[float] | None:
    """[mean, low, high] of ``after - before`` over the problems that have both numbers; None where none has.

    The two are aligned: entry i of each is problem i.
    """
    pairs = [(a, b) for a, b in zip(before, after, strict=True) if a is not None and b is not None]
    return mean_with_interval([b - a for a, b in pairs], seed=seed) if pairs else None
