"""A shard shared by many threads: order, staging of pushes, and cuts at a version."""

import threading
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ps.lanes.segment import segment_of, shared_zeros
from ps.layout import ShardRanges
from ps.messages import ShardStatus
from ps.operations import Enter, Expect, Fence, Operation, perform
from ps.push import Order, Push
from ps.shard import Receipt, Shard, ShardConfig, ShardState
from ps.snapshot import Allocate, Snapshot


class NotLoaded(RuntimeError):
    """The shard has no state yet: Load comes first."""


class LateLoad(RuntimeError):
    """A state was to replace one that has moved on since; nothing was changed."""


@dataclass(frozen=True)
class Staging:
    """Room for one push: bytes arrive here whole before anything else is touched."""

    gradient: Tensor
    statistics_delta: Tensor

    @classmethod
    def for_ranges(cls, ranges: ShardRanges) -> "Staging":
        """Room for a float32 gradient."""
        return cls(torch.empty(ranges.parameters.numel), torch.empty(ranges.statistics.numel))

    def of(self, dtype: torch.dtype) -> "Staging":
        """The same memory, for a gradient of float32 or of a narrower dtype."""
        if dtype == self.gradient.dtype:
            return self
        narrow = self.gradient.view(dtype)[: self.gradient.numel()]
        return Staging(narrow, self.statistics_delta)


@dataclass
class _Cut:
    version: int
    names: Sequence[str] | None
    state: ShardState | None = None


