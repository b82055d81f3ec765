import pickle
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from worker.data.lease import Lease
from worker.data.order import EpochOrder
from worker.data.seeding import random_words

sizes = st.lists(st.integers(0, 12), min_size=1, max_size=12).filter(any)
windows = st.integers(0, 60)
seeds = st.integers(0, 2**40)


def stored(shard_sizes: list[int]) -> list[tuple[int, int]]:
    return [(shard, index) for shard, size in enumerate(shard_sizes) for index in range(size)]


@given(sizes, seeds, windows, st.integers(0, 5))
def test_every_epoch_is_a_permutation(
    shard_sizes: list[int], seed: int, window: int, epoch: int
) -> None:
    n = sum(shard_sizes)
    order = EpochOrder(shard_sizes, seed, window)
    assert order.num_samples == n
    assert sorted(order.locate(epoch * n, (epoch + 1) * n)) == stored(shard_sizes)


@given(sizes, seeds, windows, st.data())
def test_any_cut_gives_the_same_samples(
    shard_sizes: list[int], seed: int, window: int, data: st.DataObject
) -> None:
    n = sum(shard_sizes)
    whole = EpochOrder(shard_sizes, seed, window).locate(0, 3 * n)
    cuts = data.draw(st.lists(st.integers(0, 3 * n), min_size=1, max_size=6))
    order = EpochOrder(shard_sizes, seed, window)
    for cut in cuts:  # in any sequence, so no answer depends on an earlier question
        assert order.locate(cut, 3 * n) == whole[cut:]
        assert order.locate(0, cut) == whole[:cut]


@pytest.mark.parametrize(
    ("window", "ends"),
    [
        (1, [10, 20, 30, 40, 50, 60, 70, 80, 90, 100]),
        (15, [20, 40, 60, 80, 100]),
        (25, [30, 60, 100]),
        (60, [100]),
        (1000, [100]),
    ],
)
def test_windows_are_whole_shards_of_enough_samples(window: int, ends: list[int]) -> None:
    """A window ends where every shard that was begun is complete."""
    places = EpochOrder([10] * 10, 4, window).locate(0, 100)
    seen = Counter[int]()
    complete = []
    for position, (shard, _) in enumerate(places, 1):
        seen[shard] += 1
        if all(count == 10 for count in seen.values()):
            complete.append(position)
    assert complete == ends


@given(sizes, seeds, windows)
def test_no_more_shards_are_open_than_announced(
    shard_sizes: list[int], seed: int, window: int
) -> None:
    order = EpochOrder(shard_sizes, seed, window)
    seen = Counter[int]()
    for shard, _ in order.locate(0, order.num_samples):
        seen[shard] += 1
        is_open = [count < shard_sizes[shard] for shard, count in seen.items()]
        assert sum(is_open) <= order.max_window_shards


@given(sizes, seeds)
def test_window_zero_keeps_the_stored_order(shard_sizes: list[int], seed: int) -> None:
    n = sum(shard_sizes)
    order = EpochOrder(shard_sizes, seed, 0)
    assert order.locate(0, 2 * n) == 2 * stored(shard_sizes)
    assert order.max_window_shards == 1


def test_epochs_seeds_and_windows_differ() -> None:
    order = EpochOrder([100] * 4, seed=1, shuffle_window=100)
    other = EpochOrder([100] * 4, seed=2, shuffle_window=100)
    first, second = order.locate(0, 400), order.locate(400, 800)
    assert len({tuple(first), tuple(second), tuple(other.locate(0, 400))}) == 3
    shard_orders = {
        tuple(shard for shard, _ in order.locate(e * 400, e * 400 + 400)) for e in range(9)
    }
    assert len(shard_orders) > 1
    inner = {tuple(index for _, index in first[at : at + 100]) for at in range(0, 400, 100)}
    assert len(inner) == 4


def test_a_small_set_is_shuffled_uniformly() -> None:
    """Each sample stands equally often at each place: chi-squared over 720 epochs of 6."""
    order = EpochOrder([1, 2, 3], seed=3, shuffle_window=6)
    number = {place: i for i, place in enumerate(stored([1, 2, 3]))}
    counts = np.zeros((6, 6))
    for position, place in enumerate(order.locate(0, 720 * 6)):
        counts[position % 6, number[place]] += 1
    assert ((counts - 120) ** 2 / 120).sum() < 52.6  # p = 0.001 at 25 degrees of freedom


def test_another_process_agrees() -> None:
    shard_sizes = [5, 0, 17, 3, 9]
    code = (
        "from worker.data.order import EpochOrder\n"
        f"print(EpochOrder({shard_sizes}, 11, 12).locate(20, 100))"
    )
    root = Path(__file__).parents[2]
    answer = subprocess.run(
        [sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True
    ).stdout
    assert answer.strip() == str(EpochOrder(shard_sizes, 11, 12).locate(20, 100))


def test_the_order_never_changes() -> None:
    """Positions are written into checkpoints, so another version must read them alike."""
    assert EpochOrder([3, 2], 5, 5).locate(0, 5) == [(1, 0), (0, 2), (0, 1), (0, 0), (1, 1)]
    assert random_words(2, 1, 2, 3).tolist() == [9479379789068640953, 15798532992614286419]


def test_words_of_different_purposes_and_lengths_differ() -> None:
    keys = [(0, 0), (0, 0, 0), (0, 1), (1, 0), (0, 2**32), (0, 0, 1)]
    assert len({tuple(random_words(2, 7, *key).tolist()) for key in keys}) == len(keys)


@settings(deadline=None, max_examples=3)
@given(st.integers(0, 10**10))
def test_a_hundred_thousand_shards_cost_one_window(position: int) -> None:
    order = EpochOrder([1000] * 100_000, 0, 8192)
    places = order.locate(position, position + 1000)
    assert len(set(places)) == 1000
    assert len({shard for shard, _ in places}) <= 2 * order.max_window_shards == 2 * 17


def test_pickled_orders_agree() -> None:
    order = EpochOrder([4, 5, 6], 1, 8)
    expected = order.locate(3, 40)
    assert pickle.loads(pickle.dumps(order)).locate(3, 40) == expected


def test_a_lease_counts_its_samples() -> None:
    assert Lease(3, 10).num_samples == 7
