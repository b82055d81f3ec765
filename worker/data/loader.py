"""Batches of decoded images for the leased positions, made ahead in threads."""

import threading
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import islice
from queue import SimpleQueue

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from model.errors import InputError
from worker.data.cache import CachedImage, ImageCache
from worker.data.labels import LabelLists
from worker.data.lease import Lease
from worker.data.order import EpochOrder
from worker.data.source import ImageSource, LostShard
from worker.data.transform import CorruptImage, Transform


@dataclass(frozen=True)
class Batch:
    """The samples at positions start <= p < stop, without those that can't be had."""

    images: Tensor
    """uint8 (N, 3, H, W); N may be 0."""
    labels: LabelLists
    """Of the same N images."""
    start: int
    stop: int
    corrupt_keys: tuple[str, ...]
    """The samples left out because they don't decode."""
    lost: Mapping[str, int] = field(default_factory=dict)
    """The samples left out with their shard, by its name. Together with the corrupt ones and the
    N images they make stop - start."""


class BatchLoader:
    """Reads, decodes and augments leased positions, `prefetch_batches` ahead of the consumer.

    cache_images_mb: decoded images (before augmentation) to keep in memory, in 10^6 bytes; the
    images of small sets are then decoded once instead of once per epoch.
    pin_memory: put batches into pinned memory, from where a GPU copies them by itself.
    skip_lost: leave out the samples of shards that can't be had, instead of raising InputError.
    Raises InputError when a shuffle window spans more compressed shards than the source keeps,
    since almost every read would then decompress a shard.
    """

    def __init__(
        self,
        source: ImageSource,
        order: EpochOrder,
        transform: Transform,
        *,
        batch_size: int,
        num_threads: int = 1,
        prefetch_batches: int = 4,
        cache_images_mb: float = 0,
        skip_lost: bool = False,
        pin_memory: bool = False,
    ) -> None:
        assert min(batch_size, num_threads, prefetch_batches) >= 1
        _check_window_fits(source, order)
        self._source = source
        self._order = order
        self._transform = transform
        self._batch_size = batch_size
        self._num_threads = num_threads
        self._prefetch_batches = prefetch_batches
        self._cache = ImageCache(int(cache_images_mb * 1e6)) if cache_images_mb else None
        self._skip_lost, self._pin_memory = skip_lost, pin_memory

    def batches(self, leases: Iterable[Lease], first: int = 0, every: int = 1) -> Iterator[Batch]:
        """Yield the batches of each lease, of at most `batch_size` positions, in order.

        Of all these, counted from 0, only number `first` and each `every`-th after it.

        `leases` is iterated in a background thread, and one is taken only when there is room to
        read ahead; of a source that fetches, one more. What it raises, and what reading raises, is
        raised here, after the batches before it. No thread outlives the generator: closing it
        waits for the lease and the batches that are under way, so fetching a lease must have a
        deadline.
        """
        chunks = islice(self._chunks(leases), first, None, every)
        feed = _Feed(chunks, self._load, self._prefetch_batches)
        pool = ThreadPoolExecutor(self._num_threads, "decode")
        feeder = threading.Thread(target=feed.run, args=(pool,), name="feed", daemon=True)
        feeder.start()
        try:
            while (pending := feed.ready.get()) is not None:
                batch = pending.result()
                feed.room.release()
                yield batch
        finally:
            feed.stop()
            feeder.join()
            pool.shutdown(cancel_futures=True)

    def _chunks(self, leases: Iterable[Lease]) -> Iterator[Lease]:
        """The positions of each batch."""
        for lease in self._announced(leases):
            yield from lease.batches(self._batch_size)

    def _announced(self, leases: Iterable[Lease]) -> Iterator[Lease]:
        """The leases; where shards take long to fetch, each once the next one's are under way."""
        if not self._source.fetches:
            yield from leases
            return
        waiting: deque[Lease] = deque()
        for lease in leases:
            self._source.announce(self._order.shards(lease.start, lease.stop))
            waiting.append(lease)
            if len(waiting) > 1:
                yield waiting.popleft()
        yield from waiting

    def _load(self, chunk: Lease) -> Batch:
        size = self._transform.image_size
        shape = (chunk.num_samples, 3, size, size)
        tensor = torch.empty(shape, dtype=torch.uint8, pin_memory=self._pin_memory)
        images: NDArray[np.uint8] = tensor.numpy()
        labels: list[tuple[int, ...]] = []
        corrupt: list[str] = []
        lost: Counter[str] = Counter()
        places = self._order.locate(chunk.start, chunk.stop)
        for position, place in enumerate(places, chunk.start):
            try:
                images[len(labels)], found = self._read(place, position)
            except _Corrupt as error:
                corrupt.append(error.key)
            except LostShard as error:
                lost[error.name] += 1
                if not self._skip_lost:
                    raise InputError(
                        f"{error}: mend or restore it, or let data.max_lost_shards be skipped"
                    ) from None
            else:
                labels.append(found)
        return Batch(
            tensor[: len(labels)],
            LabelLists.from_lists(labels),
            chunk.start,
            chunk.stop,
            tuple(corrupt),
            lost,
        )

    def _read(self, place: tuple[int, int], position: int) -> CachedImage:
        """The image as it is seen at a position, and its labels. Raises _Corrupt, LostShard."""
        if self._cache is not None:
            image, labels = self._decoded(place, self._cache)
            return self._transform.augment(image, position), labels
        sample = self._source.read(*place)
        try:
            return self._transform.load(sample.image, position), sample.labels
        except CorruptImage:
            raise _Corrupt(sample.key) from None

    def _decoded(self, place: tuple[int, int], cache: ImageCache) -> CachedImage:
        found = cache.get(place)
        if found is None:
            sample = self._source.read(*place)
            try:
                found = self._transform.decode(sample.image), sample.labels
            except CorruptImage:
                raise _Corrupt(sample.key) from None
            cache.put(place, found)
        return found


