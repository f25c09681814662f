"""Means with intervals that respect how the numbers were sampled.

k samples of one problem are not k independent observations: intervals of avg@k, pass@k and majority@k resample
problems, not samples (percentile bootstrap over problems, 95 %).
"""

from __future__ import annotations

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
