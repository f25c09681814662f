"""Means and bootstrap intervals over problems."""

from __future__ import annotations

import math

import numpy as np
import pytest

from openzaya.intervals import mean_with_interval, paired_difference


def test_the_mean_lies_in_its_interval() -> None:
    mean, low, high = mean_with_interval([0.0, 0.25, 0.5, 1.0, 1.0])
    assert mean == pytest.approx(0.55)
    assert 0 <= low < mean < high <= 1


def test_equal_values_leave_no_doubt_and_no_values_say_nothing() -> None:
    assert mean_with_interval([1.0] * 7) == [1.0, 1.0, 1.0]
    assert mean_with_interval([0.5]) == [0.5, 0.5, 0.5]
    assert all(math.isnan(value) for value in mean_with_interval([]))


def test_the_same_numbers_give_the_same_interval() -> None:
    values = list(np.random.default_rng(0).random(50))
    assert mean_with_interval(values) == mean_with_interval(values)
    assert mean_with_interval(values) != mean_with_interval(values, seed=1)


@pytest.mark.parametrize("share", [0.3, 0.8])
def test_the_interval_covers_the_truth_as_often_as_it_says(share: float) -> None:
    """200 experiments of 60 problems, each the mean of 8 dependent samples: about 95 % of intervals hold the truth."""
    generator = np.random.default_rng(3)
    covered = 0
    for _ in range(200):
        # Every problem has its own chance: the samples of one problem are not independent observations.
        chances = generator.beta(2 * share, 2 * (1 - share), 60)
        _, low, high = mean_with_interval(list(generator.binomial(8, chances) / 8))
        covered += low <= share <= high
    # A percentile bootstrap of 60 is slightly narrow; 3 standard errors of 200 experiments are 4.6 points.
    assert 0.89 <= covered / 200 <= 0.99


def test_resampling_samples_instead_of_problems_would_not_cover() -> None:
    """Why problems are resampled: with all samples as observations the interval is far too narrow."""
    generator = np.random.default_rng(3)
    covered = 0
    for _ in range(100):
        chances = generator.beta(0.3, 0.3, 40)
        samples = (generator.random((40, 8)) < chances[:, None]).astype(float)
        _, low, high = mean_with_interval(samples.reshape(-1))
        covered += low <= 0.5 <= high
    assert covered < 85


def test_it_is_the_normal_interval_for_many_problems() -> None:
    values = np.random.default_rng(1).normal(0.5, 0.1, 2000)
    mean, low, high = mean_with_interval(values)
    half = 1.96 * values.std() / math.sqrt(values.size)
    assert low == pytest.approx(mean - half, rel=0.01) and high == pytest.approx(mean + half, rel=0.01)


def test_a_paired_difference_forgets_how_hard_the_problems_are() -> None:
    generator = np.random.default_rng(0)
    before = list(generator.random(80) * 0.9)
    after = [value + 0.05 + 0.01 * generator.random() for value in before]
    mean, low, high = paired_difference(before, after) or []
    assert 0.05 < low < mean < high < 0.06
    first, second = mean_with_interval(before), mean_with_interval(after)
    assert first[2] > second[1], "unpaired intervals overlap"


def test_a_paired_difference_uses_the_problems_that_have_both_numbers() -> None:
    assert paired_difference([0.0, None, 1.0, 0.5], [1.0, 1.0, None, 0.5]) == mean_with_interval([1.0, 0.0])
    assert paired_difference([None, 1.0], [1.0, None]) is None
    assert paired_difference([], []) is None
    with pytest.raises(ValueError, match="longer"):
        paired_difference([1.0], [1.0, 0.0])