class _Corrupt(Exception):
    """The sample called `key` doesn't decode."""

    def __init__(self, key: str) -> None:
        super().__init__(key)
        self.key = key


class _Feed:
    """Takes chunks while there is room ahead of the consumer, and has them loaded."""

    def __init__(
        self, chunks: Iterator[Lease], load: Callable[[Lease], Batch], num_ahead: int
    ) -> None:
        self.ready: SimpleQueue[Future[Batch] | None] = SimpleQueue()
        """Batches in order, under way or done; None at the end."""
        self.room = threading.Semaphore(num_ahead)
        self._chunks = chunks
        self._load = load
        self._stopped = False

    def run(self, pool: ThreadPoolExecutor) -> None:
        try:
            # Room before the chunk, so that no lease is taken before it can be worked on.
            while self._wait_for_room() and (chunk := next(self._chunks, None)) is not None:
                self.ready.put(pool.submit(self._load, chunk))
        except BaseException as error:  # whatever it is, the consumer must not wait for ever
            failed: Future[Batch] = Future()
            failed.set_exception(error)
            self.ready.put(failed)
        self.ready.put(None)

    def stop(self) -> None:
        self._stopped = True
        self.room.release()

    def _wait_for_room(self) -> bool:
        self.room.acquire()
        return not self._stopped


def _check_window_fits(source: ImageSource, order: EpochOrder) -> None:
    kept, needed = source.cached_shards, order.max_window_shards
    if kept is not None and needed > kept:
        raise InputError(
            f"data.cached_shards={kept} is less than the {needed} compressed shards that "
            f"data.shuffle_window={order.shuffle_window} can span, so nearly every image would "
            f"decompress a shard: set data.cached_shards={needed}, lower data.shuffle_window, or "
            "store plain tars"
        )
