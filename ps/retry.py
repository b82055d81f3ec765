"""Calls that are repeated until they succeed, or a deadline has passed."""

import logging
import time
from collections.abc import Callable
from typing import TypeVar

import grpc
from google.protobuf.message import DecodeError
from pydantic import PositiveFloat

from model.settings import Settings
from ps.lanes.lane import LaneError, Refused
from ps.lanes.stream import StreamError

T = TypeVar("T")

_RETRIED = {
    grpc.StatusCode.UNAVAILABLE,
    grpc.StatusCode.DEADLINE_EXCEEDED,
    grpc.StatusCode.CANCELLED,
    grpc.StatusCode.RESOURCE_EXHAUSTED,
    grpc.StatusCode.INTERNAL,
}
"""Statuses that say nothing of what became of the call; all calls are safe to repeat."""

MAX_PAUSE_S = 5.0

_log = logging.getLogger(__name__)


class ShardUnavailable(ConnectionError):
    """A shard gave no answer within the deadline, retries included."""


class RetryPolicy(Settings):
    """How long a call to a shard is tried."""

    attempt_s: PositiveFloat = 60.0
    """Deadline of one attempt, in seconds; must cover the transfer of a shard's bytes."""
    deadline_s: PositiveFloat = 180.0
    """No attempt starts later than this after the first one."""
    backoff_s: PositiveFloat = 0.1
    """Pause after the first failure; doubles with each one, up to 5 s."""


class Retrying:
    """Repeats calls to one shard as its policy says."""

    def __init__(
        self,
        address: str,
        policy: RetryPolicy,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self.address, self.policy = address, policy
        self._clock, self._sleep = clock, sleep
        self.is_lost: Callable[[], bool] = lambda: False
        """Whether there will be no answer any more, as far as the caller knows by other ways."""

    def __call__(self, call: Callable[[float], T], extra_s: float = 0.0) -> T:
        """`call(timeout_s)` until it succeeds.

        Raises ShardUnavailable, or Refused where no retry can mend it.
        """
        start_s, pause_s = self._clock(), self.policy.backoff_s
        while True:
            try:
                return call(self.policy.attempt_s + extra_s)
            except (grpc.RpcError, StreamError, DecodeError, LaneError) as error:
                code = code_of(error)
                if code is not None and code not in _RETRIED:
                    raise _refused(error, code) from error
                if self.is_lost():
                    raise ShardUnavailable(f"shard at {self.address} is lost") from error
                if self._clock() + pause_s - start_s > self.policy.deadline_s:
                    deadline_s = self.policy.deadline_s
                    raise ShardUnavailable(
                        f"shard at {self.address} gave no answer in {deadline_s:.0f} s"
                    ) from error
                _log.info("shard at %s: %s; trying again", self.address, code or error)
            self._sleep(pause_s)
            pause_s = min(2 * pause_s, MAX_PAUSE_S)


def code_of(error: Exception) -> grpc.StatusCode | None:
    """The status that a call ended with, whatever its lane; None if it got none."""
    return error.code() if isinstance(error, grpc.Call | Refused) else None


def _refused(error: Exception, code: grpc.StatusCode) -> Refused:
    details = error.details() if isinstance(error, grpc.Call | Refused) else None
    return Refused(code, details or str(error))
