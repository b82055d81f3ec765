"""Versioned buffers: the update writes the next version while readers keep what they pinned.

A pull is never torn and never blocks an update: nobody writes to a published buffer until it is
neither the newest nor pinned. Memory is bounded by the readers: at most one buffer a reader, the
newest, and the one that is being written.
"""

import threading
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class Snapshot:
    """One version of a shard's parameters and BN statistics; read-only once published."""

    version: int
    parameters: Tensor
    statistics: Tensor
    pins: int = 0


class Snapshots:
    """The newest published version, the older ones still pinned, and spare buffers.

    Any thread may pin and release; one thread at a time writes (`next_buffer`, then `publish`).
    """

    def __init__(self, first: Snapshot) -> None:
        self._lock = threading.Lock()
        self._newest = first
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

    def pin(self) -> Snapshot:
        """The newest version, kept whole until `release`."""
        with self._lock:
            self._newest.pins += 1
            return self._newest

    def release(self, snapshot: Snapshot) -> None:
        """Give back one pin; the buffer may then be written again."""
        with self._lock:
            assert snapshot.pins > 0, "released more often than pinned"
            snapshot.pins -= 1
            if snapshot.pins == 0 and snapshot is not self._newest:
                self._pinned = [held for held in self._pinned if held is not snapshot]
                self._spare.append(snapshot)

    def next_buffer(self) -> Snapshot:
        """A buffer to write the next version into; its contents are arbitrary."""
        with self._lock:
            if self._spare:
                return self._spare.pop()
        newest = self._newest
        return Snapshot(
            newest.version,
            torch.empty_like(newest.parameters),
            torch.empty_like(newest.statistics),
        )

    def publish(self, snapshot: Snapshot, version: int) -> None:
        """Make a written buffer the newest version."""
        snapshot.version = version
        with self._lock:
            previous, self._newest = self._newest, snapshot
            (self._pinned if previous.pins else self._spare).append(previous)