class ShardService:
    """The only door to a shard. Updates are serialised; pulls never wait for them.

    Memory: one staging buffer for each push under way at once (none in the shm lane), one copy for
    each name of a cut, and `snapshot.max_buffers` of what is pulled.
    """

    def __init__(
        self,
        config: ShardConfig,
        clock: Callable[[], float] = time.perf_counter,
        allocate: Allocate = shared_zeros,
    ) -> None:
        """allocate: the memory of what is pulled; in private memory there is no shm lane."""
        self.config = config
        self._clock, self._allocate = clock, allocate
        self._lock = threading.Lock()
        self._captured = threading.Condition(self._lock)
        self._published = threading.Condition(self._lock)
        self._shard: Shard | None = None
        self._cuts: dict[str, _Cut] = {}
        self._spare_staging: list[Staging] = []
        self._apply_s = self._queue_s = self._gate_s = 0.0

    def load(self, state: ShardState) -> None:
        """Replace the shard's state; copies the vectors.

        Raises LateLoad if that would undo pushes or bring an earlier version back: the call
        comes late, and whoever made it has been answered, or has given it up.
        """
        shard = Shard(self.config, state, self._allocate)
        with self._lock:
            self._check_in_time(state)
            self._shard = shard
            self._cuts.clear()
            self._published.notify_all()

    def _check_in_time(self, state: ShardState) -> None:
        if self._shard is None:
            return
        if self._shard.settled or state.clocks.updates < self._shard.version:
            raise LateLoad(
                f"a state at version {state.clocks.updates} is to replace one at version "
                f"{self._shard.version}, which has settled pushes or is newer"
            )

    def _loaded(self) -> Shard:
        if self._shard is None:
            raise NotLoaded("the shard has no state yet")
        return self._shard

    def reached(self, version: int, wait_s: float, worker: int | None = None) -> bool:
        """Whether the shard has come to a version, and the policy lets `worker` pull.

        Waits up to `wait_s` seconds for both. worker: who is to compute from it, if anyone.
        """

        def may_pull() -> bool:
            shard = self._loaded()
            return shard.version >= version and shard.may_pull(worker)

        if self.config.policy.max_lead is None and self._loaded().version >= version:
            return True
        with self._published:
            start_s = self._clock()
            reached = self._published.wait_for(may_pull, wait_s)
            self._gate_s += self._clock() - start_s
            return reached

    @contextmanager
    def pinned(self, worker: int | None = None) -> Iterator[Snapshot]:
        """The version to pull, kept whole inside the block; see `Shard.pin`."""
        shard = self._loaded()
        snapshot = shard.pin(worker)
        try:
            yield snapshot
        finally:
            shard.release(snapshot)

    @contextmanager
    def staging(self, dtype: torch.dtype = torch.float32) -> Iterator[Staging]:
        """Room for one push with a gradient of this dtype, reused from push to push."""
        try:
            staging = self._spare_staging.pop()
        except IndexError:
            staging = Staging.for_ranges(self.config.ranges)
        try:
            yield staging.of(dtype)
        finally:
            self._spare_staging.append(staging)

    def may_be_mapped(self) -> bool:
        """Whether what is pulled lies where other processes can map it. Raises NotLoaded."""
        with self.pinned() as snapshot:
            return segment_of(snapshot.parameters) is not None

    def push(self, push: Push) -> Receipt:
        """Settle a staged push. Raises ForgottenReceipt, NotLoaded."""
        if push.order is not None:
            return self._follow(push, push.order)
        receipt: Receipt = self._settle(push)
        return receipt

    def _follow(self, push: Push, order: Order) -> Receipt:
        """Take a push from a primary."""
        raise NotLoaded(f"push {order.index} of a log, and this shard follows none")

    def expect(self, workers: Collection[int], number: int) -> None:
        """See `Shard.expect`. `number` rises from call to call; one that doesn't comes late.

        A late one would bring back who has gone since, and put out who has entered.
        """
        self._settle(Expect(frozenset(workers), number))

    def enter(self, worker: int, incarnation: int, clock: int | None = None) -> int:
        """See `Shard.enter`."""
        entered: int = self._settle(Enter(worker, incarnation, clock))
        return entered

    def fence(self, worker: int, incarnation: int) -> Mapping[int, int]:
        """See `Shard.fence`."""
        sequences: Mapping[int, int] = self._settle(Fence(worker, incarnation))
        return sequences

    def _settle(self, operation: Operation) -> Any:
        """Carry out what changes the shard, one after the other."""
        arrived_s = self._clock()
        with self._lock:
            return self._perform(self._loaded(), operation, arrived_s)

    def _perform(self, shard: Shard, operation: Operation, arrived_s: float) -> Any:
        """The lock is held."""
        start_s = self._clock()
        result = perform(shard, operation)
        if isinstance(operation, Push):
            self._queue_s += start_s - arrived_s
            self._apply_s += self._clock() - start_s
        self._notify(shard)
        return result

    def _notify(self, shard: Shard) -> None:
        """Wake the pulls that wait for this version, and make the cuts that do."""
        self._published.notify_all()
        self._capture_due(shard)

    def _capture_due(self, shard: Shard) -> None:
        due = [c for c in self._cuts.values() if c.state is None and shard.version >= c.version]
        for cut in due:
            cut.state = shard.capture(cut.names)
        if due:
            self._captured.notify_all()

    def cut(self, name: str, version: int, wait_s: float, names: Sequence[str] | None) -> None:
        """Keep a copy of the state at `version`, or at the present one after `wait_s` seconds."""
        with self._captured:
            shard = self._loaded()
            cut = self._cuts[name] = _Cut(version, names)
            self._capture_due(shard)
            self._captured.wait_for(lambda: cut.state is not None, timeout=wait_s)
            if cut.state is None:
                cut.state = shard.capture(names)

    def captured(self, name: str) -> ShardState | None:
        """The copy made by the last cut of this name."""
        with self._lock:
            cut = self._cuts.get(name)
            return cut.state if cut else None

    def release(self, name: str) -> None:
        """Free the copy."""
        with self._lock:
            self._cuts.pop(name, None)

    def status(self) -> ShardStatus:
        """Clocks and counters."""
        with self._lock:
            shard = self._loaded()
            return ShardStatus(
                shard.clocks,
                shard.last_sequences(),
                shard.num_buffers,
                {outcome.value: count for outcome, count in shard.settled.items()},
                self._apply_s,
                shard.num_uncompensated,
                queue_s=self._queue_s,
                gate_s=self._gate_s,
                num_pins=shard.num_pins,
            )
