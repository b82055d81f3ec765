"""How long a run may take: `training.max_s`."""

from collections.abc import Callable

from asynception.origin import Origin
from asynception.totals import Progress


class Budget:
    """Tells when a run has had its time: that of earlier sessions, and this one's so far.

    This one's begins with its first lease, so that what starting takes doesn't count.
    """

    def __init__(self, max_s: float | None, origin: Origin, clock: Callable[[], float]) -> None:
        self._max_s, self._origin, self._clock = max_s, origin, clock
        self._began_s: float | None = None

    def is_spent(self, progress: Progress) -> bool:
        """To be asked often. Never true without a limit."""
        if self._began_s is None and progress.totals.leases > self._origin.totals.leases:
            self._began_s = self._clock()
        if self._max_s is None or self._began_s is None:
            return False
        return self._origin.wall_s + (self._clock() - self._began_s) >= self._max_s
