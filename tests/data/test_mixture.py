"""Mixtures: token shares, determinism, resume."""

from __future__ import annotations

import json

import pytest

from openzaya.data.mixture import MAX_CONSECUTIVE_SKIPS, Example, Mixture
from openzaya.errors import DataError


class CountingSource:
    """Example number i has ``length(i)`` tokens, all equal to i (None where the length is 0)."""

    def __init__(self, name, length):
        self.name, self.length, self.index = name, length, 0

    def next_example(self):
        i, self.index = self.index, self.index + 1
        size = self.length(i)
        return Example([i] * size, [False] + [True] * (size - 1)) if size else None

    def state_dict(self):
        return {"index": self.index}

    def load_state_dict(self, state):
        self.index = state["index"]

    def report(self):
        return {"items": self.index}


def mixture(seed=0, weights=(5, 3, 2, 0)):
    lengths = {
        "short": lambda i: 1 + i % 7,
        "long": lambda i: 50 + 40 * (i % 3),
        "gaps": lambda i: 9 * (i % 2),
        "off": lambda i: 5,
    }
    return Mixture([CountingSource(name, length) for name, length in lengths.items()], weights, seed)


def draw(mix, num):
    return [mix.next_example().tokens for _ in range(num)]


def test_token_shares_follow_the_weights():
    mix = mixture()
    draw(mix, 5000)
    report = mix.report()
    total = sum(entry["tokens"] for entry in report.values())
    for name, weight in {"short": 0.5, "long": 0.3, "gaps": 0.2, "off": 0.0}.items():
        assert abs(report[name]["tokens"] - weight * total) <= 130, "within one example of the longest source"
    assert report["short"]["supervised_tokens"] == report["short"]["tokens"] - report["short"]["examples"]
    assert report["off"]["items"] == 0


@pytest.mark.parametrize("num_before", [0, 1, 17, 1000])
def test_resume_is_exact(num_before):
    first = mixture()
    draw(first, num_before)
    state = json.loads(json.dumps(first.state_dict()))
    second = mixture()
    second.load_state_dict(state)
    assert draw(first, 300) == draw(second, 300)
    assert first.report() == second.report()


def test_the_same_seed_gives_the_same_order():
    assert draw(mixture(), 100) == draw(mixture(), 100)


def test_another_recipe_is_refused():
    state = mixture().state_dict()
    for other in (mixture(seed=1), mixture(weights=(5, 3, 1, 0))):
        with pytest.raises(DataError, match="resume with the same recipe"):
            other.load_state_dict(state)


def test_a_source_without_usable_examples_is_reported_not_looped_on():
    empty = CountingSource("empty", lambda i: 0)
    with pytest.raises(DataError, match=f"'empty': {MAX_CONSECUTIVE_SKIPS} items in a row"):
        Mixture([empty], [1.0], 0).next_example()


@pytest.mark.parametrize("weights", [(1, 2), (0, 0, 0, 0), (1, -1, 1, 1), (1, float("nan"), 1, 1)])
def test_bad_weights(weights):
    with pytest.raises(DataError, match="weights"):
        mixture(weights=weights)


def test_names_must_differ():
    with pytest.raises(DataError, match="names repeat"):
        Mixture([CountingSource("a", len), CountingSource("a", len)], [1, 1], 0)


def test_an_example_needs_a_mask_of_its_length():
    with pytest.raises(DataError, match="3 tokens and 2 mask entries"):
        Example([1, 2, 3], [True, False])
