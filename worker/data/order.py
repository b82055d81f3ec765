"""The order of samples as a pure function of position, so that ranges say what was seen."""

from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from worker.data.cache import RecentCache
from worker.data.seeding import ORDER, random_words


@dataclass(frozen=True)
class _EpochPlan:
    """One epoch's shards in order, and where they are cut into windows."""

    shards: NDArray[np.int64]
    window_bounds: list[int]
    """Window w is made of shards[window_bounds[w]:window_bounds[w + 1]]."""
    window_starts: list[int]
    """Samples before each window, and the total."""


@dataclass(frozen=True)
class _Window:
    """The samples of one window in order: sample i is `index[i]` of shard `shard[i]`."""

    shard: NDArray[np.int64]
    index: NDArray[np.int64]


class EpochOrder:
    """Which sample stands at each global position, the same in every process.

    Position p lies in epoch p // num_samples, and every epoch holds each sample exactly once.
    An epoch permutes the shards, cuts them into windows of at least `shuffle_window` samples
    (whole shards; a smaller data set is one window) and permutes the samples of each window.
    So shards are read a few at a time, and memory is that of a window.

    shuffle_window: 0 keeps the stored order, in every epoch.
    """

    def __init__(self, shard_sizes: Sequence[int], seed: int, shuffle_window: int) -> None:
        assert sum(shard_sizes) > 0
        assert min(*shard_sizes, seed, shuffle_window) >= 0, (seed, shuffle_window)
        self._sizes = np.array(shard_sizes, np.int64)
        self._filled = np.flatnonzero(self._sizes)
        self._num_samples = int(self._sizes.sum())
        self._seed = seed
        self._shuffle_window = shuffle_window
        # Two of each: a loader that reads ahead is at the end of one and the start of the next.
        self._plans: RecentCache[int, _EpochPlan] = RecentCache(2)
        self._windows: RecentCache[tuple[int, int], _Window] = RecentCache(2)

    @property
    def num_samples(self) -> int:
        """Samples in an epoch."""
        return self._num_samples

    @property
    def shuffle_window(self) -> int:
        return self._shuffle_window

    @property
    def max_window_shards(self) -> int:
        """No window of any epoch has more shards than this."""
        ascending = np.cumsum(np.sort(self._sizes[self._filled]))
        enough = int(np.searchsorted(ascending, max(1, self._shuffle_window))) + 1
        # The last window also takes in a rest too small to be a window: fewer than `enough`.
        longest = 2 * enough - 1 if self._shuffle_window else 1
        return min(longest, len(self._filled))

    def shards(self, start: int, stop: int) -> list[int]:
        """The shards of the samples at positions start <= p < stop, in the order of first use."""
        return list(dict.fromkeys(shard for shard, _ in self.locate(start, stop)))

    def window_end(self, position: int) -> int:
        """The end of the window that holds a position: up to there, no other shards are read."""
        epoch, offset = divmod(position, self._num_samples)
        starts = self._plan(epoch).window_starts
        return epoch * self._num_samples + starts[bisect_right(starts, offset)]

    def num_windows(self, epoch: int) -> int:
        """Windows of an epoch."""
        return len(self._plan(epoch).window_starts) - 1

    def locate(self, start: int, stop: int) -> list[tuple[int, int]]:
        """(shard, index) of the samples at positions start <= p < stop."""
        assert 0 <= start <= stop, (start, stop)
        places: list[tuple[int, int]] = []
        while start < stop:
            epoch, offset = divmod(start, self._num_samples)
            plan = self._plan(epoch)
            number = bisect_right(plan.window_starts, offset) - 1
            window = self._window(epoch, number)
            first = offset - plan.window_starts[number]
            end = min(len(window.shard), first + stop - start)
            places += zip(
                window.shard[first:end].tolist(), window.index[first:end].tolist(), strict=True
            )
            start += end - first
        return places

    def _plan(self, epoch: int) -> _EpochPlan:
        return self._plans.get(epoch, lambda: self._make_plan(epoch))

    def _window(self, epoch: int, number: int) -> _Window:
        # The plan is looked up outside: a cache must not be entered from within itself.
        plan = self._plan(epoch)
        return self._windows.get((epoch, number), lambda: self._make_window(plan, epoch, number))

    def _make_plan(self, epoch: int) -> _EpochPlan:
        shards = self._filled[self._permutation(len(self._filled), epoch, 0)]
        starts = np.cumsum([0, *self._sizes[shards]]).tolist()
        bounds = _window_bounds(starts, max(1, self._shuffle_window))
        return _EpochPlan(shards, bounds, [starts[bound] for bound in bounds])

    def _make_window(self, plan: _EpochPlan, epoch: int, number: int) -> _Window:
        shards = plan.shards[plan.window_bounds[number] : plan.window_bounds[number + 1]]
        sizes = self._sizes[shards]
        shard = np.repeat(shards, sizes)
        index = np.arange(len(shard)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
        order = self._permutation(len(shard), epoch, 1 + number)
        return _Window(shard[order], index[order])

    def _permutation(self, length: int, epoch: int, part: int) -> NDArray[np.int64]:
        if not self._shuffle_window:
            return np.arange(length)
        return np.argsort(random_words(length, self._seed, ORDER, epoch, part), kind="stable")


def _window_bounds(starts: list[int], min_samples: int) -> list[int]:
    """Cut shards, with starts[i] samples before shard i, into windows of at least min_samples.

    Returns the first shard of each window, and the number of shards.
    """
    bounds = [0]
    while bounds[-1] < len(starts) - 1:
        end = bisect_left(starts, starts[bounds[-1]] + min_samples)
        rest = starts[-1] - starts[end] if end < len(starts) else 0
        bounds.append(end if rest >= min_samples else len(starts) - 1)
    return bounds
