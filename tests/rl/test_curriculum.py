"""Calibration finds planted difficulties and follows a policy that improves; the online rule; the sampler."""

from __future__ import annotations

import json
import random

import numpy as np
import pytest

from openzaya.errors import DataError
from openzaya.rl.curriculum import IRTPool, IRTSettings, LeastSampledFirst, OnlineDifficulty

NUM_ROLLOUTS = 16


def pass_rate(difficulty, mu, slope):
    return 1 / (1 + np.exp((difficulty - mu) / slope))


def calibrate(pool, mu, slope, rng, num_groups=8):
    for _ in range(num_groups):
        difficulty = pool.ask()
        pool.observe(difficulty, int(rng.binomial(NUM_ROLLOUTS, pass_rate(difficulty, mu, slope))), NUM_ROLLOUTS)


def test_planted_difficulties_are_found():
    errors = []
    for seed in range(400):
        rng = np.random.default_rng(10_000 + seed)
        mu, slope = rng.uniform(0, 15), rng.uniform(0.2, 2)
        pool = IRTPool(seed=seed)
        calibrate(pool, mu, slope, rng)
        errors.append(abs(pool.estimate[0] - mu))
    assert np.mean(np.array(errors) <= 1) >= 0.95


def test_without_observations_nothing_is_found():
    """The check above can fail: the prior alone is within one level for few."""
    near = [
        abs(IRTPool(seed=seed).estimate[0] - np.random.default_rng(seed).uniform(0, 15)) <= 1 for seed in range(100)
    ]
    assert np.mean(near) < 0.3


def test_an_improving_policy_is_followed():
    errors = []
    for seed in range(100):
        rng = np.random.default_rng(seed)
        pool, mu = IRTPool(seed=seed), 3.0
        calibrate(pool, mu, 1.0, rng)
        for _ in range(40):
            mu += 0.15
            calibrate(pool, mu, 1.0, rng, num_groups=1)
        errors.append(pool.estimate[0] - mu)
    assert np.mean(np.abs(errors) <= 1.5) >= 0.95 and abs(np.mean(errors)) < 1


def test_questions_are_asked_near_the_target_and_never_below_zero():
    rng = np.random.default_rng(0)
    pool = IRTPool(IRTSettings(epsilon=0), seed=0)
    calibrate(pool, 7.0, 0.8, rng, num_groups=12)
    asked = [pool.ask() for _ in range(50)]
    assert abs(np.mean(asked) - 7) < 0.7 and pool.difficulty == 7
    assert pool.pass_rate(7) == pytest.approx(0.5, abs=0.15) and pool.deviation < 0.6
    too_hard = IRTPool(seed=0)
    calibrate(too_hard, -5.0, 1.0, rng)
    assert too_hard.difficulty == 0 and too_hard.ask() >= 0


def test_a_pool_goes_on_from_its_state():
    rng = np.random.default_rng(0)
    pool = IRTPool(seed=3)
    calibrate(pool, 5.0, 1.0, rng, num_groups=3)
    again = IRTPool(seed=99)
    again.load_state_dict(json.loads(json.dumps(pool.state_dict())))
    for _ in range(5):
        difficulty = pool.ask()
        assert again.ask() == difficulty
        pool.observe(difficulty, 4, 16)
        again.observe(difficulty, 4, 16)
    assert again.estimate == pool.estimate


@pytest.mark.parametrize("group", [(-1, 0, 16), (3, 17, 16), (3, -1, 16), (3, 0, 0)])
def test_impossible_groups_are_refused(group):
    with pytest.raises(DataError, match="expected 0 <= right"):
        IRTPool().observe(*group)


def test_online_rule():
    online = OnlineDifficulty(3)
    assert online.update(3, 0.7) == 3, "not above"
    assert online.update(3, 0.71) == 4
    assert online.update(3, 1.0) == 4, "of an older difficulty"
    assert online.update(3, 0.0) == 4
    assert online.update(4, 0.0) == 3
    assert online.num_groups == 3
    floor = OnlineDifficulty()
    assert floor.update(0, 0.0) == 0
    again = OnlineDifficulty()
    again.load_state_dict(online.state_dict())
    assert again == online
    with pytest.raises(DataError, match=r"pass_rate=1\.5"):
        online.update(3, 1.5)


def test_least_sampled_first():
    sampler, rng = LeastSampledFirst("abc"), random.Random(0)
    drawn = [sampler.next(rng) for _ in range(30)]
    assert all(set(drawn[i : i + 3]) == set("abc") for i in range(0, 30, 3))
    assert len({tuple(drawn[i : i + 3]) for i in range(0, 30, 3)}) > 1, "ties are drawn"
    again = LeastSampledFirst("abcd")
    again.load_state_dict(sampler.state_dict())
    assert again.counts == {"a": 10, "b": 10, "c": 10, "d": 10}
    with pytest.raises(DataError, match="no environments"):
        LeastSampledFirst([])
