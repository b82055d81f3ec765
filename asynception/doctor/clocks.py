"""Clocks of the nodes against that of this machine."""

import time
from collections.abc import Callable, Iterable
from typing import NamedTuple

from asynception.doctor.finding import Verdict, fail, ok, warn

SKEWED_S, WRONG_S = 1.0, 300.0
"""Log lines of several nodes get out of order; signed requests to object stores are refused."""

_READINGS = 10


class Reading(NamedTuple):
    """A clock that was asked, by this machine's clock."""

    asked_s: float
    said_s: float
    heard_s: float

    @property
    def ahead_s(self) -> float:
        """How far the other clock is ahead, if both ways took equally long."""
        return self.said_s - (self.asked_s + self.heard_s) / 2

    @property
    def within_s(self) -> float:
        """By how much that may be wrong, whatever each way took."""
        return (self.heard_s - self.asked_s) / 2


def measure_clock(ask: Callable[[], float]) -> Verdict:
    """ask: what another clock says now, in seconds since the epoch."""
    return judge_clock(_read(ask) for _ in range(_READINGS))


def _read(ask: Callable[[], float]) -> Reading:
    asked_s = time.time()
    return Reading(asked_s, ask(), time.time())


def judge_clock(readings: Iterable[Reading]) -> Verdict:
    """The quickest answer tells most. What may come of its way is not held against a clock."""
    best = min(readings, key=lambda reading: reading.within_s)
    found = f"{1e3 * best.ahead_s:+.1f} ms (within {1e3 * best.within_s:.1f}) from the clock here"
    surely_s = abs(best.ahead_s) - best.within_s
    mend = "let one time service (chrony, systemd-timesyncd) run on every node"
    if surely_s > WRONG_S:
        return fail(found, mend)
    if surely_s > SKEWED_S:
        return warn(found, mend)
    return ok(found)
