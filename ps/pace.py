"""Who may begin another clock, where workers may not run far ahead (SSP, Ho et al. 2013).

A worker's clock counts its pushes that were settled, applied or not. All shards count the same
pushes, so that between two calls of a worker its clock is the same at all of them, as long as all
let a new life enter at the same one.
"""

from collections.abc import Collection, Mapping


class Pace:
    """Clocks of the workers at work.

    The slowest of them, who may always begin, is at `floor`. Who has left, dead or done, holds
    nobody up.
    """

    def __init__(self, workers: Collection[int], slack: int) -> None:
        """All `workers` begin at 0. slack: how far one may be ahead of the slowest."""
        self._clocks = dict.fromkeys(workers, 0)
        self._slack = slack
        self.floor = 0

    def clocks(self) -> dict[int, int]:
        """A copy of all workers' clocks."""
        return dict(self._clocks)

    def restore(self, clocks: Mapping[int, int], floor: int) -> None:
        """Be as one with these clocks and this floor."""
        self._clocks, self.floor = dict(clocks), floor

    def clock(self, worker: int) -> int | None:
        """A worker's clock; None if it is not at work."""
        return self._clocks.get(worker)

    def may_begin(self, worker: int) -> bool:
        """Whether the worker may pull for another clock; one that is not at work may."""
        return self._clocks.get(worker, self.floor) - self.floor <= self._slack

    def enter(self, worker: int, clock: int | None = None) -> int:
        """Set a worker that begins to `clock`, or, if it is not at work, to the slowest's."""
        if clock is not None:
            self._clocks[worker] = max(clock, self.floor)
        entered = self._clocks.setdefault(worker, self.floor)
        self._settle()
        return entered

    def leave(self, worker: int) -> None:
        """Wait for this worker no longer."""
        self._clocks.pop(worker, None)
        self._settle()

    def keep_only(self, workers: Collection[int]) -> None:
        """Wait for no others than these."""
        self._clocks = {w: clock for w, clock in self._clocks.items() if w in workers}
        self._settle()

    def tick(self, worker: int) -> None:
        """A push of the worker was settled. If it was not at work, it is from now on."""
        self._clocks[worker] = self._clocks.get(worker, self.floor) + 1
        self._settle()

    def _settle(self) -> None:
        self.floor = min(self._clocks.values(), default=self.floor)
