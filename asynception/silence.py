"""For how long workers have been silent by themselves, and not since a server says nothing."""

import time
from collections.abc import Callable, Mapping

SERVING_S = 4.0
"""A server that answers has been heard of within so long, however often it is asked."""


class Silence:
    """A worker that waits for a server's answer is not heard of meanwhile. Its silence counts from
    when all servers answered again, so that it isn't given up beside the server."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._served_since_s = clock()

    def counted(self, silent_s: Mapping[int, float], unserved_s: float) -> dict[int, float]:
        """By worker, the seconds of `silent_s` that are its own.

        unserved_s: since all shards were last known to answer pushes. To be called often.
        """
        now_s = self._clock()
        if unserved_s > SERVING_S:
            self._served_since_s = now_s
        served_s = now_s - self._served_since_s
        return {
            worker: min(max(0.0, seconds - unserved_s), served_s)
            for worker, seconds in silent_s.items()
        }
