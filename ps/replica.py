"""A primary's side of replication: what it has its standby carry out, and until when.

An operation is carried out by the standby first. So whatever the primary shows or answers, its
standby has it; an operation whose primary dies meanwhile is at the standby at most, and its caller,
who has no answer, makes it again.
"""

import threading
from collections import deque
from collections.abc import Callable
from dataclasses import replace
from enum import Enum
from typing import Protocol, TypeVar

from ps.image import Image
from ps.operations import Operation
from ps.push import Order, Push
from ps.standby import Echo

T = TypeVar("T")

MAX_BACKLOG = 8
"""Operations that are kept for a standby while its image travels; the next ones wait."""

ENDLESS_S = 1e6
"""For waits that end by what they wait for alone."""


class LinkDown(ConnectionError):
    """The standby gave no answer; the same call may be made again."""


class LinkRefused(RuntimeError):
    """The standby says that it can't be in step; no repetition mends it."""


class Link(Protocol):
    """The way to one standby, a call at a time; each may be repeated until the next.

    All calls raise LinkDown, LinkRefused or Superseded.
    """

    def seed(self, order: Order, image: Image) -> None:
        """See `Standby.seed`."""

    def follow(self, order: Order, operation: Operation) -> Echo:
        """See `Standby.follow`."""

    def complete(self, order: Order) -> None:
        """See `Standby.complete`."""

    def close(self) -> None:
        """End calls under way, which then raise LinkDown."""


class ReplicaState(Enum):
    """How a standby is doing."""

    SEEDING = "seeding"
    """Operations are kept for it, and answered without it."""
    IN_STEP = "in_step"
    """Nothing is answered that it hasn't carried out."""
    FAILED = "failed"
    """It differs from its primary, or refused to follow: an error that nothing mends."""
    GIVEN_UP = "given_up"
    """The primary was told to go on without it."""


class Replica:
    """One standby of a primary.

    One operation at a time is given to `take`, in the order of the log. changed: notified when
    something changes that others wait for; the lock that it is made of guards the backlog.
    """

    def __init__(
        self,
        epoch: int,
        link: Link,
        changed: threading.Condition,
        clock: Callable[[], float],
    ) -> None:
        self.epoch, self._link = epoch, link
        self._changed, self._clock = changed, clock
        self._backlog: deque[tuple[int, Operation]] = deque()
        self._began_s: float | None = None
        self.state = ReplicaState.SEEDING
        self.error = ""

    @property
    def is_active(self) -> bool:
        """Whether it is still to follow."""
        return self.state in (ReplicaState.SEEDING, ReplicaState.IN_STEP)

    @property
    def num_behind(self) -> int:
        """Operations that it is known to lack."""
        return len(self._backlog) + (self._began_s is not None and not self._backlog)

    @property
    def waiting_s(self) -> float:
        """How long it has had the operation, or the image, that it has yet to answer."""
        began_s = self._began_s
        return 0.0 if began_s is None else self._clock() - began_s

    def take(self, index: int, operation: Operation) -> Echo | None:
        """Have the standby carry it out, or keep it for one that is being seeded.

        Returns its answer; None if it hasn't answered: it is being seeded, has failed, or was given
        up. Raises Superseded.
        """
        if self.state is ReplicaState.SEEDING:
            with self._changed:
                self._changed.wait_for(self._has_room, ENDLESS_S)
                if self.state is ReplicaState.SEEDING:
                    self._backlog.append((index, _own(operation)))
            return None
        return self._persist(lambda: self._link.follow(Order(self.epoch, index), operation))

    def _has_room(self) -> bool:
        return self.state is not ReplicaState.SEEDING or len(self._backlog) < MAX_BACKLOG

    def seed(self, index: int, image: Image) -> None:
        """Send an image, which operations follow from `index` on. Raises Superseded."""
        self._persist(lambda: self._link.seed(Order(self.epoch, index), image))

    def drain(self) -> None:
        """Have the standby carry out what was kept for it, until nothing is. Raises Superseded."""
        while self._backlog and self.is_active:
            index, operation = self._backlog[0]
            order = Order(self.epoch, index)
            self._persist(lambda o=order, op=operation: self._link.follow(o, op))  # type: ignore[misc]
            with self._changed:
                if self._backlog:  # it may have been given up meanwhile
                    self._backlog.popleft()
                self._changed.notify_all()

    def complete(self, index: int) -> None:
        """Nothing is kept, and `index` comes next: be in step from now on. Raises Superseded."""
        self._persist(lambda: self._link.complete(Order(self.epoch, index)))
        with self._changed:
            if self.is_active:
                self.state = ReplicaState.IN_STEP
            self._changed.notify_all()

    def fail(self, error: str) -> None:
        """It can't go on: see `ReplicaState.FAILED`."""
        self._end(ReplicaState.FAILED, error)

    def give_up(self) -> None:
        """Go on without it: ends what is under way. The lock is not held."""
        self._end(ReplicaState.GIVEN_UP)

    def _end(self, state: ReplicaState, error: str = "") -> None:
        with self._changed:
            if self.is_active:
                self.state, self.error = state, error
            self._backlog.clear()
            self._changed.notify_all()
        self._link.close()

    def _persist(self, call: Callable[[], T]) -> T | None:
        self._began_s = self._clock()
        try:
            while self.is_active:
                try:
                    return call()
                except LinkDown:
                    continue
                except LinkRefused as error:
                    self.fail(str(error))
            return None
        finally:
            self._began_s = None


def _own(operation: Operation) -> Operation:
    """With vectors of its own: those of a push are used again."""
    if not isinstance(operation, Push):
        return operation
    gradient, delta = operation.gradient.clone(), operation.statistics_delta.clone()
    return replace(operation, gradient=gradient, statistics_delta=delta)
