"""Packing: nothing lost, best fit, always advances; batches that resume bit for bit."""

from __future__ import annotations

import json
import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from openzaya.data.mixture import Example, Mixture
from openzaya.data.packing import PackedBatches, assign, pack
from openzaya.errors import DataError


class RandomSource:
    """Example i: random length and contents from (seed, i)."""

    def __init__(self, name, longest, seed=0):
        self.name, self.longest, self.seed, self.index = name, longest, seed, 0

    def next_example(self):
        rng = random.Random(f"{self.name}/{self.seed}/{self.index}")
        self.index += 1
        size = rng.randint(1, self.longest)
        return Example(
            [rng.randrange(100) for _ in range(size)], [False] + [rng.random() < 0.7 for _ in range(size - 1)]
        )

    def state_dict(self):
        return {"index": self.index}

    def load_state_dict(self, state):
        self.index = state["index"]

    def report(self):
        return {}


def batches(longest=40, window=64, per_batch=3, shard=50, **settings):
    mix = Mixture([RandomSource("a", longest), RandomSource("b", longest // 2)], [2, 1], 7)
    return PackedBatches(mix, window, per_batch, shard, **settings)


def naive_best_fit(lengths, window):
    free, windows = [], []
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        fitting = [w for w in range(len(free)) if free[w] >= lengths[index]]
        if fitting:
            chosen = min(fitting, key=lambda w: free[w])
        else:
            chosen = len(free)
            free.append(window)
            windows.append([])
        free[chosen] -= lengths[index]
        windows[chosen].append(index)
    return free


@settings(max_examples=200, derandomize=True, deadline=None)
@given(lengths=st.lists(st.integers(1, 32), max_size=60))
def test_best_fit_decreasing(lengths):
    windows = assign(lengths, 32)
    assert sorted(index for window in windows for index in window) == list(range(len(lengths)))
    free = [32 - sum(lengths[i] for i in window) for window in windows]
    assert all(space >= 0 for space in free)
    assert sorted(free) == sorted(naive_best_fit(lengths, 32))


@settings(max_examples=100, derandomize=True, deadline=None)
@given(masks=st.lists(st.lists(st.booleans(), min_size=1, max_size=20), max_size=25))
def test_packing_loses_nothing(masks):
    examples = [Example([100 * i + t + 1 for t in range(len(mask))], mask) for i, mask in enumerate(masks)]
    found = []
    for window in pack(examples, 20, pad_token_id=0):
        for array, kind in ((window.tokens, "int64"), (window.loss_mask, "bool"), (window.positions, "int64")):
            assert array.shape == (20,) and array.dtype == kind
        padding = window.document_ids == -1
        assert not window.loss_mask[padding].any() and not window.tokens[padding].any()
        assert window.num_tokens == (~padding).sum()
        for document in range(window.document_ids.max() + 1):
            places = (window.document_ids == document).nonzero()[0]
            assert (window.positions[places] == range(len(places))).all()
            assert (places == range(places[0], places[0] + len(places))).all(), "whole and in one piece"
            found.append(Example(window.tokens[places].tolist(), window.loss_mask[places].tolist()))
    assert sorted(found, key=lambda example: example.tokens) == sorted(examples, key=lambda example: example.tokens)


def test_overlong_examples_are_an_error_or_skipped_by_policy():
    examples = [Example([1] * 5, [True] * 5), Example([2] * 9, [True] * 9)]
    with pytest.raises(DataError, match=r"1 of 2 examples exceed the window of 8 tokens \(the longest has 9\)"):
        pack(examples, 8)
    assert [window.num_tokens for window in pack(examples, 8, overlong="skip")] == [5]
    with pytest.raises(DataError, match="unknown overlong policy"):
        pack(examples, 8, overlong="cut")


def test_many_examples_in_large_windows_pack_tightly():
    rng = random.Random(0)
    lengths = [rng.randint(1, 131_072) for _ in range(20_000)]
    windows = assign(lengths, 131_072)
    assert sum(lengths) / (131_072 * len(windows)) > 0.98


def stacked(batch):
    return [getattr(batch, name) for name in ("tokens", "loss_mask", "document_ids", "positions")]


@pytest.mark.parametrize("num_before", [0, 1, 2, 6, 7, 8, 13, 25])
def test_resume_is_bit_identical(num_before):
    first = batches()
    for _ in range(num_before):
        next(first)
    state = json.loads(json.dumps(first.state_dict()))
    assert len(json.dumps(state)) < 2000
    second = batches()
    second.load_state_dict(state)
    assert second.state_dict() == state
    for _ in range(20):
        for ours, theirs in zip(stacked(next(first)), stacked(next(second)), strict=True):
            assert ours.dtype == theirs.dtype and torch.equal(ours, theirs)
    assert first.report() == second.report()


def test_batches_hold_every_example_of_the_mixture():
    stream = batches()
    windows = 0
    seen = []
    while windows == 0 or stream.state_dict()["counts"]["shards"] < 4:
        batch = next(stream)
        assert batch.tokens.shape == (3, 64) and batch.tokens.dtype == torch.int64
        assert batch.loss_mask.dtype == torch.bool
        windows += 3
        for tokens, documents in zip(batch.tokens, batch.document_ids, strict=True):
            seen += [tuple(tokens[documents == d].tolist()) for d in range(int(documents.max()) + 1)]
    mixture = batches().mixture
    expected = [tuple(mixture.next_example().tokens) for _ in range(4 * 50)]
    missing = list(expected)
    for example in seen:
        if example in missing:
            missing.remove(example)
    assert missing == [], "every example of the finished shards was emitted"
    report = stream.report()
    assert report["fill_rate"] > 0.9 and report["examples"] % 50 == 0


def test_long_examples_do_not_come_first():
    stream = batches(shard=400)
    lengths = [int((next(stream).document_ids == 0).sum(dim=1).max()) for _ in range(30)]
    assert lengths != sorted(lengths, reverse=True)


def test_skipped_examples_are_counted_and_an_impossible_shard_is_an_error():
    stream = batches(longest=90, overlong="skip")
    for _ in range(10):
        next(stream)
    report = stream.report()
    assert report["overlong_skipped"] > 0
    assert report["examples"] + report["overlong_skipped"] == 50 * report["shards"]
    with pytest.raises(DataError, match="exceed the window"):
        next(batches(longest=90))

    class Endless(RandomSource):
        def next_example(self):
            return Example([1] * 65, [False] * 65)

    with pytest.raises(DataError, match="none of 5 examples fits the window of 64 tokens"):
        next(PackedBatches(Mixture([Endless("long", 1)], [1], 0), 64, 1, 5, overlong="skip"))


def test_other_settings_or_changed_data_are_refused_on_resume():
    stream = batches()
    for _ in range(5):
        next(stream)
    state = stream.state_dict()
    with pytest.raises(DataError, match="resume with the same recipe"):
        batches(window=128).load_state_dict(state)
    with pytest.raises(DataError, match="the data changed"):
        batches().load_state_dict({**state, "windows_emitted": 10_000})
    # The batch size may change: the stream of windows is the same.
    other = batches(per_batch=1)
    other.load_state_dict(state)
    assert torch.equal(next(other).tokens[0], next(stream).tokens[0])
