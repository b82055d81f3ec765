"""Bounded memory of values that are dear to make again."""

import threading
from collections import OrderedDict
from collections.abc import Callable
from typing import Any, Generic, TypeVar

import numpy as np
from numpy.typing import NDArray

K = TypeVar("K")
V = TypeVar("V")


class RecentCache(Generic[K, V]):
    """The `limit` most recently used values.

    Shared by threads: one value is made at a time, so that two threads which miss the same key
    never both pay for it. Pickles as an empty cache.
    """

    def __init__(self, limit: int) -> None:
        assert limit >= 1, limit
        self._limit = limit
        self._values: OrderedDict[K, V] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, key: K, make: Callable[[], V]) -> V:
        """The value kept under `key`, made and kept if there is none."""
        with self._lock:
            if key not in self._values:
                # Room first, so that no more than `limit` values exist while one is made.
                while len(self._values) >= self._limit:
                    self._values.popitem(last=False)
                self._values[key] = make()
            self._values.move_to_end(key)
            return self._values[key]

    def __reduce__(self) -> tuple[Any, ...]:
        return RecentCache, (self._limit,)


CachedImage = tuple[NDArray[np.uint8], tuple[int, ...]]
"""An image and its labels."""


class ImageCache:
    """Decoded images, with their labels, up to `limit_bytes` in all; the rest isn't kept.

    Nothing is ever evicted: epochs visit every sample once, and under that pattern the least
    recently used image is the one needed next, so eviction would turn every read into a miss.
    """

    def __init__(self, limit_bytes: int) -> None:
        self._free_bytes = limit_bytes
        self._images: dict[tuple[int, int], CachedImage] = {}
        self._lock = threading.Lock()

    def get(self, place: tuple[int, int]) -> CachedImage | None:
        return self._images.get(place)

    def put(self, place: tuple[int, int], image: CachedImage) -> None:
        num_bytes = image[0].nbytes
        with self._lock:
            if place not in self._images and num_bytes <= self._free_bytes:
                self._images[place] = image
                self._free_bytes -= num_bytes
