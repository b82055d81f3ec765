import io
import threading
from collections import Counter
from collections.abc import Generator, Iterator, Sequence
from itertools import islice, pairwise
from typing import cast

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from model.errors import InputError
from worker.data.lease import Lease
from worker.data.loader import Batch, BatchLoader
from worker.data.order import EpochOrder
from worker.data.source import LostShard, Sample
from worker.data.transform import AugmentSettings, Transform


class NumberedSource:
    """Sample n is a grey image of level n with the labels [n, n + 1]; `corrupt` do not decode."""

    class_names = None
    known_labels = None
    fetches = False

    def __init__(
        self,
        shard_sizes: tuple[int, ...],
        corrupt: frozenset[int] = frozenset(),
        cached_shards: int | None = None,
    ) -> None:
        self.shard_sizes = shard_sizes
        self.cached_shards = cached_shards
        self.reads: list[int] = []
        self._corrupt = corrupt

    def number(self, shard: int, index: int) -> int:
        return sum(self.shard_sizes[:shard]) + index

    def labels(self, shard: int, index: int) -> tuple[int, ...]:
        number = self.number(shard, index)
        return (number, number + 1)

    def announce(self, shards: Sequence[int]) -> None:
        pass

    def read(self, shard: int, index: int) -> Sample:
        number = self.number(shard, index)
        self.reads.append(number)
        buffer = io.BytesIO()
        Image.new("L", (2, 2), number).save(buffer, "PNG")
        image = b"broken" if number in self._corrupt else buffer.getvalue()
        return Sample(f"key-{number}", image, self.labels(shard, index))


class BrokenSource(NumberedSource):
    def read(self, shard: int, index: int) -> Sample:
        if self.number(shard, index) == 5:
            raise InputError("shard 0 is gone")
        return super().read(shard, index)


class DistantSource(NumberedSource):
    """Its shards come from afar, and those in `missing` never come."""

    fetches = True

    def __init__(self, shard_sizes: tuple[int, ...], missing: frozenset[int] = frozenset()) -> None:
        super().__init__(shard_sizes)
        self.announced: list[int] = []
        self._missing = missing

    def announce(self, shards: Sequence[int]) -> None:
        self.announced += shards

    def read(self, shard: int, index: int) -> Sample:
        assert shard in self.announced
        if shard in self._missing:
            raise LostShard(f"shard-{shard}", "403")
        return super().read(shard, index)


def loader(source: NumberedSource, window: int = 0, **options: float) -> BatchLoader:
    order = EpochOrder(source.shard_sizes, 1, window)
    arguments = {"batch_size": 4, "num_threads": 2, "prefetch_batches": 2} | options
    return BatchLoader(source, order, Transform(2), **arguments)  # type: ignore[arg-type]


def threads() -> set[str]:
    return {t.name for t in threading.enumerate() if t.name.startswith(("feed", "decode"))}


sizes = st.lists(st.integers(0, 9), min_size=1, max_size=5).filter(any).map(tuple)
spans = st.lists(st.tuples(st.integers(0, 80), st.integers(0, 25)), max_size=4)


