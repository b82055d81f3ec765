"""Versioned buffers: the update writes the next version while readers keep what they pinned.

A pull is never torn and never blocks an update: nobody writes to a published buffer until it is
neither the newest nor pinned. Memory is bounded by the readers: at most one buffer a reader, one
for each version that is kept besides, the newest, and the one that is being written.
"""

import threading
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ps.push import NewestPushes

Allocate = Callable[[int], Tensor]
"""Memory for so many float32 elements, with any contents."""


def max_buffers(num_readers: int, num_kept: int = 0) -> int:
    """Buffers that exist at most if so many readers pin one version each at a time.

    num_kept: versions kept besides, such as a policy's (`kept_versions`).
    """
    return num_readers + num_kept + 2


@dataclass
class Snapshot:
    """One version of a shard's parameters and BN statistics; read-only once published."""

    version: int
    parameters: Tensor
    statistics: Tensor
    pins: int = 0
    newest_pushes: NewestPushes = field(default_factory=dict)
    """What had been settled when it was made: what is in it, or was dropped before."""

    @classmethod
    def copy_of(
        cls,
        version: int,
        parameters: Tensor,
        statistics: Tensor,
        newest_pushes: NewestPushes,
        allocate: Allocate,
    ) -> "Snapshot":
        """A version with a copy of both vectors, side by side in memory from `allocate`."""
        snapshot = cls._empty(version, parameters.numel(), statistics.numel(), allocate)
        snapshot.parameters.copy_(parameters)
        snapshot.statistics.copy_(statistics)
        snapshot.newest_pushes = newest_pushes
        return snapshot

    def another(self, allocate: Allocate) -> "Snapshot":
        """A buffer of the same size; its contents are arbitrary."""
        numels = (self.parameters.numel(), self.statistics.numel())
        return self._empty(self.version, *numels, allocate)

    @classmethod
    def _empty(
        cls, version: int, num_parameters: int, num_statistics: int, allocate: Allocate
    ) -> "Snapshot":
        memory = allocate(num_parameters + num_statistics)
        return cls(version, memory[:num_parameters], memory[num_parameters:])


@dataclass(frozen=True)
class Pulled:
    """Which version a pull has put into the caller's vectors."""

    version: int
    newest_pushes: NewestPushes = field(default_factory=dict)
    """Those of the snapshot; empty to a caller that is no worker."""


class Snapshots:
    """The newest published version, the older ones still pinned, and spare buffers.

    Any thread may pin and release; one thread at a time writes (`next_buffer`, then `publish`).
    """

    def __init__(self, first: Snapshot, allocate: Allocate = torch.empty) -> None:
        self.allocate = allocate
        self._lock = threading.Lock()
        self._newest = first
        self._marked: Snapshot | None = None
        self._pinned: list[Snapshot] = []
        self._spare: list[Snapshot] = []

    @property
    def newest(self) -> Snapshot:
        """The last published version, for the writer's own use (unpinned)."""
        return self._newest

    @property
    def num_buffers(self) -> int:
        """Buffers that exist now, whatever their use."""
        with self._lock:
            return 1 + len(self._pinned) + len(self._spare)

    @property
    def num_pins(self) -> int:
        """Pins that have not been released."""
        with self._lock:
            return sum(each.pins for each in (self._newest, *self._pinned))

    def pin(self) -> Snapshot:
        """The newest version, kept whole until `release`."""
        with self._lock:
            self._newest.pins += 1
            return self._newest

    def pin_again(self, snapshot: Snapshot) -> None:
        """One pin more on a version that is pinned."""
        with self._lock:
            assert snapshot.pins > 0, "it may be written to already"
            snapshot.pins += 1

    @property
    def marked(self) -> Snapshot | None:
        """The version that `pin_marked` gives, for the writer's own use (unpinned)."""
        return self._marked

    def restore_mark(self, snapshot: Snapshot) -> None:
        """Mark a version that was published once, in place of the one marked before."""
        with self._lock:
            before, self._marked = self._marked, snapshot
            snapshot.pins += 1
            self._pinned.append(snapshot)
            if before is not None:
                self._unpin(before)

    def mark(self) -> None:
        """Keep the newest version for `pin_marked`, in place of the one marked before."""
        with self._lock:
            before, self._marked = self._marked, self._newest
            self._newest.pins += 1
            if before is not None:
                self._unpin(before)

    def pin_marked(self) -> Snapshot:
        """The marked version, kept whole until `release`."""
        with self._lock:
            assert self._marked is not None, "there is no mark"
            self._marked.pins += 1
            return self._marked

    def release(self, snapshot: Snapshot) -> None:
        """Give back one pin; the buffer may then be written again."""
        with self._lock:
            assert snapshot.pins > 0, "released more often than pinned"
            self._unpin(snapshot)

    def _unpin(self, snapshot: Snapshot) -> None:
        snapshot.pins -= 1
        if snapshot.pins == 0 and snapshot is not self._newest:
            self._pinned = [held for held in self._pinned if held is not snapshot]
            self._spare.append(snapshot)

    def next_buffer(self) -> Snapshot:
        """A buffer to write the next version into; its contents are arbitrary."""
        with self._lock:
            if self._spare:
                return self._spare.pop()
        return self._newest.another(self.allocate)

    def publish(self, snapshot: Snapshot, version: int) -> None:
        """Make a written buffer the newest version."""
        snapshot.version = version
        with self._lock:
            previous, self._newest = self._newest, snapshot
            (self._pinned if previous.pins else self._spare).append(previous)
