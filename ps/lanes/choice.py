"""Which lane a caller uses to a shard, and when it gives one up for the next."""

import logging
import threading
from collections.abc import Callable, Sequence
from typing import TypeVar

from model.errors import InputError
from ps.lanes.lane import (
    Lane,
    LaneError,
    LaneName,
    LaneUnavailable,
    NoSharedMemory,
    NotAdmitted,
)

T = TypeVar("T")

MAX_FAILURES = 2
"""A lane that fails so often in a row, while the shard answers, is given up."""

MAX_REFUSALS = 6
"""A lane that has no other behind it may so often not let one in: a server that is overworked is
too late as well, and no reason to end a run."""

_log = logging.getLogger(__name__)


class LaneChoice:
    """Lanes to one shard in order of preference; the first one that works is used.

    A lane is at fault if it fails again and again while the shard goes on issuing tickets: a dead
    shard shows as grpc.RpcError, which is the caller's to handle. Whatever was under way is done
    again in the next lane; that is safe, as all calls are safe to repeat.
    """

    def __init__(self, address: str, lanes: Sequence[Lane]) -> None:
        self._address = address
        self._lanes = list(lanes)
        self._lock = threading.Lock()
        self._failures = 0
        self._proven = False

    @property
    def name(self) -> LaneName:
        """The lane in use."""
        return self._lanes[0].name

    def use(self, call: Callable[[Lane], T]) -> T:
        """`call(lane)` with the lane in use.

        Raises what `call` raises: LaneError, after which the same call is safe to repeat. Raises
        InputError if there is but one lane, which never worked and can't be opened, or for which
        this process lacks the memory.
        """
        while True:
            lane = self._lanes[0]
            try:
                value = call(lane)
            except LaneError as error:
                if not self._gave_up(lane, error):
                    raise
            else:
                self._failures, self._proven = 0, True
                return value

    def close(self) -> None:
        """Close all lanes."""
        for lane in tuple(self._lanes):
            lane.close()

    def _gave_up(self, lane: Lane, error: LaneError) -> bool:
        """Whether another lane is now in use."""
        with self._lock:
            if lane is not self._lanes[0]:
                return True
            self._failures += 1
            if self._failures < MAX_FAILURES and not isinstance(error, LaneUnavailable):
                return False
            if len(self._lanes) == 1:
                self._check_proven(error)
                return False
            self._lanes.pop(0)
            self._failures, proven, self._proven = 0, self._proven, False
        expected = isinstance(error, LaneUnavailable) and lane.name == "shm" and not proven
        message = "shard at %s: no %s lane (%s); going on with %s"
        level = logging.INFO if expected else logging.WARNING
        _log.log(level, message, self._address, lane.name, error, self.name)
        lane.close()
        return True

    def _check_proven(self, error: LaneError) -> None:
        refused = isinstance(error, NotAdmitted) and self._failures >= MAX_REFUSALS
        never_worked = not self._proven and (refused or isinstance(error, LaneUnavailable))
        if never_worked or isinstance(error, NoSharedMemory):
            raise InputError(
                f'lanes.choice = "{self.name}": this lane does not work to the shard at'
                f' {self._address} ({error}), so nothing could be pulled or pushed; set "auto"'
            ) from error
