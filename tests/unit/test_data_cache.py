import pickle
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from worker.data.cache import ImageCache, RecentCache


@given(st.integers(1, 4), st.lists(st.integers(0, 6)))
def test_the_most_recent_are_kept(limit: int, keys: list[int]) -> None:
    """Against a plain list of keys, most recent last."""
    cache: RecentCache[int, int] = RecentCache(limit)
    recent: list[int] = []
    for key in keys:
        made: list[int] = []

        def make(key: int = key, made: list[int] = made) -> int:
            made.append(key)
            return 10 * key

        assert cache.get(key, make) == 10 * key
        assert bool(made) == (key not in recent)
        recent = [*(k for k in recent if k != key), key][-limit:]


def test_a_value_is_made_once_for_all_threads() -> None:
    cache: RecentCache[str, object] = RecentCache(1)
    barrier = Barrier(4)

    def make() -> object:
        sum(range(10**6))  # long enough for the others to miss too
        return object()

    def ask(_: int) -> object:
        barrier.wait()
        return cache.get("key", make)

    with ThreadPoolExecutor(4) as pool:
        assert len(set(pool.map(ask, range(4)))) == 1


def test_a_failure_is_not_kept() -> None:
    cache: RecentCache[str, int] = RecentCache(1)

    def fail() -> int:
        raise KeyError("broken")

    with pytest.raises(KeyError):
        cache.get("key", fail)
    assert cache.get("key", lambda: 1) == 1


def test_pickles_empty() -> None:
    cache: RecentCache[str, Callable[[], int]] = RecentCache(1)
    cache.get("key", lambda: lambda: 1)
    copy: RecentCache[str, int] = pickle.loads(pickle.dumps(cache))
    assert copy.get("key", lambda: 2) == 2


def test_images_are_kept_while_they_fit() -> None:
    cache = ImageCache(limit_bytes=35)
    images = [(np.full(10, i, np.uint8), (i,)) for i in range(4)]
    for _ in range(2):
        for i, image in enumerate(images):
            cache.put((0, i), image)
    assert [cache.get((0, i)) is image for i, image in enumerate(images)] == [True] * 3 + [False]
    cache.put((1, 0), (np.zeros(5, np.uint8), ()))
    assert cache.get((1, 0)) is not None


def test_an_image_put_again_takes_no_more_room() -> None:
    cache = ImageCache(limit_bytes=20)
    for place in ((0, 0), (0, 0), (0, 1)):
        cache.put(place, (np.zeros(10, np.uint8), ()))
    assert cache.get((0, 1)) is not None
