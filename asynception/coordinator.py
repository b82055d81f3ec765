"""Who is alive, what data they hold, and what they report. It never sees a tensor."""

import copy
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from asynception.ledger import Ledger, Position
from asynception.totals import Progress, Totals
from ps.receipts import Settled
from worker.data.lease import Lease
from worker.step_report import StepReport


class Coordinator:
    """The control side of a run; calls come one at a time, and may come again.

    A worker is a place in the run that successive processes fill; each of those is a life, with
    an incarnation number that only rises. What an ended life still asks for is refused.
    """

    def __init__(
        self, ledger: Ledger, totals: Totals, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._ledger, self._totals, self._clock = ledger, totals, clock
        self._incarnations: dict[int, int] = {}
        self._alive: dict[int, float] = {}
        self._sequences: dict[int, dict[int, int]] = {}
        self._num_published = 0
        self._last_leases: dict[int, tuple[int, int, Lease]] = {}
        self._left: dict[int, tuple[int, int]] = {}
        self.num_deaths = 0
        """How often a coordinator of this run died and another took its place."""

    def enlist(self, worker: int, incarnation: int | None = None) -> int:
        """Begin a new life of a worker; returns its incarnation.

        incarnation: the one that the caller expects, by which a repeated call is known.
        """
        if incarnation is not None and self._is_alive(worker, incarnation):
            return incarnation
        assert worker not in self._alive, "end a worker's life before the next begins"
        incarnation = self._incarnations.get(worker, -1) + 1
        self._incarnations[worker] = incarnation
        self._alive[worker] = self._clock()
        return incarnation

    def _is_alive(self, worker: int, incarnation: int) -> bool:
        return worker in self._alive and self._incarnations[worker] == incarnation

    def lease(self, worker: int, incarnation: int, number: int | None = None) -> Lease | None:
        """The next range of positions for a worker; None if there is none for it.

        number: how many leases this life has been given, by which a repeated call is known.
        """
        if not self._is_alive(worker, incarnation):
            return None
        self._alive[worker] = self._clock()
        last = self._last_leases.get(worker)
        if last is not None and number is not None and last[:2] == (incarnation, number):
            return last[2]
        lease = self._ledger.lease(worker, incarnation)
        if lease is not None and number is not None:
            self._last_leases[worker] = incarnation, number, lease
        self._totals.leases += lease is not None
        return lease

    def report(self, worker: int, incarnation: int, steps: Sequence[StepReport]) -> int | None:
        """Count batches whose pushes are settled; without any, the worker is heard of.

        Steps that were counted before are not counted again. Returns the sequence of the first one
        that is yet to be reported; None to a life that has ended, whose steps nobody wants.
        """
        if not self._is_alive(worker, incarnation):
            return None
        self._alive[worker] = self._clock()
        last = self._sequences.get(worker, {}).get(incarnation, -1)
        for step in steps:
            if step.sequence > last:
                last = step.sequence
                self._totals.add(step, worker)
                self._sequences.setdefault(worker, {})[incarnation] = last
        return last + 1

    def published(self, num_samples: int) -> None:
        """The servers now hold a state of so many samples, which workers sent there."""
        self._num_published = num_samples

    def end(
        self, worker: int, settled: Settled | None = None, incarnation: int | None = None
    ) -> int:
        """End the present life of a worker; what it left is handed out again.

        `settled` says how far the pushes of a life that died had come; without it, its work is
        done to the last batch. incarnation: the life, by which a repeated call is known. Returns
        how many samples it left.
        """
        last = self._left.get(worker)
        if last is not None and last[0] == incarnation:
            return last[1]
        incarnation = self._incarnations[worker]
        del self._alive[worker]
        if settled is None:
            last_sequence = self._ledger.last_sequence(worker, incarnation)
            settled = Settled(last_sequence, last_sequence)
        # A shard that took the last push takes its samples again from whoever gets them next.
        self._totals.samples_twice += self._ledger.num_samples_between(
            worker, incarnation, settled.everywhere, settled.somewhere
        )
        self._sequences.setdefault(worker, {})[incarnation] = settled.everywhere
        left = self._ledger.end(worker, incarnation, settled.everywhere)
        self._totals.samples_returned += left
        self._left[worker] = incarnation, left
        return left

    def has_work(self) -> bool:
        """Whether a worker that started now would get a lease."""
        return self._ledger.available

    def close(self) -> None:
        """The run's time is over: no more leases, whatever is left."""
        self._ledger.close()

    def progress(self) -> Progress:
        """How far the run is."""
        now_s = self._clock()
        return Progress(
            self._ledger.num_consumed(self._sequences),
            self._totals.copy(),
            {worker: now_s - seen_s for worker, seen_s in self._alive.items()},
            self._ledger.finished,
            self._num_published,
            self.num_deaths,
        )

    def position(
        self, last_sequences: Mapping[int, Mapping[int, int]], forget: bool = True
    ) -> Position:
        """How far the data were at a state; see `Ledger.position`."""
        return self._ledger.position(last_sequences, forget=forget)

    def num_samples_twice(
        self,
        everywhere: Mapping[int, Mapping[int, int]],
        somewhere: Mapping[int, Mapping[int, int]],
    ) -> int:
        """What goes on from a state has so many samples twice; see `Ledger.num_samples_twice`.

        What a worker that died left at one shard alone was counted when its life ended.
        """
        return self._ledger.num_samples_twice(everywhere, somewhere)

    def at_cut(
        self,
        everywhere: Mapping[int, Mapping[int, int]],
        somewhere: Mapping[int, Mapping[int, int]],
    ) -> tuple[Position, Progress]:
        """What a checkpoint says: how far the data were, and what was counted.

        With what going on from there would do twice. In one call, as a life that ended between two
        would be counted by both.
        """
        progress = self.progress()
        progress.totals.samples_twice += self.num_samples_twice(everywhere, somewhere)
        return self.position(everywhere), progress

    def state(self) -> dict[str, Any]:
        """All that calls have changed, which shares nothing with this coordinator."""
        kept = {name: getattr(self, name) for name in _KEPT}
        return copy.deepcopy(kept | {"alive": list(self._alive), "ledger": self._ledger.state()})

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on from a state; workers that were alive then are heard of now."""
        for name in _KEPT:
            setattr(self, name, copy.deepcopy(state[name]))
        self._alive = dict.fromkeys(state["alive"], self._clock())
        self._ledger.restore(state["ledger"])


_KEPT = (
    "_totals",
    "_incarnations",
    "_sequences",
    "_num_published",
    "_last_leases",
    "_left",
    "num_deaths",
)
