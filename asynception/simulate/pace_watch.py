"""Bounded staleness, counted beside the shard: nobody begins too far ahead of the slowest."""

from collections.abc import Collection

from asynception.simulate.world import Violation


class PaceWatch:
    """Pushes settled of each worker at work, at one shard.

    A new life counts from its first push on, or when it is announced, beginning with the slowest.
    """

    def __init__(self, max_lead: int | None, num_workers: int) -> None:
        self._max_lead = max_lead
        self._clocks = dict.fromkeys(range(num_workers), 0)
        self._at_work: Collection[int] = range(num_workers)
        self._incarnations: dict[int, int] = {}
        self._floor = 0

    def fence(self, worker: int, incarnation: int) -> None:
        """Lives before this one are over."""
        if incarnation > self._incarnations.get(worker, 0):
            self._incarnations[worker] = incarnation
            self._clocks.pop(worker, None)
            self._settle()

    def enter(self, worker: int, incarnation: int, clock: int | None) -> None:
        """A life is announced, to begin at a clock."""
        if incarnation < self._incarnations.get(worker, 0):
            return
        self.fence(worker, incarnation)
        self._at_work = {*self._at_work, worker}
        if clock is not None:
            self._clocks[worker] = max(clock, self._floor)
        self._clocks.setdefault(worker, self._floor)
        self._settle()

    def expect(self, workers: Collection[int]) -> None:
        """No others are at work."""
        self._at_work = workers
        self._clocks = {w: clock for w, clock in self._clocks.items() if w in workers}
        self._settle()

    def settle(self, worker: int, incarnation: int) -> None:
        """A push got its first receipt."""
        self.fence(worker, incarnation)
        if worker in self._at_work:
            self._clocks[worker] = self._clocks.get(worker, self._floor) + 1
            self._settle()

    def begin(self, worker: int) -> None:
        """A worker was let go on."""
        if self._max_lead is None or worker not in self._at_work:
            return
        clock = self._clocks.get(worker, self._floor)
        if clock - self._floor > self._max_lead:
            raise Violation(f"worker {worker} begins {clock - self._floor} ahead: {self._clocks}")

    def _settle(self) -> None:
        self._floor = min(self._clocks.values(), default=self._floor)
