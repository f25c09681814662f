"""Subsets: drawn uniformly, seed by seed the same, and ordered so that prompts begin alike."""

from __future__ import annotations

import itertools
import statistics
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from openzaya.errors import ConfigError
from openzaya.ttc.subsets import canonical_order, derive_seed, draw_order, draw_subsets, shared_share


@given(st.integers(1, 20), st.integers(1, 9), st.integers(), st.integers(0, 9), st.integers(1, 20))
def test_subsets_are_without_repetition_and_of_the_size_asked(n: int, c: int, seed: int, round: int, num: int) -> None:
    subsets = draw_subsets(n, c, seed, round, population=num)
    assert len(subsets) == n
    for subset in subsets:
        assert len(subset) == len(set(subset)) == min(c, num)
        assert all(0 <= candidate < num for candidate in subset)


def test_a_draw_depends_on_seed_round_and_slot_alone() -> None:
    assert draw_subsets(16, 4, 7, 1)[:5] == draw_subsets(5, 4, 7, 1, population=16)
    assert [subset[:2] for subset in draw_subsets(16, 4, 7, 1)] == draw_subsets(16, 2, 7, 1)
    draws = [draw_subsets(16, 4, seed, round) for seed in (7, 8) for round in (1, 2)]
    assert all(one != other for one, other in itertools.combinations(draws, 2))
    assert len({tuple(subset) for subset in draws[0]}) > 10
    # Written down: a run is resumed with the same subsets by later versions too.
    assert draws[0][:3] == [[12, 0, 2, 1], [10, 2, 13, 1], [4, 9, 8, 0]]


def test_who_failed_changes_only_the_draws_that_held_it() -> None:
    whole, rest = draw_subsets(16, 4, 7, 1), draw_subsets(16, 4, 7, 1, available=set(range(16)) - {2})
    for slot, (before, after) in enumerate(zip(whole, rest, strict=True)):
        order = draw_order(16, 4, 7, 1, slot)
        assert before == order[:4] and after == [one for one in order if one != 2][:4]
        assert (before == after) == (2 not in before)
    assert [sorted(subset) for subset in draw_subsets(2, 4, 7, 1, 16, available=[9, 3])] == [[3, 9]] * 2


def test_one_tail_is_the_candidate_s_own() -> None:
    assert draw_subsets(5, 1, 3, 2) == [[0], [1], [2], [3], [4]]
    assert draw_subsets(4, 1, 3, 2, population=3) == [[0], [1], [2], [0]]
    assert draw_subsets(1, 4, 3, 2) == [[0]]


def test_all_subsets_and_first_places_are_equally_likely() -> None:
    counts: Counter[tuple[int, ...]] = Counter()
    for seed in range(1500):
        counts.update(tuple(subset) for subset in draw_subsets(4, 2, seed, 1))
    # 12 ordered pairs, 500 each expected with a standard deviation of 21.
    assert len(counts) == 12 and all(abs(count - 500) < 100 for count in counts.values())


@pytest.mark.parametrize("wrong", [{"n": 0}, {"c": 0}, {"population": 0}])
def test_numbers_below_one_are_refused(wrong: dict[str, int]) -> None:
    name = next(iter(wrong))
    with pytest.raises(ConfigError, match=f"{name}=0, expected at least 1"):
        draw_subsets(**{"n": 4, "c": 2, "seed": 0, "round": 0} | wrong)


@given(st.lists(st.lists(st.integers(0, 6), unique=True, max_size=5), max_size=8))
def test_the_order_changes_no_subset_and_does_not_ask_in_which_order_they_came(subsets: list[list[int]]) -> None:
    orders = canonical_order(subsets)
    assert [sorted(order) for order in orders] == [sorted(subset) for subset in subsets]
    assert canonical_order([subset[::-1] for subset in subsets]) == orders
    assert canonical_order(subsets[::-1]) == orders[::-1]


def test_the_order_by_hand() -> None:
    subsets = [[0, 1], [2, 1], [3, 0], [4], [], [1, 2, 3]]
    assert canonical_order(subsets) == [[1, 0], [1, 2], [0, 3], [4], [], [1, 2, 3]]
    assert canonical_order([]) == []


def test_prompts_share_as_much_as_the_file_says() -> None:
    draws = [draw_subsets(16, 4, seed, 1) for seed in range(200)]
    means = [
        statistics.mean(map(shared_share, orders))
        for orders in (draws, [[sorted(s) for s in draw] for draw in draws], map(canonical_order, draws))
    ]
    assert means == pytest.approx([0.097, 0.189, 0.322], abs=0.01)


@given(st.lists(st.lists(st.integers(0, 3), max_size=5), max_size=8))
def test_shared_are_all_elements_but_the_tree_s(sequences: list[list[int]]) -> None:
    nodes = {tuple(sequence[: end + 1]) for sequence in sequences for end in range(len(sequence))}
    total = sum(map(len, sequences))
    assert shared_share(sequences) == (pytest.approx(1 - len(nodes) / total) if total else 0)


def test_derived_seeds_differ_by_each_part_and_stay() -> None:
    seeds = {derive_seed(*parts) for parts in ((1,), (2,), (1, "a"), (1, "a", 0), (1, "a", 1), (1, "a0"))}
    assert len(seeds) == 6 and all(0 <= seed < 2**31 for seed in seeds)
    assert derive_seed(1, "a", 0) == 1224542509
