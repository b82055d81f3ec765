"""Which samples a run has consumed: leases out to workers, settled by their acknowledged pushes.

The order of samples is a pure function of a global position (`worker.data.order`), so all that is
to be known of the data is which positions are done. Batch n of a worker's life is its push n, or
lies in push n // H with H local steps, so the newest sequence that the shards have settled says how
far each lease has come: also of a worker that died, and exactly as of the version at which a
checkpoint was cut.
"""

import copy
import sys
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Self

from worker.data.lease import Lease
from worker.data.order import EpochOrder


@dataclass(frozen=True, slots=True)
class _Issued:
    """A lease as given to a worker's life, whose first batch is number `first_batch` of it."""

    lease: Lease
    first_batch: int
    stop: int
    """Where it ends: with the lease, or where a life that ended had come to."""

    def cut(self, num_batches: int, batch_size: int) -> int:
        """The position up to which it is consumed once the life has so many batches behind it."""
        num_done = max(0, num_batches - self.first_batch)
        return min(self.stop, self.lease.after(num_done, batch_size))

    def rest(self, num_batches: int, batch_size: int) -> Lease | None:
        """What is not consumed."""
        cut = self.cut(num_batches, batch_size)
        return Lease(cut, self.stop) if cut < self.stop else None


@dataclass
class _Life:
    """What one incarnation of a worker was given."""

    issued: list[_Issued] = field(default_factory=list)
    num_batches: int = 0
    ended: bool = False
    num_consumed: int = 0
    """The first so many of `issued` are known to be wholly consumed."""


@dataclass(frozen=True)
class Position:
    """How far a run is in its data: everything before `frontier` but `open` is consumed."""

    frontier: int
    open: tuple[Lease, ...]

    @property
    def num_consumed(self) -> int:
        """Samples consumed, of all epochs together."""
        return self.frontier - sum(lease.num_samples for lease in self.open)

    def to_json(self) -> dict[str, Any]:
        return {"frontier": self.frontier, "open": [[o.start, o.stop] for o in self.open]}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Self:
        return cls(values["frontier"], tuple(Lease(*bounds) for bounds in values["open"]))


START = Position(0, ())

LeaseEnd = Callable[[int], int]
"""From the position where a lease starts to where it ends at the latest, further on."""


@dataclass(frozen=True)
class BatchLeases:
    """Leases of so many batches each, wherever shards begin and end."""

    batch_size: int
    lease_batches: int

    def __call__(self, start: int) -> int:
        return start + self.batch_size * self.lease_batches


@dataclass(frozen=True)
class WindowLeases:
    """Leases up to the end of a shuffle window, so that one worker reads a window's shards."""

    order: EpochOrder

    def __call__(self, start: int) -> int:
        return self.order.window_end(start)


