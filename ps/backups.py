"""What workers pulled, kept until their pushes come, for delay compensation."""

import threading
from collections.abc import Collection, Iterator
from contextlib import contextmanager

from ps.snapshot import Snapshot, Snapshots


class Backups:
    """The last few versions that each worker pulled, pinned. Any thread may call.

    A worker that pulls ahead of its push has two of them under way. What is pulled beyond
    `per_worker` displaces the oldest, whose push is then not compensated.
    """

    def __init__(self, snapshots: Snapshots, per_worker: int) -> None:
        self._snapshots, self._per_worker = snapshots, per_worker
        self._lock = threading.Lock()
        self._kept: dict[int, list[Snapshot]] = {}

    def keep(self, worker: int, snapshot: Snapshot) -> None:
        """Keep a snapshot, which is pinned, for a push of this worker."""
        self._snapshots.pin_again(snapshot)
        with self._lock:
            kept = self._kept.setdefault(worker, [])
            kept.append(snapshot)
            surplus, kept[:] = kept[: -self._per_worker], kept[-self._per_worker :]
        self._release(surplus)

    @contextmanager
    def taken(self, worker: int, version: int) -> Iterator[Snapshot | None]:
        """What the worker pulled as `version`, if it is kept; given back after the block.

        All that it pulled before is given back as well.
        """
        with self._lock:
            kept = self._kept.pop(worker, [])
            versions = [snapshot.version for snapshot in kept]
            found = kept.pop(versions.index(version)) if version in versions else None
            ahead = [snapshot for snapshot in kept if snapshot.version >= version]
            if ahead:
                self._kept[worker] = ahead
        self._release([snapshot for snapshot in kept if snapshot.version < version])
        try:
            yield found
        finally:
            self._release([found] if found is not None else [])

    def drop(self, worker: int) -> None:
        """Give back all that is kept for a worker."""
        with self._lock:
            kept = self._kept.pop(worker, [])
        self._release(kept)

    def keep_only(self, workers: Collection[int]) -> None:
        """Give back what is kept for others than these."""
        for worker in [worker for worker in self._kept.copy() if worker not in workers]:
            self.drop(worker)

    def _release(self, snapshots: Collection[Snapshot]) -> None:
        for snapshot in snapshots:
            self._snapshots.release(snapshot)