@settings(deadline=None, max_examples=60)
@given(
    shard_sizes=sizes,
    spans=spans,
    window=st.integers(0, 30),
    corrupt=st.frozensets(st.integers(0, 45), max_size=10),
    batch_size=st.integers(1, 12),
    num_threads=st.integers(1, 4),
    prefetch_batches=st.integers(1, 5),
    cache_images_mb=st.sampled_from([0, 0.0001, 1]),
)
def test_every_position_once_and_in_order(
    shard_sizes: tuple[int, ...],
    spans: list[tuple[int, int]],
    window: int,
    corrupt: frozenset[int],
    batch_size: int,
    num_threads: int,
    prefetch_batches: int,
    cache_images_mb: float,
) -> None:
    source = NumberedSource(shard_sizes, corrupt)
    leases = [Lease(start, start + length) for start, length in spans]
    batches = list(
        loader(
            source,
            window,
            batch_size=batch_size,
            num_threads=num_threads,
            prefetch_batches=prefetch_batches,
            cache_images_mb=cache_images_mb,
        ).batches(iter(leases))
    )
    chunks = [(b.start, b.stop) for b in batches]
    assert [p for start, stop in chunks for p in range(start, stop)] == [
        p for lease in leases for p in range(lease.start, lease.stop)
    ]
    assert all(0 < stop - start <= batch_size for start, stop in chunks)
    assert len(chunks) == sum(-(-lease.num_samples // batch_size) for lease in leases)
    order = EpochOrder(shard_sizes, 1, window)
    for batch in batches:
        numbers = [source.number(*place) for place in order.locate(batch.start, batch.stop)]
        assert batch.corrupt_keys == tuple(f"key-{n}" for n in numbers if n in corrupt)
        check_contents(batch, [n for n in numbers if n not in corrupt])
    assert not threads()


def check_contents(batch: Batch, numbers: list[int]) -> None:
    expected = np.empty((len(numbers), 3, 2, 2), np.uint8)
    expected[:] = np.array(numbers, np.uint8)[:, None, None, None]
    np.testing.assert_array_equal(batch.images.numpy(), expected)
    assert batch.labels.num_images == len(numbers)
    assert batch.labels.ids.tolist() == [label for n in numbers for label in (n, n + 1)]


@pytest.mark.parametrize("num_ranks", [1, 2, 3, 12])
def test_ranks_that_take_turns_share_the_batches_out(num_ranks: int) -> None:
    source = NumberedSource((9, 20))
    leases = [Lease(0, 10), Lease(10, 11), Lease(13, 29)]
    whole = [batch.start for batch in loader(source).batches(leases)]
    for rank in range(num_ranks):
        own = loader(source).batches(leases, first=rank, every=num_ranks)
        assert [batch.start for batch in own] == whole[rank::num_ranks]


def test_a_batch_may_be_empty() -> None:
    (batch,) = loader(NumberedSource((3,), frozenset(range(3)))).batches([Lease(0, 3)])
    assert batch.images.shape == (0, 3, 2, 2)
    assert batch.labels.num_images == 0
    assert batch.corrupt_keys == ("key-0", "key-1", "key-2")


def test_samples_are_augmented_by_their_position() -> None:
    augment = AugmentSettings(max_shift=0.5)
    transform = Transform(8, 3, augment)

    class Pictured(NumberedSource):
        def read(self, shard: int, index: int) -> Sample:
            pixels = np.random.default_rng(index).integers(0, 256, (8, 8, 3), dtype=np.uint8)
            buffer = io.BytesIO()
            Image.fromarray(pixels).save(buffer, "PNG")
            return Sample("", buffer.getvalue(), ())

    source = Pictured((5,))
    order = EpochOrder((5,), 0, 5)
    for cache_images_mb in (0, 1):
        batches = BatchLoader(
            source, order, transform, batch_size=3, cache_images_mb=cache_images_mb
        ).batches([Lease(2, 14)])
        images = [image for batch in batches for image in batch.images.numpy()]
        for position, (place, image) in enumerate(zip(order.locate(2, 14), images, strict=True), 2):
            decoded = transform.decode(source.read(*place).image)
            np.testing.assert_array_equal(image, transform.augment(decoded, position))


def test_cached_images_are_read_once() -> None:
    source = NumberedSource((6,))
    cached = loader(source, 6, cache_images_mb=1, num_threads=1)
    for _ in cached.batches([Lease(0, 30)]):
        pass
    assert sorted(source.reads) == list(range(6))
    uncached = loader(source, 6, num_threads=1)
    for _ in uncached.batches([Lease(0, 12)]):
        pass
    assert len(source.reads) == 6 + 12


class WatchedLeases:
    """Counts what is taken from it."""

    def __init__(self) -> None:
        self.num_taken = 0

    def __iter__(self) -> Iterator[Lease]:
        while True:
            self.num_taken += 1
            yield Lease(0, 4)


@pytest.mark.parametrize("num_taken", [0, 1, 5])
def test_closing_ends_all_threads(num_taken: int) -> None:
    leases = WatchedLeases()
    batches = cast(Generator[Batch], loader(NumberedSource((8,))).batches(leases))
    assert len(list(islice(batches, num_taken))) == num_taken
    batches.close()
    assert not threads()
    assert leases.num_taken <= num_taken + 3  # two ahead, and the one in the consumer's hands


def test_leases_are_taken_only_when_there_is_room() -> None:
    """With one lease per batch and room for two, the third is taken for the first one's place."""
    taken = threading.Semaphore(0)
    count = 0

    def leases() -> Iterator[Lease]:
        nonlocal count
        while True:
            count += 1
            taken.release()
            yield Lease(0, 4)

    batches = cast(Generator[Batch], loader(NumberedSource((8,))).batches(leases()))
    for consumed in range(1, 6):
        next(batches)
        for _ in range(3 if consumed == 1 else 1):
            assert taken.acquire(timeout=60)
        assert count == consumed + 2
    batches.close()


def test_closing_waits_for_the_lease_under_way() -> None:
    taking, done = threading.Event(), threading.Event()

    def leases() -> Iterator[Lease]:
        yield Lease(0, 4)
        taking.set()
        sum(range(10**7))  # far longer than closing would take without waiting
        done.set()

    batches = cast(Generator[Batch], loader(NumberedSource((8,))).batches(leases()))
    next(batches)
    assert taking.wait(timeout=60)
    batches.close()
    assert done.is_set()
    assert not threads()


def test_a_consumer_that_raises_ends_all_threads() -> None:
    def consume() -> None:
        for _ in loader(NumberedSource((8,))).batches(WatchedLeases()):
            raise KeyError("consumer")

    with pytest.raises(KeyError, match="consumer"):
        consume()
    assert not threads()


def test_errors_of_the_leases_surface_after_the_batches_before_them() -> None:
    def leases() -> Iterator[Lease]:
        yield Lease(0, 8)
        raise ConnectionError("the coordinator is gone")

    batches = loader(NumberedSource((8,))).batches(leases())
    assert [(b.start, b.stop) for b in islice(batches, 2)] == [(0, 4), (4, 8)]
    with pytest.raises(ConnectionError, match="coordinator is gone"):
        next(batches)
    assert not threads()


def test_errors_of_the_source_surface_in_order() -> None:
    batches = loader(BrokenSource((16,))).batches([Lease(0, 16)])
    assert next(batches).start == 0
    with pytest.raises(InputError, match="shard 0 is gone"):
        next(batches)
    assert not threads()


def test_batches_may_be_iterated_twice_at_once() -> None:
    twice = loader(NumberedSource((30,)), 10)
    pairs = zip(twice.batches([Lease(0, 30)]), twice.batches([Lease(0, 30)]), strict=True)
    for left, right in pairs:
        np.testing.assert_array_equal(left.images.numpy(), right.images.numpy())


def test_a_window_of_more_shards_than_are_kept_is_refused() -> None:
    source = NumberedSource((4,) * 9, cached_shards=3)
    assert loader(source, 8).batches([])  # two shards, and a third where one is left over
    with pytest.raises(InputError, match=r"data\.cached_shards=3 .* data\.cached_shards=5"):
        loader(source, 9)


def test_chunks_follow_one_another() -> None:
    batches = list(loader(NumberedSource((7,))).batches([Lease(1, 12)]))
    assert all(a.stop == b.start for a, b in pairwise(batches))
    assert [b.stop - b.start for b in batches] == [3, 4, 4]


def test_shards_from_afar_are_announced_a_lease_ahead() -> None:
    source = DistantSource((4, 4, 4, 4))
    leases = [Lease(start, start + 4) for start in range(0, 16, 4)]
    batches = loader(source, 1, prefetch_batches=1).batches(leases)
    order = EpochOrder((4, 4, 4, 4), 1, 1).shards(0, 16)
    for number, batch in enumerate(batches):
        assert batch.start == 4 * number
        assert source.announced[: number + 2] == order[: number + 2]
    assert source.announced == order


@settings(deadline=None, max_examples=40)
@given(sizes, st.frozensets(st.integers(0, 4)), st.integers(0, 12))
def test_samples_of_lost_shards_are_left_out_and_counted(
    shard_sizes: tuple[int, ...], missing: frozenset[int], window: int
) -> None:
    source = DistantSource(shard_sizes, missing)
    total = sum(shard_sizes)
    batches = loader(source, window, skip_lost=True).batches([Lease(0, total)])
    lost: Counter[str] = Counter()
    for batch in batches:
        numbers = [
            source.number(*place)
            for place in EpochOrder(shard_sizes, 1, window).locate(batch.start, batch.stop)
            if place[0] not in missing
        ]
        check_contents(batch, numbers)
        lost.update(batch.lost)
        assert batch.labels.num_images + sum(batch.lost.values()) == batch.stop - batch.start
    sizes_of = {f"shard-{s}": size for s, size in enumerate(shard_sizes) if s in missing and size}
    assert lost == sizes_of


def test_a_lost_shard_is_an_error_unless_it_may_be_left_out() -> None:
    batches = loader(DistantSource((3, 3), frozenset({1}))).batches([Lease(0, 6)])
    with pytest.raises(InputError, match=r"shard-1: 403: .* data\.max_lost_shards"):
        list(batches)
    assert not threads()