class Ledger:
    """Hands out positions 0 to `total_samples`, and takes back what dead workers leave."""

    def __init__(
        self,
        total_samples: int,
        batch_size: int,
        lease_end: LeaseEnd,
        start: Position = START,
        batches_per_push: int | None = 1,
    ) -> None:
        """`batches_per_push`: local steps behind each push but a life's last; None for all."""
        self.total_samples = total_samples
        self._batches_per_push = batches_per_push
        self._batch_size = batch_size
        self._lease_end = lease_end
        self._frontier = start.frontier
        self._returned = deque(start.open)
        self._lives: dict[tuple[int, int], _Life] = {}
        self._closed = False

    def state(self) -> dict[str, Any]:
        """All that calls have changed, which shares nothing with this ledger."""
        return copy.deepcopy({name: getattr(self, name) for name in _KEPT})

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on from a state of a ledger that was made as this one was."""
        for name in _KEPT:
            setattr(self, name, copy.deepcopy(state[name]))

    def close(self) -> None:
        """Hand out nothing more; what is leased by now ends the run."""
        self._closed = True

    def lease(self, worker: int, incarnation: int) -> Lease | None:
        """The next range for this life of a worker; None if there is nothing left to hand out.

        A worker that gets None is done; what another may yet leave behind goes to that one's
        successor.
        """
        lease = self._next()
        if lease is None:
            return None
        life = self._lives.setdefault((worker, incarnation), _Life())
        assert not life.ended, "a lease for a life that has ended"
        life.issued.append(_Issued(lease, life.num_batches, lease.stop))
        life.num_batches += lease.num_batches(self._batch_size)
        return lease

    def _next(self) -> Lease | None:
        if self._closed:
            return None
        if self._returned:
            left = self._returned.popleft()
            cut = min(left.stop, self._lease_end(left.start))
            if cut < left.stop:
                self._returned.appendleft(Lease(cut, left.stop))
            return Lease(left.start, cut)
        start = self._frontier
        if start >= self.total_samples:  # beyond it after a resume with a smaller budget
            return None
        self._frontier = min(self.total_samples, self._lease_end(start))
        return Lease(start, self._frontier)

    def end(self, worker: int, incarnation: int, last_sequence: int) -> int:
        """A life is over, its newest settled push being `last_sequence` (-1 for none).

        What it left is handed out again; returns how many samples that is.
        """
        life = self._lives.setdefault((worker, incarnation), _Life())
        assert not life.ended, "a life ends once"
        life.ended = True
        num_batches = self._batches_in(last_sequence)
        cuts = [(each, each.cut(num_batches, self._batch_size)) for each in life.issued]
        left = [Lease(cut, each.stop) for each, cut in cuts if cut < each.stop]
        self._returned.extend(left)
        # From here on, this life is held to what it consumed, whatever else it was given.
        life.issued = [replace(each, stop=cut) for each, cut in cuts if cut > each.lease.start]
        return sum(lease.num_samples for lease in left)

    def num_samples_between(
        self, worker: int, incarnation: int, sequence: int, later_sequence: int
    ) -> int:
        """Samples of a life's pushes after `sequence`, up to `later_sequence`.

        Of one that has ended, without those that it left: another life's push has them.
        """
        life = self._lives.get((worker, incarnation), _Life())
        size, done = self._batch_size, self._batches_in(sequence)
        later = self._batches_in(later_sequence)
        return sum(each.cut(later, size) - each.cut(done, size) for each in life.issued)

    def num_samples_twice(
        self,
        everywhere: Mapping[int, Mapping[int, int]],
        somewhere: Mapping[int, Mapping[int, int]],
    ) -> int:
        """Samples of pushes that some shards' parts of a state have, and that are done again.

        everywhere, somewhere: the newest sequences that count as consumed, and those of any part.
        """
        return sum(
            self.num_samples_between(worker, life, everywhere.get(worker, {}).get(life, -1), last)
            for worker, lives in somewhere.items()
            for life, last in lives.items()
        )

    def _batches_in(self, last_sequence: int) -> int:
        """Batches in a life's pushes up to `last_sequence`, if it was given so many."""
        if self._batches_per_push is None:
            return sys.maxsize if last_sequence >= 0 else 0
        return (last_sequence + 1) * self._batches_per_push

    def last_sequence(self, worker: int, incarnation: int) -> int:
        """Of the push that ends a life which did all that it was given; -1 for none."""
        num_batches = self.num_batches(worker, incarnation)
        return -(-num_batches // (self._batches_per_push or max(1, num_batches))) - 1

    @property
    def available(self) -> bool:
        """Whether `lease` has something to hand out."""
        left = bool(self._returned) or self._frontier < self.total_samples
        return left and not self._closed

    @property
    def finished(self) -> bool:
        """Everything is handed out and no life that has any of it goes on."""
        return not self.available and all(life.ended for life in self._lives.values())

    def num_batches(self, worker: int, incarnation: int) -> int:
        """Batches leased to a life so far."""
        life = self._lives.get((worker, incarnation))
        return life.num_batches if life else 0

    def num_consumed(self, last_sequences: Mapping[int, Mapping[int, int]]) -> int:
        """Samples consumed, given the newest sequences that are known.

        These must not fall from call to call: what was consumed once isn't looked at again.
        """
        num_open = sum(lease.num_samples for lease in self._returned)
        size = self._batch_size
        for (worker, incarnation), life in self._lives.items():
            done = self._batches_in(last_sequences.get(worker, {}).get(incarnation, -1))
            rests = [each.stop - each.cut(done, size) for each in life.issued[life.num_consumed :]]
            num_open += sum(rests)
            life.num_consumed += next((i for i, rest in enumerate(rests) if rest), len(rests))
        return self._frontier - num_open

    def position(
        self, last_sequences: Mapping[int, Mapping[int, int]], *, forget: bool = True
    ) -> Position:
        """How far the data were at a state, given the newest sequences that are in it.

        With `forget`, leases wholly consumed in that state are dropped, and ended lives that had
        no other, which bounds memory: positions must then be asked for in the order in which the
        states were cut.
        """
        unconsumed = list(self._returned)
        for (worker, incarnation), life in self._lives.items():
            last = last_sequences.get(worker, {}).get(incarnation, -1)
            done = self._batches_in(last)
            rests = [(each, each.rest(done, self._batch_size)) for each in life.issued]
            unconsumed += [rest for _, rest in rests if rest]
            if forget:
                life.issued = [each for each, rest in rests if rest]
                life.num_consumed = 0
        if forget:
            lives = self._lives.items()
            self._lives = {key: life for key, life in lives if life.issued or not life.ended}
        return Position(self._frontier, tuple(_merged(unconsumed)))


_KEPT = ("_frontier", "_returned", "_lives", "_closed")


def _merged(leases: Sequence[Lease]) -> list[Lease]:
    """Sorted, with neighbours joined."""
    merged: list[Lease] = []
    for lease in sorted(leases, key=lambda each: each.start):
        if merged and merged[-1].stop == lease.start:
            merged[-1] = Lease(merged[-1].start, lease.stop)
        else:
            merged.append(lease)
    return merged
