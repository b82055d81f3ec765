"""For how long workers have been silent by themselves, and not since a server says nothing."""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

SERVING_S = 4.0
"""A server that has time has been heard of within so long, however often it is asked."""

EXCUSE = 3.0
"""So many times as long as a server said nothing may its callers take until they are heard of."""

_SAME_S = 0.5
"""Two outages that began so near to one another are one."""


@dataclass
class _Outage:
    """A time in which not all servers answered."""

    began_s: float
    known_s: float
    """When it was last seen to go on."""


class Silence:
    """A worker that waits for a server's answer is not heard of meanwhile, and isn't to be given
    up beside the server: its silence counts from when all answered again. No more is excused than
    the longest outage in it explains, as a server that is always slow would else hide for ever a
    worker that hangs."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._outages: list[_Outage] = []

    def counted(self, silent_s: Mapping[int, float], unserved_s: float) -> dict[int, float]:
        """By worker, the seconds of `silent_s` that are its own.

        unserved_s: since all shards were last known to answer pushes. To be called often.
        """
        now_s = self._clock()
        self._note(now_s, unserved_s)
        longest_s = max(silent_s.values(), default=0.0)
        self._outages = [each for each in self._outages if each.known_s >= now_s - longest_s]
        return {
            worker: seconds - max(min(seconds, unserved_s), self._excused_s(now_s - seconds))
            for worker, seconds in silent_s.items()
        }

    def _note(self, now_s: float, unserved_s: float) -> None:
        if unserved_s <= SERVING_S:
            return
        began_s = now_s - unserved_s
        if not self._outages or abs(self._outages[-1].began_s - began_s) > _SAME_S:
            self._outages.append(_Outage(began_s, now_s))
        self._outages[-1].known_s = now_s

    def _excused_s(self, since_s: float) -> float:
        """Of a silence that began then."""
        over = [outage for outage in self._outages if outage.known_s >= since_s]
        if not over:
            return 0.0
        longest_s = max(outage.known_s - outage.began_s for outage in over)
        return min(over[-1].known_s - since_s, EXCUSE * longest_s)
