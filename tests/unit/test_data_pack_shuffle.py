"""The external shuffle: a sort by hash, whatever the buckets, in bounded memory."""

import tracemalloc

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from asynception.data.shuffle import KeyShuffle, is_held_out, order_digest

RECORDS = st.lists(st.tuples(st.text(max_size=5), st.binary(max_size=30)), max_size=60)


def shuffled(folder, records, seed=0, bucket_num_bytes=500):
    shuffle = KeyShuffle(folder / "buckets", seed, bucket_num_bytes)
    for key, payload in records:
        shuffle.add(key, payload)
    found = list(shuffle.drain())
    assert list(folder.iterdir()) == []
    return found


@settings(max_examples=25, deadline=None)
@given(records=RECORDS, bucket_num_bytes=st.integers(20, 500), seed=st.integers(0, 2**64 - 1))
def test_it_is_a_sort_by_digest_for_any_bucket(records, bucket_num_bytes, seed, tmp_path_factory):
    found = shuffled(tmp_path_factory.mktemp("s"), records, seed, bucket_num_bytes)
    assert found == sorted((order_digest(key, seed), payload) for key, payload in records)


def test_seeds_give_unrelated_orders_that_have_no_trace_of_the_input(tmp_path):
    records = [(f"class{i // 500}/{i:04d}", b"%d" % i) for i in range(2000)]
    orders = [[int(p) for _, p in shuffled(tmp_path, records, seed)] for seed in (0, 1)]
    assert sorted(orders[0]) == list(range(2000))
    expected = sum(a == b for a, b in zip(*orders, strict=True))
    assert expected <= 8  # of 2000, one on average
    for order in orders:
        tenths = [sum(i < 500 for i in order[first : first + 200]) for first in range(0, 2000, 200)]
        assert all(25 <= count <= 75 for count in tenths)  # 50 on average, 4 sigma


def test_memory_does_not_grow_with_the_records(tmp_path):
    peaks = []
    for num_records in (4_000, 32_000):
        shuffle = KeyShuffle(tmp_path / "buckets", 0, 100_000)
        tracemalloc.start()
        for number in range(num_records):
            shuffle.add(str(number), bytes(500))
        for _ in shuffle.drain():
            pass
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < peaks[0] + 500_000  # of 17 MB of records


@pytest.mark.parametrize("share", [0.0, 0.01, 0.3])
def test_held_out_keys_are_a_share_and_stay_so_for_a_larger_one(share):
    keys = [str(number) for number in range(20_000)]
    held_out = [key for key in keys if is_held_out(key, share)]
    assert abs(len(held_out) - share * 20_000) <= 4 * (20_000 * share) ** 0.5
    assert all(is_held_out(key, share + 0.1) for key in held_out)
